"""The operations as callers reach them: the kernels refuse what the reference refuses, and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from fuzz.entries import sizes
from fuzz.tensors import filled, spoil_arguments, wrongs
from fuzz.worker import REFUSALS
from million_experts import ops

DTYPES = st.sampled_from(["float32", "float64", "bfloat16", "float16"])
RAW = torch.ops.million_experts


def calls(case: dict[str, Any], backend: str) -> dict[str, tuple[Any, list[Any]]]:
    s = case["sizes"]
    T, K, N, R, D, H, d, n1, n2 = (s[name] for name in ("T", "K", "N", "R", "D", "H", "d", "n1", "n2"))
    x, grad_y = (filled((T, D), case["x"]) for _ in range(2))
    indices, gates, experts = (
        filled((T, K), "int64", N),
        filled((T, K), case["x"]),
        filled((N, R, D), case["table"]),
    )
    mask = filled((T,), "bool") if case["masked"] else None
    query, keys1, keys2 = (filled(shape, case["x"]) for shape in ((T, H, 2, d), (n1, d), (n2, d)))
    k = max(1, min(n1, n2, K))
    wide = "float64" if "float64" in (case["x"], case["table"]) else "float32"
    pre, mean = filled((R - 1, T, K), wide), filled((D,), "float64" if case["x"] == "float64" else "float32")
    weight, needs = filled((D,), case["table"]), [True, True, case["masked"]]
    return {
        "product_key_topk": (ops.product_key_topk, [query, keys1, keys2, k, backend]),
        "expert_mlp": (
            lambda *a: ops.expert_mlp(*a[:-1], mask=a[-1], sparse_grad=case["sparse"]),
            [x, indices, gates, experts, case["activation"], backend, mask],
        ),
        "masked_batch_norm": (ops.masked_batch_norm, [x, mask, weight, weight.clone(), 1e-5, backend]),
        "product_key_topk_backward": (
            RAW.product_key_topk_backward,
            [filled((T, H, k), case["x"]), filled((T, H, k), "int64", n1 * n2), query, keys1, keys2, backend],
        ),
        "expert_mlp_backward": (
            RAW.expert_mlp_backward,
            [grad_y, x, indices, gates, experts, pre, mask, case["activation"], needs, backend],
        ),
        "expert_mlp_touched_backward": (
            RAW.expert_mlp_touched_backward,
            [grad_y, x, indices, gates, experts, pre, mask, case["activation"], needs[:2], backend],
        ),
        "masked_batch_norm_backward": (
            RAW.masked_batch_norm_backward, [grad_y, x, mask, weight, mean, mean.abs(), 1e-5, backend],
        ),
    }  # fmt: skip


cases = st.fixed_dictionaries(
    {
        "operation": st.sampled_from(
            ["product_key_topk", "expert_mlp", "masked_batch_norm", "product_key_topk_backward",
             "expert_mlp_backward", "expert_mlp_touched_backward", "masked_batch_norm_backward"]
        ),
        "sizes": sizes,
        "x": DTYPES,
        "table": DTYPES,
        "activation": st.sampled_from(["gelu", "relu", "silu", "tanh"]),
        "masked": st.booleans(),
        "sparse": st.booleans(),
        "wrong": st.lists(wrongs, max_size=2),
    }
)  # fmt: skip


def run(case: dict[str, Any], backend: str) -> list[Tensor]:
    operation, arguments = calls(case, backend)[case["operation"]]
    arguments = spoil_arguments(arguments, case["wrong"])
    wanted = [t for t in arguments if isinstance(t, Tensor) and t.is_floating_point() and t.is_leaf]
    for tensor in wanted:
        tensor.requires_grad_()
    results = operation(*arguments)
    results = [results] if isinstance(results, Tensor) else list(results)
    if not case["operation"].endswith("backward"):
        outputs = [t for t in results if t.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
        results += [torch.zeros(0) if t.grad is None else t.grad.to_dense() for t in wanted]
    return results


def attempt(case: dict[str, Any]) -> None:
    try:
        expected = run(case, "reference")
    except REFUSALS as error:
        expected = error
    try:
        found = run(case, "cpu")
    except REFUSALS:
        if not isinstance(expected, list):
            raise
        raise AssertionError("the kernels refuse what the reference takes") from None
    assert isinstance(expected, list), f"the kernels take what the reference refuses: {expected}"
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert [t.dtype for t in found] == [t.dtype for t in expected]
