// From the best sub-keys of two halves to the best pairs.
#pragma once

#include "scratch.h"
#include "sub_keys.h"
#include "topk.h"

namespace million_experts {
namespace {

// The pairs (a, b) of ranks in the two halves that can be among the best k: (a + 1) * (b + 1) <= k, so that rank a
// has k / (a + 1) partners. Divided once, not for each query.
struct PairList {
  Scratch<int32_t> first, second, partners;
  int64_t count = 0;

  static int64_t size(int64_t k) {
    int64_t pairs = 0;
    for (int64_t a = 1; a <= k; ++a) pairs += k / a;
    return pairs;
  }
  explicit PairList(int64_t k) : first(size(k)), second(size(k)), partners(k) {
    for (int32_t a = 0; a < k; ++a) {
      partners.data[a] = static_cast<int32_t>(k / (a + 1));
      for (int32_t b = 0; b < partners.data[a]; ++b) {
        first.data[count] = a;
        second.data[count++] = b;
      }
    }
  }
};

template <class A>
struct PairScratchSizes {
  int64_t row, best, numbers, integers;
  PairScratchSizes(int64_t width, int64_t k, int64_t pairs)
      : row(whole_vectors<A>((width > pairs ? width : pairs) + lanes<A>)), best(whole_vectors<A>(k)),
        numbers(4 * row + 2 * query_rows * best), integers(3 * row + 2 * query_rows * best + best) {}
};

// One thread's memory for the search: the best sub-keys of up to query_rows queries, and their pairs' sums.
template <class A>
struct PairScratch {
  int64_t best;
  TopKScratch<A> topk;
  A *sums, *best_scores;
  int32_t *best_positions, *winners;

  PairScratch(const PairScratchSizes<A>& sizes, A* numbers, int32_t* integers)
      : best(sizes.best), topk{numbers,  numbers + sizes.row,  numbers + 2 * sizes.row,
                                 integers, integers + sizes.row, integers + 2 * sizes.row},
        sums(numbers + 3 * sizes.row), best_scores(numbers + 4 * sizes.row), best_positions(integers + 3 * sizes.row),
        winners(best_positions + 2 * query_rows * sizes.best) {}

  A* scores_of(int half, int r) { return best_scores + (half * query_rows + r) * best; }
  int32_t* positions_of(int half, int r) { return best_positions + (half * query_rows + r) * best; }

  // The k best of a query's scores for one half; what follows the n scores is overwritten.
  void best_sub_keys(A* scores, int64_t n, int64_t k, int half, int r) {
    for (int64_t i = n; i % lanes<A>; ++i) scores[i] = minus_infinity<A>;
    best_of<A>(scores, n, k, topk, [](int32_t p, int32_t q) { return p < q; }, scores_of(half, r),
                  positions_of(half, r));
  }

  // The k best pairs of query r, whose sub-keys `best_sub_keys` has found.
  void best_pairs(const PairList& pairs, int64_t k, int64_t n2, int r, A* scores, int64_t* indices) {
    const A *s1 = scores_of(0, r), *s2 = scores_of(1, r);
    const int32_t *i = positions_of(0, r), *j = positions_of(1, r);
    const auto index = [&](int32_t p) { return i[pairs.first.data[p]] * n2 + j[pairs.second.data[p]]; };
    // In the list's order, whole vectors at a time: what one writes too far, the next overwrites.
    for (int64_t a = 0, p = 0; a < k; ++a) {
      const int64_t partners = pairs.partners.data[a];
      for (int64_t b = 0; b < partners; b += lanes<A>) store(sums + p + b, Vec<A>(splat(s1[a]) + load(s2 + b)));
      p += partners;
    }
    for (int64_t p = pairs.count; p % lanes<A>; ++p) sums[p] = minus_infinity<A>;
    best_of<A>(sums, pairs.count, k, topk, [&](int32_t p, int32_t q) { return index(p) < index(q); }, scores,
                   winners);
    for (int64_t c = 0; c < k; ++c) indices[c] = index(winners[c]);
    // A pair that was not looked at has k pairs at least as good, but its sum may round to the same number as the
    // worst of these while its index is lower.
    bool tied = false;
    for (int64_t a = 1; a < k; ++a) tied |= s1[a] + s2[pairs.partners.data[a]] >= scores[k - 1];
    if (tied) best_of_all_pairs(k, n2, r, scores, indices);
  }

 private:
  void best_of_all_pairs(int64_t k, int64_t n2, int r, A* scores, int64_t* indices) {
    const A *s1 = scores_of(0, r), *s2 = scores_of(1, r);
    const int32_t *i = positions_of(0, r), *j = positions_of(1, r);
    const auto index = [&](int64_t p) { return i[p / k] * n2 + j[p % k]; };
    best_by_insertion([&](int64_t p) { return s1[p / k] + s2[p % k]; }, k * k, k,
                      [&](int32_t p, int32_t q) { return index(p) < index(q); }, scores, winners);
    for (int64_t c = 0; c < k; ++c) indices[c] = index(winners[c]);
  }
};

}  // namespace
}  // namespace million_experts
