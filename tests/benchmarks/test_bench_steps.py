"""Training steps with an optimiser of their own: sparse gradients, phases, memory, language models."""

from __future__ import annotations

import gc
import json
import re
import weakref
from dataclasses import replace
from importlib.util import find_spec

import bench_competitors
import pytest
import torch
from torch import nn

from million_experts.benchmarks import correctness, memory, steps
from million_experts.benchmarks.cases import select_cases
from million_experts.benchmarks.cases_steps import (
    DENSE_GRADIENTS,
    IN_BACKWARD,
    SMALL,
    SPARSE,
    STEP_SWEEP_CASES,
    STEP_TARGET_CASES,
    trained_layer,
)
from million_experts.benchmarks.correctness import compare, compare_steps
from million_experts.benchmarks.figures import draw_figures
from million_experts.benchmarks.optimizers import OPTIMIZERS, AdamW, AsInTraining, Rowwise, settle
from million_experts.benchmarks.report import markdown
from million_experts.benchmarks.runner import CaseRunner, Effort
from million_experts.benchmarks.targets import evaluate
from million_experts.benchmarks.timing import make_run
from million_experts.benchmarks.workload import Competitor, draw_inputs, draw_upstream, prepare, run_once

SHAPE = {"tokens": 6, "dim": 16, "num_experts": 64, "num_heads": 2, "experts_per_head": 3, "key_dim": 8}
SETTINGS = (SPARSE, IN_BACKWARD, SMALL, DENSE_GRADIENTS)
needs_peaks = pytest.mark.skipif(not memory.can_measure(), reason="needs Linux's /proc/self/clear_refs")


def small(competitor: Competitor, **changes) -> Competitor:
    """A competitor, its truth included, at a shape that takes no time."""
    arguments = {**competitor.arguments, **SHAPE, **changes}
    truth = competitor.truth and replace(competitor.truth, arguments={**competitor.truth.arguments, **SHAPE})
    return replace(competitor, arguments=arguments, truth=truth)


def built(setting: str = SPARSE, picks: str = "retrieved", build=steps.layer, **arguments):
    """A workload and its truth with the same weights."""
    competitor, shared = small(trained_layer(setting, 6, 64, picks)), {}
    truth = competitor.truth
    return (
        build(shared, **competitor.arguments, **arguments),
        truth.build(shared, **truth.arguments),
    )


# Results: sparse gradients, steps in the backward pass.


@pytest.mark.parametrize("picks", steps.PICKS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_gradients_of_every_setting_agree_with_the_reference(setting, picks, monkeypatch):
    monkeypatch.setattr(correctness, "BLOCK", 7 * 2 * 16)  # tables are compared in parts
    workload, truth = built(setting, picks)
    assert truth.module.backend == "reference"
    assert truth.module.experts is workload.module.experts
    assert compare(workload, truth, training=True) is None
    loss = workload.module(*draw_inputs(workload, 0, True)).sum()
    loss.backward()
    assert workload.module.experts.grad.is_sparse == (setting != DENSE_GRADIENTS)
    assert workload.module.experts.dtype == (torch.bfloat16 if setting == SMALL else torch.float32)
    assert workload.module.keys1.dtype == torch.float32


@pytest.mark.parametrize("block", [2 * 16, 5 * 2 * 16, 2**24])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("value", "gradient of experts differs"),
        ("row left out", r"gradient of experts leaves out row \d+, which is not zero"),
        ("another row", "gradient of experts leaves out row"),
        ("in two parts and out of order", None),
        ("nothing", None),
    ],
)
def test_a_wrong_sparse_gradient_is_found(what, message, block, monkeypatch):
    monkeypatch.setattr(correctness, "BLOCK", block)
    workload, truth = built(build=bench_competitors.off_sparse, what=what)
    difference = compare(workload, truth, training=True)
    if message is None:
        assert difference is None
    else:
        assert re.search(message, difference)


def test_a_row_that_is_left_out_is_found_however_small_it_is():
    expected = torch.zeros(10, 2, 4)
    expected[3], expected[7] = 1.0, 1e-20
    sparse = torch.sparse_coo_tensor(torch.tensor([[3]]), expected[[3]], expected.shape)
    assert correctness._difference("x", sparse, expected) == "x leaves out row 7, which is not zero"
    both = torch.sparse_coo_tensor(torch.tensor([[3, 7]]), expected[[3, 7]], expected.shape)
    assert correctness._difference("x", both, expected) is None
    zero = torch.sparse_coo_tensor(torch.empty(1, 0, dtype=torch.int64), expected[:0], expected.shape)
    assert correctness._difference("x", zero, torch.zeros_like(expected)) is None


