"""The parts of the GPU check on the CPU, the reference in the kernels' place: each finds what it is for."""

from __future__ import annotations

import contextlib
import math
import time
from types import SimpleNamespace

import pytest
import torch

from million_experts.benchmarks.gpu import (
    compiling,
    costs,
    fast,
    kernels,
    learns,
    plan,
    right,
    right_layer,
    rivals,
    why,
    worker,
)
from million_experts.benchmarks.gpu import rows as files
from million_experts.benchmarks.gpu.costs import Shape
from million_experts.ops import expert_mlp, product_key_topk, reference

CPU = torch.device("cpu")
TINY = Shape(6, 5, 8, "float32", H=2, k=3, d=4)


@pytest.fixture
def stand_in(monkeypatch) -> SimpleNamespace:
    """The reference in the kernels' place; `experts` and `topk` change what they return."""
    changes = SimpleNamespace(experts=lambda y: y, topk=lambda scores, indices: (scores, indices), calls=0)

    def experts(x, indices, gates, pool, activation, backend, sparse_grad=False):
        y = expert_mlp(x, indices, gates, pool, activation, "reference", sparse_grad=sparse_grad)
        changes.calls += backend == "triton"
        return changes.experts(y) if backend == "triton" else y

    def topk(query, keys1, keys2, k, backend):
        found = product_key_topk(query, keys1, keys2, k, "reference")
        changes.calls += backend == "triton"
        return changes.topk(*found) if backend == "triton" else found

    monkeypatch.setattr(right, "expert_mlp", experts)
    monkeypatch.setattr(right, "product_key_topk", topk)
    monkeypatch.setattr(right, "implementation", lambda _: reference)
    for module in (right, right_layer):
        monkeypatch.setattr(module, "forced", lambda _: contextlib.nullcontext({"a kernel": 3}))
    monkeypatch.setattr(rivals, "new_layer", _on_reference(rivals.new_layer))
    monkeypatch.setattr(rivals, "BACKEND", "reference")
    monkeypatch.setattr(right_layer, "new_layer", _on_reference(right_layer.new_layer))
    return changes


def _on_reference(new_layer):
    return lambda *arguments, **named: new_layer(*arguments, **named | {"backend": "reference"})


EXPERTS = {"T": 4, "K": 5, "N": 30, "D": 8}


@pytest.mark.parametrize(
    "more", [{}, {"dtype": "bfloat16"}, {"R": 3, "sparse": True}, {"hot": True, "table": "bfloat16"}], ids=str
)
def test_right_experts_are_right(more, stand_in):
    row = right.experts(CPU, **EXPERTS, **more)
    assert row["status"] == "right", row
    assert row["configurations"] == 1
    assert stand_in.calls == 1


def test_each_configuration_runs_and_the_first_twice(stand_in):
    row = right.experts(CPU, **EXPERTS, bits=True)
    assert (row["status"], row["configurations"], stand_in.calls) == ("right", 3, 4)


def test_of_many_tokens_the_first_and_the_last_are_compared(stand_in, monkeypatch):
    monkeypatch.setattr(right, "TOKENS_COMPARED", 2)
    assert right.experts(CPU, **EXPERTS)["status"] == "right"

    def last_is_wrong(y):
        return y * torch.tensor([1.0, 1.0, 1.0, 2.0])[:, None]

    stand_in.experts = last_is_wrong
    assert right.experts(CPU, **EXPERTS)["status"] == "wrong"


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda y: y * 1.001, "y, float32: norm of the error 0.001"),
        (lambda y: y + torch.zeros_like(y).index_fill_(0, torch.tensor([0]), math.nan), "y is not finite"),
        (lambda y: y.detach() + (y - y.detach()) * 2, "grad_x, float32: norm of the error 1 of"),
    ],
    ids=["values", "NaN", "gradients"],
)
def test_wrong_experts_are_found(spoil, said, stand_in):
    stand_in.experts = spoil
    row = right.experts(CPU, **EXPERTS)
    assert row["status"] == "wrong"
    assert said in row["fault"]


