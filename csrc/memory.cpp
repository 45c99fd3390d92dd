#include "memory.h"

#include <iterator>
#include <map>
#include <mutex>
#include <new>
#include <cstdlib>

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#include <unistd.h>
#define ME_MMAP 1
#endif

namespace million_experts {
namespace {

constexpr size_t huge_page = size_t{2} << 20;
constexpr size_t reclaimable = size_t{64} << 20;  // the system may have buffers as large as this when it runs short

std::mutex mutex;
std::multimap<size_t, void*> kept;  // size, as `capacity` gives it -> buffer
size_t total_kept = 0, in_use = 0, most_in_use = 0;

// The size of the buffer for so many bytes: whole pages, and one of eight sizes between powers of two, so that a
// gradient of rows, of which each step touches another number, finds the buffer of the step before. What is beyond
// the bytes is never touched and takes no memory.
size_t capacity(size_t bytes) {
  size_t step = huge_page;
  while (bytes / step >= 16) step *= 2;
  return (bytes + step - 1) / step * step;
}

#if defined(ME_MMAP)
void* map(size_t bytes) {
  // A huge page must start at a multiple of its size: map one more, and give back what is not needed.
  const size_t wanted = bytes + huge_page;
  void* mapping = mmap(nullptr, wanted, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  char* const start = static_cast<char*>(mapping);
  const size_t before = -reinterpret_cast<uintptr_t>(start) % huge_page;
  if (before) munmap(start, before);
  munmap(start + before + bytes, wanted - before - bytes);
  advise_huge_pages(start + before, bytes);
  return start + before;
}
void unmap(void* data, size_t bytes) { munmap(data, bytes); }
#else
void* map(size_t bytes) {
  void* data = std::aligned_alloc(4096, bytes);
  if (!data) throw std::bad_alloc();
  return data;
}
void unmap(void* data, size_t) { std::free(data); }
#endif

// Of the kept ones; the caller holds the lock.
void unmap_largest() {
  const auto largest = std::prev(kept.end());
  total_kept -= largest->first;
  unmap(largest->second, largest->first);
  kept.erase(largest);
}

// The part of an array that consists of whole pages.
struct Pages {
  char* start;
  size_t bytes;
  Pages(void* data, size_t size) {
#if defined(ME_MMAP)
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
#else
    const uintptr_t page = 4096;
#endif
    const uintptr_t first = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(data) + size) / page * page;
    start = reinterpret_cast<char*>(first);
    bytes = last > first ? last - first : 0;
  }
};

}  // namespace

void* take_buffer(size_t bytes) {
  bytes = capacity(bytes);
  size_t most_before;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    most_before = most_in_use;
    const auto found = kept.find(bytes);
    in_use += bytes;
    if (found != kept.end()) {
      void* data = found->second;
      kept.erase(found);
      total_kept -= bytes;
      return data;
    }
    // Buffers of other sizes go, so that all together never take more than was in use at one time.
    if (in_use > most_in_use) most_in_use = in_use;
    while (!kept.empty() && in_use + total_kept > most_in_use) unmap_largest();
  }
  try {
    return map(bytes);
  } catch (...) {
    const std::lock_guard<std::mutex> lock(mutex);
    in_use -= bytes;
    most_in_use = most_before;
    throw;
  }
}

void return_buffer(void* data, size_t bytes) {
  bytes = capacity(bytes);
#if defined(MADV_FREE)
  if (bytes >= reclaimable) madvise(data, bytes, MADV_FREE);
#endif
  const std::lock_guard<std::mutex> lock(mutex);
  in_use -= bytes;
  try {
    kept.emplace(bytes, data);
    total_kept += bytes;
  } catch (const std::bad_alloc&) {  // destructors call this, which must not throw
    unmap(data, bytes);
  }
}

size_t release_buffers() {
  const std::lock_guard<std::mutex> lock(mutex);
  const size_t released = total_kept;
  while (!kept.empty()) unmap_largest();
  most_in_use = in_use;
  return released;
}

size_t kept_bytes() {
  const std::lock_guard<std::mutex> lock(mutex);
  return total_kept;
}

bool advise_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const Pages pages(data, bytes);
  return pages.bytes >= huge_page && madvise(pages.start, pages.bytes, MADV_HUGEPAGE) == 0;
#else
  (void)data, (void)bytes;
  return false;
#endif
}

bool collapse_to_huge_pages(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE) && defined(__linux__)
  constexpr int madv_collapse = 25;  // Linux 6.1; older C libraries have no name for it
  if (!advise_huge_pages(data, bytes)) return false;
  const Pages pages(data, bytes);
  return madvise(pages.start, pages.bytes, madv_collapse) == 0;
#else
  (void)data, (void)bytes;
  return false;
#endif
}

}  // namespace million_experts
