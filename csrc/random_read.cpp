// The fastest way found to read rows at random places and do nothing with them: what the experts' kernels are
// measured against.

#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace million_experts {
namespace {

void read_rows(RandomRead& a) {
  constexpr int64_t ahead = 16;
  std::atomic<uint64_t> checksum{0};
  const char* table = static_cast<const char*>(a.table);
  parallel(a.threads, [&](int thread, int team) {
    const int64_t first = a.count * thread / team, last = a.count * (thread + 1) / team;
    Vec<uint64_t> sum[4] = {};
    for (int64_t i = first; i < last && i < first + ahead; ++i)
      prefetch_row(table + a.rows[i] * a.row_bytes, a.row_bytes);
    for (int64_t i = first; i < last; ++i) {
      if (i + ahead < last) prefetch_row(table + a.rows[i + ahead] * a.row_bytes, a.row_bytes);
      const uint64_t* row = reinterpret_cast<const uint64_t*>(table + a.rows[i] * a.row_bytes);
      const int64_t words = a.row_bytes / 8;
      int64_t at = 0;
      for (; at + 4 * lanes<uint64_t> <= words; at += 4 * lanes<uint64_t>)
        for (int v = 0; v < 4; ++v) sum[v] += load(row + at + v * lanes<uint64_t>);
      for (uint64_t word; at < words; ++at) {
        std::memcpy(&word, row + at, sizeof word);  // rows need not be aligned
        sum[0][0] += word;
      }
    }
    uint64_t total = 0;
    for (const auto& v : sum)
      for (int i = 0; i < lanes<uint64_t>; ++i) total += v[i];
    checksum.fetch_add(total, std::memory_order_relaxed);
  });
  a.checksum = checksum;
}

}  // namespace

namespace ME_ISA {
void random_read(RandomRead& a) { read_rows(a); }
}  // namespace ME_ISA

}  // namespace million_experts
