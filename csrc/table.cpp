// The kernels of one instruction set, as one table.

#include "isa.h"

#define ME_TEXT_(name) #name
#define ME_TEXT(name) ME_TEXT_(name)

namespace million_experts::ME_ISA {

extern const Kernels kernels;
const Kernels kernels = {ME_TEXT(ME_ISA),
                         expert_mlp_forward,
                         expert_mlp_backward,
                         expert_mlp_table_grad,
                         expert_mlp_sort,
                         expert_mlp_touched_grad,
                         expert_products_forward,
                         expert_products_backward,
                         product_key_topk,
                         product_key_topk_backward,
                         batch_norm,
                         batch_norm_backward,
                         layer_inference,
                         rowwise_adamw,
                         random_read};

}  // namespace million_experts::ME_ISA
