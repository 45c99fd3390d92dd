"""How far a result is from the truth, in float64 and some numbers at a time; outputs poisoned beforehand."""

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

#: Numbers that are compared at a time.
BLOCK = 2**26

#: Norm of the error over the truth's, and largest error over the largest number, by the result's type.
#: float32 sums some hundred products; the others are such sums, rounded once to 8 or 11 bits.
ALLOWED = {
    torch.float64: (1e-10, 1e-9),
    torch.float32: (1e-5, 2e-5),
    torch.bfloat16: (2**-8, 1e-2),
    torch.float16: (2**-11, 1e-3),
    torch.int64: (0.0, 0.0),
    torch.int32: (0.0, 0.0),
}


@dataclass(frozen=True)
class Error:
    """Of a result: both errors, and what is wrong with it, if anything is."""

    norm: float
    largest: float
    fault: str | None


def compare(name: str, actual: Tensor, truth: Tensor, allowed: tuple[float, float] | None = None) -> Error:
    """The error of a result; NaN and infinity are wrong wherever the truth is finite.

    Args:
        allowed: bounds of norm and largest error; by default those of the result's type.
    """
    bounds = allowed or ALLOWED[actual.dtype]
    if actual.shape != truth.shape:
        return Error(math.inf, math.inf, f"{name} has shape {list(actual.shape)}, not {list(truth.shape)}")
    squares = norm = largest = scale = 0.0
    actual, truth = actual.reshape(-1), truth.reshape(-1)
    for one, right in zip(actual.split(BLOCK), truth.split(BLOCK), strict=True):
        difference = one.double() - right.double()
        squares += float(difference.square().sum())
        norm += float(right.double().square().sum())
        largest = max(largest, float(difference.abs().max()) if len(one) else 0.0)
        scale = max(scale, float(right.double().abs().max()) if len(one) else 0.0)
        if not math.isfinite(squares):  # `max` would pass over NaN
            where = int((~difference.isfinite()).nonzero()[0])
            return Error(math.inf, math.inf, f"{name} is not finite, first within a block at {where}")
    errors = math.sqrt(squares / norm) if norm else math.inf * squares if squares else 0.0
    relative = largest / scale if scale else math.inf * largest if largest else 0.0
    fault = None
    if errors > bounds[0] or relative > bounds[1]:
        fault = (
            f"{name}, {str(actual.dtype).removeprefix('torch.')}: norm of the error {errors:.2g} of the "
            f"truth's, allowed {bounds[0]:.2g}; largest error {relative:.2g} of the largest number, "
            f"allowed {bounds[1]:.2g}"
        )
    return Error(errors, relative, fault)


def same_bits(name: str, actual: Tensor, expected: Tensor) -> str | None:
    """What is wrong if two results differ in any bit, by their values alone."""
    if actual.shape == expected.shape and torch.equal(actual, expected):
        return None
    if actual.shape != expected.shape:
        return f"{name} has shape {list(actual.shape)} the first time, {list(expected.shape)} the second"
    return f"{name} differs in {int((actual != expected).sum())} of {actual.numel()} numbers"


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """New memory holds NaN, or the largest integer: what a kernel leaves out is found."""
    was = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of each operation that has no deterministic form
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(was)
