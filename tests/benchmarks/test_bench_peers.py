"""The competitors compute what is claimed of them."""

from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

from million_experts.benchmarks import parts, peers
from million_experts.benchmarks.case import MIXTRAL
from million_experts.benchmarks.cases import CASES, experts, select_cases
from million_experts.benchmarks.correctness import check_sanity, compare
from million_experts.benchmarks.workload import Unavailable, draw_inputs

SHAPE = {"dim": 16, "num_experts": 64, "num_heads": 2, "experts_per_head": 3, "key_dim": 8}
needs_peer_pytorch = pytest.mark.skipif(find_spec("PEER_pytorch") is None, reason="PEER-pytorch is an extra")


def test_every_layer_gives_the_shape_of_its_tokens(tiny_layers):
    shared = {}
    for competitor in tiny_layers():
        try:
            workload = competitor.build(shared, **competitor.arguments)
        except Unavailable:
            assert competitor.name == "PEER-pytorch"
            continue
        for training in (False, True):
            assert check_sanity(workload, training) is None
        tokens = draw_inputs(workload, 3, False)[0]
        assert tokens.shape[-2:] == (6, 16)
        again, other = draw_inputs(workload, 3, False)[0], draw_inputs(workload, 4, False)[0]
        assert torch.equal(tokens, again)
        assert not torch.equal(tokens, other)


def test_layers_on_several_backends_hold_one_set_of_weights(tiny_layers):
    ours, *_, reference, _ = tiny_layers()
    shared = {}
    a, b = (c.build(shared, **c.arguments).module for c in (ours, reference))
    assert a.experts is b.experts
    assert a.query_norm is not b.query_norm
    assert (a.backend, b.backend) == ("auto", "reference")
    assert ours.share_key == reference.share_key


@pytest.mark.parametrize("glu", [False, True])
def test_the_layer_in_plain_pytorch_agrees_with_the_reference(glu):
    shared = {}
    arguments = {**SHAPE, "glu": glu, "tokens": 20}
    plain = peers.compiled_plain_peer(shared, **arguments)
    plain.module._compiled_call_impl = None  # its arithmetic: what the compiler makes of it is the runner's
    truth = peers.peer(shared, backend="reference", **arguments)
    for training in (False, True):
        assert compare(plain, truth, training) is None


@needs_peer_pytorch
def test_peer_pytorch_takes_all_k_experts_with_softmax_and_the_same_keys():
    """With the same weights it is this project's layer with keys per head and no query norm."""
    theirs = peers.peer_pytorch({}, tokens=5, **SHAPE).module
    ours = peers.PEER(**SHAPE, query_norm="none", share_keys=False, backend="reference")
    assert theirs.keys.shape == (2, 8, 2, SHAPE["key_dim"] // 2)
    with torch.no_grad():
        theirs.keys.normal_()
        ours.keys1.copy_(theirs.keys[:, :, 0])
        ours.keys2.copy_(theirs.keys[:, :, 1])
        # Their rows are ordered by half, head and width, ours by head, half and width.
        weight = theirs.to_queries[0].weight.view(2, 2, 4, 16).transpose(0, 1)
        ours.query_proj.weight.copy_(weight.reshape(16, 16))
        ours.experts[:, 0] = theirs.weight_down_embed.weight
        ours.experts[:, 1] = theirs.weight_up_embed.weight
    x = torch.randn(1, 5, 16)
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-4, atol=1e-5)
    theirs(x[:, :1]).sum().backward()
    touched = theirs.weight_down_embed.weight.grad.abs().sum(1).count_nonzero()
    assert SHAPE["experts_per_head"] < touched <= SHAPE["num_heads"] * SHAPE["experts_per_head"]


def test_peer_pytorch_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "PEER_pytorch", None)
    with pytest.raises(Unavailable, match=r"pip install .million-experts\[bench\]"):
        peers.peer_pytorch({}, tokens=5, **SHAPE)


