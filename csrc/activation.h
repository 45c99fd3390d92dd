// The experts' activations and their slopes, a vector at a time.
#pragma once

#include "kernels.h"
#include "simd.h"

namespace million_experts {
namespace {

// h = act(z), slope = act'(z); NaN stays NaN.
template <class A>
inline void activate(Activation name, Vec<A> z, Vec<A>& h, Vec<A>& slope) {
  const Vec<A> one = splat(A(1)), zero{};
  if (name == Activation::gelu) {
    const Vec<A> below = A(0.5) * (one + error_function(z * A(0.70710678118654752)));  // P(normal < z)
    const Vec<A> density = A(0.39894228040143268) * exponential(z * z * A(-0.5));
    h = z * below;
    slope = below + z * density;
  } else if (name == Activation::relu) {
    h = z < zero ? zero : z;
    slope = z <= zero ? zero : one;
  } else {
    const Vec<A> sigmoid = one / (one + exponential(-z));
    h = z * sigmoid;
    slope = sigmoid * (one + z * (one - sigmoid));
  }
}

// The same for an array whose length is rounded up to whole vectors.
template <class A>
inline void activate(Activation name, const A* z, int count, A* h, A* slope) {
  for (int at = 0; at < count; at += lanes<A>) {
    Vec<A> value, derivative;
    activate<A>(name, load(z + at), value, derivative);
    store(h + at, value);
    if (slope) store(slope + at, derivative);
  }
}

}  // namespace
}  // namespace million_experts
