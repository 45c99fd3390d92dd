// Vectors of the widest registers that this file is compiled for, in the compiler's own vector extension, so
// that one source serves every instruction set. Everything here has internal linkage on purpose: were a function
// shared between instruction sets, the linker would keep one copy, perhaps the one that the processor lacks.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__AVX512F__)
#define ME_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define ME_VECTOR_BYTES 32
#else
#define ME_VECTOR_BYTES 16
#endif

namespace million_experts {
namespace {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <class T, int bytes = ME_VECTOR_BYTES>
struct VectorOf {
  typedef T type __attribute__((vector_size(bytes)));
  typedef T unaligned __attribute__((vector_size(bytes), aligned(1), may_alias));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int lanes = ME_VECTOR_BYTES / sizeof(T);

template <class A>
inline Vec<A> splat(A value) {
  return value - Vec<A>{};
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// --- one element -----------------------------------------------------------------------------------------

inline float widen(float v) { return v; }
inline double widen(double v) { return v; }
inline float widen(bf16 v) { return bits_to_float(uint32_t{v.bits} << 16); }
inline float widen(f16 v) {
  const uint32_t sign = uint32_t(v.bits & 0x8000) << 16, magnitude = v.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  if (magnitude < 0x400) {  // subnormal: a multiple of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return bits_to_float(sign | float_to_bits(value));
  }
  return bits_to_float(sign | ((magnitude << 13) + ((127 - 15) << 23)));
}

template <class T>
struct Narrow;
template <>
struct Narrow<float> {
  static float from(double v) { return static_cast<float>(v); }
};
template <>
struct Narrow<double> {
  static double from(double v) { return v; }
};
template <>
struct Narrow<bf16> {
  static bf16 from(float v) {
    const uint32_t bits = float_to_bits(v);
    if (v != v) return {static_cast<uint16_t>((bits >> 16) | 0x40)};
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  }
  static bf16 from(double v) { return from(static_cast<float>(v)); }
};
template <>
struct Narrow<f16> {
  static f16 from(float v) {
    const uint32_t bits = float_to_bits(v), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {static_cast<uint16_t>(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {static_cast<uint16_t>(sign | 0x7c00)};  // 65520 and above round to inf
    if (magnitude < 0x38800000) {  // below 2^-14: count multiples of 2^-24, rounded to even by the addition
      const float count = bits_to_float(magnitude) * 0x1p24f + 0x1.8p23f;
      return {static_cast<uint16_t>(sign | (float_to_bits(count) & 0x7ff))};
    }
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    return {static_cast<uint16_t>(sign | ((rounded - ((127 - 15) << 23)) >> 13))};
  }
  static f16 from(double v) { return from(static_cast<float>(v)); }
};

// --- whole vectors ---------------------------------------------------------------------------------------

template <class A>
inline Vec<A> load(const A* p) {
  return *reinterpret_cast<const typename VectorOf<A>::unaligned*>(p);
}
template <class A>
inline void store(A* p, Vec<A> v) {
  *reinterpret_cast<typename VectorOf<A>::unaligned*>(p) = v;
}

// Loads lanes<A> elements stored as T and widens them to the accumulation type A.
template <class A, class T>
struct Storage {  // any pair without a faster way
  static Vec<A> load(const T* p) {
    Vec<A> v;
    for (int i = 0; i < lanes<A>; ++i) v[i] = widen(p[i]);
    return v;
  }
  static void store(T* p, Vec<A> v) {
    for (int i = 0; i < lanes<A>; ++i) p[i] = Narrow<T>::from(v[i]);
  }
};
template <class A>
struct Storage<A, A> {
  static Vec<A> load(const A* p) { return million_experts::load(p); }
  static void store(A* p, Vec<A> v) { million_experts::store(p, v); }
};
template <>
struct Storage<double, float> {
  typedef typename VectorOf<float, ME_VECTOR_BYTES / 2>::type Half;
  typedef typename VectorOf<float, ME_VECTOR_BYTES / 2>::unaligned HalfUnaligned;
  static Vec<double> load(const float* p) {
    return __builtin_convertvector(Half(*reinterpret_cast<const HalfUnaligned*>(p)), Vec<double>);
  }
  static void store(float* p, Vec<double> v) {
    *reinterpret_cast<HalfUnaligned*>(p) = __builtin_convertvector(v, Half);
  }
};
template <>
struct Storage<float, bf16> {
  typedef typename VectorOf<uint16_t, ME_VECTOR_BYTES / 2>::type Half;
  typedef typename VectorOf<uint16_t, ME_VECTOR_BYTES / 2>::unaligned HalfUnaligned;
  static Vec<float> load(const bf16* p) {
#if defined(__AVX512F__)
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return reinterpret_cast<Vec<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
#elif defined(__AVX2__)
    const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<Vec<float>>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
#else
    const Half raw = *reinterpret_cast<const HalfUnaligned*>(p);
    return reinterpret_cast<Vec<float>>(__builtin_convertvector(raw, Vec<uint32_t>) << 16);
#endif
  }
  static void store(bf16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
    // Rounds to nearest even like the code below, but takes subnormal numbers for zero.
    const __m256bh narrow = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
    std::memcpy(p, &narrow, sizeof narrow);
#else
    const Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(v);
    const Vec<uint32_t> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Vec<uint32_t> quiet = (bits >> 16) | 0x40;
    const auto is_nan = reinterpret_cast<Vec<uint32_t>>(v != v);
    const Vec<uint32_t> narrow = (is_nan & quiet) | (~is_nan & rounded);
    *reinterpret_cast<HalfUnaligned*>(p) = __builtin_convertvector(narrow, Half);
#endif
  }
};
#if defined(__AVX512F__)
template <>
struct Storage<float, f16> {
  static Vec<float> load(const f16* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return reinterpret_cast<Vec<float>>(_mm512_cvtph_ps(raw));
  }
  static void store(f16* p, Vec<float> v) {
    const __m256i narrow = _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
  }
};
#elif defined(__AVX2__)
template <>
struct Storage<float, f16> {
  static Vec<float> load(const f16* p) {
    return reinterpret_cast<Vec<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static void store(f16* p, Vec<float> v) {
    const __m128i narrow = _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
  }
};
#endif

// The first `count` < lanes elements; the others are zero, and memory beyond is not touched.
template <class A, class T>
inline Vec<A> load_part(const T* p, int count) {
  Vec<A> v{};
  for (int i = 0; i < count; ++i) v[i] = static_cast<A>(widen(p[i]));
  return v;
}
template <class A, class T>
inline void store_part(T* p, Vec<A> v, int count) {
  for (int i = 0; i < count; ++i) p[i] = Narrow<T>::from(v[i]);
}

template <class A>
inline A horizontal_sum(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
  else return _mm512_reduce_add_pd(reinterpret_cast<__m512d>(v));
#else
  for (int width = lanes<A> / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) v[i] += v[i + width];
  return v[0];
#endif
}

// Lanes of two vectors in turn: a0 b0 a1 b1 ..., the lower or the upper half of that.
template <bool upper, class A>
inline Vec<A> interleave(Vec<A> a, Vec<A> b) {
  constexpr int W = lanes<A>, h = upper ? W / 2 : 0;
  if constexpr (W == 2) return __builtin_shufflevector(a, b, h, h + 2);
  else if constexpr (W == 4) return __builtin_shufflevector(a, b, h, h + 4, h + 1, h + 5);
  else if constexpr (W == 8)
    return __builtin_shufflevector(a, b, h, h + 8, h + 1, h + 9, h + 2, h + 10, h + 3, h + 11);
  else
    return __builtin_shufflevector(a, b, h, h + 16, h + 1, h + 17, h + 2, h + 18, h + 3, h + 19, h + 4, h + 20, h + 5,
                                   h + 21, h + 6, h + 22, h + 7, h + 23);
}

// Transposes a square of lanes x lanes numbers: interleaving rows i and i + lanes / 2 does it in log2(lanes) rounds.
template <class A>
inline void transpose(Vec<A>* rows) {
  constexpr int W = lanes<A>;
  for (int round = 1; round < W; round *= 2) {
    Vec<A> next[W];
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = interleave<false, A>(rows[i], rows[i + W / 2]);
      next[2 * i + 1] = interleave<true, A>(rows[i], rows[i + W / 2]);
    }
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// Lane i is set where a[i] >= b[i]; NaN compares false.
inline uint32_t lanes_at_least(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), _CMP_GE_OQ));
#elif defined(__SSE2__)
  return _mm_movemask_ps(_mm_cmpge_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b)));
#else
  uint32_t mask = 0;
  for (int i = 0; i < lanes<float>; ++i) mask |= uint32_t(a[i] >= b[i]) << i;
  return mask;
#endif
}
inline uint32_t lanes_at_least(Vec<double> a, Vec<double> b) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), _CMP_GE_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), _CMP_GE_OQ));
#else
  uint32_t mask = 0;
  for (int i = 0; i < lanes<double>; ++i) mask |= uint32_t(a[i] >= b[i]) << i;
  return mask;
