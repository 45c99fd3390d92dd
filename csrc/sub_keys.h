// Scores of queries against a codebook of sub-keys: a small matrix product whose results never leave the cache.
#pragma once

#include "simd.h"

namespace million_experts {
namespace {

// Queries against a panel of sub-keys at a time, as many as keep the sums in registers.
#if defined(__AVX512F__)
constexpr int panel_vectors = 4, query_rows = 6;  // 24 sums, 4 sub-keys, 1 query in 32 registers
#else
constexpr int panel_vectors = 2, query_rows = 4;
#endif
template <class A>
constexpr int panel_keys = panel_vectors * lanes<A>;

template <class A>
inline int64_t panels_of(int64_t n) {
  return (n + panel_keys<A> - 1) / panel_keys<A>;
}

// Lays sub-keys [first, first + panel_keys) of keys [n, d] out as [d, panel_keys], zeros where there are none.
template <class A>
inline void pack_panel(const A* keys, int64_t n, int64_t d, int64_t panel, A* packed) {
  constexpr int P = panel_keys<A>, W = lanes<A>;
  const int64_t first = panel * P, count = n - first < P ? n - first : P;
  if (count < P) std::memset(packed, 0, sizeof(A) * static_cast<size_t>(d * P));
  int64_t c = 0;
  for (; c + W <= count; c += W) {
    const A* key = keys + (first + c) * d;
    int64_t i = 0;
    for (; i + W <= d; i += W) {
      Vec<A> square[W];
      for (int row = 0; row < W; ++row) square[row] = load(key + row * d + i);
      transpose<A>(square);
      for (int row = 0; row < W; ++row) store(packed + (i + row) * P + c, square[row]);
    }
    for (; i < d; ++i)
      for (int row = 0; row < W; ++row) packed[i * P + c + row] = key[row * d + i];
  }
  for (; c < count; ++c)
    for (int64_t i = 0; i < d; ++i) packed[i * P + c] = keys[(first + c) * d + i];
}

template <int rows, class A>
inline void score_panel(const A* const* queries, int64_t d, const A* packed, A* const* scores) {
  constexpr int W = lanes<A>, P = panel_keys<A>;
  Vec<A> sums[rows][panel_vectors] = {};
  for (int64_t i = 0; i < d; ++i) {
    Vec<A> key[panel_vectors];
    for (int v = 0; v < panel_vectors; ++v) key[v] = load(packed + i * P + v * W);
    for (int r = 0; r < rows; ++r) {
      const Vec<A> q = splat(queries[r][i]);
      for (int v = 0; v < panel_vectors; ++v) sums[r][v] += q * key[v];
    }
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < panel_vectors; ++v) store(scores[r] + v * W, sums[r][v]);
}

// The same for any number of rows up to query_rows; a row's arithmetic does not depend on the others.
template <class A>
inline void score_rows(const A* const* queries, int rows, int64_t d, const A* packed, A* const* scores) {
  int r = 0;
  for (; r + query_rows <= rows; r += query_rows) score_panel<query_rows>(queries + r, d, packed, scores + r);
  for (; r + 2 <= rows; r += 2) score_panel<2>(queries + r, d, packed, scores + r);
  if (r < rows) score_panel<1>(queries + r, d, packed, scores + r);
}

}  // namespace
}  // namespace million_experts