@pytest.mark.parametrize("picks", steps.PICKS)
def test_steps_in_backward_are_compared_to_the_bit(picks):
    workload, _ = built(IN_BACKWARD, picks)
    before = workload.module.experts.detach().clone()
    assert compare_steps(workload) is None
    assert not torch.equal(before, workload.module.experts), "a step was taken"
    wrong, _ = built(IN_BACKWARD, picks, build=bench_competitors.off_in_backward)
    assert "experts after a step in the backward pass is not" in compare_steps(wrong)
    assert compare_steps(built(SPARSE)[0]) is None


def test_a_workload_steps_in_backward_for_one_optimiser_after_another():
    workload, truth = built(IN_BACKWARD)
    seen = []
    for seed in range(2):
        optimizer = prepare(workload, "step")
        inputs = draw_inputs(workload, seed, True)
        before = workload.module.experts.detach().clone()
        run_once(workload, "step", inputs, draw_upstream(inputs), optimizer)
        assert not torch.equal(before, workload.module.experts)
        assert truth.module.experts.data_ptr() == workload.module.experts.data_ptr()
        seen.append(weakref.ref(optimizer))
        del optimizer
    gc.collect()
    assert [reference() for reference in seen] == [None, None]


def test_wrong_results_of_steps_are_refused():
    case = replace(STEP_TARGET_CASES[0], competitors=tuple(map(small, STEP_TARGET_CASES[0].competitors)))
    ours = case.competitors[0]
    wrong = (
        replace(
            ours, name="off", build=bench_competitors.off_sparse, arguments=ours.arguments | {"what": "value"}
        ),
        replace(ours, name="off", build=bench_competitors.off_in_backward),
    )
    for off, message in zip(wrong, ("gradient of experts differs", "in the backward pass"), strict=True):
        spoiled = replace(case, competitors=(ours, off), memory=False)
        rows = CaseRunner(spoiled, Effort(3, 1.0), threads=1).run()
        assert {row["status"] for row in rows} == {"refused"}
        assert {row["median_s"] for row in rows} == {None}
        assert message in rows[1]["reason"]


# Builders.


def test_uniform_picks_replace_those_that_are_retrieved_and_are_counted():
    workload, _ = built(SPARSE, "uniform")
    x, picks = draw_inputs(workload, 5, True)
    assert picks.shape == (6, 2, 3)
    workload.module(x, picks).sum().backward()
    rows = workload.module.experts.grad._indices()[0]
    assert torch.equal(rows, picks.unique())
    assert workload.touched((x, picks)) == len(rows)
    assert workload.module.retrieve(x.detach()).indices.shape == picks.shape
    assert not torch.equal(workload.module.retrieve(x.detach()).indices, picks)
    assert built(SPARSE)[0].touched is None


def test_a_bfloat16_table_is_drawn_as_a_float32_one_is():
    shape = {**SHAPE, "num_experts": 32**2, "tokens": 512, "dim": 32, "key_dim": 16}
    workload = steps.layer({}, **shape, optimizer="RowwiseAdamW, small state", dtype="bfloat16")
    layer = workload.module.train()
    assert abs(float(layer.experts[:, 0].detach().float().std()) * 32**0.5 - 1) < 0.02
    assert 0.008 < float(layer(*draw_inputs(workload, 0, False)).detach().std()) < 0.012
    assert float(layer.query_norm.running_var.sub(1).abs().max()) < 0.5
    with torch.device("meta"):
        estimated = steps.layer({}, **shape, optimizer="RowwiseAdamW, small state", dtype="bfloat16").module
    assert {parameter.device.type for parameter in estimated.parameters()} == {"meta"}
    assert estimated.experts.dtype == torch.bfloat16


LM = {
    **SHAPE,
    "tokens": 16,
    "context": 8,
    "vocab_size": 50,
    "blocks": 2,
    "attention_heads": 2,
    "optimizer": "RowwiseAdamW",
}


def test_the_layer_of_a_language_model_is_compared_with_the_reference():
    shared = {}
    workload = steps.language_model(shared, **LM)
    truth = steps.layer_of_language_model(shared, **LM)
    (ids,) = draw_inputs(workload, 0, True)
    assert ids.shape == (2, 8)
    assert workload.module.model.config.mlp_layer_types == ["dense", "peer"]
    assert truth.module.experts is workload.part.module.experts
    assert (truth.module.backend, truth.module.sparse_grad) == ("reference", False)
    assert compare(workload, truth, training=True) is None
    workload.part.module.experts.register_hook(lambda grad: grad * 1.01 if grad.is_sparse else grad)
    assert "gradient of experts differs" in compare(workload, truth, training=True)
    dense = steps.language_model({}, **{**LM, "num_experts": 0, "optimizer": "AdamW, fused"})
    assert dense.part is None
    assert dense.module.model.config.mlp_layer_types == ["dense", "dense"]


