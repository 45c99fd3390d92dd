// The experts of a token, forward and backward, and the gradient of their table.
//
// Forward and the backward towards the tokens are one walk over (token, expert) pairs: inner products of a
// token with one row of each of its experts, something elementwise, a weighted sum of another row. Pairs are
// taken a few at a time, with the rows of the next ones on their way from memory. Where many tokens of a tile share
// experts, the walk goes block of experts by block of experts, so that a block is fetched into the cache once
// for the whole tile. Within a token the order of its experts is (block, position), whatever the tile: results
// do not depend on the number of threads.

#include <cstdlib>
#include <new>

#include "activation.h"
#include "isa.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"

namespace million_experts {
namespace {

constexpr int group_pairs = 16;
constexpr int64_t tile_tokens = 1024;       // where experts are met block by block
constexpr int64_t stream_bytes = 32 << 20;  // a gradient as large as this goes past the caches
constexpr int64_t cached_bytes = 1 << 20;   // a table as small as this stays in the second cache
constexpr int64_t columns_reuse = 4;        // pairs an expert from which its gradient goes column by column

int64_t expert_bytes(const ExpertMlp& a) {
  const int64_t element = a.dtype_experts == DType::f64 ? 8 : a.dtype_experts == DType::f32 ? 4 : 2;
  return a.R * a.D * element;
}

// Calls visit(token, positions, count) for the pairs of tokens [first, last): at most group_pairs pairs of one
// token at a time, `positions` being those in [0, K), while the next as many come from memory.
template <class Visit>
void walk_in_order(const ExpertMlp& a, int64_t first, int64_t last, const Visit& visit) {
  const char* const table = static_cast<const char*>(a.experts);
  const int64_t bytes = expert_bytes(a);
  const bool far = a.N * bytes > cached_bytes;  // what is in the second cache is near enough
  const auto fetch = [&](int64_t pair) {
    if (far) prefetch_row(table + a.indices[pair] * bytes, bytes);
  };
  const int64_t pairs_end = last * a.K;
  for (int64_t p = first * a.K; p < pairs_end && p < first * a.K + group_pairs; ++p) fetch(p);
  uint32_t positions[group_pairs];
  for (int64_t t = first; t < last; ++t) {
    for (int64_t at = 0; at < a.K; at += group_pairs) {
      const int count = static_cast<int>(a.K - at < group_pairs ? a.K - at : group_pairs);
      for (int i = 0; i < count; ++i) positions[i] = static_cast<uint32_t>(at + i);
      const int64_t fetched = t * a.K + at + group_pairs;
      for (int64_t p = fetched; p < fetched + count && p < pairs_end; ++p) fetch(p);
      visit(t, positions, count);
    }
  }
}

// A block is a power of two of experts, so that a shift tells the block of an expert: two divisions a pair took a
// tenth of the time.
int block_shift(const ExpertMlp& a) { return __builtin_ctzll(static_cast<uint64_t>(a.block_experts)); }
int64_t block_count(const ExpertMlp& a) { return ((a.N - 1) >> block_shift(a)) + 1; }

template <class Visit>
void walk_by_blocks(const ExpertMlp& a, int64_t first, int64_t last, uint32_t* order, uint32_t* starts,
                    const Visit& visit) {
  const int shift = block_shift(a);
  const int64_t blocks = block_count(a);
  const int64_t* indices = a.indices + first * a.K;
  const int64_t pairs = (last - first) * a.K;
  std::memset(starts, 0, sizeof(uint32_t) * static_cast<size_t>(blocks + 1));
  for (int64_t p = 0; p < pairs; ++p) ++starts[(indices[p] >> shift) + 1];
  for (int64_t b = 0; b < blocks; ++b) starts[b + 1] += starts[b];
  for (int64_t p = 0; p < pairs; ++p) order[starts[indices[p] >> shift]++] = static_cast<uint32_t>(p);

  uint32_t positions[group_pairs];
  const uint32_t K = static_cast<uint32_t>(a.K);
  for (int64_t i = 0; i < pairs;) {
    const uint32_t token = order[i] / K, token_start = token * K;
    int count = 0;
    while (count < group_pairs && i + count < pairs && order[i + count] - token_start < K) {
      positions[count] = order[i + count] - token_start;
      ++count;
    }
    i += count;
    visit(first + token, positions, count);
  }
}

// Cuts the tokens into tiles for the threads and walks each; start(first, last) comes before a tile's pairs.
template <class Start, class Visit>
void walk(const ExpertMlp& a, const Start& start, const Visit& visit) {
  const bool by_blocks = a.block_experts < a.N;
  const int64_t share = (a.T + a.threads - 1) / a.threads;
  int64_t tile = by_blocks ? tile_tokens : 16;
  if (tile > share) tile = share;
  if (tile < 1) return;
  const int64_t blocks = by_blocks ? block_count(a) : 0;
  const ThreadScratch<uint32_t> scratch(a.threads, by_blocks ? tile * a.K + blocks + 1 : 0);
  std::atomic<int64_t> next{0};
  parallel(a.threads, [&](int thread, int) {
    uint32_t* order = by_blocks ? scratch.of(thread) : nullptr;
    for (;;) {
      const int64_t first = next.fetch_add(1, std::memory_order_relaxed) * tile;
      if (first >= a.T) return;
      const int64_t last = first + tile < a.T ? first + tile : a.T;
      start(first, last);
      if (order) walk_by_blocks(a, first, last, order, order + tile * a.K, visit);
      else walk_in_order(a, first, last, visit);
    }
  });
}

// The rows of a group of experts, and the few numbers of each pair.
template <class A, class T>
struct Group {
  static constexpr int padded = (group_pairs + lanes<A> - 1) / lanes<A> * lanes<A>;
  const T *down[group_pairs] = {}, *up[group_pairs] = {}, *gate[group_pairs] = {};
  alignas(64) A pre[padded] = {}, pre2[padded] = {}, hidden[padded], slope[padded];
  A dot[group_pairs], weight[group_pairs], weight2[group_pairs];
};

template <class A, class T, bool glu>
void forward(const ExpertMlpForward& a) {
  const A* x = static_cast<const A*>(a.x);
  const A* gates = static_cast<const A*>(a.gates);
  const T* experts = static_cast<const T*>(a.experts);
  A* y = static_cast<A*>(a.y);
  A* pre = static_cast<A*>(a.pre);
  constexpr int R = glu ? 3 : 2;
  const int64_t D = a.D, K = a.K, stride = R * D;
  walk(
      a,
      [&](int64_t first, int64_t last) {
        std::memset(y + first * D, 0, sizeof(A) * static_cast<size_t>((last - first) * D));
      },
      [&](int64_t t, const uint32_t* positions, int count) {
        Group<A, T> g;
        for (int i = 0; i < count; ++i) {
          g.down[i] = experts + a.indices[t * K + positions[i]] * stride;
          g.up[i] = g.down[i] + D;
          if (glu) g.gate[i] = g.up[i] + D;
        }
        dot_rows(x + t * D, g.down, count, D, g.pre);
        if (glu) dot_rows(x + t * D, g.gate, count, D, g.pre2);
        activate(a.activation, g.pre, count, g.hidden, static_cast<A*>(nullptr));
        for (int i = 0; i < count; ++i) {
          const int64_t p = t * K + positions[i];
          g.weight[i] = gates[p] * (glu ? g.hidden[i] * g.pre2[i] : g.hidden[i]);
          pre[p] = g.pre[i];
          if (glu) pre[a.pre_stride + p] = g.pre2[i];
        }
        add_rows(y + t * D, g.up, g.weight, count, D);
      });
}

template <class A, class T, bool glu>
void backward(const ExpertMlpBackward& a) {
  const A* grad_y = static_cast<const A*>(a.grad_y);
  const A* gates = static_cast<const A*>(a.gates);
  const A* pre = static_cast<const A*>(a.pre);
  const T* experts = static_cast<const T*>(a.experts);
  A* grad_x = static_cast<A*>(a.grad_x);
  A* grad_gates = static_cast<A*>(a.grad_gates);
  A* weights = static_cast<A*>(a.weights);
  constexpr int R = glu ? 3 : 2;
  const int64_t D = a.D, K = a.K, stride = R * D;
  walk(
      a,
      [&](int64_t first, int64_t last) {
        if (grad_x) std::memset(grad_x + first * D, 0, sizeof(A) * static_cast<size_t>((last - first) * D));
      },
      [&](int64_t t, const uint32_t* positions, int count) {
        Group<A, T> g;
        for (int i = 0; i < count; ++i) {
          const int64_t p = t * K + positions[i];
          g.down[i] = experts + a.indices[p] * stride;
          g.up[i] = g.down[i] + D;
          g.pre[i] = pre[p];
          if (glu) {
            g.gate[i] = g.up[i] + D;
            g.pre2[i] = pre[a.pre_stride + p];
          }
        }
        dot_rows(grad_y + t * D, g.up, count, D, g.dot);
        activate(a.activation, g.pre, count, g.hidden, g.slope);
        for (int i = 0; i < count; ++i) {
          const int64_t p = t * K + positions[i];
          const A hidden = glu ? g.hidden[i] * g.pre2[i] : g.hidden[i];
          const A grad_hidden = g.dot[i] * gates[p];
          g.weight[i] = grad_hidden * (glu ? g.slope[i] * g.pre2[i] : g.slope[i]);
          if (glu) g.weight2[i] = grad_hidden * g.hidden[i];
          if (grad_gates) grad_gates[p] = g.dot[i] * hidden;
          if (weights) {
            A* of_rows = weights + p * R;
            of_rows[0] = g.weight[i];
            of_rows[1] = gates[p] * hidden;
            if (glu) of_rows[2] = g.weight2[i];
          }
        }
        if (grad_x) {
          add_rows(grad_x + t * D, g.down, g.weight, count, D);
          if (glu) add_rows(grad_x + t * D, g.gate, g.weight2, count, D);
        }
      });
}

// --- the gradient of the table -----------------------------------------------------------------------------

// A pair in the order of its expert, with all that the gradients of its R rows need.
template <class A, int R>
struct SortedPair {
  uint32_t expert, token;
  A weights[R];
};

// Fills `sorted` with the pairs in ascending order of (expert, pair): a radix sort by the experts' digits, stable,
// the same for any number of threads. Between passes a pair travels as expert << 32 | pair; the last pass adds
// what else belongs to it.
template <class A, int R>
void sort_pairs(const ExpertMlp& a, const A* weights, SortedPair<A, R>* sorted) {
  constexpr int digit_bits = 11, digits = 1 << digit_bits;
  const int64_t pairs = a.T * a.K, share = (pairs + a.threads - 1) / a.threads;
  int passes = 1;
  while (a.N > int64_t{1} << (passes * digit_bits)) ++passes;
  Scratch<uint64_t> first(passes > 1 ? pairs : 0), second(passes > 2 ? pairs : 0);
  Scratch<uint32_t> counts(int64_t{a.threads} * digits);
  const auto for_shares = [&](auto&& body) {
    parallel(a.threads, [&](int thread, int team) {
      for (int part = thread; part < a.threads; part += team) {
        const int64_t begin = part * share, end = begin + share < pairs ? begin + share : pairs;
        body(counts.data + int64_t{part} * digits, begin, end);
      }
    });
  };
  const uint64_t* from = nullptr;
  for (int pass = 0; pass < passes; ++pass) {
    const auto entry = [&](int64_t p) {
      return from ? from[p] : static_cast<uint64_t>(a.indices[p]) << 32 | static_cast<uint64_t>(p);
    };
    const auto digit = [&](uint64_t e) { return e >> (32 + pass * digit_bits) & (digits - 1); };
    for_shares([&](uint32_t* count, int64_t begin, int64_t end) {
      std::memset(count, 0, digits * sizeof(uint32_t));
      for (int64_t p = begin; p < end; ++p) ++count[digit(entry(p))];
    });
    uint32_t total = 0;
    for (int d = 0; d < digits; ++d)
      for (int part = 0; part < a.threads; ++part) {
        uint32_t& count = counts.data[int64_t{part} * digits + d];
        const uint32_t start = total;
        total += count;
        count = start;
      }
    if (pass + 1 < passes) {
      uint64_t* to = pass % 2 ? second.data : first.data;
      for_shares([&](uint32_t* place, int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
          const uint64_t e = entry(p);
          to[place[digit(e)]++] = e;
        }
      });
      from = to;
      continue;
    }
    for_shares([&](uint32_t* place, int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const uint64_t e = entry(p);
        const uint32_t pair = static_cast<uint32_t>(e);
        SortedPair<A, R>& out = sorted[place[digit(e)]++];
        out.expert = static_cast<uint32_t>(e >> 32);
        out.token = pair / static_cast<uint32_t>(a.K);
        for (int r = 0; r < R; ++r) out.weights[r] = weights[int64_t{pair} * R + r];
      }
    });
  }
}