def test_bits_that_change_from_run_to_run_are_found(stand_in):
    stand_in.experts = lambda y: y * (1 + 2**-22 * stand_in.calls)
    row = right.experts(CPU, **EXPERTS, bits=True)
    assert row["status"] == "wrong"
    assert "y, with configuration 1, differs in" in row["fault"]
    assert "y, in a second run, differs in" in row["fault"]


RETRIEVAL = {"T": 4, "H": 2, "k": 3, "n1": 6, "n2": 5, "d": 4}


@pytest.mark.parametrize("shared", [True, False])
def test_retrieval_is_judged(shared, stand_in):
    assert right.retrieval(CPU, **RETRIEVAL, shared=shared)["status"] == "right"
    stand_in.topk = lambda scores, indices: (scores, indices.flip(-1))
    row = right.retrieval(CPU, **RETRIEVAL, shared=shared)
    assert row["status"] == "wrong"
    assert "scores of the indices" in row["fault"]


def test_row_wise_adamw_and_batch_norm_are_judged(stand_in, monkeypatch):
    adamw = {"N": 6, "D": 8, "R": 2, "dtype": "bfloat16", "by_row": True, "momentum": "bfloat16"}
    norm = {"T": 7, "C": 12, "dtype": "float32"}
    assert right.rowwise_adamw(CPU, **adamw)["status"] == "right"
    assert right.rowwise_adamw(CPU, **adamw | {"momentum": None, "by_row": False})["status"] == "right"
    assert right.batch_norm(CPU, **norm)["status"] == "right"
    broken = SimpleNamespace(**vars(reference))
    broken.rowwise_adamw = lambda **named: reference.rowwise_adamw(**named | {"lr": 0.31})
    broken.masked_batch_norm = lambda x, mask, weight, bias, eps: reference.masked_batch_norm(
        x, None, weight, bias, eps
    )
    monkeypatch.setattr(right, "implementation", {"triton": broken, "reference": reference}.__getitem__)
    assert "table" in right.rowwise_adamw(CPU, **adamw)["fault"]
    assert "mean" in right.batch_norm(CPU, **norm)["fault"]


@pytest.mark.parametrize(
    "more", [{}, {"glu": True, "sparse": True, "mask": True}, {"autocast": "bfloat16"}], ids=str
)
def test_the_layer_is_judged(more, stand_in, monkeypatch):
    shape = {"T": 10, "D": 8, "n": 5, "H": 2, "k": 3, "key_dim": 4}
    row = right_layer.layer(CPU, **shape, **more)
    assert row["status"] == "right", row
    retrieve = right_layer.PEER.retrieve

    def others(self, *arguments):
        routing = retrieve(self, *arguments)
        return routing._replace(indices=(routing.indices + 1) % self.num_experts)

    monkeypatch.setattr(right_layer.PEER, "retrieve", others)
    assert right_layer.layer(CPU, **shape, **more)["status"] == "wrong"


def test_layers_take_turns_and_what_does_not_fit_says_so(stand_in, monkeypatch):
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    def broken(*_):
        raise NotImplementedError("no such product here")

    replaced = {
        "dense, K neurons": rivals.RIVALS["dense, K neurons"],
        "dense, 4 * D neurons": too_large,
        "grouped mixture, 2 of 8": broken,
    }
    for name, build in replaced.items():
        if callable(build):
            rival = SimpleNamespace(**vars(rivals.RIVALS[name]) | {"build": build})
            monkeypatch.setitem(rivals.RIVALS, name, rival)
    names = [*rivals.OURS, rivals.GATHERS, *replaced, "product-key memory"]
    clock = fast.Clock(CPU, repetitions=3)
    found = list(fast.layers(clock, TINY, names, ["forward", "step"]))
    outcomes = {(row["competitor"], row["phase"]): row["status"] for row in found}
    for name in (*rivals.OURS, rivals.GATHERS, "dense, K neurons", "product-key memory"):
        assert outcomes[name, "forward"] == outcomes[name, "step"] == "timed"
    assert outcomes["dense, 4 * D neurons", "all"] == "out of memory"
    assert outcomes["grouped mixture, 2 of 8", "all"] == "unavailable"
    assert all(0 < row["distinct"] <= 25 for row in found if row["status"] == "timed")


