// Rows at random places, read and added up: what the experts' kernels are measured against. As there, a group of rows
// is fetched while the group before it is read.

#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace million_experts {
namespace {

constexpr int64_t group = 16, share = 128 * group;  // rows fetched together, and taken by a thread at a time

// Adds the words of a row to four sums.
inline void add_row(const char* row, int64_t bytes, Vec<uint64_t>* sums) {
  constexpr int W = lanes<uint64_t>;
  const uint64_t* words = reinterpret_cast<const uint64_t*>(row);
  const int64_t count = bytes / 8;
  int64_t at = 0;
  for (; at + 4 * W <= count; at += 4 * W)
    for (int v = 0; v < 4; ++v) sums[v] += load(words + at + v * W);
  for (uint64_t word; at < count; ++at) {
    std::memcpy(&word, words + at, sizeof word);  // rows need not be aligned
    sums[0][0] += word;
  }
}

void read_rows(RandomRead& a) {
  std::atomic<uint64_t> checksum{0};
  const char* table = static_cast<const char*>(a.table);
  const auto row = [&](int64_t i) { return table + a.rows[i] * a.row_bytes; };
  parallel_items(a.threads, (a.count + share - 1) / share, [&](int64_t item) {
    const int64_t first = item * share, last = first + share < a.count ? first + share : a.count;
    Vec<uint64_t> sums[4] = {};
    for (int64_t i = first; i < last && i < first + group; ++i) prefetch_row(row(i), a.row_bytes);
    for (int64_t at = first; at < last; at += group) {
      const int64_t next = at + group;
      for (int64_t i = next; i < last && i < next + group; ++i) prefetch_row(row(i), a.row_bytes);
      for (int64_t i = at; i < last && i < next; ++i) add_row(row(i), a.row_bytes, sums);
    }
    uint64_t total = 0;
    for (const auto& v : sums)
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
