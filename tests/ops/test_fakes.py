"""What every operation says of its outputs when given meta tensors: shapes, dtypes and nothing computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from million_experts.ops import ACTIVATIONS, expert_mlp, masked_batch_norm
from million_experts.ops.reference import expert_mlp as reference_mlp
from million_experts.ops.registration import LIBRARY

OPERATIONS = torch.ops.million_experts
T, D, H, K, N, R, n1, n2, d, k = 5, 6, 2, 4, 30, 3, 6, 5, 3, 2
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def retrieval(dtype: torch.dtype) -> tuple:
    return torch.randn(T, H, 2, d).to(dtype), torch.randn(n1, d), torch.randn(H, n2, d)[0]


def experts(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, gates = torch.randn(T, D).to(dtype), torch.rand(T, K).to(dtype)
    return x, torch.randint(0, N, (T, K)), gates, torch.randn(N, R, D)


def layer() -> tuple:
    norm = [torch.ones(H * 2 * d) for _ in range(4)]
    keys = torch.randn(n1, d), torch.randn(n2, d)
    table = torch.randn(n1 * n2, R, D)
    return (
        torch.randn(T, D),
        torch.randn(H * 2 * d, D),
        "batch",
        norm,
        1e-5,
        *keys,
        table,
        H,
        k,
        "softmax",
        "gelu",
    )


def _calls(dtype: torch.dtype) -> dict[str, tuple]:
    query, keys1, keys2 = retrieval(dtype)
    scores, indices = torch.randn(T, H, k), torch.randint(0, n1 * n2, (T, H, k))
    x, picks, gates, table = experts(dtype)
    mask = torch.tensor([True, False, True, True, False])
    pre = reference_mlp(x, picks, gates, table, "gelu")[1]
    weight, mean = (
        torch.ones(D),
        torch.zeros(D, dtype=torch.float64 if dtype == torch.float64 else torch.float32),
    )
    needs = [True, False, True]
    return {
        "product_key_topk": (query, keys1, keys2, k),
        "product_key_topk_backward": (scores, indices, query, keys1, keys2),
        "expert_mlp": (x, picks, gates, table, mask, "gelu"),
        "expert_mlp_backward": (x, x, picks, gates, table, pre, mask, "gelu", needs),
        "masked_batch_norm": (x, mask, weight, weight, 1e-5),
        "masked_batch_norm_backward": (x, x, mask, weight, mean, mean + 1, 1e-5),
    }


def to_meta(value):
    if isinstance(value, list):
        return [to_meta(v) for v in value]
    return value.to("meta") if isinstance(value, Tensor) else value


def forms(outputs) -> list[tuple[torch.Size, torch.dtype]]:
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    return [(t.shape, t.dtype) for t in outputs]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", _calls(torch.float32))
def test_meta_tensors_give_the_outputs_that_numbers_give(name, dtype):
    arguments = _calls(dtype)[name]
    run: Callable = getattr(OPERATIONS, name)
    real = run(*arguments, "reference")
    for backend in ("reference", "cpu", "triton"):  # the name of a backend that need not be here
        fake = run(*to_meta(list(arguments)), backend)
        assert all(t.device.type == "meta" for t in fake)
        assert forms(fake) == forms(real)


def test_layer_inference_of_meta_tensors():
    fake = OPERATIONS.layer_inference(*to_meta(list(layer())), "cpu")
    assert (fake.device.type, fake.shape, fake.dtype) == ("meta", (T, D), torch.float32)


def test_moved_statistics_of_meta_tensors():
    mean, variance, count = torch.randn(D), torch.rand(D).double(), torch.tensor(3)
    arguments = (mean, variance, count, torch.randn(D), torch.rand(D), None, torch.tensor(True))
    real = OPERATIONS.moved_statistics(*arguments)
    assert forms(OPERATIONS.moved_statistics(*to_meta(list(arguments)))) == forms(real)


def test_how_many_rows_are_touched_is_unknown_without_numbers():
    x, picks, gates, table = experts(torch.float32)
    pre = reference_mlp(x, picks, gates, table, "gelu")[1]
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = [mode.from_tensor(t) for t in (x, x, picks, gates, table, pre)]
        *grads, rows, values = OPERATIONS.expert_mlp_touched_backward(
            *fakes, None, "gelu", [True, True], "triton"
        )
    assert forms(grads) == [(x.shape, x.dtype), (gates.shape, gates.dtype)]
    assert rows.dtype == torch.int64
    assert isinstance(rows.shape[0], torch.SymInt)
    assert values.shape[0] == rows.shape[0]
    assert values.shape[1:] == table.shape[1:]


def test_gradients_flow_between_meta_tensors():
    x, picks, gates, table = (to_meta(t) for t in experts(torch.float32))
    table.requires_grad_()
    for activation in ACTIVATIONS:
        y = expert_mlp(x, picks, gates, table, activation)
        y.sum().backward()
        assert table.grad.device.type == "meta"
        assert table.grad.shape == table.shape
    assert masked_batch_norm(x, None, x.new_ones(D), x.new_ones(D))[0].shape == x.shape


def test_every_operation_is_tested_here():
    registered = {name.split("::")[1].split(".")[0] for name in LIBRARY._op_defs}
    tested = {*_calls(torch.float32), "layer_inference", "expert_mlp_touched_backward", "moved_statistics"}
    assert registered == tested