def test_a_layer_that_is_wrong_is_not_timed(stand_in, monkeypatch):
    def gradients_are_wrong(self, x, **options):
        y, *others = right_forward(self, x, **options)
        return y.detach() + 1.01 * (y - y.detach()), *others

    right_forward = right_layer.PEER.forward
    monkeypatch.setattr(right_layer.PEER, "forward", gradients_are_wrong)
    found = list(fast.layers(fast.Clock(CPU, repetitions=3), TINY, list(rivals.OURS), ["forward"]))
    assert [row["status"] for row in found] == ["wrong", "wrong"]
    assert "gradient of x" in found[0]["fault"]


def test_rivals_have_one_table(stand_in):
    shared: dict = {}
    ours = [rivals.RIVALS[name].build(TINY, CPU, shared) for name in rivals.OURS]
    gathers = rivals.RIVALS[rivals.GATHERS].build(TINY, CPU, shared)
    assert ours[0].experts is ours[1].experts is gathers.experts
    assert (ours[0].sparse_grad, ours[1].sparse_grad) == (False, True)


def test_gathers_compute_what_the_layer_does(stand_in):
    shared: dict = {}
    layer = rivals.RIVALS[rivals.OURS_DENSE].build(TINY, CPU, shared)
    gathers = rivals.Gathers(layer)
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gathers.train()(x), layer.train()(x), rtol=1e-4, atol=1e-5)


def test_a_grouped_mixture_is_a_sum_of_two_experts():
    torch.manual_seed(0)
    mixture = rivals.GroupedMixture(16, 16).to(torch.bfloat16)
    x = torch.randn(9, 16, dtype=torch.bfloat16)
    best, chosen = mixture.router(x).float().topk(2)
    truth = torch.zeros(9, 16)
    for t, expert, gate in zip(range(9), chosen, best.softmax(-1), strict=True):
        for e, g in zip(expert, gate, strict=True):
            truth[t] += g * (torch.nn.functional.gelu(x[t] @ mixture.down[e]) @ mixture.up[e]).float()
    torch.testing.assert_close(mixture(x).float(), truth, rtol=0.05, atol=0.05)


def timed(name: str, tokens: int, over: float) -> dict:
    shape = vars(Shape(tokens, 1024, 256))
    seconds = {"median": 1e-3, "q1": 9e-4, "q3": 2e-3, "repetitions": 9}
    return {
        "run": "run", "part": "fast", "case": f"{name}: T={tokens}", "competitor": "PEER", "phase": name,
        "shape": shape, "status": "timed", "seconds": seconds, "over_roofline": over,
        "roofline_seconds": 1e-3 / over, "bytes": 1e9, "flops": 1e9,
    }  # fmt: skip


def test_the_operations_furthest_from_their_roofline_are_explained():
    found = [timed("a", 8192, 2.0), timed("b", 8192, 3.0), timed("a", 2048, 5.0), timed("c", 1, 90.0)]
    assert [(row["phase"], row["over_roofline"]) for row in why.furthest(found, 3)] == [
        ("a", 5.0),
        ("b", 3.0),
    ]


NCU = """==PROF== Connected to process 12
text of the program
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes_read.sum","launch__registers_per_thread"
"","","","ns","byte","register/thread"
"0","12","void spin_kernel(long)","1","1","1"
"1","12","dots_kernel","161,120","1,000,000","64"
"2","12","spin_kernel(long)","1","1","1"
"3","12","mix_kernel","n/a","2","32"
"""


