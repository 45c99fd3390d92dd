"""Clipping by the norm of sparse and dense gradients together, against torch's on dense copies."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from million_experts.optim import clip_grad_norm_
from million_experts.optim.clip import merge_repeated_rows


def sparse(rows: list[int], values: torch.Tensor, N: int) -> torch.Tensor:
    return torch.sparse_coo_tensor(
        torch.tensor([rows]), values, (N, *values.shape[1:]), check_invariants=True
    )


@given(
    rows=st.lists(st.integers(0, 9), max_size=12),
    max_norm=st.sampled_from([1e-3, 0.5, 10.0, math.inf]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_as_torch_does_with_dense_gradients(rows, max_norm, dtype):
    torch.manual_seed(len(rows))
    ours = [nn.Parameter(torch.zeros(s, dtype=dtype)) for s in ((10, 2, 3), (4, 5), (7,))]
    theirs = copy.deepcopy(ours)
    ours[0].grad = sparse(rows, torch.randn(len(rows), 2, 3, dtype=dtype), 10)
    ours[1].grad = torch.randn(4, 5, dtype=dtype)
    theirs[0].grad, theirs[1].grad = ours[0].grad.to_dense(), ours[1].grad.clone()
    norm = clip_grad_norm_(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, max_norm)
    assert norm == pytest.approx(float(expected), rel=1e-5)
    assert ours[0].grad.is_sparse
    for a, b in zip(ours[:2], theirs[:2], strict=True):
        torch.testing.assert_close(a.grad.to_dense(), b.grad)
    assert ours[2].grad is None


def test_rows_are_merged_in_order_and_only_if_they_must():
    values = torch.tensor([[1e8], [1.0], [-1e8], [2.0]])
    merged = merge_repeated_rows(sparse([3, 3, 3, 1], values, 5))
    assert merged.is_coalesced()
    assert merged._indices().tolist() == [[1, 3]]
    # (1e8 + 1) - 1e8 in float32, in this order and no other.
    assert merged._values().flatten().tolist() == [2.0, 0.0]
    ascending = sparse([0, 2, 4], values[:3], 5)
    assert merge_repeated_rows(ascending)._values().data_ptr() == ascending._values().data_ptr()


def test_what_is_not_finite_shows():
    table = nn.Parameter(torch.zeros(5, 2))
    table.grad = sparse([1], torch.tensor([[math.nan, 1.0]]), 5)
    assert math.isnan(clip_grad_norm_(table, 1.0))


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan])
def test_a_norm_that_is_no_norm_is_refused(max_norm):
    with pytest.raises(ValueError, match="max_norm must be a positive number, got"):
        clip_grad_norm_([nn.Parameter(torch.zeros(2))], max_norm)
