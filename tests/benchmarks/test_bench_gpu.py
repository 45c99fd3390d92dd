"""The benchmark of the GPU's kernels finds out what is wrong, and survives what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from million_experts.benchmarks import correctness, gpu
from million_experts.ops import reference

(TINY,) = gpu.TINY
SHAPES = (TINY, replace(TINY, dtype=torch.bfloat16))
CPU = torch.device("cpu")

# The function behind each part, and how many of its results are compared.
FUNCTIONS = {
    "retrieval, forward": ("product_key_topk", 2),
    "retrieval, backward": ("product_key_topk_backward", 3),
    "experts, forward": ("expert_mlp", 2),
    "experts, backward to the touched rows": ("expert_mlp_backward_touched", 4),
    "experts, backward, dense": ("expert_mlp_backward", 3),
    "row-wise AdamW": ("rowwise_adamw", 4),
}


@pytest.fixture
def kernels(monkeypatch) -> SimpleNamespace:
    """In place of the kernels, the reference's functions, to be replaced."""
    functions = SimpleNamespace(**{name: getattr(reference, name) for name, _ in FUNCTIONS.values()})
    modules = {"triton": functions, "reference": reference}
    monkeypatch.setattr(gpu, "implementation", modules.__getitem__)
    return functions


def measure(part: str, shape: gpu.Shape = TINY) -> dict:
    return gpu.measure(shape, gpu.PARTS[part], CPU, 1e9, 2)


def assert_wrong(row: dict) -> None:
    assert row["status"] == "wrong"
    assert "from the reference" in row["fault"]
    assert "seconds" not in row
    json.dumps(row, allow_nan=False)


@pytest.mark.parametrize("part", gpu.PARTS)
@pytest.mark.parametrize("shape", SHAPES, ids=["float32", "bfloat16"])
def test_what_agrees_is_timed(part, shape, kernels):
    row = measure(part, shape)
    assert row["status"] == "timed"
    assert row["error"] == 0
    assert row["seconds"]["median"] > 0


@pytest.mark.parametrize(("part", "result"), [(p, i) for p, (_, n) in FUNCTIONS.items() for i in range(n)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 30.0])
def test_one_wrong_number_of_any_result_is_found(part, result, poison, kernels):
    name, count = FUNCTIONS[part]
    right = getattr(reference, name)

    def wrong(*arguments):
        results = right(*arguments)
        if results is None:  # AdamW changes what it was given
            results = arguments[:count]
        assert len(results) == count
        broken = results[result]
        broken.view(-1)[-1] = poison if broken.is_floating_point() else -7
        return results

    setattr(kernels, name, wrong)
    assert_wrong(measure(part))


@pytest.mark.parametrize("shape", SHAPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda scores, picks: (scores, picks.flip(-1)),
        lambda scores, picks: (scores, picks.roll(1, 0)),
        lambda scores, picks: (scores, picks[..., :1].expand_as(picks)),
        lambda scores, picks: (scores, picks + 1000),
        lambda scores, picks: (scores * (1 + 1e-4), picks),
    ],
    ids=["other order", "other tokens", "one for all", "beyond the table", "scores"],
)
def test_wrong_winners_are_found(spoil, shape, kernels):
    kernels.product_key_topk = lambda *arguments: spoil(*reference.product_key_topk(*arguments))
    assert_wrong(measure("retrieval, forward", shape))


def test_the_same_winner_twice_is_found_though_scores_are_equal(kernels):
    query, keys = torch.ones(1, 1, 2, 4), torch.ones(5, 4)
    picks = torch.tensor([[[3, 4, 4, 24, 25, -1]]])
    scores = gpu.scores_at(picks, query, keys, keys)
    assert scores[0, 0].isfinite().tolist().count(False) == 3
    assert torch.equal(scores[0, 0, [0, 3]], torch.full((2,), 8.0))


def test_a_step_that_leaves_the_table_alone_is_found(kernels):
    kernels.rowwise_adamw = lambda table, *others: reference.rowwise_adamw(table.clone(), *others)
    for shape in SHAPES:
        assert_wrong(measure("row-wise AdamW", shape))