def test_counters_are_read_and_their_absence_is_told(monkeypatch, tmp_path):
    asked = [timed("experts, forward", 8192, 3.0), timed("row-wise AdamW", 8192, 2.0)]
    program = tmp_path / "ncu"
    program.write_text(f"#!/bin/sh\ncat <<'END'\n{NCU}END\necho \"$@\" > {tmp_path}/arguments\n")
    program.chmod(0o755)
    monkeypatch.setattr(why, "find_ncu", lambda: str(program))
    first, second = why.counters(asked, 10)
    assert (first["phase"], first["kernel"], first["launch"]) == ("experts, forward", "dots_kernel", 1)
    assert (first["nanoseconds"], first["bytes_read"], first["registers"]) == (161120.0, 1e6, 64.0)
    assert (second["phase"], second["kernel"], second["nanoseconds"]) == (
        "row-wise AdamW",
        "mix_kernel",
        None,
    )
    assert "--clock-control none" in (tmp_path / "arguments").read_text()
    for script, said in (
        ("echo LibraryNotLoaded >&2; exit 9", "ncu counted nothing, status 9: LibraryNotLoaded"),
        ("exec sleep 60", "ncu counted nothing, no end after 1 s: "),
    ):
        monkeypatch.setattr(why, "LEAST_SECONDS", 1.0)
        program.write_text(f"#!/bin/sh\n{script}\n")
        (row,) = why.counters(asked, 1)
        assert (row["status"], row["fault"]) == ("unavailable", said)
    monkeypatch.setattr(why, "find_ncu", lambda: None)
    (row,) = why.counters(asked, 10)
    assert row["fault"] == "ncu is not installed"


def test_occupancy():
    chip = SimpleNamespace(
        max_threads_per_multi_processor=2048, regs_per_multiprocessor=65536, warp_size=32,
        shared_memory_per_multiprocessor=228 * 1024,
    )  # fmt: skip
    assert kernels.occupancy(32, 0, 4, chip) == {"blocks": 16, "occupancy": 1.0, "bound_by": "registers"}
    assert kernels.occupancy(255, 0, 8, chip) == {"blocks": 1, "occupancy": 0.125, "bound_by": "registers"}
    assert kernels.occupancy(32, 100 * 1024, 4, chip)["bound_by"] == "shared memory"
    assert kernels.occupancy(16, 0, 1, chip) == {"blocks": 32, "occupancy": 0.5, "bound_by": "blocks"}


SIZE = learns.Size(D=16, blocks=2, heads=2, S=16, batch=2, n=5, H=2, k=3, evaluated=1)


def test_arms_have_equal_time_and_rows_as_they_go(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"abcdefgh" * 200)
    found = [{"run": "run"} | row for row in learns.learn(CPU, text, SIZE, time.monotonic() + 4)]
    arms = {name: [r for r in found if r["competitor"] == name] for name in ("dense", "mixture", "PEER")}
    counts = [len(own) for own in arms.values()]
    assert min(counts) >= 1
    assert max(counts) - min(counts) <= 1
    for own in arms.values():
        assert [row["turn"] for row in own] == list(range(1, len(own) + 1))
        assert all(row["flops"] == row["tokens"] * own[0]["flops"] / own[0]["tokens"] for row in own)
    assert len(learns.outcome(found)) == 3


def test_an_arm_that_cannot_run_costs_no_other(tmp_path, monkeypatch):
    def no_product(*_):
        raise RuntimeError("no grouped product here")

    monkeypatch.setattr(rivals, "_grouped", no_product)
    text = tmp_path / "text"
    text.write_bytes(b"abcdefgh" * 200)
    found = list(learns.learn(CPU, text, SIZE, time.monotonic() + 2))
    assert found[0]["competitor"] == "mixture"
    assert found[0]["status"] == "unavailable"
    assert {row["competitor"] for row in found if "turn" in row} == {"dense", "PEER"}


