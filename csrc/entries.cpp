// Each kernel as Python calls it: every tensor and every number that counts or indexes is checked, then the kernel runs
// without the interpreter lock. `ops/cpu.py` has given clearer messages before; these are the last line.

#include "entries.h"

#include <algorithm>
#include <optional>

#include "tensors.h"

namespace million_experts {
namespace {

// Runs a kernel without the interpreter lock.
template <class Taken, class Arguments>
void run(void (*Kernels::*kernel)(Taken), Arguments& arguments) {
  const nb::gil_scoped_release unlocked;
  (kernels().*kernel)(arguments);
}

Activation activation_of(int number) {
  check_number("activation", number, 0, 2);
  return static_cast<Activation>(number);
}

int threads_of(int number) {
  check_number("threads", number, 1, 1 << 16);
  return number;
}

// What the kernels of the experts share: tokens [first, first + T) of all that the tensors hold.
struct Pairs {
  Tensor indices, gates, experts;
  int64_t T, K, N, R, D, first;
  DType dtype_sum;

  // All tokens that the tensors hold.
  Pairs(handle indices, handle gates, handle experts) : Pairs(indices, gates, experts, 0, std::nullopt) {}

  Pairs(handle indices_, handle gates_, handle experts_, int64_t first, std::optional<int64_t> count)
      : first(first) {
    indices = take("indices", indices_, only(Type::i64), {any, any});
    T = count.value_or(indices.shape[0]);
    gates = take("gates", gates_, sums, {indices.shape[0], indices.shape[1]});
    experts = take("experts", experts_, floating, {any, any, any});
    K = indices.shape[1], N = experts.shape[0], R = experts.shape[1], D = experts.shape[2];
    dtype_sum = gates.dtype();
    check_number("rows per expert", R, 2, 3);
    check_number("first token", first, 0, indices.shape[0]);
    check_number("tokens", T, 0, indices.shape[0] - first);
    check_range(indices, first, T, N);
  }

  int64_t tokens() const { return indices.shape[0]; }
  unsigned sum() const { return only(dtype_sum); }
  Tensor of_tokens(const char* name, handle given) const { return take(name, given, sum(), {tokens(), D}); }
  Tensor pre(handle given) const { return take("pre", given, sum(), {R - 1, tokens(), K}); }
  void* pre_at(const Tensor& pre) const { return static_cast<char*>(pre.data) + first * K * pre.item_bytes(); }
  int64_t pre_stride() const { return tokens() * K; }

  // Fills in what every kernel is told.
  void hand_over(ExpertMlp& a, int activation, int64_t block_experts, int threads) const {
    check_number("block_experts", block_experts, std::min<int64_t>(1, N), N);
    const bool whole = block_experts == N || (block_experts & (block_experts - 1)) == 0;
    check_number("block_experts that are a power of two", whole, 1, 1);
    a = {dtype_sum, experts.dtype(), activation_of(activation), T, K, N, R, D, indices.at<int64_t>(first),
         gates.at(first), experts.at(), pre_stride(), block_experts, threads_of(threads)};
  }
};

// A sorted pair is two 32-bit numbers and its R weights.
Tensor sorted_pairs(const Pairs& pairs, handle sorted) {
  return take("sorted", sorted, only(Type::u8), {pairs.T * pairs.K, 8 + pairs.R * pairs.gates.item_bytes()});
}

// Tokens [first, first + T) of indices, gates, pre and grad_gates, and the products of these tokens: with rows of the
// inner matrix forward, with up rows backward.
ExpertProducts expert_products(handle indices_, handle gates_, handle pre_, handle products_, handle of_up_,
                               bool backward, int64_t first, int activation, int threads) {
  const Tensor indices = take("indices", indices_, only(Type::i64), {any, any});
  const int64_t tokens = indices.shape[0], K = indices.shape[1];
  const Tensor gates = take("gates", gates_, only(Type::f32), {tokens, K});
  const Tensor pre = take("pre", pre_, only(Type::f32), {any, tokens, K});
  const Tensor of_up = take("of_up", of_up_, only(Type::bf16), {any, any});
  const int64_t T = of_up.shape[0], N = of_up.shape[1], inner = pre.shape[0];
  check_number("rows of pre", inner, 1, 2);
  check_number("first token", first, 0, tokens);
  check_number("tokens", T, 0, tokens - first);
  check_range(indices, first, T, N);
  const Tensor products = take("products", products_, only(Type::bf16), {T, backward ? N : N * inner});
  return {activation_of(activation), T, K, N, inner + 1, indices.at<int64_t>(first), gates.at<float>(first),
          tokens * K, static_cast<float*>(pre.data) + first * K, products.at(), of_up.at(), nullptr, nullptr,
          threads_of(threads)};
}

// Sub-keys [n, d], or [heads, n, d] where there is a codebook for each head.
struct Codebook {
  Tensor keys;
  bool per_head;
  int64_t n, d;