// Calls visit(expert, its pairs, how many) for the experts in [first, last) that have pairs, zero(from, to) for
// the runs of experts between them.
template <class Pair, class Visit, class Zero>
inline void for_experts(const Pair* pairs, int64_t count, int64_t first, int64_t last, const Visit& visit,
                        const Zero& zero) {
  int64_t i = 0;
  for (int64_t high = count; i < high;) {
    const int64_t middle = (i + high) / 2;
    if (pairs[middle].expert < first) i = middle + 1;
    else high = middle;
  }
  int64_t written = first;
  while (i < count && pairs[i].expert < last) {
    const int64_t expert = pairs[i].expert;
    int64_t stop = i + 1;
    while (stop < count && pairs[stop].expert == expert) ++stop;
    if (written < expert) zero(written, expert);
    visit(expert, pairs + i, stop - i);
    written = expert + 1;
    i = stop;
  }
  if (written < last) zero(written, last);
}

constexpr int64_t expert_ranges = 512;  // what threads take at a time

// Few pairs an expert: its rows are written one after the other, with all their columns in registers.
template <int vectors, class A, class T, class Pair>
inline int64_t write_blocks(T* out, const A* source, const Pair* pairs, int64_t count, int64_t r, int64_t at,
                            int64_t D, bool accumulate, bool streamed) {
  constexpr int W = lanes<A>;
  for (; at + vectors * W <= D; at += vectors * W) {
    Vec<A> sums[vectors] = {};
    for (int v = 0; accumulate && v < vectors; ++v) sums[v] = Storage<A, T>::load(out + at + v * W);
    for (int64_t i = 0; i < count; ++i) {
      const Vec<A> weight = splat(pairs[i].weights[r]);
      const A* row = source + int64_t{pairs[i].token} * D + at;
      for (int v = 0; v < vectors; ++v) sums[v] += weight * load(row + v * W);
    }
    for (int v = 0; v < vectors; ++v) {
      if (streamed) stream<A>(out + at + v * W, sums[v]);
      else Storage<A, T>::store(out + at + v * W, sums[v]);
    }
  }
  return at;
}

