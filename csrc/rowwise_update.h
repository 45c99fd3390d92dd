// One row of a table and AdamW's step for it: what was missed since the row's last step, then the step itself.
// The row's gradient comes in a buffer of the accumulation type, from wherever it was computed.
#pragma once

#include <cmath>
#include <type_traits>

#include "kernels.h"
#include "simd.h"

namespace million_experts {
namespace {

// --- random bits -------------------------------------------------------------------------------------------

// The finaliser of splitmix64.
inline uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// 32 random bits for each of the columns `first`, `first` + 1, ... of a row with the key `row_key`: the upper half
// is for the table, the lower for the momentum. Functions of the place alone, on any processor.
inline Vec<uint32_t> random_bits(uint64_t row_key, uint32_t first) {
  Vec<uint32_t> h;
  for (int i = 0; i < lanes<uint32_t>; ++i) h[i] = static_cast<uint32_t>(i);
  h = ((h + first) * 0x9e3779b1u) ^ static_cast<uint32_t>(row_key);
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = ((h ^ (h >> 13)) + static_cast<uint32_t>(row_key >> 32)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// Adds 16 random bits below those that are kept and truncates; infinities and NaN stay what they are.
inline void store_stochastic(bf16* p, Vec<float> v, Vec<uint32_t> random) {
  const Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(v);
  const auto special = reinterpret_cast<Vec<uint32_t>>((bits & 0x7f800000u) == 0x7f800000u);
  const auto is_nan = reinterpret_cast<Vec<uint32_t>>(v != v);
  const Vec<uint32_t> narrow = (bits + (random & ~special)) >> 16 | (is_nan & 0x40u);
  *reinterpret_cast<Storage<float, bf16>::HalfUnaligned*>(p) =
      __builtin_convertvector(narrow, Storage<float, bf16>::Half);
}

// --- vectors, the last of a row shorter --------------------------------------------------------------------

template <class A, class T>
inline Vec<A> load_up_to(const T* p, int count) {
  return count == lanes<A> ? Storage<A, T>::load(p) : load_part<A>(p, count);
}

template <class A, class T>
inline void store_up_to(T* p, Vec<A> v, int count, bool stochastic, Vec<uint32_t> random) {
  // The last vector takes the same way as the others, through a buffer: an element's bits do not depend on its place.
  T last[lanes<A>];
  T* to = count == lanes<A> ? p : last;
  if constexpr (std::is_same_v<T, bf16> && sizeof(A) == 4) {
    if (stochastic) store_stochastic(to, v, random);
    else Storage<A, T>::store(to, v);
  } else {
    Storage<A, T>::store(to, v);
  }
  if (count < lanes<A>) std::memcpy(p, last, count * sizeof(T));
}

template <class A>
inline void store_up_to(A* p, Vec<A> v, int count) {
  count == lanes<A> ? store(p, v) : store_part<A>(p, v, count);
}

template <class A>
inline Vec<A> square_root(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return reinterpret_cast<Vec<A>>(_mm512_sqrt_ps(reinterpret_cast<__m512>(v)));
  else return reinterpret_cast<Vec<A>>(_mm512_sqrt_pd(reinterpret_cast<__m512d>(v)));
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return reinterpret_cast<Vec<A>>(_mm256_sqrt_ps(reinterpret_cast<__m256>(v)));
  else return reinterpret_cast<Vec<A>>(_mm256_sqrt_pd(reinterpret_cast<__m256d>(v)));
#else
  for (int i = 0; i < lanes<A>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

// --- the first moment --------------------------------------------------------------------------------------

// In place of the type of a first moment where beta1 is 0 and none is kept.
struct NoMomentum {};

template <class M>
constexpr bool has_momentum = !std::is_same_v<M, NoMomentum>;

// Where a row's first moment begins.
template <class M>
inline M* momentum_at(M* exp_avg, int64_t offset) {
  if constexpr (has_momentum<M>) return exp_avg + offset;
  else return nullptr;
}

// --- the row -------------------------------------------------------------------------------------------------

// What all rows of a step have in common.
template <class A>
struct RowwiseStep {
  const double* history;  // [step + 1, 3]
  int64_t step;
  double keep1, keep2, keep_table;  // beta1, beta2, 1 - lr * weight_decay
  A add1, add2;                     // 1 - beta1, 1 - beta2
  A step_size, inverse_root, eps;   // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  bool by_row, stochastic;
  uint64_t key;

  explicit RowwiseStep(const RowwiseAdamW& a)
      : history(a.history), step(a.step), keep1(a.beta1), keep2(a.beta2), keep_table(1 - a.lr * a.weight_decay),
        add1(static_cast<A>(1 - a.beta1)), add2(static_cast<A>(1 - a.beta2)),
        step_size(static_cast<A>(a.lr / (1 - std::pow(a.beta1, static_cast<double>(a.step))))),
        inverse_root(static_cast<A>(1 / std::sqrt(1 - std::pow(a.beta2, static_cast<double>(a.step))))),
        eps(static_cast<A>(a.eps)), by_row(a.by_row), stochastic(a.stochastic), key(a.key) {}

  uint64_t row_key(int64_t row) const { return mix64(key + static_cast<uint64_t>(row) * 0x9e3779b97f4a7c15u); }

  // The product of a factor (0: beta1, 1: beta2, 2: weight decay) over the steps after `from` up to `to`.
  double product(int factor, int64_t from, int64_t to) const {
    if (from == to) return 1;
    return std::exp(history[3 * to + factor] - history[3 * from + factor]);
  }
};

// Scales `count` numbers. Zeros are not written: the moments of rows that no token has met take no memory yet.
template <class A, class T>
inline void scale_row(T* p, int64_t count, A factor, bool stochastic, uint64_t row_key, int shift) {
  constexpr int W = lanes<A>;
  for (int64_t at = 0; at < count; at += W) {
    const int part = count - at < W ? static_cast<int>(count - at) : W;
    const Vec<A> old = load_up_to<A>(p + at, part);
    bool any = false;
    for (int i = 0; i < W; ++i) any |= old[i] != 0;
    if (!any) continue;
    const Vec<uint32_t> random = stochastic ? random_bits(row_key, static_cast<uint32_t>(at)) : Vec<uint32_t>{};
    store_up_to<A>(p + at, old * factor, part, stochastic, (random >> shift) & 0xffffu);
  }
}

// Brings a row that no gradient reaches up to the step.
template <class A, class T, class M>
inline void catch_up_row(const RowwiseStep<A>& s, int64_t row, int64_t R, int64_t D, T* table, M* exp_avg,
                         A* exp_avg_sq, int32_t* last_step) {
  const uint64_t row_key = s.row_key(row);
  const A keep = static_cast<A>(s.product(2, *last_step, s.step));
  if (keep != 1) scale_row<A>(table, R * D, keep, s.stochastic, row_key, 16);
  if constexpr (has_momentum<M>)
    scale_row<A>(exp_avg, R * D, static_cast<A>(s.product(0, *last_step, s.step)), s.stochastic, row_key, 0);
  scale_row<A>(exp_avg_sq, s.by_row ? R : R * D, static_cast<A>(s.product(1, *last_step, s.step)), false, 0, 0);
  *last_step = static_cast<int32_t>(s.step);
}

// The step of a row with the gradient `grad` [R, D]; exp_avg_sq is [R, D], or [R] with one number a row of D. Without
// momentum beta1 is 0.
template <class A, class T, class M>
inline void update_row(const RowwiseStep<A>& s, int64_t row, int64_t R, int64_t D, const A* grad, T* table,
                       M* exp_avg, A* exp_avg_sq, int32_t* last_step) {
  constexpr int W = lanes<A>;
  const uint64_t row_key = s.row_key(row);
  const Vec<A> keep1 = splat(static_cast<A>(s.product(0, *last_step, s.step - 1) * s.keep1));
  const Vec<A> keep_table = splat(static_cast<A>(s.product(2, *last_step, s.step - 1) * s.keep_table));
  const A keep2 = static_cast<A>(s.product(1, *last_step, s.step - 1) * s.keep2);
  constexpr bool rounds = sizeof(A) == 4 && (std::is_same_v<T, bf16> || std::is_same_v<M, bf16>);
  for (int64_t r = 0; r < R; ++r) {
    Vec<A> by_row{};
    if (s.by_row) {
      Vec<A> squares{};
      for (int64_t at = 0; at < D; at += W) {
        const Vec<A> g = load_up_to<A>(grad + r * D + at, D - at < W ? static_cast<int>(D - at) : W);
        squares += g * g;
      }
      const A mean = horizontal_sum<A>(squares) / static_cast<A>(D);
      exp_avg_sq[r] = exp_avg_sq[r] * keep2 + s.add2 * mean;
      by_row = splat(s.step_size / (std::sqrt(exp_avg_sq[r]) * s.inverse_root + s.eps));
    }
    for (int64_t c = 0; c < D; c += W) {
      const int part = D - c < W ? static_cast<int>(D - c) : W;
      const int64_t at = r * D + c;
      const Vec<A> g = load_up_to<A>(grad + at, part);
      Vec<A> m = g;
      if constexpr (has_momentum<M>) m = load_up_to<A>(exp_avg + at, part) * keep1 + s.add1 * g;
      Vec<A> change;
      if (s.by_row) {
        change = by_row * m;
      } else {
        const Vec<A> v = load_up_to<A>(exp_avg_sq + at, part) * keep2 + s.add2 * (g * g);
        store_up_to<A>(exp_avg_sq + at, v, part);
        change = s.step_size * m / (square_root<A>(v) * s.inverse_root + s.eps);
      }
      const Vec<A> p = load_up_to<A>(table + at, part) * keep_table - change;
      Vec<uint32_t> random{};
      if (rounds && s.stochastic) random = random_bits(row_key, static_cast<uint32_t>(at));
      if constexpr (has_momentum<M>) store_up_to<A>(exp_avg + at, m, part, s.stochastic, random & 0xffffu);
      store_up_to<A>(table + at, p, part, s.stochastic, random >> 16);
    }
  }
  *last_step = static_cast<int32_t>(s.step);
}

}  // namespace
}  // namespace million_experts