  Codebook(const char* name, handle given, unsigned allowed, int64_t heads, int64_t width) {
    keys = take(name, given, allowed);
    per_head = keys.dims == 3;
    if (per_head) check_shape(keys, {heads, any, width});
    else check_shape(keys, {any, width});
    n = keys.shape[keys.dims - 2], d = keys.shape[keys.dims - 1];
  }
};

void check_alike(const Codebook& first, const Codebook& second) {
  check_number("dimensions of the second codebook", second.keys.dims, first.keys.dims, first.keys.dims);
}

Retrieval retrieval(handle query_, handle keys1_, handle keys2_, int64_t k, int threads) {
  const Tensor query = take("query", query_, sums, {any, any, 2, any});
  const int64_t H = query.shape[1], d = query.shape[3];
  const Codebook keys1("keys1", keys1_, only(query.type), H, d), keys2("keys2", keys2_, only(query.type), H, d);
  check_alike(keys1, keys2);
  check_number("k", k, 1, std::min(keys1.n, keys2.n));
  return {query.dtype(), query.shape[0], H, d, keys1.n, keys2.n, k, keys1.per_head ? H : 1, query.at(),
          keys1.keys.at(), keys2.keys.at(), threads_of(threads)};
}

// What both directions take: x, the mask and one number per channel and name.
BatchNorm batch_norm_arguments(handle x_, handle mask, handle weight, handle mean, handle variance, double eps,
                               int threads) {
  const Tensor x = take("x", x_, sums, {any, any});
  const unsigned type = only(x.type);
  BatchNorm a{};
  a.dtype_sum = x.dtype(), a.T = x.shape[0], a.C = x.shape[1], a.eps = eps, a.threads = threads_of(threads);
  a.x = x.at(), a.mask = take_optional("mask", mask, only(Type::boolean), {a.T}).at<uint8_t>();
  a.weight = take("weight", weight, type, {a.C}).at();
  a.mean = take("mean", mean, type, {a.C}).at(), a.variance = take("variance", variance, type, {a.C}).at();
  return a;
}

}  // namespace

void expert_mlp_forward(handle x, handle indices, handle gates, handle experts, handle y, handle pre, int activation,
                        int64_t block_experts, int threads) {
  const Pairs pairs(indices, gates, experts);
  ExpertMlpForward a;
  pairs.hand_over(a, activation, block_experts, threads);
  a.x = pairs.of_tokens("x", x).at(), a.y = pairs.of_tokens("y", y).at(), a.pre = pairs.pre(pre).at();
  run(&Kernels::expert_mlp_forward, a);
}

void expert_mlp_backward(handle grad_y, handle indices, handle gates, handle experts, handle pre, handle grad_x,
                         handle grad_gates, handle weights, int64_t first, int64_t count, int activation,
                         int64_t block_experts, int threads) {
  const Pairs pairs(indices, gates, experts, first, count);
  const Tensor before = pairs.pre(pre);
  const Tensor of_x = take_optional("grad_x", grad_x, pairs.sum(), {pairs.tokens(), pairs.D});
  const Tensor of_gates = take_optional("grad_gates", grad_gates, pairs.sum(), {pairs.tokens(), pairs.K});
  const Tensor of_rows = take_optional("weights", weights, pairs.sum(), {any, pairs.K, pairs.R});
  if (of_rows.dims) check_number("tokens in weights", of_rows.shape[0], count, std::max(count, of_rows.shape[0]));
  ExpertMlpBackward a;
  pairs.hand_over(a, activation, block_experts, threads);
  a.grad_y = pairs.of_tokens("grad_y", grad_y).at(first), a.pre = pairs.pre_at(before);
  a.grad_x = of_x.at(first), a.grad_gates = of_gates.at(first), a.weights = of_rows.at();
  run(&Kernels::expert_mlp_backward, a);
}

void expert_mlp_table_grad(handle x, handle grad_y, handle indices, handle gates, handle experts, handle weights,
                           handle grad_experts, bool accumulate, int64_t first, int64_t count, int64_t block_experts,
                           int threads) {
  const Pairs pairs(indices, gates, experts, first, count);
  const Tensor of_rows = take("weights", weights, pairs.sum(), {any, pairs.K, pairs.R});
  check_number("tokens in weights", of_rows.shape[0], count, std::max(count, of_rows.shape[0]));
  ExpertMlpTableGrad a;
  pairs.hand_over(a, 0, block_experts, threads);
  a.x = pairs.of_tokens("x", x).at(first), a.grad_y = pairs.of_tokens("grad_y", grad_y).at(first);
  a.weights = of_rows.at(), a.accumulate = accumulate;
  a.grad_experts =
      take("grad_experts", grad_experts, only(pairs.experts.type), {pairs.N, pairs.R, pairs.D}).at();
  run(&Kernels::expert_mlp_table_grad, a);
}

int64_t expert_mlp_sort(handle indices, handle gates, handle experts, handle weights, handle sorted, handle starts,
                        int64_t count, int threads) {
  const Pairs pairs(indices, gates, experts, 0, count);
  ExpertMlpSort a;
  pairs.hand_over(a, 0, pairs.N, threads);
  a.weights = take("weights", weights, pairs.sum(), {count, pairs.K, pairs.R}).at();
  a.sorted = sorted_pairs(pairs, sorted).at();
  a.starts = take("starts", starts, only(Type::i64), {std::min(pairs.N, count * pairs.K) + 1}).at<int64_t>();
  run(&Kernels::expert_mlp_sort, a);
  return a.touched;
}

// `sorted` and `starts` are what the sort wrote, for the same tokens.
void expert_mlp_touched_grad(handle x, handle grad_y, handle indices, handle gates, handle experts, handle sorted,
                             handle starts, int64_t first, int64_t touched, handle rows, handle values, int threads) {
  const Pairs pairs(indices, gates, experts);
  const int64_t most = std::min(pairs.N, pairs.T * pairs.K);
  const Tensor begins = take("starts", starts, only(Type::i64), {most + 1});
  check_number("first row", first, 0, most);
  check_number("touched rows", touched, 0, most - first);
  check_range(begins, first, touched + 1, pairs.T * pairs.K + 1);
  const Tensor numbers = take("rows", rows, only(Type::i64), {any});
  check_number("rows", numbers.shape[0], touched, std::max(touched, numbers.shape[0]));
  ExpertMlpTouchedGrad a;
  pairs.hand_over(a, 0, pairs.N, threads);
  a.x = pairs.of_tokens("x", x).at(), a.grad_y = pairs.of_tokens("grad_y", grad_y).at();
  a.sorted = sorted_pairs(pairs, sorted).at(), a.starts = begins.at<int64_t>(first), a.touched = touched;
  a.rows = numbers.at<int64_t>();
  a.values = take("values", values, only(pairs.experts.type), {numbers.shape[0], pairs.R, pairs.D}).at();
  run(&Kernels::expert_mlp_touched_grad, a);
}

void expert_products_forward(handle indices, handle gates, handle pre, handle products, handle of_up, int64_t first,
                             int activation, int threads) {
  const ExpertProducts a = expert_products(indices, gates, pre, products, of_up, false, first, activation, threads);
  run(&Kernels::expert_products_forward, a);
}

void expert_products_backward(handle indices, handle gates, handle pre, handle products, handle of_up,
                              handle of_inner, handle grad_gates, int64_t first, int activation, int threads) {
  ExpertProducts a = expert_products(indices, gates, pre, products, of_up, true, first, activation, threads);
  a.of_inner = take("of_inner", of_inner, only(Type::bf16), {a.T, a.N * (a.R - 1)}).at();
  const Tensor of_gates = take_optional("grad_gates", grad_gates, only(Type::f32), {any, a.K});
  if (of_gates.dims) check_number("tokens in grad_gates", of_gates.shape[0] * a.K, a.pre_stride, a.pre_stride);
  a.grad_gates = of_gates.at<float>(first);
  run(&Kernels::expert_products_backward, a);
}

void product_key_topk(handle query, handle keys1, handle keys2, int64_t k, handle scores, handle indices,
                      int threads) {
  RetrievalForward a;
  static_cast<Retrieval&>(a) = retrieval(query, keys1, keys2, k, threads);
  a.scores = take("scores", scores, only(a.dtype_sum), {a.T, a.H, k}).at();
  a.indices = take("indices", indices, only(Type::i64), {a.T, a.H, k}).at<int64_t>();
  run(&Kernels::product_key_topk, a);
}

void product_key_topk_backward(handle grad_scores, handle indices, handle query, handle keys1, handle keys2,
                               handle grad_query, handle grad_keys1, handle grad_keys2, int threads) {
  const Tensor found = take("indices", indices, only(Type::i64), {any, any, any});
  RetrievalBackward a;
  static_cast<Retrieval&>(a) = retrieval(query, keys1, keys2, found.shape[2], threads);
  const unsigned type = only(a.dtype_sum);
  check_shape(found, {a.T, a.H, a.k});
  a.indices = found.at<int64_t>();
  check_range(found, 0, a.T, a.n1 * a.n2);
  a.grad_scores = take("grad_scores", grad_scores, type, {a.T, a.H, a.k}).at();
  a.grad_query = take("grad_query", grad_query, type, {a.T, a.H, 2, a.d}).at();
  const Codebook of_keys1("grad_keys1", grad_keys1, type, a.H, a.d), of_keys2("grad_keys2", grad_keys2, type, a.H, a.d);
  const int64_t sub_key = a.codebooks * a.d * of_keys1.keys.item_bytes();
  check_number("bytes of grad_keys1", of_keys1.keys.bytes(), a.n1 * sub_key, a.n1 * sub_key);
  check_number("bytes of grad_keys2", of_keys2.keys.bytes(), a.n2 * sub_key, a.n2 * sub_key);
  a.grad_keys1 = of_keys1.keys.at(), a.grad_keys2 = of_keys2.keys.at();
  run(&Kernels::product_key_topk_backward, a);
}

void batch_norm(handle x, handle mask, handle weight, handle bias, double eps, handle y, handle mean, handle variance,
                int threads) {
  BatchNorm a = batch_norm_arguments(x, mask, weight, mean, variance, eps, threads);
  a.bias = take("bias", bias, only(a.dtype_sum), {a.C}).at();
  a.y = take("y", y, only(a.dtype_sum), {a.T, a.C}).at();
  run(&Kernels::batch_norm, a);
}

void batch_norm_backward(handle grad_y, handle x, handle mask, handle weight, handle mean, handle variance, double eps,
                         handle grad_x, handle grad_weight, handle grad_bias, int threads) {
  BatchNorm a = batch_norm_arguments(x, mask, weight, mean, variance, eps, threads);
  const unsigned type = only(a.dtype_sum);
  a.grad_y = take("grad_y", grad_y, type, {a.T, a.C}).at(), a.grad_x = take("grad_x", grad_x, type, {a.T, a.C}).at();
  a.grad_weight = take("grad_weight", grad_weight, type, {a.C}).at();
  a.grad_bias = take("grad_bias", grad_bias, type, {a.C}).at();
  run(&Kernels::batch_norm_backward, a);
}

void layer_inference(handle x_, handle query_weight, int query_norm, const std::vector<nb::object>& norm, double eps,
                     handle keys1_, handle keys2_, handle experts_, int64_t heads, int64_t k, int score,
                     int activation, handle y, int threads) {
  constexpr unsigned f32 = only(Type::f32);
  const Tensor x = take("x", x_, f32, {any, any});
  const Tensor experts = take("experts", experts_, f32 | only(Type::bf16) | only(Type::f16), {any, any, x.shape[1]});
  check_number("rows per expert", experts.shape[1], 2, 3);
  check_number("num_heads", heads, 1, INT32_MAX);
  check_number("query_norm", query_norm, 0, 2);
  check_number("score", score, 0, 2);
  const Codebook first("keys1", keys1_, f32, heads, any), second("keys2", keys2_, f32, heads, first.d);
  check_alike(first, second);
  const int64_t n1 = first.n, n2 = second.n, d = first.d, width = heads * 2 * d;
  check_number("experts_per_head", k, 1, std::min(n1, n2));
  check_number("experts in the table", experts.shape[0], n1 * n2, n1 * n2);

  constexpr int64_t norm_tensors[] = {0, 4, 2};  // none, batch, layer
  check_number("tensors of the norm", static_cast<int64_t>(norm.size()), norm_tensors[query_norm],
               norm_tensors[query_norm]);
  constexpr const char* names[] = {"query_norm.weight", "query_norm.bias", "query_norm.running_mean",
                                   "query_norm.running_var"};
  const float* of_norm[4] = {};
  for (size_t i = 0; i < norm.size(); ++i)
    of_norm[i] = take(names[i], norm[i], f32, {query_norm == 2 ? 2 * d : width}).at<float>();

  const Tensor weight = take("query_proj.weight", query_weight, f32, {width, x.shape[1]});
  const Tensor output = take("y", y, f32, {x.shape[0], x.shape[1]});
  const LayerInference a{x.shape[0], x.shape[1], heads, k, d, n1, n2, first.per_head ? heads : 1, experts.shape[1],
                         n1 * n2, x.at<float>(), weight.at<float>(), QueryNorm(query_norm), of_norm[0], of_norm[1],
                         of_norm[2], of_norm[3], eps, first.keys.at<float>(), second.keys.at<float>(), Score(score),
                         activation_of(activation), experts.dtype(), experts.at(), output.at<float>(),
                         threads_of(threads)};
  run(&Kernels::layer_inference, a);
}

void rowwise_adamw(handle table_, handle exp_avg_, handle exp_avg_sq_, handle last_step_, handle history_,
                   int64_t step, handle rows_, handle values_, handle places_, handle starts_, double lr, double beta1,
                   double beta2, double eps, double weight_decay, bool stochastic, uint64_t key, int threads) {
  const Tensor table = take("table", table_, floating, {any, any, any});
  const int64_t N = table.shape[0], R = table.shape[1], D = table.shape[2];
  const Type sum = table.type == Type::f64 ? Type::f64 : Type::f32;
  const Tensor exp_avg_sq = take("exp_avg_sq", exp_avg_sq_, only(sum));
  const bool by_row = exp_avg_sq.dims == 2;
  if (by_row) check_shape(exp_avg_sq, {N, R});
  else check_shape(exp_avg_sq, {N, R, D});
  const unsigned momenta = only(sum) | (sum == Type::f32 ? only(Type::bf16) : 0);
  const Tensor exp_avg = take_optional("exp_avg", exp_avg_, momenta, {N, R, D});
  const Tensor last_step = take("last_step", last_step_, only(Type::i32), {N});
  const Tensor history = take("history", history_, only(Type::f64), {any, 3});
  check_number("step", step, 1, history.shape[0] - 1);

  const Tensor rows = take_optional("rows", rows_, only(Type::i64), {any});
  const int64_t n = rows.dims ? rows.shape[0] : 0;
  const Tensor values = take_optional("values", values_, only(sum) | only(table.type), {any, R, D});
  const Tensor places = take_optional("places", places_, only(Type::i64), {any});
  const Tensor starts = take_optional("starts", starts_, only(Type::i64), {n + 1});
  check_number("places given with starts", places.dims == starts.dims, 1, 1);
  check_number("values given with rows", (values.dims > 0) == (rows.dims > 0), 1, 1);
  if (rows.dims) check_range(rows, 0, n, N);
  if (starts.dims) {
    check_range(starts, 0, n + 1, places.shape[0] + 1);
    check_range(places, 0, places.shape[0], values.shape[0]);
    const int64_t* at = starts.at<int64_t>();
    for (int64_t i = 0; i < n; ++i) check_number("values per row", at[i + 1] - at[i], 1, places.shape[0]);
  } else if (rows.dims) {
    check_number("values", values.shape[0], n, std::max(n, values.shape[0]));
  }
  // A row that is not up to date reads the history from its last step on.
  const int32_t* last = last_step.at<int32_t>();
  for (int64_t i = 0, end = rows.dims ? n : N; i < end; ++i)
    check_number("last_step", last[rows.dims ? rows.at<int64_t>()[i] : i], 0, step);

  // An absent tensor's type is never read, but must be one that the kernel knows.
  const RowwiseAdamW a{static_cast<DType>(sum), table.dtype(), exp_avg.dims ? exp_avg.dtype() : static_cast<DType>(sum),
                       values.dims ? values.dtype() : static_cast<DType>(sum), N, R, D, n, table.at(), exp_avg.at(),
                       exp_avg_sq.at(), last_step.at<int32_t>(), history.at<double>(), step, rows.at<int64_t>(),
                       values.at(), places.at<int64_t>(), starts.at<int64_t>(), lr, beta1, beta2, eps, weight_decay,
                       by_row, stochastic, key, threads_of(threads)};
  run(&Kernels::rowwise_adamw, a);
}

uint64_t random_read(handle table_, handle rows_, int threads) {
  const Tensor table = take("table", table_, floating | only(Type::i32) | only(Type::i64), {any, any});
  const Tensor rows = take("rows", rows_, only(Type::i64), {any});
  check_range(rows, 0, rows.shape[0], table.shape[0]);
  RandomRead a{table.at(), table.row_bytes(), rows.at<int64_t>(), rows.shape[0], 0, threads_of(threads)};
  run(&Kernels::random_read, a);
  return a.checksum;
}

}  // namespace million_experts