// out [R, D] (+)= the gradient of an expert, from all its pairs.
template <class A, class T, int R>
inline void write_expert(T* out, const A* x, const A* grad_y, const SortedPair<A, R>* run, int64_t count, int64_t D,
                         bool accumulate, bool streamed) {
  for (int r = 0; r < R; ++r, out += D) {
    const A* source = r == 1 ? grad_y : x;
    int64_t at = write_blocks<sum_vectors>(out, source, run, count, r, 0, D, accumulate, streamed);
    at = write_blocks<sum_vectors / 4>(out, source, run, count, r, at, D, accumulate, streamed);
    at = write_blocks<1>(out, source, run, count, r, at, D, accumulate, streamed);
    if (at == D) continue;
    const int rest = static_cast<int>(D - at);
    Vec<A> sum = accumulate ? load_part<A>(out + at, rest) : Vec<A>{};
    for (int64_t i = 0; i < count; ++i)
      sum += splat(run[i].weights[r]) * load_part<A>(source + int64_t{run[i].token} * D + at, rest);
    store_part<A>(out + at, sum, rest);
  }
}

template <class A, class T, int R>
void grad_by_rows(const ExpertMlpTableGrad& a, const SortedPair<A, R>* pairs) {
  const A *x = static_cast<const A*>(a.x), *grad_y = static_cast<const A*>(a.grad_y);
  T* grad = static_cast<T*>(a.grad_experts);
  const int64_t D = a.D, ranges = a.N < expert_ranges ? a.N : expert_ranges;
  const bool streamed = a.N * R * D * static_cast<int64_t>(sizeof(T)) >= stream_bytes;
  parallel_items(a.threads, ranges, [&](int64_t range) {
    for_experts(
        pairs, a.T * a.K, a.N * range / ranges, a.N * (range + 1) / ranges,
        [&](int64_t expert, const SortedPair<A, R>* run, int64_t count) {
          write_expert<A, T, R>(grad + expert * R * D, x, grad_y, run, count, D, a.accumulate, streamed);
        },
        [&](int64_t from, int64_t to) {
          if (a.accumulate) return;
          const int64_t bytes = (to - from) * R * D * static_cast<int64_t>(sizeof(T));
          if (streamed) stream_zero(grad + from * R * D, bytes);
          else std::memset(grad + from * R * D, 0, static_cast<size_t>(bytes));
        });
    stream_fence();
  });
}

