"""Running statistics: moved once per forward pass, not again when gradient checkpointing repeats it."""

import sys
from types import FrameType

import torch
from torch import Tensor
from torch.autograd import graph
from torch.autograd.function import BackwardCFunction

from million_experts.ops.registration import define

# The engine calls the backward of every `torch.autograd.Function` by one of these, that of reentrant
# checkpointing among them.
_CUSTOM_BACKWARD = {
    getattr(BackwardCFunction, name).__code__
    for name in ("apply", "apply_boxed")
    if hasattr(BackwardCFunction, name)
}
# Everything that runs in backward was called from here.
_ENGINE = graph._engine_run_backward.__code__


def repeats_a_forward_pass() -> bool:
    """Whether gradient checkpointing computes anew what a forward pass, already counted, has computed before.

    True inside the backward of a `torch.autograd.Function`, where reentrant checkpointing and that of other
    libraries recompute, and inside the hook by which `torch.utils.checkpoint` gets back what it did not save.
    A forward pass that a user's hook starts during backward is a new one.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code in _CUSTOM_BACKWARD:
            return True
        if code.co_name == "unpack_hook" and frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return True
        if code is _ENGINE:
            return False
        frame = frame.f_back
    return False


def move_statistics(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    unbiased: Tensor,
    momentum: float | None,
    any_real: Tensor | None = None,
) -> None:
    """Moves running statistics [C], in place, towards a batch's.

    Args:
        momentum: as in `torch.nn.BatchNorm1d`: with None they are the means over all batches.
        any_real: a bool; where it is False nothing moves. None for True.

    Raises:
        RuntimeError: a transform of `torch.func` that lets nothing be changed.
    """
    arguments = (running_mean, running_var, num_batches_tracked, mean, unbiased, momentum, any_real)
    if torch.compiler.is_compiling():  # whether the graph repeats a forward pass is known when it runs
        moved = torch.ops.million_experts.moved_statistics(*arguments)
        for old, new in zip(arguments[:3], moved, strict=True):
            old.copy_(new)
        return
    try:
        _move(*arguments)
    except RuntimeError as error:
        if not torch._C._are_functorch_transforms_active():
            raise
        raise RuntimeError(
            "BatchNorm's running statistics cannot move inside a transform of torch.func that does not get "
            "them as arguments: call .eval(), pass the buffers to functional_call, choose "
            "query_norm='layer', or let torch.func.replace_all_batch_norm_modules_ drop them"
        ) from error


def _move(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    unbiased: Tensor,
    momentum: float | None,
    any_real: Tensor | None,
) -> None:
    if repeats_a_forward_pass():
        return
    for running, new in ((running_mean, mean), (running_var, unbiased)):
        new = new.to(running)
        if any_real is not None:
            new = torch.where(any_real, new, running)
        if momentum is None:
            running.lerp_(new, (num_batches_tracked + 1).to(running.dtype).reciprocal())
        else:
            running.lerp_(new, momentum)
    num_batches_tracked.add_(1 if any_real is None else any_real)


def _moved(*arguments) -> tuple[Tensor, ...]:
    statistics = tuple(t.clone() for t in arguments[:3])
    _move(*statistics, *arguments[3:])
    return statistics


define(
    "moved_statistics",
    "(Tensor running_mean, Tensor running_var, Tensor num_batches_tracked, Tensor mean, Tensor unbiased,"
    " float? momentum, Tensor? any_real) -> (Tensor, Tensor, Tensor)",
    _moved,
    lambda *arguments: tuple(t.new_empty(t.shape) for t in arguments[:3]),
    # A CUDA graph would replay it without asking.
    tags=(torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else (),
)
