// Experts by dense products, what stands between the products. Where tokens use a good part of few experts, every
// token times every row is faster by matrix units than the picks alone by vectors. `ops/cpu_products.py` calls the
// products; here a token's picks are taken from its row of them, go through activation and gate, and are spread over
// rows that the next product reads.

#include "activation.h"
#include "isa.h"
#include "parallel.h"
#include "scratch.h"

namespace million_experts {
namespace {

constexpr int group_pairs = 64;
constexpr int64_t share_tokens = 16;  // what a thread takes at a time

// Numbers of one pair each, as arrays that are whole vectors long.
struct Group {
  alignas(64) float pre[group_pairs] = {}, pre2[group_pairs] = {}, hidden[group_pairs], slope[group_pairs];
};

// Writes sums [count] as bfloat16 and leaves zeros for the next token.
void hand_over(float* sums, bf16* out, int64_t count) {
  constexpr int W = lanes<float>;
  int64_t at = 0;
  for (; at + W <= count; at += W) {
    Storage<float, bf16>::store(out + at, load(sums + at));
    store(sums + at, Vec<float>{});
  }
  for (; at < count; ++at) {
    out[at] = Narrow<bf16>::from(sums[at]);
    sums[at] = 0;
  }
}

// Calls token(t, sums) with `length` zeros a thread, which it must leave zero.
template <class Token>
void for_tokens(const ExpertProducts& a, int64_t length, const Token& token) {
  ThreadScratch<float> sums(a.threads, length);
  sums.fill(0);
  parallel_shares(a.threads, (a.T + share_tokens - 1) / share_tokens, [&](int64_t item, int thread) {
    const int64_t last = (item + 1) * share_tokens < a.T ? (item + 1) * share_tokens : a.T;
    for (int64_t t = item * share_tokens; t < last; ++t) token(t, sums.of(thread));
  });
}

// Calls group(first, count) for the pairs of token t, at most group_pairs at a time.
template <class Visit>
void for_groups(const ExpertProducts& a, int64_t t, const Visit& group) {
  const int64_t end = (t + 1) * a.K;
  for (int64_t at = t * a.K; at < end; at += group_pairs)
    group(at, static_cast<int>(end - at < group_pairs ? end - at : group_pairs));
}

template <bool glu>
void forward(const ExpertProducts& a) {
  const bf16* products = static_cast<const bf16*>(a.products);
  bf16* of_up = static_cast<bf16*>(a.of_up);
  for_tokens(a, a.N, [&](int64_t t, float* sums) {
    const bf16* row = products + t * a.N * (glu ? 2 : 1);
    Group g;
    for_groups(a, t, [&](int64_t at, int count) {
      for (int i = 0; i < count; ++i) {
        const int64_t expert = a.indices[at + i];
        a.pre[at + i] = g.pre[i] = widen(row[expert]);
        if (glu) a.pre[a.pre_stride + at + i] = g.pre2[i] = widen(row[a.N + expert]);
      }
      activate(a.activation, g.pre, count, g.hidden, static_cast<float*>(nullptr));
      for (int i = 0; i < count; ++i)
        sums[a.indices[at + i]] += a.gates[at + i] * (glu ? g.hidden[i] * g.pre2[i] : g.hidden[i]);
    });
    hand_over(sums, of_up + t * a.N, a.N);
  });
}

template <bool glu>
void backward(const ExpertProducts& a) {
  const bf16* products = static_cast<const bf16*>(a.products);
  bf16 *of_up = static_cast<bf16*>(a.of_up), *of_inner = static_cast<bf16*>(a.of_inner);
  const int64_t inner = a.N * (glu ? 2 : 1);
  for_tokens(a, inner + a.N, [&](int64_t t, float* sums) {
    const bf16* row = products + t * a.N;
    float* up_sums = sums + inner;
    Group g;
    for_groups(a, t, [&](int64_t at, int count) {
      for (int i = 0; i < count; ++i) {
        g.pre[i] = a.pre[at + i];
        if (glu) g.pre2[i] = a.pre[a.pre_stride + at + i];
      }
      activate(a.activation, g.pre, count, g.hidden, g.slope);
      for (int i = 0; i < count; ++i) {
        const int64_t expert = a.indices[at + i];
        const float dot = widen(row[expert]), gate = a.gates[at + i];
        const float hidden = glu ? g.hidden[i] * g.pre2[i] : g.hidden[i], grad_hidden = dot * gate;
        sums[expert] += grad_hidden * (glu ? g.slope[i] * g.pre2[i] : g.slope[i]);
        if (glu) sums[a.N + expert] += grad_hidden * g.hidden[i];
        up_sums[expert] += gate * hidden;
        if (a.grad_gates) a.grad_gates[at + i] = dot * hidden;
      }
    });
    hand_over(sums, of_inner + t * inner, inner);
    hand_over(up_sums, of_up + t * a.N, a.N);
  });
}

}  // namespace

namespace ME_ISA {
void expert_products_forward(const ExpertProducts& a) { a.R == 3 ? forward<true>(a) : forward<false>(a); }
void expert_products_backward(const ExpertProducts& a) { a.R == 3 ? backward<true>(a) : backward<false>(a); }
}  // namespace ME_ISA

}  // namespace million_experts
