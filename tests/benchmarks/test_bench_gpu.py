"""The operations that are timed on a GPU: what is wrong is not timed, and bytes are those of the model."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from million_experts.benchmarks.gpu import compare, costs, fast, operations
from million_experts.benchmarks.gpu.costs import Shape
from million_experts.ops import reference

TINY = Shape(3, 5, 20, "float32", H=2, k=3, d=4)
SHAPES = (TINY, replace(TINY, dtype="bfloat16"))
CPU = torch.device("cpu")

# The function behind each operation, and how many of its results are compared.
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
    monkeypatch.setattr(operations, "implementation", modules.__getitem__)
    monkeypatch.setattr(fast, "choices", dict)
    return functions


def measure(name: str, shape: Shape = TINY) -> dict:
    (row,) = fast.operation(fast.Clock(CPU, repetitions=3), name, shape)
    json.dumps(row, allow_nan=row["status"] == "wrong")
    return row


def assert_wrong(row: dict) -> None:
    assert row["status"] == "wrong"
    assert "result" in row["fault"]
    assert "seconds" not in row


@pytest.mark.parametrize("name", costs.OPERATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_agrees_is_timed(name, shape, kernels):
    row = measure(name, shape)
    assert row["status"] == "timed"
    assert row["error"] == 0
    assert row["seconds"]["median"] > 0
    assert row["over_roofline"] == pytest.approx(row["seconds"]["median"] / row["roofline_seconds"])


@pytest.mark.parametrize(("name", "result"), [(p, i) for p, (_, n) in FUNCTIONS.items() for i in range(n)])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 30.0])
def test_one_wrong_number_of_any_result_is_found(name, result, poison, kernels):
    function, count = FUNCTIONS[name]
    right = getattr(reference, function)

    def wrong(*arguments):
        results = right(*arguments)
        if results is None:  # AdamW changes what it was given
            results = arguments[:count]
        assert len(results) == count
        broken = results[result]
        broken.view(-1)[-1] = poison if broken.is_floating_point() else -7
        return results

    setattr(kernels, function, wrong)
    assert_wrong(measure(name))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
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
    scores = operations.scores_at(picks, query, keys, keys)
    assert scores[0, 0].isfinite().tolist().count(False) == 3
    assert torch.equal(scores[0, 0, [0, 3]], torch.full((2,), 8.0))


def test_scores_of_heads_with_codebooks_of_their_own():
    generator = torch.Generator().manual_seed(0)
    query, keys1, keys2 = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 2, 2, 4), (2, 5, 4), (2, 6, 4))
    )
    scores, picks = reference.product_key_topk(query, keys1, keys2, 3)
    torch.testing.assert_close(operations.scores_at(picks, query, keys1, keys2), scores)


def test_a_step_that_leaves_the_table_alone_is_found(kernels):
    kernels.rowwise_adamw = lambda table, *others: reference.rowwise_adamw(table.clone(), *others)
    for shape in SHAPES:
        assert_wrong(measure("row-wise AdamW", shape))


def test_errors_are_relative_and_taken_in_pieces(monkeypatch):
    monkeypatch.setattr(compare, "BLOCK", 3)
    whole = torch.arange(1.0, 8.0)
    broken = whole.clone()
    broken[5] += 3.5
    error = compare.compare("y", broken, whole)
    assert error.largest == 0.5
    assert error.norm == pytest.approx(3.5 / float(whole.norm()))
    assert "y, float32: norm of the error" in error.fault
    assert compare.compare("y", whole[:0], whole[:0]) == compare.Error(0.0, 0.0, None)
    assert "shape [3], not [7]" in compare.compare("y", whole[:3], whole).fault
    broken[4] = float("nan")
    assert "not finite" in compare.compare("y", broken, whole).fault
    assert compare.compare("y", whole, torch.zeros(7)).fault is not None
    assert compare.compare("y", torch.zeros(7), torch.zeros(7)).fault is None


def test_a_bit_that_differs_is_found():
    x = torch.ones(3)
    assert compare.same_bits("y", x, x.clone()) is None
    assert "differs in 1 of 3" in compare.same_bits("y", torch.tensor([1, 1, 1 + 2**-23]), x)
    assert "shape" in compare.same_bits("y", x[:2], x)


def test_new_memory_is_poisoned_while_asked():
    with compare.poisoned():
        assert torch.empty(3).isnan().all()
        assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()
        assert (torch.ones(2).new_empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_are_those_that_must_move_in_the_model(shape):
    pytest.importorskip("triton", reason="Triton is not installed")
    from million_experts.benchmarks import triton_traffic as model

    indices = torch.randint(0, shape.N, (shape.T, shape.K), generator=torch.Generator().manual_seed(0))
    picks = model.Picks(indices.numpy())
    N, R, D, size = shape.N, shape.R, shape.D, shape.size
    of_tokens = shape.T, shape.K, D, size, model.Gather("table", picks, R * D * size)
    expected = {"experts, forward": model.experts_forward(*of_tokens)}
    for name, count in (
        ("experts, backward to the touched rows", picks.distinct * (8 + R * D * size)),
        ("experts, backward, dense", N * R * D * size),
    ):
        expected[name] = model.experts_backward(*of_tokens, model.Stream("grad", count))
    sizes = model.Retrieval(shape.T, shape.H, shape.k, shape.n, shape.n, shape.d, size, size)
    expected["retrieval, forward"] = model.topk(sizes).accesses
    step = model.adamw(picks.distinct, R, D, 3, size, size, size, True).accesses
    history = 3 * 3 * 8
    expected["row-wise AdamW"] = step
    for name, accesses in expected.items():
        counted = costs.operation(name, shape, picks.distinct).bytes
        if name == "row-wise AdamW":  # the model counts the sums of logarithms, too
            counted += history
        assert counted == model.Kernel(accesses, {}).necessary(model.CACHE), name


def test_expected_picks():
    shape = Shape(64, 16, 8)
    draws = [operations.Draw(shape, CPU, seed).picks().unique().numel() for seed in range(20)]
    assert shape.distinct == pytest.approx(sum(draws) / 20, rel=0.02)
    assert Shape(4, 1, 8).distinct == 1