@pytest.mark.parametrize("name", ["RowwiseAdamW", "AdamW, fused"])
def test_a_language_model_is_trained_as_the_command_does(name):
    arguments = LM if name == "RowwiseAdamW" else {**LM, "num_experts": 0, "optimizer": name}
    workload = steps.language_model({}, **arguments)
    optimizer = prepare(workload, "step")
    decays = {group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {0.0, 0.1}
    module = workload.module
    (ids,) = draw_inputs(workload, 0, True)
    (1e3 * module(ids)).backward()
    optimizer.step()
    parts = [
        p.grad._values() if p.grad.is_sparse else p.grad for p in module.parameters() if p.grad is not None
    ]
    assert torch.nn.utils.get_total_norm(parts) == pytest.approx(1.0, rel=1e-3)


def test_cases_run_from_end_to_end_at_a_tiny_size():
    rows, found = [], []
    for case in STEP_TARGET_CASES:
        tiny = tuple(
            replace(
                c,
                arguments=c.tiny().arguments,
                truth=c.truth and replace(c.truth, arguments=c.truth.tiny().arguments),
            )
            for c in case.competitors
        )
        own = CaseRunner(replace(case, competitors=tiny, memory=False), Effort(3, 1.0), threads=1).run()
        rows += own
        found += evaluate(case.targets, own)
    assert {row["status"] for row in rows if row["competitor"] != "PEER-pytorch"} == {"measured"}
    assert all(json.loads(json.dumps(row)) == row for row in rows)
    counted = {row["case"] for row in rows if row["touched"]}
    assert counted == {"S2", "S3"}
    ratios = {outcome.target.name: outcome.ratio for outcome in found}
    assert ratios["S2"] > 0
    assert ratios["S5"] > 0
    if find_spec("PEER_pytorch") is not None:
        assert ratios["S1"] > 0


# Phases and memory.


def test_an_update_is_a_step_without_its_forward_pass():
    workload = bench_competitors.slow({}, seconds=0.05, tokens=2)
    before = workload.module.weight.detach().clone()
    assert make_run(workload, "update")(0) < 0.05
    assert not torch.equal(before, workload.module.weight)
    assert make_run(workload, "step")(0) >= 0.05


def test_of_an_own_optimiser_the_state_is_there_before_anything_is_timed(monkeypatch):
    settled = []
    monkeypatch.setattr("million_experts.benchmarks.timing.settle", settled.append)
    make_run(built(SPARSE)[0], "step")
    assert len(settled) == 1
    assert settled[0].state
    make_run(bench_competitors.slow({}, seconds=0.0, tokens=2), "step")
    make_run(built(SPARSE)[0], "backward")
    assert len(settled) == 1


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    names = ("exp_avg", "exp_avg_sq", "last_step")
    return sum(state[name].nbytes for state in optimizer.state.values() for name in names if name in state)


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_estimate_is_the_state_that_an_optimiser_makes(setting):
    competitor = small(trained_layer(setting, 6, 64))
    workload = competitor.build({}, **competitor.arguments)
    optimizer = prepare(workload, "step")
    inputs = draw_inputs(workload, 0, True)
    workload.module(*inputs).backward(draw_upstream(inputs))
    grads = [p.grad for p in workload.module.parameters() if p.grad is not None]
    gradients = sum(g._values().nbytes if g.is_sparse else g.nbytes for g in grads)
    optimizer.step()
    picks = 6 * 2 * 3
    state, working = workload.optimizer.estimate(workload.module, picks)
    assert state == state_bytes(optimizer)
    assert gradients <= working <= gradients + (picks + 1) * 2 * 16 * 4
    weights = sum(p.nbytes for p in workload.module.parameters())
    kept, needed = memory.estimate_bytes(competitor, "step")
    assert kept == weights + state
    assert needed > working


def test_sparse_steps_are_expected_to_need_less():
    needs = {s: sum(memory.estimate_bytes(trained_layer(s, 1024, 512**2), "step")) for s in SETTINGS}
    assert needs[SMALL] < needs[IN_BACKWARD] < needs[SPARSE] < needs[DENSE_GRADIENTS]
    plain = nn.Linear(4, 4)
    assert AdamW(fused=True).estimate(plain, 0)[1] < AdamW().estimate(plain, 0)[1]
    assert AsInTraining(OPTIMIZERS["AdamW"]).estimate(plain, 0) == AdamW().estimate(plain, 0)


@needs_peaks
def test_state_that_nobody_has_written_to_is_made_resident():
    layer = steps.layer({}, **{**SHAPE, "dim": 256, "num_experts": 128**2}, optimizer="RowwiseAdamW").module
    optimizer = Rowwise()(layer)
    layer(torch.randn(6, 256)).sum().backward()
    optimizer.step()
    before = {p: {n: v.clone() for n, v in s.items() if n != "history"} for p, s in optimizer.state.items()}
    del before[layer.experts]["exp_avg"], before[layer.experts]["exp_avg_sq"]
    start, table = memory.resident_bytes(), layer.experts.nbytes
    settle(optimizer)
    gained = memory.resident_bytes() - start
    assert 0.3 * table < gained < 2.2 * table, "two moments, less what the step has touched"
    for p, state in before.items():
        assert all(torch.equal(value, optimizer.state[p][name]) for name, value in state.items())


@needs_peaks
def test_working_memory_is_counted_above_weights_and_state():
    # Steps that touch four rows of many pages.
    few = {"tokens": 2, "dim": 256, "num_experts": 256**2, "num_heads": 1, "experts_per_head": 2}
    peak = memory.measure_peaks(small(trained_layer(SPARSE, 2, 64), **few), ("step",), threads=1)["step"]
    table = 256**2 * 2 * 256 * 4
    assert 2 * table <= peak.added - peak.working < 2.2 * table
    assert peak.working < 0.2 * table
    assert peak.process > peak.added + table
    # And steps of some thousand rows, whose gradients count although their memory is kept.
    peak = memory.measure_peaks(trained_layer(SPARSE, 64, 128**2), ("step",), threads=1)["step"]
    assert 64 * 128 * 0.3 * 2048 < peak.working < 128**2 * 2 * 256 * 4
    plain = Competitor("hoard", bench_competitors.hoard, {"megabytes": 80, "tokens": 4})
    other = memory.measure_peaks(plain, ("step",), threads=1)["step"]
    assert other.working is None
    assert other.process > other.added


# Cases, tables, figures.


def test_cases_of_steps_are_selected_by_group():
    assert [case.name for case in select_cases("S1,S3")] == ["S1", "S1 dense", "S3"]
    assert select_cases("steps") == STEP_SWEEP_CASES
    quick = {case.name: case for case in select_cases("S1,S2,S3,S4,S5", quick=True)}
    assert list(quick) == ["S1", "S2", "S3", "S4", "S5"]
    assert {name for name, case in quick.items() if case.memory} == {"S3", "S4"}
    assert quick["S2"].phases == ("update",)
    assert len(quick["S4"].competitors) == 2
    with pytest.raises(ValueError, match=r"among P1, .*S1, S2, S3, S4, S5, N, T, k, D, steps "):
        select_cases("S6")


def rows_of(cases):
    for case in cases:
        runner = CaseRunner(case, Effort(), threads=1)
        for competitor in case.competitors:
            for phase in case.phases:
                side = competitor.arguments.get("num_experts", 1) ** 0.5
                times = {"median_s": side, "q1_s": 0.9 * side, "q3_s": 1.1 * side, "repetitions": 3}
                sizes = {"peak_bytes": 2**20, "working_bytes": 400_000_000, "process_bytes": 9_500_000_000}
                yield runner._row(competitor, phase, "measured", "", None) | times | sizes | {"touched": 1234}


def test_tables_and_figures_know_bytes_rows_and_steps(tmp_path):
    rows = list(rows_of((*STEP_TARGET_CASES, *STEP_SWEEP_CASES)))
    table = markdown(rows)
    assert "| S3: peak memory above weights and optimiser state | 0.4 GB | — | ≤ 0.7 GB | met | — |" in table
    assert "| 0.4 GB | — | ≤ 0.15 GB | **not met** | — |" in table
    assert "| 9.5 GB | — | ≤ 14 GB | met | — |" in table
    assert "1,234 rows of the table touched" in table
    assert "memory above weights and optimiser state 381 MiB, of the whole process 8.85 GiB" in table
    assert "training step without its forward pass" in table
    assert [path.name for path in draw_figures(rows, tmp_path)] == ["sweep-steps.png", "targets.png"]
    one = [row for row in rows if row["case"].startswith("steps=128^2")]
    assert draw_figures(one, tmp_path / "one") == [], "two cases of one N are no line"
