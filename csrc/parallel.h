// Threads, from the OpenMP runtime that torch brought into the process. Nothing links to a runtime: its entry
// points are handed over by Python (`use_openmp`), so there can be no second pool of threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace million_experts {

// Entry points of the GNU OpenMP interface; LLVM's and Intel's runtimes export them too.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
  int (*thread_num)() = nullptr;
  int (*num_threads)() = nullptr;
};

extern OpenMP openmp;

// Calls body(thread, threads) on every thread of a team of at most `wanted`; alone where there is no runtime.
// `body` must not throw: an exception cannot cross the runtime.
template <class Body>
void parallel(int wanted, const Body& body) {
  if (wanted <= 1 || !openmp.parallel) {
    body(0, 1);
    return;
  }
  openmp.parallel(
      [](void* context) {
        (*static_cast<const Body*>(context))(openmp.thread_num(), openmp.num_threads());
      },
      const_cast<void*>(static_cast<const void*>(&body)), static_cast<unsigned>(wanted), 0);
}

// Calls body(item) for items [0, count), each taken by the next free thread.
template <class Body>
void parallel_items(int threads, int64_t count, const Body& body) {
  if (threads > count) threads = static_cast<int>(count);
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int, int) {
    for (;;) {
      const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
      if (item >= count) return;
      body(item);
    }
  });
}

// The same with items shared out evenly beforehand: from call to call a thread gets the same ones, whose data may
// still lie in its cache.
template <class Body>
void parallel_shares(int threads, int64_t count, const Body& body) {
  if (threads > count) threads = static_cast<int>(count);
  parallel(threads, [&](int thread, int team) {
    for (int64_t item = count * thread / team; item < count * (thread + 1) / team; ++item) body(item, thread);
  });
}

}  // namespace million_experts
