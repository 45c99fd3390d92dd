"""No time without a right result: a competitor is compared with its truth at the very case."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from million_experts.benchmarks.optimizers import Rowwise
from million_experts.benchmarks.workload import Workload, draw_inputs, draw_upstream, run_once
from million_experts.optim.clip import merge_repeated_rows

# Largest error against the largest value, and norm of the error against the norm. Whole layers in float32:
# the rounding of scores of size 3 moves gates by some 1e-6, and gradients add 2048 tokens of both signs.
TOLERANCE = 1e-4
BLOCK = 2**24  # numbers compared at a time: a difference of two tables of a million experts takes 2 GiB
# More tokens than this that no two backends need agree on would leave too few to tell.
AMBIGUOUS = 0.25


def compare(actual: Workload, truth: Workload, training: bool, seed: int = 0) -> str | None:
    """What differs between a competitor's result and the truth: outputs and, in training, all gradients.

    A sparse gradient must have the truth's values at its rows, and the truth zeros at all others.

    Returns:
        The first difference in words, or None.
    """
    actual, truth = actual.part or actual, truth.part or truth
    inputs, clear = _clear_inputs(truth, training, seed)
    for workload in (actual, truth):
        workload.module.train(training)
    y, grads = _results(actual, inputs, clear, training)
    expected_y, expected_grads = _results(truth, inputs, clear, training)
    if difference := _difference("output", y, expected_y):
        return difference
    if len(grads) != len(expected_grads):
        return f"{len(grads)} gradients where the truth has {len(expected_grads)}"
    for (name, grad), expected in zip(grads.items(), expected_grads.values(), strict=True):
        if difference := _difference(f"gradient of {name}", grad, expected):
            return difference
    return None


def compare_steps(workload: Workload, seed: int = 0) -> str | None:
    """What differs, in any bit, between a step taken in the backward pass and one that comes after it.

    The first is taken by a copy, the second by the workload itself. Other optimisers have nothing to differ.

    Returns:
        The first difference in words, or None.
    """
    if not isinstance(workload.optimizer, Rowwise) or not workload.optimizer.in_backward:
        return None
    twin = replace(workload, module=copy.deepcopy(workload.module))
    upstream = draw_upstream(draw_inputs(workload, seed, True))
    for one, training in ((twin, workload.optimizer), (workload, workload.optimizer.apart())):
        one.module.train()
        optimizer = training(one.module)
        run_once(one, "step", draw_inputs(one, seed, True), upstream, optimizer)
        del optimizer
    expected = dict(workload.module.named_parameters())
    for name, parameter in twin.module.named_parameters():
        pairs = zip(blocks(parameter.detach()), blocks(expected[name].detach()), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs):
            return f"{name} after a step in the backward pass is not what a step after it makes"
    return None


def check_sanity(workload: Workload, training: bool, seed: int = 0) -> str | None:
    """What is plainly wrong with the result of a layer that has no truth here, or None."""
    workload.module.train(training)
    inputs = draw_inputs(workload, seed, False)
    with torch.no_grad():
        y = workload.module(*inputs)
    if workload.like_tokens and y.shape != inputs[0].shape:
        return f"output has shape {list(y.shape)}, the tokens {list(inputs[0].shape)}"
    if not all(bool(torch.isfinite(part).all()) for part in blocks(y)):
        return "output is not finite"
    return None


def _clear_inputs(truth: Workload, training: bool, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs, and [T] the tokens whose result is beyond doubt."""
    for attempt in range(20):
        inputs = draw_inputs(truth, seed + attempt, training)
        clear = torch.ones(len(inputs[0]), dtype=torch.bool)
        if truth.ambiguous is not None:
            clear = ~truth.ambiguous(inputs, training)
        if int(clear.sum()) >= (1 - AMBIGUOUS) * len(clear):
            return inputs, clear
    raise RuntimeError("too many tokens have experts that score the same: nothing can be compared")


