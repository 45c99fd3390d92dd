"""MaskedBatchNorm against torch.nn.BatchNorm1d on the tokens that are real."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from million_experts.layers import MaskedBatchNorm

MASK = torch.tensor([True, False, True, True, False, True])


def make_pair(**settings) -> tuple[MaskedBatchNorm, nn.BatchNorm1d]:
    torch.manual_seed(0)
    theirs = nn.BatchNorm1d(3, **settings).double()
    nn.init.normal_(theirs.weight)
    nn.init.normal_(theirs.bias)
    mine = MaskedBatchNorm(3, **settings).double()
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return mine, theirs


@pytest.mark.parametrize("mask", [None, MASK, torch.ones(6, dtype=torch.bool)])
@pytest.mark.parametrize("settings", [{}, {"eps": 0.3, "momentum": 0.7}])
def test_is_batch_norm_of_the_real_tokens(mask, settings, assert_close):
    mine, theirs = make_pair(**settings)
    real = slice(None) if mask is None else mask
    for _ in range(3):
        x, weights = torch.randn(2, 6, 3, dtype=torch.float64) * 3 + 1
        if mask is not None:
            x[~mask] = float("nan")
        x, clean = x.requires_grad_(), x[real].detach().clone().requires_grad_()
        y, expected = mine(x, mask), theirs(clean)
        assert_close(y[real], expected)
        y[real].backward(weights[real])
        expected.backward(weights[real])
        assert_close(x.grad[real], clean.grad)
        if mask is not None:
            assert not x.grad[~mask].any()
        for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert_close(a.grad, b.grad)
        for (name, a), (other, b) in zip(mine.named_buffers(), theirs.named_buffers(), strict=True):
            assert name == other
            assert_close(a, b, torch.float64)
    assert mine.num_batches_tracked == 3
    x = torch.randn(6, 3, dtype=torch.float64)
    assert_close(mine.eval()(x), theirs.eval()(x))


def test_evaluation_leaves_the_statistics_alone():
    mine, _ = make_pair()
    mine.eval()
    before = copy.deepcopy(mine.state_dict())
    x = torch.randn(6, 3, dtype=torch.float64)
    assert torch.equal(mine(x, MASK)[MASK], mine(x)[MASK])
    assert mine(x[:1]).shape == (1, 3)
    assert mine(x[:0]).shape == (0, 3)
    for name, tensor in mine.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize(("tokens", "mask"), [(1, None), (3, [False] * 3), (3, [False, True, False])])
def test_fewer_than_two_real_tokens(tokens, mask):
    mine, _ = make_pair()
    real = tokens if mask is None else sum(mask)
    with pytest.raises(ValueError, match=rf"at least two real tokens .*, got {real} of {tokens}; eval mode"):
        mine(torch.randn(tokens, 3), None if mask is None else torch.tensor(mask))
    assert mine.num_batches_tracked == 0


def test_an_empty_batch_in_training():
    mine, _ = make_pair()
    x = torch.zeros(0, 3, requires_grad=True)
    y = mine(x)
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 3)
    assert mine.num_batches_tracked == 0


@pytest.mark.parametrize(
    ("of_x", "of_y"), [(torch.bfloat16, torch.float32), (torch.float32,) * 2, (torch.float64,) * 2]
)
def test_output_is_float32_or_wider(of_x, of_y, assert_close):
    norm = MaskedBatchNorm(3).to(torch.bfloat16)
    x = (torch.randn(50, 3) * 2 + 100).to(of_x)
    y = norm(x)
    assert y.dtype == of_y
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    theirs = nn.BatchNorm1d(3).double()
    # The mean of 100 costs float32 two of its digits in x - mean: compare y * std, the centred numbers, to x.
    scale = x.double().std(0, correction=0)
    assert ((y.double() - theirs(x.double())) * scale).abs().max() <= 100 * 1e-7 * 2
    assert_close(norm.running_mean, theirs.running_mean, torch.float32)


def test_pickles():
    mine, _ = make_pair()
    twin = pickle.loads(pickle.dumps(mine))
    x = torch.randn(6, 3, dtype=torch.float64)
    assert torch.equal(twin(x), mine(x))
