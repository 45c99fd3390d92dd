// What the experts' kernels do with rows of a table: inner products with a token, weighted sums. Sums run in the
// order of the rows, and a row's arithmetic does not depend on its neighbours: however the work is cut, the bits
// are the same.
#pragma once

#include "simd.h"

namespace million_experts {
namespace {

template <int group, class A, class T>
inline void dot_group(const A* x, const T* const* rows, int64_t D, A* out) {
  constexpr int W = lanes<A>;
  Vec<A> even[group] = {}, odd[group] = {};  // two chains a row hide the latency of the sums
  int64_t at = 0;
  for (; at + 2 * W <= D; at += 2 * W) {
    const Vec<A> x0 = load(x + at), x1 = load(x + at + W);
    for (int g = 0; g < group; ++g) {
      even[g] += x0 * Storage<A, T>::load(rows[g] + at);
      odd[g] += x1 * Storage<A, T>::load(rows[g] + at + W);
    }
  }
  if (at + W <= D) {
    const Vec<A> x0 = load(x + at);
    for (int g = 0; g < group; ++g) even[g] += x0 * Storage<A, T>::load(rows[g] + at);
    at += W;
  }
  if (at < D) {
    const int rest = static_cast<int>(D - at);
    const Vec<A> x0 = load_part<A>(x + at, rest);
    for (int g = 0; g < group; ++g) odd[g] += x0 * load_part<A>(rows[g] + at, rest);
  }
  for (int g = 0; g < group; ++g) out[g] = horizontal_sum<A>(even[g] + odd[g]);
}

// out[i] = x . rows[i]
template <class A, class T>
inline void dot_rows(const A* x, const T* const* rows, int count, int64_t D, A* out) {
  int i = 0;
  for (; i + 4 <= count; i += 4) dot_group<4>(x, rows + i, D, out + i);
  switch (count - i) {
    case 3: return dot_group<3>(x, rows + i, D, out + i);
    case 2: return dot_group<2>(x, rows + i, D, out + i);
    case 1: return dot_group<1>(x, rows + i, D, out + i);
  }
}

// How many vectors of a sum stay in registers while its rows pass by.
#if defined(__AVX512F__)
constexpr int sum_vectors = 16;
#else
constexpr int sum_vectors = 8;
#endif

template <int vectors, class A, class T>
inline void sum_block(Vec<A>* sums, const T* const* rows, const A* weights, int count, int64_t at) {
  constexpr int W = lanes<A>;
  for (int i = 0; i < count; ++i) {
    const Vec<A> weight = splat(weights[i]);
    const T* row = rows[i] + at;
    for (int v = 0; v < vectors; ++v) sums[v] += weight * Storage<A, T>::load(row + v * W);
  }
}

template <int vectors, class A, class T>
inline int64_t add_blocks(A* y, const T* const* rows, const A* weights, int count, int64_t at, int64_t D) {
  constexpr int W = lanes<A>;
  for (; at + vectors * W <= D; at += vectors * W) {
    Vec<A> sums[vectors];
    for (int v = 0; v < vectors; ++v) sums[v] = load(y + at + v * W);
    sum_block<vectors>(sums, rows, weights, count, at);
    for (int v = 0; v < vectors; ++v) store(y + at + v * W, sums[v]);
  }
  return at;
}

// y += sum over i of weights[i] * rows[i]
template <class A, class T>
inline void add_rows(A* y, const T* const* rows, const A* weights, int count, int64_t D) {
  int64_t at = add_blocks<sum_vectors>(y, rows, weights, count, 0, D);
  at = add_blocks<sum_vectors / 4>(y, rows, weights, count, at, D);
  at = add_blocks<1>(y, rows, weights, count, at, D);
  if (at < D) {
    const int rest = static_cast<int>(D - at);
    Vec<A> sum = load_part<A>(y + at, rest);
    for (int i = 0; i < count; ++i) sum += splat(weights[i]) * load_part<A>(rows[i] + at, rest);
    store_part<A>(y + at, sum, rest);
  }
}

}  // namespace
}  // namespace million_experts
