"""Row-wise AdamW on a GPU against the plain step on the CPU: the same bits, in each form of the kernel."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch

from million_experts.ops import reference_rowwise
from million_experts.ops.backends import implementation
from rowwise_cases import exact_sqrt, make_gradient, make_state

# D, R: narrow and wide rows, one of no power of two, and experts that are updated in several pieces.
SIZES = ((64, 2), (256, 3), (1000, 2), (8192, 3))
bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
# Types of table, first moment and gradient; a second moment by row; gradients summed from places; the key.
FORMS = {
    "float32": (f32, f32, f32, False, False, None),
    "float32, gathered": (f32, f32, f32, False, True, None),
    "bfloat16, by row, stochastic": (bf16, bf16, bf16, True, False, 1),
    "bfloat16, by row, gathered, stochastic": (bf16, bf16, bf16, True, True, 2**63 + 5),
    "bfloat16, gathered, stochastic": (bf16, f32, bf16, False, True, 1),
    "bfloat16, to the nearest": (bf16, bf16, f32, False, False, None),
    "float16": (f16, f32, f16, False, False, None),
    "float32, no first moment, by row": (f32, None, f32, True, False, None),
    "bfloat16, no first moment, gathered, stochastic": (bf16, None, bf16, False, True, 1),
}

State = dict[str, Any]


def after_step(run, state: State, gradient: State, device: torch.device, **options) -> State:
    """The state after a step; what lies on the device already is changed in place."""
    own, gradient = (
        {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in tensors.items()}
        for tensors in (state, gradient)
    )
    run(**own, **gradient, lr=1e-2, eps=1e-8, weight_decay=0.1, **options)
    return own


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("touched", [True, False], ids=["a step", "all rows catch up"])
def test_adamw_has_the_bits_of_the_reference(size, form, touched, device, tiny, assert_close):
    (D, R), (table, momentum, values, by_row, gathered, key) = size, FORMS[form]
    N = 5 if tiny else max(100, 2**20 // (D * R))
    state = make_state(0, N, R, D, table, momentum, by_row, below_one=True)
    gradient = dict.fromkeys(("rows", "values", "places", "starts"))
    if touched:
        gradient = make_gradient(1, N, R, D, max(1, N // 2), values, gathered)
    options = {"betas": (0.0 if momentum is None else 0.9, 0.99), "key": key}
    own = copy.deepcopy(state)
    actual = after_step(implementation("triton").rowwise_adamw, own, gradient, device, **options)
    with mock.patch.object(torch.Tensor, "sqrt", exact_sqrt):
        cpu = torch.device("cpu")
        own = copy.deepcopy(state)
        expected = after_step(reference_rowwise.rowwise_adamw, own, gradient, cpu, **options)
    assert not torch.equal(expected["table"], state["table"])
    for name, right in expected.items():
        if not isinstance(right, torch.Tensor):
            assert actual[name] == right
        elif touched and by_row and name in ("table", "exp_avg_sq"):
            # A row's mean of squares is summed in another order, and the table depends on it.
            assert_close(actual[name].cpu(), right)
        else:
            assert torch.equal(actual[name].cpu(), right), name


def test_adamw_of_a_table_beyond_32_bits(device, tiny, needs_bytes):
    N, D, R = (30, 20, 2) if tiny else (2**20 + 2**10, 1024, 2)
    bytes_ = 2 * N * R * D * 2  # table and first moment
    needs_bytes(1.5 * bytes_)
    small = make_state(0, 4, R, D, bf16, bf16, True, below_one=True)
    large: State = {name: small[name] for name in ("history", "step")}
    for name in ("table", "exp_avg", "exp_avg_sq", "last_step"):
        large[name] = torch.zeros(N, *small[name].shape[1:], dtype=small[name].dtype, device=device)
        large[name][-4:] = small[name].to(device)
    values = torch.randn(2, R, D, generator=torch.Generator().manual_seed(1))
    results = []
    for state, last in ((copy.deepcopy(small), 3), (large, N - 1)):
        gradient = {"rows": torch.tensor([last, last - 2]), "values": values, "places": None, "starts": None}
        run = implementation("triton").rowwise_adamw
        results.append(after_step(run, state, gradient, device, betas=(0.9, 0.99), key=None))
    for name in ("table", "exp_avg", "exp_avg_sq", "last_step"):
        assert torch.equal(results[0][name], results[1][name][-4:]), name
    assert not torch.equal(results[0]["table"].cpu(), small["table"])