def test_mixtrals_implementations_are_chosen_and_agree():
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    shape = {"tokens": 7, "dim": 16, "width": 8, "experts": 4, "active": 2}
    eager, grouped = (
        peers.mixtral({}, **shape, implementation=name).module for name in ("eager", "grouped_mm")
    )
    grouped.load_state_dict(eager.state_dict())
    assert grouped.experts.config._experts_implementation in ALL_EXPERTS_FUNCTIONS
    assert eager.experts.config._experts_implementation == "eager"
    x = torch.randn(1, 7, 16)
    torch.testing.assert_close(eager(x), grouped(x))
    assert len(MIXTRAL) == 2


def test_the_memory_is_the_gated_sum_of_its_values():
    layer = peers.EmbeddingBagMemory(**SHAPE, backend="auto").eval()
    x = torch.randn(5, 16)
    routing = layer.retrieve(x)
    values = layer.values.weight[routing.indices.flatten(1)]
    expected = (values * routing.gates.flatten(1).unsqueeze(-1)).sum(1)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("picks", parts.PICKS)
def test_picks_are_in_range_and_as_uneven_as_said(picks):
    N = 1000
    _, indices, gates = parts.draw_picks(400, 4, N, 50, picks)(torch.Generator().manual_seed(0))
    assert indices.shape == gates.shape == (400, 50)
    assert 0 <= int(indices.min()) <= int(indices.max()) < N
    shares = torch.bincount(indices.flatten(), minlength=N).sort(descending=True).values / indices.numel()
    if picks == "uniform":
        assert shares[0] < 2.5 / N
    else:  # log(1 + 1/r) / log(N + 1)
        expected = torch.log1p(1 / torch.arange(1.0, 11)) / torch.log(torch.tensor(N + 1.0))
        torch.testing.assert_close(shares[:10], expected, rtol=0.2, atol=0)


@pytest.mark.parametrize("how", ["embedding_bag", "index_select"])
def test_probes_read_every_row_of_the_chosen_experts(how):
    shape = {"tokens": 5, "dim": 4, "num_experts": 20, "K": 3, "dtype": "float32"}
    shared = {}
    probe = parts.row_probe(shared, how=how, **shape)
    module = parts.experts(shared, **shape).module
    assert probe.module.experts is module.experts
    inputs = draw_inputs(probe, 0, False)
    with torch.no_grad():
        read = probe.module(*inputs)
        rows = module.experts.flatten(1)[inputs[1]]
    assert torch.equal(read, rows.flatten(0, 1)) if how == "index_select" else True
    torch.testing.assert_close(read.sum(), rows.sum())


def test_the_experts_of_a_bfloat16_table_agree_with_the_reference():
    for dtype in ("float32", "bfloat16"):
        competitor = experts("experts", 30, dtype=dtype)
        arguments = {**competitor.arguments, "tokens": 9, "dim": 8, "K": 4}
        shared = {}
        workload = competitor.build(shared, **arguments)
        truth = competitor.truth.build(shared, **{**arguments, "backend": "reference"})
        assert workload.module.experts.dtype == getattr(torch, dtype)
        assert compare(workload, truth, training=True) is None


def test_cases_are_named_once_and_selected_by_name_and_group():
    assert len({case.name for case in CASES}) == len(CASES)
    assert [case.name for case in select_cases("P5, P1")] == ["P1", "P5", "P5 turns"]
    assert [case.name for case in select_cases("T")] == ["T=1", "T=16", "T=128", "T=512", "T=8192"]
    assert select_cases(None) == CASES
    assert {case.name for case in select_cases(None, quick=True)} == {c.name for c in CASES if c.targets}
    with pytest.raises(ValueError, match=r"among P1, P1g, P2, P2s, .*got 'P99'"):
        select_cases("P1,P99")
    with pytest.raises(ValueError, match="got none"):
        select_cases(",")
    with pytest.raises(ValueError, match="have targets"):
        select_cases("T", quick=True)


def test_targets_name_competitors_of_their_case():
    for case in CASES:
        for target in case.targets:
            assert target.case == case.name
            assert target.phase in case.phases
            assert {target.ours, *target.over} <= {c.name for c in case.competitors}
            assert case.memory or not target.of_memory
        assert {c.name for c in case.quick().competitors} <= {c.name for c in case.competitors}
