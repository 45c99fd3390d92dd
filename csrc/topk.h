// The k largest of a row of numbers, without sorting the row.
//
// A threshold that at least k numbers reach is found by bisection: over the maxima of groups of lanes where the
// row is long, which is valid because each group holds one number that large. What reaches it, little more than
// k numbers, is collected in one pass and ranked by counting.
#pragma once

#include "simd.h"

namespace million_experts {
namespace {

template <class A>
constexpr A minus_infinity = -__builtin_inf();

template <class A>
inline int64_t whole_vectors(int64_t count) {
  return (count + lanes<A> - 1) / lanes<A> * lanes<A>;
}

template <class A>
inline int64_t count_at_least(const A* values, int64_t padded, A threshold) {
  const Vec<A> t = splat(threshold);
  int64_t count = 0;
  for (int64_t at = 0; at < padded; at += lanes<A>) count += __builtin_popcount(lanes_at_least(load(values + at), t));
  return count;
}

// A value that at least k of the values reach, and not many more than k + slack where bisection can tell them
// apart. `values` has `count` real numbers, then minus infinity up to whole vectors. False where some that
// matter are infinite.
template <class A>
inline bool find_threshold(const A* values, int64_t count, int64_t k, int64_t slack, A& threshold) {
  constexpr int W = lanes<A>;
  const int64_t padded = whole_vectors<A>(count);
  Vec<A> largest = load(values);
  for (int64_t at = W; at < padded; at += W) largest = maximum<A>(largest, load(values + at));
  A high = horizontal_max<A>(largest), low;
  if (whole_vectors<A>(k) <= count) {
    Vec<A> smallest = load(values);
    for (int64_t at = W; at < k; at += W) smallest = minimum<A>(smallest, load(values + at));
    low = horizontal_min<A>(smallest);
  } else {
    low = values[0];
    for (int64_t i = 1; i < k; ++i) low = values[i] < low ? values[i] : low;
  }
  if (!(low > minus_infinity<A> && high < -minus_infinity<A>)) return false;
  for (;;) {
    const A middle = low + (high - low) * A(0.5);
    if (!(middle > low && middle < high)) break;
    const int64_t reaching = count_at_least(values, padded, middle);
    if (reaching < k) {
      high = middle;
    } else {
      low = middle;
      if (reaching <= k + slack) break;
    }
  }
  threshold = low;
  return true;
}

// What `best_of` needs beside the row: arrays as long as the row, in whole vectors.
template <class A>
struct TopKScratch {
  A *maxima, *values, *sorted;
  int32_t *positions, *ranks, *sorted_positions;
};

// A number that is NaN counts as the largest, as in torch.topk.
template <class A>
inline bool exceeds(A a, A b) {
  return a > b || (a != a && b == b);
}

// For rows with NaN, infinities or many equal numbers: insertion into a sorted list. `before(p, q)` orders equals.
template <class A, class Before>
inline void best_by_insertion(const A* values, int64_t count, int64_t k, const Before& before, A* best,
                              int32_t* positions) {
  int64_t kept = 0;
  for (int64_t p = 0; p < count; ++p) {
    const A value = values[p];
    const auto goes_before = [&](int64_t at) {
      if (exceeds(value, best[at])) return true;
      return !exceeds(best[at], value) && before(static_cast<int32_t>(p), positions[at]);
    };
    if (kept == k && !goes_before(k - 1)) continue;
    int64_t at = kept < k ? kept++ : k - 1;
    for (; at > 0 && goes_before(at - 1); --at) {
      best[at] = best[at - 1];
      positions[at] = positions[at - 1];
    }
    best[at] = value;
    positions[at] = static_cast<int32_t>(p);
  }
}

template <class A>
struct IntegerAs;
template <>
struct IntegerAs<float> {
  typedef int32_t type;
};
template <>
struct IntegerAs<double> {
  typedef int64_t type;
};

// Sorts the candidates, descending: the place of one is the number of those that come before it, equal ones in
// the order they have now. `all`: they are the whole row, and a candidate's position is its place in the list.
template <class A>
inline void rank(TopKScratch<A>& s, int64_t count, bool all) {
  constexpr int W = lanes<A>;
  typedef Vec<typename IntegerAs<A>::type> Counts;
  Counts positions_in_vector;
  for (int i = 0; i < W; ++i) positions_in_vector[i] = i;
  for (int64_t at = 0; at < count; at += W) {
    const Vec<A> own = load(s.values + at);
    Counts before{};  // comparisons are 0 or -1 in each lane
    for (int64_t j = 0; j < at; ++j) before += splat(s.values[j]) >= own;
    const int64_t here = at + W < count ? at + W : count;
    for (int64_t j = at; j < here; ++j) {
      const Vec<A> other = splat(s.values[j]);
      const Counts later = positions_in_vector > static_cast<typename IntegerAs<A>::type>(j - at);
      before += (other > own) | ((other == own) & later);
    }
    for (int64_t j = here; j < count; ++j) before += splat(s.values[j]) > own;
    for (int i = 0; i < W; ++i) s.ranks[at + i] = static_cast<int32_t>(-before[i]);
  }
  for (int64_t i = 0; i < count; ++i) {
    s.sorted[s.ranks[i]] = s.values[i];
    s.sorted_positions[s.ranks[i]] = all ? static_cast<int32_t>(i) : s.positions[i];
  }
}

// The k largest of `row`, descending, and their positions. The row has `count` numbers, padded to whole vectors
// with minus infinity. Equal numbers: lowest position first, or as `before` says where positions do not order
// them (`ties_by_position` false).
template <bool ties_by_position, class A, class Before>
inline void best_of(const A* row, int64_t count, int64_t k, TopKScratch<A>& scratch, const Before& before, A* best,
                    int32_t* positions) {
  constexpr int W = lanes<A>;
  const int64_t padded = whole_vectors<A>(count), limit = 2 * k + 16, groups = whole_vectors<A>(4 * k);
  Vec<A> odd{};  // NaN and infinities leave NaN here
  A threshold = minus_infinity<A>;
  bool usual;
  int64_t real = 0;
  if (count > limit && groups < padded) {
    for (int64_t g = 0; g < groups; g += W) {
      Vec<A> largest = load(row + g);
      odd += largest * A(0);
      int64_t at = g + groups;
      for (; at + W <= count; at += groups) {
        const Vec<A> more = load(row + at);
        odd += more * A(0);
        largest = maximum<A>(largest, more);
      }
      if (at < padded) largest = maximum<A>(largest, load(row + at));  // the last vector, padded
      store(scratch.maxima + g, largest);
    }
    real = count / W * W;
  } else {
    for (; real + W <= count; real += W) odd += load(row + real) * A(0);
  }
  A check = horizontal_sum<A>(odd);
  for (int64_t i = real; i < count; ++i) check += row[i] * A(0);
  usual = check == A(0);
  if (usual && count > limit) {
    usual = groups < padded ? find_threshold(scratch.maxima, groups, k, k / 4 + 2, threshold)
                            : find_threshold(row, count, k, k / 4 + 2, threshold);
  }
  int64_t found = 0;
  if (usual && count <= limit) {
    std::memcpy(scratch.values, row, sizeof(A) * static_cast<size_t>(padded));
    found = count;
  } else if (usual) {
    const Vec<A> t = splat(threshold);
    for (int64_t at = 0; at < padded; at += W) {
      uint32_t reach = lanes_at_least(load(row + at), t);
      if (at + W > count) reach &= (1u << (count - at)) - 1;
      found += append_lanes<A>(reach, load(row + at), static_cast<int32_t>(at), scratch.values + found,
                               scratch.positions + found);
    }
    for (int64_t i = found; i % W; ++i) scratch.values[i] = minus_infinity<A>;
    usual = found <= 2 * limit;
  }
  if (usual) {
    rank(scratch, found, count <= limit);
    bool tied = false;
    if (!ties_by_position)
      for (int64_t i = 1; i < found && i <= k; ++i) tied |= scratch.sorted[i] == scratch.sorted[i - 1];
    if (!tied) {
      std::memcpy(best, scratch.sorted, sizeof(A) * static_cast<size_t>(k));
      std::memcpy(positions, scratch.sorted_positions, sizeof(int32_t) * static_cast<size_t>(k));
      return;
    }
  }
  best_by_insertion(row, count, k, before, best, positions);
}

}  // namespace
}  // namespace million_experts