// Many pairs an expert: tokens are read many times, so a few columns of x and grad_y of all tokens are laid side
// by side, small enough for the second cache, and all experts are summed for these columns before the next ones.
template <class A, class T, int R>
void grad_by_columns(const ExpertMlpTableGrad& a, const SortedPair<A, R>* pairs) {
  constexpr int W = lanes<A>, V = 4, columns = V * W;
  const A *x = static_cast<const A*>(a.x), *grad_y = static_cast<const A*>(a.grad_y);
  T* grad = static_cast<T*>(a.grad_experts);
  const int64_t D = a.D, ranges = a.N < expert_ranges ? a.N : expert_ranges;
  Scratch<A> packed(a.T * 2 * columns);
  for (int64_t at = 0; at < D; at += columns) {
    const int64_t count = D - at < columns ? D - at : columns;
    parallel_items(a.threads, (a.T + 63) / 64, [&](int64_t item) {
      for (int64_t t = item * 64; t < a.T && t < (item + 1) * 64; ++t) {
        A* out = packed.data + t * 2 * columns;
        if (count < columns) std::memset(out, 0, sizeof(A) * 2 * columns);
        std::memcpy(out, x + t * D + at, sizeof(A) * static_cast<size_t>(count));
        std::memcpy(out + columns, grad_y + t * D + at, sizeof(A) * static_cast<size_t>(count));
      }
    });
    parallel_items(a.threads, ranges, [&](int64_t range) {
    for_experts(
        pairs, a.T * a.K, a.N * range / ranges, a.N * (range + 1) / ranges,
        [&](int64_t expert, const SortedPair<A, R>* run, int64_t length) {
          Vec<A> sums[R][V] = {};
          for (int r = 0; a.accumulate && r < R; ++r)
            for (int v = 0; v < V && v * W < count; ++v) {
              const T* old = grad + (expert * R + r) * D + at + v * W;
              sums[r][v] = count - v * W >= W ? Storage<A, T>::load(old)
                                              : load_part<A>(old, static_cast<int>(count - v * W));
            }
          for (int64_t i = 0; i < length; ++i) {
            const A* token = packed.data + int64_t{run[i].token} * 2 * columns;
            for (int r = 0; r < R; ++r) {
              const Vec<A> weight = splat(run[i].weights[r]);
              for (int v = 0; v < V; ++v) sums[r][v] += weight * load(token + (r == 1 ? columns : 0) + v * W);
            }
          }
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < V && v * W < count; ++v) {
              T* out = grad + (expert * R + r) * D + at + v * W;
              if (count - v * W >= W) Storage<A, T>::store(out, sums[r][v]);
              else store_part<A>(out, sums[r][v], static_cast<int>(count - v * W));
            }
        },
        [&](int64_t from, int64_t to) {
          for (int64_t row = from * R; !a.accumulate && row < to * R; ++row)
            std::memset(grad + row * D + at, 0, sizeof(T) * static_cast<size_t>(count));
        });
    });
  }
}

