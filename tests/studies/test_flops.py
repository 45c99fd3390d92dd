"""FLOP counts against PyTorch's own counter on eager references, and against sums by hand.

The counter sees matrix products alone. It counts nothing for custom operations, for products that are summed
without one, and for fused attention on CPUs. So here a whole model runs with eager attention and with the
references below in the places of retrieval, of PEER's experts and of the memories' weighted sums. Left out by
the counter even so: the pair sums of retrieval, which are additions.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from million_experts.models import FEED_FORWARDS, PeerConfig, PeerForCausalLM, count_parameters
from million_experts.ops.reference import activate
from million_experts.studies import training_flops_per_token

BATCH, CONTEXT = 3, 8
RETRIEVAL = {"num_experts": (8, 6), "num_heads": 2, "experts_per_head": 3, "key_dim": 10}
CASES = [
    ("dense", {"width": 24}),
    ("dense", {"glu": True}),
    ("swiglu", {"width": 24}),
    ("moe", {"num_experts": 4, "width": 5}),
    ("moe", {"num_experts": 5, "experts_per_token": 3, "glu": False}),
    ("expert_choice", {"num_experts": 4, "width": 5}),
    ("expert_choice", {"num_experts": 8, "capacity_factor": 3, "glu": True}),
    ("peer", RETRIEVAL),
    ("peer", {**RETRIEVAL, "glu": True, "share_keys": False}),
    ("peer", {**RETRIEVAL, "shared_width": 7}),
    ("pkm", RETRIEVAL),
    ("pkm", {**RETRIEVAL, "share_keys": True, "query_norm": "layer"}),
    ("memory_plus", RETRIEVAL),
]


def eager_topk(query, keys1, keys2, k, backend):
    best = []
    for half, keys in enumerate((keys1, keys2)):
        equation = "thd,nd->thn" if keys.dim() == 2 else "thd,hnd->thn"
        best.append(torch.einsum(equation, query[:, :, half], keys).topk(k))
    (first, i), (second, j) = best
    scores, pairs = (first[..., :, None] + second[..., None, :]).flatten(2).topk(k)
    rows, columns = i.gather(2, pairs // k), j.gather(2, pairs % k)
    return scores, rows * keys2.shape[-2] + columns


def eager_experts(x, indices, gates, experts, activation, backend, mask=None, sparse_grad=False):
    down, up, *gate = experts[indices].unbind(2)
    hidden = activate(activation, torch.einsum("td,tkd->tk", x, down))
    if gate:
        hidden = hidden * torch.einsum("td,tkd->tk", x, gate[0])
    return torch.einsum("tk,tkd->td", hidden * gates, up)


def eager_values(self, indices, gates):
    return torch.einsum("tk,tkd->td", gates, self.values[indices])


@pytest.fixture
def eager(monkeypatch):
    """Puts the references in their places, and keeps the experts' initialisation short."""
    monkeypatch.setattr("million_experts.layers.peer.INIT_PAIRS", 2**10)
    monkeypatch.setattr("million_experts.layers.retrieval.product_key_topk", eager_topk)
    monkeypatch.setattr("million_experts.layers.peer.expert_mlp", eager_experts)
    monkeypatch.setattr("million_experts.layers.memory._Memory._bag", eager_values)


def config_of(kind: str, arguments: dict, **settings) -> PeerConfig:
    sizes = {
        "vocab_size": 37,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return PeerConfig(**{**sizes, "mlp_layer_types": kind, kind: arguments, **settings})


def test_every_kind_is_counted():
    assert {kind for kind, _ in CASES} == set(FEED_FORWARDS)


@pytest.mark.parametrize(("kind", "arguments"), CASES)
@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 4, "head_dim": 6}], ids=str)
@pytest.mark.usefixtures("eager")
def test_a_step_of_the_eager_model_costs_what_is_counted(kind, arguments, settings):
    config = config_of(kind, arguments, attn_implementation="eager", **settings)
    torch.manual_seed(0)
    model = PeerForCausalLM(config)
    tokens = torch.randint(37, (BATCH, CONTEXT))
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens, use_cache=False).loss.backward()
    count = training_flops_per_token(config, CONTEXT, causal=False)
    expected = BATCH * CONTEXT * (count.total - count.parts.get("pair sums", 0))
    assert counter.get_total_flops() == expected


def test_parts_are_those_of_a_sum_by_hand():
    config = config_of("peer", RETRIEVAL, mlp_layer_types=["dense", "peer"], dense={"width": 24})
    count = training_flops_per_token(config, 9)
    dense, peer = count.blocks
    # Forward and backward, a multiply-add 2 FLOPs: 6 each.
    assert dense["attention projections"] == peer["attention projections"] == 6 * 16 * (16 + 8 + 8 + 16)
    assert dense["attention scores"] == 6 * 2 * 16 * 5  # 5 of 9 keys on average
    assert dense["feed-forward"] == 6 * 2 * 16 * 24
    assert peer["query projection"] == 6 * 16 * 2 * 10
    assert peer["sub-key scores"] == 6 * 2 * (8 + 6) * 5
    assert peer["pair sums"] == 3 * 2 * 9
    assert peer["experts"] == 6 * 2 * 16 * 6
    assert count.head == 6 * 16 * 37
    assert count.total == sum(dense.values()) + sum(peer.values()) + count.head == sum(count.parts.values())
    assert count.forward == count.total / 3


def test_a_dense_model_costs_six_flops_a_weight():
    """The usual rule of 6 FLOPs per parameter and token, attention scores apart."""
    config = config_of("dense", {}, num_hidden_layers=5)
    count = training_flops_per_token(config, 100)
    norms = 11 * 16
    weights = count_parameters(config).total - norms
    assert count.total - count.parts["attention scores"] == 6 * weights


def test_only_half_of_the_keys_are_seen_by_a_causal_model():
    config = config_of("dense", {})
    causal, full = (training_flops_per_token(config, 101, causal).parts for causal in (True, False))
    assert full["attention scores"] == pytest.approx(causal["attention scores"] * 101 / 51)
    assert {n: f for n, f in full.items() if n != "attention scores"} == {
        n: f for n, f in causal.items() if n != "attention scores"
    }
    with pytest.raises(ValueError, match="context must be at least 1, got 0"):
        training_flops_per_token(config, 0)


def test_a_million_experts_cost_less_than_a_dense_layer():
    """The paper's layer, 1024^2 experts and 8 heads of 16: the search costs more than what is found."""
    config = PeerConfig(hidden_size=1024, num_attention_heads=8, num_hidden_layers=3)
    dense, peer, _ = training_flops_per_token(config, 2048).blocks
    feed_forward = dense["feed-forward"]
    retrieval = peer["query projection"] + peer["sub-key scores"] + peer["pair sums"]
    assert peer["experts"] < 0.05 * feed_forward
    assert peer["experts"] < retrieval < 0.4 * feed_forward
