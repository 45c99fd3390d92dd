"""The traffic model against what the kernels load and store in Triton's interpreter, address by address."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from million_experts.benchmarks import triton_traffic as model

pytest.importorskip("triton", reason="Triton is not installed")
import triton_interpreter
import triton_trace

from million_experts.ops import reference, triton_retrieval, triton_rowwise
from million_experts.ops import triton_expert_rows as rows
from million_experts.ops import triton_expert_tiles as tiles
from million_experts.ops import triton_experts as experts

triton_interpreter.repair()

ALLOWED = 1.3  # bytes moved over bytes that must move


def check(
    traces: dict[str, list[triton_trace.Trace]], name: str, accesses: model.Accesses, cache: int
) -> None:
    """The model's bytes are those of a kernel's first launch, and little more than must move."""
    trace = traces[name][0]
    expected: dict[str, float] = {}
    for access in accesses:
        expected[access.tensor] = expected.get(access.tensor, 0) + access.issued
    assert trace.issued() == pytest.approx(expected)
    moved = trace.moved(cache)
    assert moved <= ALLOWED * sum(a.necessary(cache) for a in accesses), name
    assert moved == pytest.approx(sum(a.moved(cache) for a in accesses), rel=0.1), name


def mlp_inputs(T: int, K: int, N: int, R: int, D: int, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, grad_y = (torch.randn(T, D, generator=generator) for _ in range(2))
    indices = torch.randint(0, N, (T, K), generator=generator)
    gates = torch.rand(T, K, generator=generator)
    return x, indices, gates, torch.randn(N, R, D, generator=generator).to(dtype), grad_y


@pytest.mark.parametrize("R", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_token_by_token(R, dtype, monkeypatch):
    monkeypatch.setattr(experts, "TILE_REUSE", float("inf"))
    T, K, N, D, cache = 16, 10, 100, 320, 2**15
    x, indices, gates, table, grad_y = mlp_inputs(T, K, N, R, D, dtype)
    at_once = rows.DOTS_CONFIGS[0].kwargs["ROWS"]
    mix_d, table_d = (c[0].kwargs["BLOCK_D"] for c in (rows.MIX_CONFIGS, rows.TABLE_CONFIGS))
    picks, size = model.Picks(indices.numpy()), table.element_size()

    with triton_trace.record() as traces:
        _, pre = experts.expert_mlp(x, indices, gates, table, "gelu")
    check(traces, "dots_kernel", model.dots(picks, T, D, R - 1, 4, size, at_once // (R - 1)), cache)
    check(traces, "output_weights_kernel", model.output_weights(T * K, R, 4), cache)
    check(traces, "mix_kernel", model.mix(picks, T, D, 1, size, 4, mix_d), cache)

    with triton_trace.record() as traces:
        experts.expert_mlp_backward(grad_y, x, indices, gates, table, pre, "gelu", True, True, True)
    check(traces, "dots_kernel", model.dots(picks, T, D, 1, 4, size, at_once), cache)
    check(traces, "gradient_weights_kernel", model.gradient_weights(T * K, R, 4), cache)
    check(traces, "mix_kernel", model.mix(picks, T, D, R - 1, size, 4, mix_d), cache)
    sums = row_sums(indices, N, D, R, table_d)
    assert sums.most == 0
    check(traces, "table_rows_kernel", model.table_rows(sums, size), 2**17)


def row_sums(indices: torch.Tensor, N: int, D: int, R: int, block_d: int) -> model.RowSums:
    """The table's gradient for picks [T, K]."""
    length = rows.part_length(indices.numel(), R, D)
    return model.RowSums.of(indices.numpy(), N, D=D, R=R, x=4, block_d=block_d, length=length)


