// What Python can call: one entry for each kernel. Tensors come as Python objects. Shapes stand in kernels.h; `first`
// and `count` choose tokens of those that the tensors hold.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace million_experts {

namespace nb = nanobind;
using nb::handle;

const Kernels& kernels();  // of the instruction set in use

void expert_mlp_forward(handle x, handle indices, handle gates, handle experts, handle y, handle pre, int activation,
                        int64_t block_experts, int threads);
void expert_mlp_backward(handle grad_y, handle indices, handle gates, handle experts, handle pre, handle grad_x,
                         handle grad_gates, handle weights, int64_t first, int64_t count, int activation,
                         int64_t block_experts, int threads);
void expert_mlp_table_grad(handle x, handle grad_y, handle indices, handle gates, handle experts, handle weights,
                           handle grad_experts, bool accumulate, int64_t first, int64_t count, int64_t block_experts,
                           int threads);
int64_t expert_mlp_sort(handle indices, handle gates, handle experts, handle weights, handle sorted, handle starts,
                        int64_t count, int threads);
void expert_mlp_touched_grad(handle x, handle grad_y, handle indices, handle gates, handle experts, handle sorted,
                             handle starts, int64_t first, int64_t touched, handle rows, handle values, int threads);
void expert_products_forward(handle indices, handle gates, handle pre, handle products, handle of_up, int64_t first,
                             int activation, int threads);
void expert_products_backward(handle indices, handle gates, handle pre, handle products, handle of_up,
                              handle of_inner, handle grad_gates, int64_t first, int activation, int threads);
void product_key_topk(handle query, handle keys1, handle keys2, int64_t k, handle scores, handle indices, int threads);
void product_key_topk_backward(handle grad_scores, handle indices, handle query, handle keys1, handle keys2,
                               handle grad_query, handle grad_keys1, handle grad_keys2, int threads);
void batch_norm(handle x, handle mask, handle weight, handle bias, double eps, handle y, handle mean, handle variance,
                int threads);
void batch_norm_backward(handle grad_y, handle x, handle mask, handle weight, handle mean, handle variance,
                         double eps, handle grad_x, handle grad_weight, handle grad_bias, int threads);
void layer_inference(handle x, handle query_weight, int query_norm, const std::vector<nb::object>& norm, double eps,
                     handle keys1, handle keys2, handle experts, int64_t heads, int64_t k, int score, int activation,
                     handle y, int threads);
void rowwise_adamw(handle table, handle exp_avg, handle exp_avg_sq, handle last_step, handle history, int64_t step,
                   handle rows, handle values, handle places, handle starts, double lr, double beta1, double beta2,
                   double eps, double weight_decay, bool stochastic, uint64_t key, int threads);
uint64_t random_read(handle table, handle rows, int threads);

}  // namespace million_experts
