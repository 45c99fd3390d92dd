// The whole layer for a few tokens, as `generate` calls it: query projection and norm, sub-key scores, best
// pairs, gates, experts. With so little work the time goes into waiting: for other threads, for a call to begin,
// for memory. So there is one call, work is cut finely enough for every thread even where there is one token, and
// the experts of a head are on their way from memory while its gates are computed.

#include "activation.h"
#include "isa.h"
#include "pairs.h"
#include "parallel.h"
#include "rows.h"

namespace million_experts {
namespace {

constexpr int64_t projection_rows = 64;  // outputs of the projection that a thread takes at a time

void project(const LayerInference& a, float* query) {
  const int64_t width = a.H * 2 * a.d;
  parallel_shares(a.threads, (width + projection_rows - 1) / projection_rows, [&](int64_t item, int) {
    const int64_t first = item * projection_rows;
    const int count = static_cast<int>(width - first < projection_rows ? width - first : projection_rows);
    const float* rows[projection_rows] = {};
    for (int i = 0; i < count; ++i) rows[i] = a.query_weight + (first + i) * a.D;
    for (int64_t t = 0; t < a.T; ++t) {
      float* q = query + t * width + first;
      dot_rows(a.x + t * a.D, rows, count, a.D, q);
      if (a.query_norm != QueryNorm::batch) continue;
      for (int i = 0; i < count; ++i) {
        const float scale = 1 / std::sqrt(a.norm_var[first + i] + static_cast<float>(a.eps));
        q[i] = (q[i] - a.norm_mean[first + i]) * (scale * a.norm_weight[first + i]) + a.norm_bias[first + i];
      }
    }
  });
  if (a.query_norm != QueryNorm::layer) return;
  const int64_t each = 2 * a.d;
  parallel_items(a.threads, a.T * a.H, [&](int64_t row) {
    float* q = query + row * each;
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < each; ++i) sum += q[i];
    const double mean = sum / static_cast<double>(each);
    for (int64_t i = 0; i < each; ++i) squares += (q[i] - mean) * (q[i] - mean);
    const double rstd = 1 / std::sqrt(squares / static_cast<double>(each) + a.eps);
    for (int64_t i = 0; i < each; ++i)
      q[i] = static_cast<float>((q[i] - mean) * rstd) * a.norm_weight[i] + a.norm_bias[i];
  });
}

// All sub-key scores, [T * H, width]: half one's in the first `second_half` columns, then half two's.
void score(const LayerInference& a, const float* query, int64_t width, int64_t second_half, float* scores) {
  constexpr int P = panel_keys<float>;
  const int64_t panels[2] = {panels_of<float>(a.n1), panels_of<float>(a.n2)}, all = panels[0] + panels[1];
  const ThreadScratch<float> packed(a.threads, a.d * P);
  parallel_shares(a.threads, a.codebooks * all, [&](int64_t item, int thread) {
    float* own = packed.of(thread);
    const int64_t codebook = item / all, half = item % all >= panels[0];
    const int64_t panel = item % all - (half ? panels[0] : 0), n = half ? a.n2 : a.n1;
    pack_panel((half ? a.keys2 : a.keys1) + codebook * n * a.d, n, a.d, panel, own);
    const int64_t rows = a.codebooks == 1 ? a.T * a.H : a.T;
    for (int64_t i = 0; i < rows; i += query_rows) {
      const int count = static_cast<int>(rows - i < query_rows ? rows - i : query_rows);
      const float* queries[query_rows] = {};
      float* out[query_rows] = {};
      for (int r = 0; r < count; ++r) {
        const int64_t row = a.codebooks == 1 ? i + r : (i + r) * a.H + codebook;
        queries[r] = query + (row * 2 + half) * a.d;
        out[r] = scores + row * width + (half ? second_half : 0) + panel * P;
      }
      score_rows(queries, count, a.d, own, out);
    }
  });
}

// Gates [k] of raw scores [k], in place.
void gate(Score score, float* values, int64_t k) {
  if (score == Score::relu) {
    for (int64_t i = 0; i < k; ++i) values[i] = values[i] < 0 ? 0 : values[i];
    return;
  }
  float largest = values[0], sum = 0;
  for (int64_t i = 1; i < k; ++i) largest = values[i] > largest ? values[i] : largest;
  for (int64_t at = 0; at < k; at += lanes<float>) {
    const int count = static_cast<int>(k - at < lanes<float> ? k - at : lanes<float>);
    Vec<float> v = load_part<float>(values + at, count);
    if (score == Score::softmax) v = exponential(v - largest);
    else v = splat(1.0f) / (splat(1.0f) + exponential(-v));
    store_part<float>(values + at, v, count);
    for (int i = 0; i < count; ++i) sum += v[i];
  }
  if (score == Score::softmax)
    for (int64_t i = 0; i < k; ++i) values[i] /= sum;
}

constexpr int group_pairs = 16;
constexpr int64_t fetched_experts = 32;  // of a head, ahead of their use

// y [D] = the gated sum of a head's k experts.
template <class T>
void head_output(const LayerInference& a, const float* x, const int64_t* indices, const float* gates, float* y) {
  const T* experts = static_cast<const T*>(a.experts);
  const int64_t stride = a.R * a.D;
  std::memset(y, 0, sizeof(float) * static_cast<size_t>(a.D));
  for (int64_t at = 0; at < a.k; at += group_pairs) {
    const int count = static_cast<int>(a.k - at < group_pairs ? a.k - at : group_pairs);
    const T *down[group_pairs] = {}, *up[group_pairs] = {}, *linear[group_pairs] = {};
    alignas(64) float pre[group_pairs] = {}, pre2[group_pairs] = {}, weight[group_pairs];
    for (int i = 0; i < count; ++i) {
      down[i] = experts + indices[at + i] * stride;
      up[i] = down[i] + a.D;
      linear[i] = down[i] + (a.R - 1) * a.D;
    }
    dot_rows(x, down, count, a.D, pre);
    if (a.R == 3) dot_rows(x, linear, count, a.D, pre2);
    activate(a.activation, pre, count, weight, static_cast<float*>(nullptr));
    for (int i = 0; i < count; ++i) weight[i] *= gates[at + i] * (a.R == 3 ? pre2[i] : 1);
    add_rows(y, up, weight, count, a.D);
  }
}

int64_t expert_bytes(const LayerInference& a) {
  return a.R * a.D * (a.dtype_experts == DType::f32 ? 4 : 2);
}

void infer(const LayerInference& a) {
  const int64_t rows = a.T * a.H;
  const int64_t second_half = panels_of<float>(a.n1) * panel_keys<float>;
  const int64_t width = second_half + panels_of<float>(a.n2) * panel_keys<float>;
  Scratch<float> query(rows * 2 * a.d), scores(rows * width), outputs(rows * a.D);
  project(a, query.data);
  score(a, query.data, width, second_half, scores.data);

  const PairList pairs(a.k);
  const PairScratchSizes<float> sizes(width, a.k, pairs.count);
  const ThreadScratch<float> numbers(a.threads, sizes.numbers);
  const ThreadScratch<int32_t> integers(a.threads, sizes.integers);
  Scratch<float> gates(rows * whole_vectors<float>(a.k));
  Scratch<int64_t> indices(rows * a.k);
  std::atomic<int64_t> next{0};
  parallel(a.threads, [&](int thread, int) {
    PairScratch<float> scratch(sizes, numbers.of(thread), integers.of(thread));
    const auto gates_of = [&](int64_t row) { return gates.data + row * whole_vectors<float>(a.k); };
    const auto find = [&](int64_t row) {
      float* own = scores.data + row * width;
      scratch.best_sub_keys(own, a.n1, a.k, 0, 0);
      scratch.best_sub_keys(own + second_half, a.n2, a.k, 1, 0);
      scratch.best_pairs(pairs, a.k, a.n2, 0, gates_of(row), indices.data + row * a.k);
      for (int64_t i = 0; i < a.k && i < fetched_experts; ++i)
        prefetch_row(static_cast<const char*>(a.experts) + indices.data[row * a.k + i] * expert_bytes(a),
                     expert_bytes(a));
    };
    const auto compute = [&](int64_t row) {
      const float* x = a.x + row / a.H * a.D;
      float poison = 0;  // NaN where the token holds NaN or infinity: it must not pass for a valid one
      for (int64_t i = 0; i < a.D; ++i) poison += x[i] * 0;
      for (int64_t i = 0; i < a.k; ++i) gates_of(row)[i] += poison;
      gate(a.score, gates_of(row), a.k);
      float* y = outputs.data + row * a.D;
      const int64_t* experts = indices.data + row * a.k;
      if (a.dtype_experts == DType::bf16) head_output<bf16>(a, x, experts, gates_of(row), y);
      else if (a.dtype_experts == DType::f16) head_output<f16>(a, x, experts, gates_of(row), y);
      else head_output<float>(a, x, experts, gates_of(row), y);
    };
    // While a head's experts come from memory, the next head's are looked for.
    int64_t waiting = -1;
    for (;;) {
      const int64_t row = next.fetch_add(1, std::memory_order_relaxed);
      if (row < rows) find(row);
      if (waiting >= 0) compute(waiting);
      if (row >= rows) return;
      waiting = row;
    }
  });
  for (int64_t t = 0; t < a.T; ++t) {
    float* y = a.y + t * a.D;
    std::memcpy(y, outputs.data + t * a.H * a.D, sizeof(float) * static_cast<size_t>(a.D));
    for (int64_t h = 1; h < a.H; ++h)
      for (int64_t i = 0; i < a.D; ++i) y[i] += outputs.data[(t * a.H + h) * a.D + i];
  }
}

}  // namespace

namespace ME_ISA {
void layer_inference(const LayerInference& a) { infer(a); }
}  // namespace ME_ISA

}  // namespace million_experts