def test_numbers_are_compared_in_pieces(monkeypatch):
    whole = torch.arange(1.0, 8.0)
    broken = whole.clone()
    broken[5] += 3.5
    monkeypatch.setattr(correctness, "BLOCK", 3)
    assert gpu.compare((broken,), (whole,))[0] == 0.5
    assert gpu.compare((whole[:0],), (whole[:0],)) == (0.0, None)
    assert gpu.compare((whole[:3],), (whole,))[1] is not None


def test_what_does_not_fit_costs_no_other(kernels, monkeypatch, capsys):
    pytest.importorskip("triton", reason="Triton is not installed")

    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("sys.argv", ["gpu", "--tiny"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(gpu, "available_backends", lambda: {"triton": None})
    kernels.expert_mlp = too_large
    assert gpu.main() == 0
    printed = capsys.readouterr().out
    assert printed.endswith("\n}\n```\n")
    rows = json.loads(printed.rpartition("```json\n")[2].partition("\n```")[0])["rows"]
    assert {row["part"]: row["status"] for row in rows} == dict.fromkeys(gpu.PARTS, "timed") | {
        "experts, forward": "out of memory"
    }

    kernels.rowwise_adamw = lambda *_: None
    assert gpu.main() == 1
    del kernels.expert_mlp
    assert gpu.main() == 1
    assert '"status": "failed"' in capsys.readouterr().out


@pytest.fixture
def tuned(monkeypatch) -> SimpleNamespace:
    """A tuned kernel that was launched and has not let go of its arguments."""
    kernel = SimpleNamespace(cache={}, nargs={"table": torch.zeros(1)})
    module = SimpleNamespace(some_kernel=kernel)
    monkeypatch.setitem(gpu.sys.modules, "million_experts.ops.triton_expert_rows", module)
    return kernel


@pytest.mark.parametrize(
    ("error", "status"),
    [(torch.OutOfMemoryError("out of memory"), "out of memory"), (RuntimeError("illegal access"), "failed")],
)
def test_a_broken_gpu_costs_nothing_that_was_measured(error, status, tuned, monkeypatch):
    emptied = []

    def broken(*_):
        raise error

    def empty_cache():
        emptied.append(tuned.nargs)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    assert gpu.measure(TINY, broken, torch.device("cuda"), 1e9, 2)["status"] == status
    assert emptied == [None]  # called, and when there was nothing left that keeps memory


@pytest.mark.parametrize("shape", SHAPES, ids=["float32", "bfloat16"])
def test_the_bytes_are_those_that_must_move_in_the_model(shape, kernels):
    pytest.importorskip("triton", reason="Triton is not installed")
    from million_experts.benchmarks import triton_traffic as model

    def bytes_and_arguments(part):
        arguments = []
        setattr(kernels, FUNCTIONS[part][0], lambda *given: arguments.extend(given))
        prepared = gpu.PARTS[part](shape, CPU)
        prepared.run("triton")
        return prepared.necessary_bytes, arguments

    N, R, D, size = shape.n**2, shape.R, shape.D, shape.dtype.itemsize
    picks = model.Picks(bytes_and_arguments("experts, forward")[1][1].numpy())
    of_tokens = shape.T, shape.H * shape.k, D, size, model.Gather("table", picks, R * D * size)
    expected = {"experts, forward": model.experts_forward(*of_tokens)}
    for part, count in (
        ("experts, backward to the touched rows", picks.distinct * (8 + R * D * size)),
        ("experts, backward, dense", N * R * D * size),
    ):
        expected[part] = model.experts_backward(*of_tokens, model.Stream("grad", count))
    sizes = model.Retrieval(shape.T, shape.H, shape.k, shape.n, shape.n, shape.d, size, size)
    expected["retrieval, forward"] = model.topk(sizes).accesses
    rows = bytes_and_arguments("row-wise AdamW")[1][6]
    expected["row-wise AdamW"] = model.adamw(len(rows), R, D, 3, size, size, size, True).accesses
    for part, accesses in expected.items():
        assert bytes_and_arguments(part)[0] == model.Kernel(accesses, {}).necessary(model.CACHE), part
