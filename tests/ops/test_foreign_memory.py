"""What reaches the kernels is checked before memory is touched: dtypes, shapes, storage that is gone."""

from __future__ import annotations

import pytest
import torch

from million_experts import PEER
from million_experts.ops import _kernels

OPS = torch.ops.million_experts
BACKENDS = ("reference", "cpu")
T, K, N, D = 5, 3, 8, 16


def pairs() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    return torch.randn(T, D), torch.randint(N, (T, K)), torch.randn(T, K), torch.randn(N, 2, D)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["expert_mlp_backward", "expert_mlp_touched_backward"])
def test_pre_activations_of_another_dtype_are_refused(name, dtype, backend):
    x, indices, gates, experts = pairs()
    pre = torch.zeros(1, T, K, dtype=dtype)
    needs = [True] * (3 if name == "expert_mlp_backward" else 2)
    with pytest.raises(ValueError, match=r"pre must be torch\.float32, as the forward pass gave it"):
        getattr(OPS, name)(x, x, indices, gates, experts, pre, None, "gelu", needs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["mean", "variance"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_statistics_of_another_dtype_are_refused(dtype, name, backend):
    x, weight = torch.randn(T, D), torch.ones(D)
    statistics = {"mean": torch.zeros(D), "variance": torch.ones(D)}
    statistics[name] = statistics[name].to(dtype)
    with pytest.raises(ValueError, match=rf"{name} must be torch\.float32, as the forward pass gave it"):
        OPS.masked_batch_norm_backward(x, x, None, weight, *statistics.values(), 1e-5, backend)


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_activations_that_are_kept_in_bfloat16_are_refused_in_backward(sparse_grad):
    layer = PEER(D, num_experts=16, num_heads=2, experts_per_head=2, key_dim=8, sparse_grad=sparse_grad)

    def narrow(tensor):
        return tensor.bfloat16() if tensor.is_floating_point() and tensor.requires_grad is False else tensor

    with torch.autograd.graph.saved_tensors_hooks(narrow, lambda tensor: tensor):
        loss = layer(torch.randn(T, D)).sum()
    with pytest.raises(ValueError, match="as the forward pass gave it"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("left", [0, 10])
def test_storage_that_shrank_under_a_tensor_is_refused(left, place, backend):
    arguments = [t.clone() for t in pairs()]
    arguments[place].untyped_storage().resize_(left)
    with pytest.raises(BufferError, match="must lie in memory whole"):
        OPS.expert_mlp(*arguments, None, "gelu", backend)


def test_the_reference_and_the_kernels_take_tokens_without_numbers():
    x, indices, gates, experts = pairs()
    for backend in BACKENDS:
        y, pre = OPS.expert_mlp(x[:, :0], indices, gates, experts[:, :, :0], None, "gelu", backend)
        assert y.shape == (T, 0)
        assert not pre.any()


def test_an_entry_names_what_it_refuses():
    x, indices, gates, experts = pairs()
    y, pre = torch.empty(T, D), torch.empty(1, T, K)

    def forward(**changed):
        given = dict(x=x, indices=indices, gates=gates, experts=experts, y=y, pre=pre) | changed
        _kernels.expert_mlp_forward(*given.values(), 0, N, 1)

    forward()
    with pytest.raises(TypeError, match=r"x must be a plain torch\.Tensor, got list"):
        forward(x=[1.0])
    with pytest.raises(ValueError, match=r"gates must be float32 or float64, got torch\.bfloat16"):
        forward(gates=gates.bfloat16())
    with pytest.raises(ValueError, match=r"y must have shape \[5, 16\], got \[4, 16\]"):
        forward(y=y[:4])
    with pytest.raises(ValueError, match="experts must be contiguous"):
        forward(experts=experts.repeat(1, 1, 2)[..., ::2])
    with pytest.raises(ValueError, match="pre must be on the CPU"):
        forward(pre=pre.to("meta"))
    with pytest.raises(IndexError, match=r"indices must lie in \[0, 8\), got values from 0 to 8"):
        forward(indices=torch.full_like(indices, 8))
    with pytest.raises(ValueError, match="y must not be a view that negates"):
        forward(y=torch._neg_view(y))
