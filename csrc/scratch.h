// Memory for the length of one call, not initialised. Taken before threads start, because running out of memory
// must reach Python as MemoryError, and exceptions do not cross the OpenMP runtime.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

namespace million_experts {
namespace {

template <class T>
struct Scratch {
  T* data = nullptr;
  explicit Scratch(int64_t count) {
    if (count <= 0) return;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (!data) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

}  // namespace
}  // namespace million_experts