template <class A, class T, int R>
void table_grad(const ExpertMlpTableGrad& a) {
  const int64_t pairs = a.T * a.K;
  Scratch<SortedPair<A, R>> sorted(pairs);
  sort_pairs(a, static_cast<const A*>(a.weights), sorted.data);
  if (pairs >= a.N * columns_reuse) grad_by_columns<A, T, R>(a, sorted.data);
  else grad_by_rows<A, T, R>(a, sorted.data);
}

// --- the gradient of the touched rows alone ---------------------------------------------------------------------

template <class A, int R>
void sort_touched(ExpertMlpSort& a) {
  SortedPair<A, R>* sorted = static_cast<SortedPair<A, R>*>(a.sorted);
  sort_pairs(a, static_cast<const A*>(a.weights), sorted);
  const int64_t pairs = a.T * a.K;
  a.touched = 0;
  for (int64_t i = 0; i < pairs; ++i)
    if (i == 0 || sorted[i].expert != sorted[i - 1].expert) a.starts[a.touched++] = i;
  a.starts[a.touched] = pairs;
}

template <class A, class T, int R>
void touched_grad(const ExpertMlpTouchedGrad& a) {
  constexpr int64_t rows_each = 64;
  const A *x = static_cast<const A*>(a.x), *grad_y = static_cast<const A*>(a.grad_y);
  const SortedPair<A, R>* sorted = static_cast<const SortedPair<A, R>*>(a.sorted);
  T* values = static_cast<T*>(a.values);
  const int64_t bytes = a.touched * R * a.D * static_cast<int64_t>(sizeof(T));
  parallel_items(a.threads, (a.touched + rows_each - 1) / rows_each, [&](int64_t item) {
    for (int64_t i = item * rows_each; i < a.touched && i < (item + 1) * rows_each; ++i) {
      const SortedPair<A, R>* run = sorted + a.starts[i];
      a.rows[i] = run->expert;
      write_expert<A, T, R>(values + i * R * a.D, x, grad_y, run, a.starts[i + 1] - a.starts[i], a.D, false,
                            bytes >= stream_bytes);
    }
    stream_fence();
  });
}