def test_a_text_that_is_too_short_is_refused(tmp_path):
    text = tmp_path / "text"
    text.write_bytes(b"a" * 300)
    with pytest.raises(ValueError, match=r"text must have at least 380 bytes, .* has 300"):
        learns.Text(text, SIZE, CPU)
    text.write_bytes(b"a" * 380)
    learns.Text(text, SIZE, CPU)


def test_losses_at_equal_flops_lie_between_turns():
    def turn(name: str, number: int, flops: float, seconds: float, loss: float) -> dict:
        row = {"run": "b", "competitor": name, "turn": number, "flops": flops}
        return row | {"seconds": seconds, "valid_loss": loss}

    plan_row = {
        "run": "b", "competitor": "plan", "budget_flops": 100.0, "tokens_per_second": {"x": 1, "y": 2},
        "parameters": {"x": 3, "y": 4},
    }  # fmt: skip
    old = turn("x", 1, 50, 50, 99.0) | {"run": "a"}
    found = [
        old, plan_row, turn("x", 1, 50, 1, 4.0), turn("y", 1, 10, 1, 5.0), turn("x", 2, 200, 2, 2.0),
        turn("y", 2, 100, 2, 3.0),
    ]  # fmt: skip
    x, y = learns.outcome(found)
    assert (x["at_equal_flops"], x["at_equal_time"]) == (pytest.approx(3.0), 2.0)
    assert (y["at_equal_flops"], y["at_equal_time"]) == (3.0, 3.0)
    assert learns.outcome([old]) == []


def test_the_decoder_sees_no_later_byte():
    torch.manual_seed(0)
    (arm, *_) = learns.arms(SIZE, CPU)
    ids = torch.randint(256, (1, 17))
    ids[:, -1] = 7
    x = arm.model.bytes(ids[:, :-1]) + arm.model.places.weight
    other = x.clone()
    other[:, 10:] += 1
    y, changed = arm.model.blocks(x), arm.model.blocks(other)
    torch.testing.assert_close(y[:, :10], changed[:, :10])
    assert not torch.allclose(y[:, 10:], changed[:, 10:])


def test_a_case_that_fails_or_does_not_fit_ends_with_a_row(monkeypatch, tmp_path):
    written: list[dict] = []

    def run_case(case, context):
        yield {"status": "right"}
        raise case.arguments["error"]

    monkeypatch.setattr(worker, "run_case", run_case)
    context = worker.Context(tmp_path, "run", time.time() + 9, True, CPU)
    for error, status in (
        (torch.OutOfMemoryError("no room\nat all"), "out of memory"),
        (KeyError("x"), "failed"),
    ):
        case = plan.Case("right", "a", "f", {"error": error})
        assert worker.guarded(case, context, written.append)
        begin, row, end = written
        assert (begin["event"], row["status"], end["event"], end["status"]) == (
            "begin",
            "right",
            "end",
            status,
        )
        assert end["fault"] in ("no room", "KeyError: 'x'")
        written.clear()


def test_ceilings_are_those_measured_last(tmp_path):
    context = worker.Context(tmp_path, "run", 0, True, CPU)
    file = files.Rows(tmp_path, "run")
    file.write({"part": "run"})
    assert context.ceilings() is costs.PLANNED
    file.write({"part": "fast", "case": "ceilings", "copy": 1e12, "products": {"bfloat16": 1e14}})
    assert context.ceilings() == costs.Ceilings(1e12, {"bfloat16": 1e14})


def test_what_is_compiled_beforehand_has_the_plan_s_code():
    cases = plan.make_plan()
    names = [name for name, _ in compiling.launches(cases)]
    kinds = ("experts", "retrieval", "precision", "operation", "layers")
    assert names == [case.name for case in cases if case.function in kinds]
    for tokens in (1, 16, 17, 64, 333, 1024, 8192, 2**21 + 77):
        few = compiling._few(tokens)
        assert few <= min(tokens, 80)
        assert (few % 16, few == 1) == (tokens % 16, tokens == 1)
