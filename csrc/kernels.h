// What the kernels compute and what they are given. One table of functions for each instruction set; the
// library picks one when it loads. No Python and no torch here: pointers, sizes, a number of threads.
//
// Shapes: T tokens, D model width, H heads, k experts a head, K = H*k experts a token, N = n1*n2 experts,
// R rows an expert (down, up[, gate]), d width of a sub-key. All arrays are contiguous.
// "Accumulation type" is float, or double where `dtype_sum` says so; x, gates and outputs come in it.
#pragma once

#include <cstddef>
#include <cstdint>

namespace million_experts {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };
enum class Activation : int { gelu = 0, relu = 1, silu = 2 };

struct ExpertMlp {
  DType dtype_sum;      // f32 or f64
  DType dtype_experts;  // storage of the table
  Activation activation;
  int64_t T, K, N, R, D;
  const int64_t* indices;  // [T, K]
  const void* gates;       // [T, K]
  const void* experts;     // [N, R, D]
  int64_t pre_stride;      // numbers from x . down of a pair to its x . gate
  int64_t block_experts;   // a power of two, experts that a token meets before its tile's next token; N: token by token
  int threads;
};

struct ExpertMlpForward : ExpertMlp {
  const void* x;  // [T, D]
  void* y;        // [T, D]
  void* pre;      // x . down [T, K], and pre_stride later x . gate [T, K]
};

struct ExpertMlpBackward : ExpertMlp {
  const void* grad_y;  // [T, D]
  const void* pre;     // as written by forward
  void* grad_x;        // [T, D] or null
  void* grad_gates;    // [T, K] or null
  void* weights;       // [T, K, R] or null: what the gradient of each row of the expert sums its tokens with
};

struct ExpertMlpTableGrad : ExpertMlp {
  const void* x;        // [T, D]
  const void* grad_y;   // [T, D]
  const void* weights;  // [T, K, R], from expert_mlp_backward
  void* grad_experts;   // [N, R, D] in dtype_experts
  bool accumulate;      // add to grad_experts, which otherwise is written in full
};

// The same gradient as rows: first the pairs are sorted, which tells how many experts have any, then their gradients
// are summed into as many rows.
struct ExpertMlpSort : ExpertMlp {
  const void* weights;  // [T, K, R], from expert_mlp_backward
  void* sorted;         // T * K times sorted_pair_bytes
  int64_t* starts;      // [min(N, T * K) + 1], where in `sorted` each touched expert begins; behind the last, the end
  int64_t touched;      // output: how many experts have pairs
};

struct ExpertMlpTouchedGrad : ExpertMlp {
  const void* x;          // [T, D]
  const void* grad_y;     // [T, D]
  const void* sorted;     // from the sort
  const int64_t* starts;  // [touched + 1], likewise
  int64_t touched;
  int64_t* rows;          // [touched], ascending
  void* values;           // [touched, R, D] in dtype_experts
};

// Experts by dense products of all tokens with all rows, in bfloat16: what stands between these products, for both
// directions. Sums over a token's picks are taken in float.
struct ExpertProducts {
  Activation activation;
  int64_t T, K, N, R;
  const int64_t* indices;  // [T, K]
  const float* gates;      // [T, K]
  int64_t pre_stride;      // as in ExpertMlp
  float* pre;              // x . down [T, K], and pre_stride later x . gate [T, K]: forward writes, backward reads
  const void* products;    // forward: x with down rows [T, N], with gate rows beside them [T, 2 * N]; backward: grad_y
                           // with up rows [T, N]
  void* of_up;             // [T, N], output: what up rows are summed with forward, and grad_y for their gradient
  void* of_inner;          // [T, N], with gate rows [T, 2 * N], output of backward: the same for the other rows and x
  float* grad_gates;       // [T, K], output of backward, or null
  int threads;
};

struct Retrieval {
  DType dtype_sum;  // type of query, keys and scores
  int64_t T, H, d, n1, n2, k;
  int64_t codebooks;  // 1: shared by the heads; H: one pair a head
  const void* query;  // [T, H, 2, d]
  const void* keys1;  // [codebooks, n1, d]
  const void* keys2;  // [codebooks, n2, d]
  int threads;
};

struct RetrievalForward : Retrieval {
  void* scores;      // [T, H, k], descending
  int64_t* indices;  // [T, H, k]
};