// --- one function for every pair of types --------------------------------------------------------------------

template <template <class, class> class Body, class Arguments>
void with_types(const Arguments& a) {
  if (a.dtype_sum == DType::f64) {
    switch (a.dtype_experts) {
      case DType::f64: return Body<double, double>::run(a);
      case DType::f32: return Body<double, float>::run(a);
      case DType::bf16: return Body<double, bf16>::run(a);
      case DType::f16: return Body<double, f16>::run(a);
    }
  }
  switch (a.dtype_experts) {
    case DType::bf16: return Body<float, bf16>::run(a);
    case DType::f16: return Body<float, f16>::run(a);
    default: return Body<float, float>::run(a);
  }
}

template <class A, class T>
struct Forward {
  static void run(const ExpertMlpForward& a) { a.R == 3 ? forward<A, T, true>(a) : forward<A, T, false>(a); }
};
template <class A, class T>
struct Backward {
  static void run(const ExpertMlpBackward& a) { a.R == 3 ? backward<A, T, true>(a) : backward<A, T, false>(a); }
};
template <class A, class T>
struct TableGrad {
  static void run(const ExpertMlpTableGrad& a) { a.R == 3 ? table_grad<A, T, 3>(a) : table_grad<A, T, 2>(a); }
};

template <class A, class T>
struct TouchedGrad {
  static void run(const ExpertMlpTouchedGrad& a) {
    a.R == 3 ? touched_grad<A, T, 3>(a) : touched_grad<A, T, 2>(a);
  }
};

}  // namespace

namespace ME_ISA {
void expert_mlp_forward(const ExpertMlpForward& a) { with_types<Forward>(a); }
void expert_mlp_backward(const ExpertMlpBackward& a) { with_types<Backward>(a); }
void expert_mlp_table_grad(const ExpertMlpTableGrad& a) { with_types<TableGrad>(a); }
void expert_mlp_sort(ExpertMlpSort& a) {
  if (a.dtype_sum == DType::f64) a.R == 3 ? sort_touched<double, 3>(a) : sort_touched<double, 2>(a);
  else a.R == 3 ? sort_touched<float, 3>(a) : sort_touched<float, 2>(a);
}
void expert_mlp_touched_grad(const ExpertMlpTouchedGrad& a) { with_types<TouchedGrad>(a); }
}  // namespace ME_ISA

}  // namespace million_experts
