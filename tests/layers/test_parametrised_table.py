"""A table cannot be parametrised: each forward pass would compute another one. What is smaller can."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from million_experts import PEER
from million_experts.layers import MemoryPlus, ProductKeyMemory

TABLES = {PEER: "experts", ProductKeyMemory: "values", MemoryPlus: "values"}


@pytest.fixture(autouse=True)
def _quick_initialisation(monkeypatch):
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**10)


class Doubled(nn.Module):
    def forward(self, weight):
        return weight * 2


@pytest.mark.parametrize("sparse_grad", [False, True])
@pytest.mark.parametrize(("layer_class", "table"), TABLES.items())
@pytest.mark.parametrize("after_keys", [False, True])
def test_the_table_stays_what_it_is(layer_class, table, sparse_grad, after_keys):
    torch.manual_seed(0)
    layer = layer_class(8, 64, 2, 4, 8, sparse_grad=sparse_grad).eval()
    x = torch.randn(5, 8)
    if after_keys:
        parametrize.register_parametrization(layer, "keys1", Doubled())
    expected, names = layer(x), list(layer.state_dict())
    with pytest.raises(
        ValueError, match=rf"{table} must not be parametrised.*64 rows.*RowwiseAdamW.*query_proj"
    ):
        parametrize.register_parametrization(layer, table, Doubled())
    assert list(layer.state_dict()) == names
    assert torch.equal(layer(x), expected)
    layer(x).sum().backward()
    assert layer.table.grad is not None


@pytest.mark.parametrize(("layer_class", "table"), TABLES.items())
def test_others_may_take_a_table_out(layer_class, table):
    """To put it back, as programs that shard parameters do."""
    layer = layer_class(8, 64, 2, 4, 8).eval()
    x, held = torch.randn(5, 8), layer.table
    expected = layer(x)
    delattr(layer, table)
    assert table not in dict(layer.named_parameters())
    setattr(layer, table, held)
    assert torch.equal(layer(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