def _results(
    workload: Workload, inputs: tuple[Tensor, ...], clear: Tensor, training: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """The output at clear tokens, and the gradients of what these put out, by name."""
    if not training:
        with torch.no_grad():
            return workload.module(*inputs)[clear], {}
    y = workload.module(*inputs)
    if y.shape != inputs[0].shape:
        return y.detach(), {}
    generator = torch.Generator().manual_seed(1)
    # Tokens in doubt put nothing out, so that the experts they picked learn nothing from them.
    y.backward(torch.randn(y.shape, generator=generator).to(y.dtype) * clear.unsqueeze(-1))
    grads = {f"input {i}": t.grad for i, t in enumerate(inputs) if t.grad is not None}
    grads |= {n: p.grad for n, p in workload.module.named_parameters() if p.grad is not None}
    for tensor in (*inputs, *workload.module.parameters()):
        tensor.grad = None
    return y.detach()[clear], grads


def _difference(name: str, actual: Tensor, expected: Tensor) -> str | None:
    if actual.shape != expected.shape:
        return f"{name} has shape {list(actual.shape)}, not {list(expected.shape)}"
    largest = error = norm = error_norm = 0.0
    if actual.is_sparse:
        actual = merge_repeated_rows(actual)
        if (row := _row_left_out(actual, expected)) is not None:
            return f"{name} leaves out row {row}, which is not zero"
    for a, e in zip(blocks(actual), blocks(expected), strict=True):
        difference = a.float() - e.float()
        if not bool(torch.isfinite(difference).all()):
            return f"{name} is not finite"
        largest = max(largest, float(e.abs().max()))
        error = max(error, float(difference.abs().max()))
        norm += float(e.float().square().sum(dtype=torch.float64))
        error_norm += float(difference.square().sum(dtype=torch.float64))
    # bfloat16 keeps eight bits, and both sides have rounded to them.
    tolerance = TOLERANCE if expected.dtype != torch.bfloat16 else 2**-7
    if error > tolerance * largest or error_norm > (tolerance**2) * norm:
        relative = (error_norm / norm) ** 0.5 if norm else float("inf")
        return (
            f"{name} differs from the reference by up to {error:.3g} where the largest value is "
            f"{largest:.3g} (relative norm of the error {relative:.3g}, allowed {tolerance:.3g})"
        )
    return None


def _row_left_out(sparse: Tensor, expected: Tensor) -> int | None:
    """A row that is not in a merged sparse tensor and has something else than zeros in a dense one."""
    rows = sparse._indices()[0]
    for start, block in _row_blocks(expected):
        out = torch.ones(len(block), dtype=torch.bool)
        out[rows[_within(rows, start, len(block))] - start] = False
        out &= block.flatten(1).ne(0).any(1)
        if bool(out.any()):
            return start + int(out.nonzero()[0])
    return None


def blocks(tensor: Tensor) -> Iterator[Tensor]:
    """All numbers of a dense tensor or of a merged sparse one, some at a time and as a dense tensor's."""
    if not tensor.numel():
        return
    if not tensor.is_sparse:
        yield from (block.reshape(-1) for _, block in _row_blocks(tensor))
        return
    rows, values = tensor._indices()[0], tensor._values()
    for start, count in _row_ranges(tensor):
        own = _within(rows, start, count)
        block = values.new_zeros(count, *tensor.shape[1:])
        block[rows[own] - start] = values[own]
        yield block.reshape(-1)


def _row_blocks(tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
    if tensor.dim() == 0:
        tensor = tensor.reshape(1)
    for start, count in _row_ranges(tensor):
        yield start, tensor[start : start + count]


def _row_ranges(tensor: Tensor) -> Iterator[tuple[int, int]]:
    step = max(1, BLOCK * len(tensor) // tensor.numel())
    return ((start, min(step, len(tensor) - start)) for start in range(0, len(tensor), step))


def _within(ascending: Tensor, start: int, count: int) -> slice:
    """Where the rows start ... start + count - 1 are."""
    return slice(*torch.searchsorted(ascending, torch.tensor([start, start + count])).tolist())
