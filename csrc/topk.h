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

// The slow and plain way, for rows with NaN or infinities and where equal numbers compete: insertion into a sorted
// list of value_of(p), p in [0, count). `before(p, q)` orders equals.
template <class A, class Value, class Before>
inline void best_by_insertion(const Value& value_of, int64_t count, int64_t k, const Before& before, A* best,
                              int32_t* positions) {
  int64_t kept = 0;
  for (int64_t p = 0; p < count; ++p) {
    const A value = value_of(p);
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

// How many of the candidates are larger than each of those in `vectors` vectors from `at` on. The vectors are taken
// together because each number is laid out for comparison once for all of them.
template <int vectors, class A>
inline void count_larger(TopKScratch<A>& s, int64_t count, int64_t at) {
  constexpr int W = lanes<A>;
  Vec<A> own[vectors];
  LaneCounts<A> larger[vectors] = {};
  for (int v = 0; v < vectors; ++v) own[v] = load(s.values + at + v * W);
  for (int64_t j = 0; j < count; ++j) {
    const Vec<A> other = splat(s.values[j]);
    for (int v = 0; v < vectors; ++v) larger[v] = count_if_larger<A>(larger[v], other, own[v]);
  }
  for (int v = 0; v < vectors; ++v)
    for (int i = 0; i < W; ++i) s.ranks[at + v * W + i] = static_cast<int32_t>(larger[v][i]);
}

// Sorts the candidates, descending: the place of one is the number of those larger. False where two are equal, and
// nothing is sorted. `all`: they are the whole row, and a candidate's position is its place in the list.
template <class A>
inline bool rank(TopKScratch<A>& s, int64_t count, bool all) {
  constexpr int W = lanes<A>;
  int64_t at = 0;
  for (; at + 4 * W <= count; at += 4 * W) count_larger<4>(s, count, at);
  switch ((count - at + W - 1) / W) {
    case 4: count_larger<4>(s, count, at); break;
    case 3: count_larger<3>(s, count, at); break;
    case 2: count_larger<2>(s, count, at); break;
    case 1: count_larger<1>(s, count, at); break;
  }
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    sum += s.ranks[i];
    s.sorted[s.ranks[i]] = s.values[i];
    s.sorted_positions[s.ranks[i]] = all ? static_cast<int32_t>(i) : s.positions[i];
  }
  return sum == count * (count - 1) / 2;  // equal numbers share a place, and others are empty
}

// The k largest of `row`, descending, and their positions. The row has `count` numbers, padded to whole vectors
// with minus infinity. `before(p, q)` orders equal numbers.
template <class A, class Before>
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
    if (rank(scratch, found, count <= limit)) {
      std::memcpy(best, scratch.sorted, sizeof(A) * static_cast<size_t>(k));
      std::memcpy(positions, scratch.sorted_positions, sizeof(int32_t) * static_cast<size_t>(k));
      return;
    }
  }
  best_by_insertion([row](int64_t p) { return row[p]; }, count, k, before, best, positions);
}

}  // namespace
}  // namespace million_experts
