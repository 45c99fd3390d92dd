// Scores of queries against a codebook of sub-keys: a small matrix product whose results never leave the cache.
#pragma once

#include "simd.h"

namespace million_experts {
namespace {

// Queries against a panel of sub-keys at a time, as many as keep the sums in registers.
#if defined(__AVX512F__)
constexpr int panel_vectors = 4, query_rows = 6;
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
  constexpr int P = panel_keys<A>;
  const int64_t first = panel * P, count = n - first < P ? n - first : P;
  if (count < P) std::memset(packed, 0, sizeof(A) * static_cast<size_t>(d * P));
  for (int64_t c = 0; c < count; ++c) {
    const A* key = keys + (first + c) * d;
    for (int64_t i = 0; i < d; ++i) packed[i * P + c] = key[i];
  }
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
  if (rows == query_rows) return score_panel<query_rows>(queries, d, packed, scores);
  for (int r = 0; r < rows; ++r) score_panel<1>(queries + r, d, packed, scores + r);
}

}  // namespace
}  // namespace million_experts
