// Memory for the length of one call, not initialised. Taken before threads start, because running out of memory
// must reach Python as MemoryError, and exceptions do not cross the OpenMP runtime.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#include "memory.h"

namespace million_experts {
namespace {

template <class T>
struct Scratch {
  T* data = nullptr;
  size_t bytes = 0;
  explicit Scratch(int64_t count) {
    if (count <= 0) return;
    bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;  // as aligned_alloc asks for
    data = static_cast<T*>(bytes >= kept ? take_buffer(bytes) : std::aligned_alloc(64, bytes));
    if (!data) throw std::bad_alloc();
  }
  ~Scratch() {
    if (bytes >= kept) return_buffer(data, bytes);
    else std::free(data);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

 private:
  // The allocator gives blocks of this size back to the system, and each call would touch new pages: 8 MiB cost
  // more than the backward pass of retrieval that they served. Sanitizers watch the allocator's blocks alone.
#if defined(__SANITIZE_ADDRESS__)
  static constexpr size_t kept = SIZE_MAX;
#else
  static constexpr size_t kept = size_t{1} << 20;
#endif
};

// The same for each thread of a team, a page and more apart: processors fetch ahead of what a thread reads, and were its
// neighbour's lines next, the neighbour would wait for them at every write. Retrieval's backward pass gained nothing from
// a second thread before.
template <class T>
class ThreadScratch {
 public:
  ThreadScratch(int threads, int64_t each) : stride_(each > 0 ? whole_lines(each) + page : 0), all_(threads * stride_) {}
  T* of(int thread) const { return all_.data + thread * stride_; }
  void fill(int byte) { std::memset(all_.data, byte, all_.bytes); }

 private:
  static constexpr int64_t page = 4096 / sizeof(T);
  static int64_t whole_lines(int64_t count) { return (count + 15) / 16 * 16; }
  int64_t stride_;
  Scratch<T> all_;
};

}  // namespace
}  // namespace million_experts