struct RetrievalBackward : Retrieval {
  const void* grad_scores;  // [T, H, k]
  const int64_t* indices;   // [T, H, k]
  void* grad_query;         // [T, H, 2, d]
  void* grad_keys1;         // [codebooks, n1, d]
  void* grad_keys2;         // [codebooks, n2, d]
};

struct BatchNorm {
  DType dtype_sum;
  int64_t T, C;
  const void* x;        // [T, C]
  const uint8_t* mask;  // [T], or null where every token is real
  const void* weight;   // [C]
  const void* bias;     // [C]; forward only
  void* mean;           // [C]; written by forward, read by backward
  void* variance;       // [C], biased; likewise
  double eps;
  void* y;              // forward: [T, C]
  const void* grad_y;   // backward: [T, C]
  void* grad_x;         // backward: [T, C]
  void* grad_weight;    // backward: [C]
  void* grad_bias;      // backward: [C]
  int threads;
};

enum class QueryNorm : int { none = 0, batch = 1, layer = 2 };
enum class Score : int { softmax = 0, sigmoid = 1, relu = 2 };

// The whole layer for few tokens, float throughout (the table may be narrower).
struct LayerInference {
  int64_t T, D, H, k, d, n1, n2, codebooks, R, N;
  const float* x;             // [T, D]
  const float* query_weight;  // [H * 2 * d, D]
  QueryNorm query_norm;
  const float *norm_weight, *norm_bias;  // [H * 2 * d] (batch) or [2 * d] (layer)
  const float *norm_mean, *norm_var;     // [H * 2 * d] (batch)
  double eps;
  const float *keys1, *keys2;  // [codebooks, n, d]
  Score score;
  Activation activation;
  DType dtype_experts;
  const void* experts;  // [N, R, D]
  float* y;             // [T, D]
  int threads;
};

// One step of AdamW for n rows of a table, or without `values` what all rows have missed. In place.
struct RowwiseAdamW {
  DType dtype_sum;       // of exp_avg_sq too
  DType dtype_table, dtype_momentum, dtype_values;
  int64_t N, R, D, n;
  void* table;            // [N, R, D]
  void* exp_avg;          // [N, R, D], or null where beta1 is 0: the first moment is the gradient
  void* exp_avg_sq;       // [N, R, D], or [N, R] where by_row
  int32_t* last_step;     // [N]
  const double* history;  // [step + 1, 3]: logarithms of beta1, beta2 and 1 - lr * weight_decay, summed over steps
  int64_t step;           // the one that is taken, counted from 1
  const int64_t* rows;    // [n], each once
  const void* values;     // [any, R, D] or null
  const int64_t* places;  // where row i's values are: places[starts[i]], ..., or both null: value i
  const int64_t* starts;  // [n + 1]
  double lr, beta1, beta2, eps, weight_decay;
  bool by_row, stochastic;
  uint64_t key;  // of the random bits
  int threads;
};

struct RandomRead {
  const void* table;
  int64_t row_bytes;
  const int64_t* rows;
  int64_t count;
  uint64_t checksum;  // so that no read can be left out
  int threads;
};

struct Kernels {
  const char* name;
  void (*expert_mlp_forward)(const ExpertMlpForward&);
  void (*expert_mlp_backward)(const ExpertMlpBackward&);
  void (*expert_mlp_table_grad)(const ExpertMlpTableGrad&);
  void (*expert_mlp_sort)(ExpertMlpSort&);
  void (*expert_mlp_touched_grad)(const ExpertMlpTouchedGrad&);
  void (*expert_products_forward)(const ExpertProducts&);
  void (*expert_products_backward)(const ExpertProducts&);
  void (*product_key_topk)(const RetrievalForward&);
  void (*product_key_topk_backward)(const RetrievalBackward&);
  void (*batch_norm)(const BatchNorm&);
  void (*batch_norm_backward)(const BatchNorm&);
  void (*layer_inference)(const LayerInference&);
  void (*rowwise_adamw)(const RowwiseAdamW&);
  void (*random_read)(RandomRead&);
};

// The instruction sets that were compiled in and that this processor has, slowest first.
const Kernels* const* supported_kernels(size_t* count);

}  // namespace million_experts
