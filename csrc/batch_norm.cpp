// BatchNorm in training mode over the tokens that a mask leaves, one block of channels at a time: the block
// stays in the cache for all passes over it. A channel is summed by one thread in one order.

#include "isa.h"
#include "parallel.h"
#include "simd.h"

namespace million_experts {
namespace {

constexpr int block_vectors = 4;
constexpr int64_t run_rows = 128;  // sums are taken of runs of rows first, which keeps their rounding small

// Calls body.operator()<whole>(first channel, count) for each block of channels.
template <class A, class Body>
void for_channels(const BatchNorm& a, const Body& body) {
  const int64_t width = block_vectors * lanes<A>;
  parallel_items(a.threads, (a.C + width - 1) / width, [&](int64_t block) {
    const int64_t first = block * width;
    body(first, a.C - first < width ? a.C - first : width);
  });
}

// Up to block_vectors vectors of consecutive channels; `count` of them are real.
template <class A>
struct Channels {
  Vec<A> v[block_vectors];

  static Channels all(A value) {
    Channels c;
    for (auto& v : c.v) v = splat(value);
    return c;
  }
  static Channels load(const A* p, int64_t count) {
    Channels c;
    for (int i = 0; i < block_vectors; ++i) {
      const int64_t rest = count - i * lanes<A>;
      c.v[i] = rest >= lanes<A> ? million_experts::load(p + i * lanes<A>)
               : rest > 0       ? load_part<A>(p + i * lanes<A>, static_cast<int>(rest))
                                : Vec<A>{};
    }
    return c;
  }
  void store(A* p, int64_t count) const {
    for (int i = 0; i < block_vectors; ++i) {
      const int64_t rest = count - i * lanes<A>;
      if (rest >= lanes<A>) million_experts::store(p + i * lanes<A>, v[i]);
      else if (rest > 0) store_part<A>(p + i * lanes<A>, v[i], static_cast<int>(rest));
    }
  }
  Channels operator+(const Channels& o) const { return zip(o, [](Vec<A> a, Vec<A> b) { return a + b; }); }
  Channels operator-(const Channels& o) const { return zip(o, [](Vec<A> a, Vec<A> b) { return a - b; }); }
  Channels operator*(const Channels& o) const { return zip(o, [](Vec<A> a, Vec<A> b) { return a * b; }); }
  Channels operator/(const Channels& o) const { return zip(o, [](Vec<A> a, Vec<A> b) { return a / b; }); }

 private:
  template <class F>
  Channels zip(const Channels& o, const F& f) const {
    Channels c;
    for (int i = 0; i < block_vectors; ++i) c.v[i] = f(v[i], o.v[i]);
    return c;
  }
};

// Sum over the real tokens of term(t).
template <class A, class Term>
inline Channels<A> sum_tokens(const BatchNorm& a, const Term& term) {
  Channels<A> total = Channels<A>::all(0);
  for (int64_t start = 0; start < a.T; start += run_rows) {
    const int64_t end = start + run_rows < a.T ? start + run_rows : a.T;
    Channels<A> run = Channels<A>::all(0);
    for (int64_t t = start; t < end; ++t)
      if (!a.mask || a.mask[t]) run = run + term(t);
    total = total + run;
  }
  return total;
}

// 1 / sqrt(variance + eps)
template <class A>
Channels<A> reciprocal_root(Channels<A> variance, A eps) {
  for (auto& v : variance.v)
    for (int i = 0; i < lanes<A>; ++i) v[i] = A(1) / std::sqrt(v[i] + eps);
  return variance;
}

int64_t real_tokens(const BatchNorm& a) {
  int64_t count = a.mask ? 0 : a.T;
  for (int64_t t = 0; a.mask && t < a.T; ++t) count += a.mask[t] != 0;
  return count;
}

template <class A>
void forward(const BatchNorm& a) {
  using Block = Channels<A>;
  const A* x = static_cast<const A*>(a.x);
  A* y = static_cast<A*>(a.y);
  const Block tokens = Block::all(static_cast<A>(real_tokens(a)));
  for_channels<A>(a, [&](int64_t first, int64_t count) {
    const auto at = [&](const void* p) { return Block::load(static_cast<const A*>(p) + first, count); };
    const auto row = [&](int64_t t) { return Block::load(x + t * a.C + first, count); };
    const Block mean = sum_tokens<A>(a, row) / tokens;
    const Block variance = sum_tokens<A>(a, [&](int64_t t) {
                             const Block centred = row(t) - mean;
                             return centred * centred;
                           }) / tokens;
    const Block scale = reciprocal_root(variance, static_cast<A>(a.eps)) * at(a.weight), bias = at(a.bias);
    for (int64_t t = 0; t < a.T; ++t) {
      const Block out = !a.mask || a.mask[t] ? (row(t) - mean) * scale + bias : Block::all(0);
      out.store(y + t * a.C + first, count);
    }
    mean.store(static_cast<A*>(a.mean) + first, count);
    variance.store(static_cast<A*>(a.variance) + first, count);
  });
}

// With z = (x - mean) * rstd, y = weight * z + bias:
// grad_x = weight * rstd * (grad_y - mean(grad_y) - z * mean(grad_y * z)) over the real tokens.
template <class A>
void backward(const BatchNorm& a) {
  using Block = Channels<A>;
  const A* x = static_cast<const A*>(a.x);
  const A* grad_y = static_cast<const A*>(a.grad_y);
  A* grad_x = static_cast<A*>(a.grad_x);
  const Block tokens = Block::all(static_cast<A>(real_tokens(a)));
  for_channels<A>(a, [&](int64_t first, int64_t count) {
    const auto at = [&](const void* p) { return Block::load(static_cast<const A*>(p) + first, count); };
    const Block mean = at(a.mean), rstd = reciprocal_root(at(a.variance), static_cast<A>(a.eps));
    const Block scale = rstd * at(a.weight);
    const auto z = [&](int64_t t) { return (Block::load(x + t * a.C + first, count) - mean) * rstd; };
    const auto grad = [&](int64_t t) { return Block::load(grad_y + t * a.C + first, count); };
    const Block grad_bias = sum_tokens<A>(a, grad);
    const Block grad_weight = sum_tokens<A>(a, [&](int64_t t) { return grad(t) * z(t); });
    const Block mean_grad = grad_bias / tokens, mean_slope = grad_weight / tokens;
    for (int64_t t = 0; t < a.T; ++t) {
      const Block out =
          !a.mask || a.mask[t] ? scale * (grad(t) - mean_grad - z(t) * mean_slope) : Block::all(0);
      out.store(grad_x + t * a.C + first, count);
    }
    grad_bias.store(static_cast<A*>(a.grad_bias) + first, count);
    grad_weight.store(static_cast<A*>(a.grad_weight) + first, count);
  });
}

}  // namespace

namespace ME_ISA {
void batch_norm(const BatchNorm& a) { a.dtype_sum == DType::f64 ? forward<double>(a) : forward<float>(a); }
void batch_norm_backward(const BatchNorm& a) {
  a.dtype_sum == DType::f64 ? backward<double>(a) : backward<float>(a);
}
}  // namespace ME_ISA

}  // namespace million_experts