@pytest.mark.parametrize("R", [2, 3])
def test_experts_with_many_pairs(R, monkeypatch):
    monkeypatch.setattr(experts, "TILE_REUSE", float("inf"))
    monkeypatch.setattr(rows, "PART", 8)
    T, K, N, D, cache = 16, 10, 100, 320, 2**18
    x, indices, gates, table, grad_y = mlp_inputs(T, K, N, R, D)
    indices[:, :2] = 7
    indices[3:12, 2] = 50
    _, pre = experts.expert_mlp(x, indices, gates, table, "gelu")
    with triton_trace.record() as traces:
        experts.expert_mlp_backward(grad_y, x, indices, gates, table, pre, "gelu", True, True, True)
    sums = row_sums(indices, N, D, R, rows.TABLE_CONFIGS[0].kwargs["BLOCK_D"])
    assert sums.parts == 7  # of 32 pairs and some of one expert, and 9 and some of another
    check(traces, "table_parts_kernel", model.table_parts(sums), cache)
    check(traces, "table_rows_kernel", model.table_rows(sums, 4), cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_in_tiles(dtype):
    T, K, N, R, D, cache, tile = 70, 40, 72, 3, 80, 2**18, tiles.TILE_TOKENS
    assert tiles.TILE_TOKENS == tiles.TILE_EXPERTS == tiles.TILE_COLUMNS
    x, indices, gates, table, grad_y = mlp_inputs(T, K, N, R, D, dtype)
    size = table.element_size()
    with triton_trace.record() as traces:
        _, pre = experts.expert_mlp(x, indices, gates, table, "gelu")
    check(traces, "tile_dots_kernel", model.tile_dots(T, N, D, 4, size, tile), cache)
    check(traces, "spread_kernel", model.spread(indices.numpy(), N, tiles.SPREAD), cache)
    check(traces, "tile_mix_kernel", model.tile_mix(T, N, D, 1, size, 4, tile), cache)
    with triton_trace.record() as traces:
        experts.expert_mlp_backward(grad_y, x, indices, gates, table, pre, "gelu", True, True, True)
    check(traces, "tile_mix_kernel", model.tile_mix(T, N, D, 2, size, 4, tile), cache)
    assert len(traces["tile_table_kernel"]) == R
    check(traces, "tile_table_kernel", model.tile_table(T, N, D, 4, _split(T, tiles.DEPTH), tile), cache)


def _split(width: int, block: int) -> int:
    return -(-width // block)


@pytest.mark.parametrize(("d", "dtype"), [(16, torch.float32), (16, torch.bfloat16), (160, torch.float32)])
def test_retrieval(d, dtype):
    T, H, k, n1, n2, cache = 10, 2, 4, 40, 34, 2**19
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(T, H, 2, d, generator=generator).to(dtype)
    keys1, keys2 = (torch.randn(n, d, generator=generator).to(dtype) for n in (n1, n2))
    s = model.Retrieval(T, H, k, n1, n2, d, query.element_size(), keys1.element_size())
    with triton_trace.record() as traces:
        scores, indices = triton_retrieval.product_key_topk(query, keys1, keys2, k)
    check(
        traces,
        "topk_kernel",
        model.topk(s, triton_retrieval.BLOCK_Q, 64 if d <= 128 else 32, d <= 128),
        cache,
    )

    with triton_trace.record() as traces:
        triton_retrieval.product_key_topk_backward(scores, indices, query, keys1, keys2)
    check(traces, "query_grad_kernel", model.query_grad(s, indices.numpy(), 4, 64), cache)
    order, starts = (t.numpy() for t in triton_retrieval._sort_selections(indices, n1, n2, 1))
    counts, part = np.diff(starts), triton_retrieval.PART
    check(traces, "key_parts_kernel", model.key_parts(s, order, counts, 4, part, 64), cache)
    check(traces, "key_sum_kernel", model.key_sum(s, counts, part, 64), cache)
    assert torch.equal(indices, reference.product_key_topk(query, keys1, keys2, k)[1])


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("with_momentum", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rowwise_adamw(by_row, with_momentum, dtype):
    N, n, R, D, steps = 30, 12, 2, 96, 5
    zeros = torch.zeros(N, R, D)
    with triton_trace.record() as traces:
        triton_rowwise.rowwise_adamw(
            zeros.to(dtype, copy=True), zeros.to(dtype, copy=True) if with_momentum else None,
            torch.zeros(N, R) if by_row else zeros.clone(),
            torch.arange(N, dtype=torch.int32) % steps, torch.zeros(steps, 3, dtype=torch.float64), steps - 1,
            torch.randperm(N)[:n], torch.ones(n, R, D, dtype=dtype), None, None, 1e-3,
            (0.9 if with_momentum else 0.0, 0.99), 1e-8, 0.0, 1,
        )  # fmt: skip
    size = dtype.itemsize
    accesses = model.adamw(n, R, D, steps, size, size if with_momentum else 0, size, by_row)
    assert len(traces["adamw_kernel"]) == 1
    check(traces, "adamw_kernel", accesses, 2**14)


def test_standard_shapes_move_little_more_than_they_must():
    for row in model.standard():
        assert row.moved <= ALLOWED * row.necessary, row
        assert row.necessary <= row.issued * 1.0001, row


def test_a_cache_keeps_what_was_used_last():
    gather = model.Gather("table", model.Picks(np.array([0, 1, 0, 2, 1, 0])), 10)
    assert gather.issued == 60
    assert gather.necessary(100) == gather.moved(100) == 30
    # Two rows fit: 0, 1 | 2, 1 | 0 must come, and 0 1 . 2 1 0 do come.
    assert gather.necessary(20) == 50
    assert gather.moved(20) == 50
    stream = model.Stream("keys", 100, 3, apart=True)
    assert stream.moved(1000) == 100
    assert stream.moved(50) == 300