#endif
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
template <class A>
using LaneCounts = Vec<typename IntegerAs<A>::type>;

// Adds one to the lanes in which a > b.
template <class A>
inline LaneCounts<A> count_if_larger(LaneCounts<A> counts, Vec<A> a, Vec<A> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __mmask16 larger =
        _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_GT_OQ);
    const __m512i old = reinterpret_cast<__m512i>(counts);
    return reinterpret_cast<LaneCounts<A>>(_mm512_mask_add_epi32(old, larger, old, _mm512_set1_epi32(1)));
  }
#endif
  return counts - (a > b);  // a comparison is 0 or -1 in each lane
}

// Appends the chosen lanes of `v`, and their positions counted from `first`, to two arrays; returns how many. Up to
// a whole vector may be written behind them.
template <class A>
inline int append_lanes(uint32_t chosen, Vec<A> v, int32_t first, A* values, int32_t* positions) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __mmask16 mask = static_cast<__mmask16>(chosen);
    _mm512_storeu_ps(values, _mm512_maskz_compress_ps(mask, reinterpret_cast<__m512>(v)));
    _mm512_storeu_si512(positions, _mm512_maskz_compress_epi32(mask, _mm512_add_epi32(lane, _mm512_set1_epi32(first))));
    return __builtin_popcount(chosen);
  }
