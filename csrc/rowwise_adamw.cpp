// AdamW for the rows of a table that have a gradient: each row is read and written once, whatever it has missed.
// A row is one thread's, and its gradients are summed in the order of their places: the same bits for any number
// of threads.

#include "isa.h"
#include "parallel.h"
#include "rowwise_update.h"
#include "scratch.h"

namespace million_experts {
namespace {

constexpr int64_t item_rows = 32;   // rows that a thread takes at a time
constexpr int64_t rows_ahead = 2;   // whose table and moments are fetched
constexpr int64_t steps_ahead = 8;  // whose last step is

inline void fetch(const void* p, int64_t bytes) {
  const char* line = static_cast<const char*>(p);
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(line + at, 1, 2);
}

// sum = values of all places of a row, in their order
template <class A, class G>
void sum_values(const RowwiseAdamW& a, const int64_t* places, int64_t count, A* sum) {
  constexpr int W = lanes<A>;
  const int64_t width = a.R * a.D;
  const G* values = static_cast<const G*>(a.values);
  for (int64_t at = 0; at < width; at += W) {
    const int part = width - at < W ? static_cast<int>(width - at) : W;
    Vec<A> total = load_up_to<A>(values + places[0] * width + at, part);
    for (int64_t i = 1; i < count; ++i) total += load_up_to<A>(values + places[i] * width + at, part);
    store_up_to<A>(sum + at, total, part);
  }
}

template <class A>
const A* gradient(const RowwiseAdamW& a, int64_t i, A* buffer) {
  const int64_t* places = a.starts ? a.places + a.starts[i] : &i;
  const int64_t count = a.starts ? a.starts[i + 1] - a.starts[i] : 1;
  if (a.dtype_values == a.dtype_sum && count == 1) return static_cast<const A*>(a.values) + places[0] * a.R * a.D;
  if constexpr (sizeof(A) == 4) {
    if (a.dtype_values == DType::bf16) sum_values<A, bf16>(a, places, count, buffer);
    else if (a.dtype_values == DType::f16) sum_values<A, f16>(a, places, count, buffer);
    else sum_values<A, A>(a, places, count, buffer);
  } else {
    sum_values<A, A>(a, places, count, buffer);
  }
  return buffer;
}

template <class A, class T, class M>
void run(const RowwiseAdamW& a) {
  const RowwiseStep<A> step(a);
  const int64_t width = a.R * a.D, squares = a.by_row ? a.R : width;
  T* table = static_cast<T*>(a.table);
  M* exp_avg = static_cast<M*>(a.exp_avg);
  A* exp_avg_sq = static_cast<A*>(a.exp_avg_sq);
  if (!a.values) {
    parallel_items(a.threads, (a.N + item_rows - 1) / item_rows, [&](int64_t item) {
      const int64_t end = (item + 1) * item_rows < a.N ? (item + 1) * item_rows : a.N;
      for (int64_t row = item * item_rows; row < end; ++row)
        if (a.last_step[row] < a.step)
          catch_up_row(step, row, a.R, a.D, table + row * width, momentum_at(exp_avg, row * width),
                       exp_avg_sq + row * squares, a.last_step + row);
    });
    return;
  }
  const int64_t items = (a.n + item_rows - 1) / item_rows;
  const int threads = a.threads < items ? a.threads : static_cast<int>(items);
  const ThreadScratch<A> sums(threads, width);
  std::atomic<int64_t> next{0};
  parallel(threads, [&](int thread, int) {
    for (;;) {
      const int64_t first = next.fetch_add(1, std::memory_order_relaxed) * item_rows;
      if (first >= a.n) return;
      const int64_t end = first + item_rows < a.n ? first + item_rows : a.n;
      for (int64_t i = first; i < end; ++i) {
        if (i + steps_ahead < a.n) __builtin_prefetch(a.last_step + a.rows[i + steps_ahead], 1, 2);
        if (i + rows_ahead < a.n) {
          const int64_t row = a.rows[i + rows_ahead];
          fetch(table + row * width, width * sizeof(T));
          if constexpr (has_momentum<M>) fetch(exp_avg + row * width, width * sizeof(M));
          fetch(exp_avg_sq + row * squares, squares * sizeof(A));
        }
        const int64_t row = a.rows[i];
        update_row(step, row, a.R, a.D, gradient(a, i, sums.of(thread)), table + row * width,
                   momentum_at(exp_avg, row * width), exp_avg_sq + row * squares, a.last_step + row);
      }
    }
  });
}

template <class A, class T>
void choose_momentum(const RowwiseAdamW& a) {
  if (!a.exp_avg) return run<A, T, NoMomentum>(a);
  if constexpr (sizeof(A) == 4)
    if (a.dtype_momentum == DType::bf16) return run<A, T, bf16>(a);
  run<A, T, A>(a);
}

}  // namespace

namespace ME_ISA {
void rowwise_adamw(const RowwiseAdamW& a) {
  switch (a.dtype_table) {
    case DType::f64: return choose_momentum<double, double>(a);
    case DType::f32: return choose_momentum<float, float>(a);
    case DType::bf16: return choose_momentum<float, bf16>(a);
    case DType::f16: return choose_momentum<float, f16>(a);
  }
}
}  // namespace ME_ISA

}  // namespace million_experts
