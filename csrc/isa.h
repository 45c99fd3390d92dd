// ME_ISA names the instruction set that a file is compiled for (see CMakeLists.txt): each operation is compiled
// once for each, into a namespace of that name.
#pragma once

#include "kernels.h"

#ifndef ME_ISA
#error "compile kernels through CMakeLists.txt, which defines ME_ISA"
#endif

namespace million_experts::ME_ISA {

void expert_mlp_forward(const ExpertMlpForward&);
void expert_mlp_backward(const ExpertMlpBackward&);
void expert_mlp_table_grad(const ExpertMlpTableGrad&);
void expert_mlp_sort(ExpertMlpSort&);
void expert_mlp_touched_grad(const ExpertMlpTouchedGrad&);
void expert_products_forward(const ExpertProducts&);
void expert_products_backward(const ExpertProducts&);
void product_key_topk(const RetrievalForward&);
void product_key_topk_backward(const RetrievalBackward&);
void batch_norm(const BatchNorm&);
void batch_norm_backward(const BatchNorm&);
void layer_inference(const LayerInference&);
void rowwise_adamw(const RowwiseAdamW&);
void random_read(RandomRead&);

}  // namespace million_experts::ME_ISA