#endif
  int count = 0;
  for (; chosen; chosen &= chosen - 1) {
    const int lane = __builtin_ctz(chosen);
    values[count] = v[lane];
    positions[count++] = first + lane;
  }
  return count;
}

// Not for NaN.
template <class A>
inline Vec<A> maximum(Vec<A> a, Vec<A> b) {
  return a > b ? a : b;
}
template <class A>
inline Vec<A> minimum(Vec<A> a, Vec<A> b) {
  return a < b ? a : b;
}
template <class A>
inline A horizontal_max(Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_reduce_max_ps(reinterpret_cast<__m512>(v));
  else return _mm512_reduce_max_pd(reinterpret_cast<__m512d>(v));
#else
  A largest = v[0];
  for (int i = 1; i < lanes<A>; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}
template <class A>
inline A horizontal_min(Vec<A> v) {
  return -horizontal_max<A>(-v);
}

// Stores past the caches where the address allows it, for what is written once and not read soon.
template <class A, class T>
inline void stream(T* p, Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == sizeof(T)) {
    if (reinterpret_cast<uintptr_t>(p) % 64 == 0) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
      return;
    }
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == sizeof(T)) {
    if (reinterpret_cast<uintptr_t>(p) % 32 == 0) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
      return;
    }
  }
#endif
  Storage<A, T>::store(p, v);
}

// Must follow streamed stores before another thread reads them.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

inline void stream_zero(void* p, int64_t bytes) {
  char* at = static_cast<char*>(p);
  char* const end = at + bytes;
  const int64_t misaligned = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(at) % ME_VECTOR_BYTES);
  if (misaligned > 0 && misaligned <= bytes) {
    std::memset(at, 0, static_cast<size_t>(misaligned));
    at += misaligned;
  }
  for (; end - at >= ME_VECTOR_BYTES; at += ME_VECTOR_BYTES)
    stream<float>(reinterpret_cast<float*>(at), Vec<float>{});
  std::memset(at, 0, static_cast<size_t>(end - at));
}

inline void prefetch_row(const void* p, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(p) + at, 0, 3);
}

// --- functions -------------------------------------------------------------------------------------------

// e^x, relative error below 2e-7; 0 below -87.3 and infinite above 88.3, just before float ends.
inline Vec<float> exponential(Vec<float> exponent) {
  Vec<float> x = exponent < -87.3f ? splat(-87.3f) : exponent;
  x = x > 88.3f ? splat(88.3f) : x;
  const Vec<float> shifted = x * 1.44269504f + 0x1.8p23f;  // the low bits now hold round(x / ln 2)
  const Vec<float> n = shifted - 0x1.8p23f;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = splat(1.3888889e-3f);  // Taylor to the sixth power: |r| <= ln(2) / 2
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 1.6666667e-1f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const Vec<uint32_t> scale = (reinterpret_cast<Vec<uint32_t>>(shifted) + 127) << 23;
  p = p * reinterpret_cast<Vec<float>>(scale);
  p = exponent < -87.3f ? Vec<float>{} : p;
  return exponent > 88.3f ? splat(bits_to_float(0x7f800000)) : p;
}

// The error function, relative error below 4e-7: a quotient of polynomials in x^2, fitted for the least
// largest relative error on |x| <= 3.92. Beyond it is 1 to the last bit of a float, and must be exactly that:
// GELU multiplies what is missing by numbers of any size.
inline Vec<float> error_function(Vec<float> argument) {
  Vec<float> x = argument < -3.92f ? splat(-3.92f) : argument;
  x = x > 3.92f ? splat(3.92f) : x;
  const Vec<float> s = x * x;
  Vec<float> p = splat(2.050283683274756e-06f);
  p = p * s + 0.0002848837757483125f;
  p = p * s + 0.003765258239582181f;
  p = p * s + 0.05274765565991402f;
  p = p * s + 0.19039690494537354f;
  p = p * s + 1.1283791065216064f;
  Vec<float> q = splat(3.809379632002674e-05f);
  q = q * s + 0.0011624653125181794f;
  q = q * s + 0.01496849488466978f;
  q = q * s + 0.11410534381866455f;
  q = q * s + 0.5020676255226135f;
  q = q * s + 1.0f;
  const Vec<float> inside = x * p / q;
  const Vec<float> above = argument >= 3.92f ? splat(1.0f) : inside;
  return argument <= -3.92f ? splat(-1.0f) : above;
}

inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}
inline Vec<double> error_function(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = std::erf(x[i]);
  return x;
}

}  // namespace
}  // namespace million_experts
