"""AdamW whose step costs the rows touched."""

import math
from collections.abc import Callable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from million_experts._arguments import check_choice, is_integer
from million_experts.layers import PEER
from million_experts.ops.backends import implementation, resolve_backend
from million_experts.ops.checks import check_row_state, check_shape
from million_experts.ops.reference import Visit
from million_experts.ops.reference_rowwise import mix64
from million_experts.optim.row_state import merge_rows, moved, record, start_rows
from million_experts.optim.step_in_backward import StepInBackward, register

SECOND_MOMENTS = ("element", "row")
MOMENTUM_DTYPES = (None, torch.bfloat16)
_TABLE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class RowwiseAdamW(Optimizer):
    """AdamW that, for sparse gradients, updates the touched rows alone and lets them catch up.

    A parameter with a dense gradient gets `torch.optim.AdamW`, bit for bit (on a CPU that of `fused=True`). A
    step with a sparse gradient (`torch.sparse_coo` with one sparse dimension: rows [n] and values [n, ...] of
    a table [N, ...], rows in any order, repeated or not) costs the rows in it. When a row is next touched it
    first catches up: its moments decay by the betas of the steps that it missed, the row itself by their
    weight decay. Learning rate, weight decay and betas may change from step to step. As in torch, steps are
    counted for each parameter, and one without a gradient (`grad` is None) does not count; a sparse gradient
    without rows does.

    **What differs from dense AdamW**: with a zero gradient that one still moves a row by its decaying
    momentum; here a row moves only when it is touched. A row that was touched at step s and next at t misses
    the sum over u = s+1 ... t-1 of lr * |m_u| / (1 - beta1^u) / (sqrt(v_u / (1 - beta2^u)) + eps), where m_u
    = beta1^(u-s) m_s and v_u = beta2^(u-s) v_s. Late in training, where the bias corrections are 1 and lr
    stays the same, each of these moves is at most beta1 / sqrt(beta2) of the one before, so all together are
    at most beta1 / (sqrt(beta2) - beta1) times the row's own move at s: nine times at the default betas. The
    moments are the same as dense AdamW's for the same gradients.

    `flush()` brings all rows up to date; call it before evaluating or saving the weights. To resume, a state
    saved without it will do.

    Args:
        params: parameters or groups; every argument below may be a group's own.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; lr * weight_decay below 1. Where the first
            beta is 0 when the first sparse gradient comes, no first moment is kept, and it has to stay 0
            while gradients are sparse.
        second_moment: for sparse gradients, "element", or "row": one number for the last dimension, the
            moving average of the mean of its squares: [N, R] for a table [N, R, D].
        momentum_dtype: for sparse gradients, None (float32; float64 for a float64 table) or `torch.bfloat16`.
        stochastic_rounding: bfloat16 tables and momentum are computed in float32 and rounded up or down at
            random, so that small steps count on average; False rounds to nearest, as float16 always is.
        seed: of that randomness, which depends on seed, step, parameter and place alone: not on threads.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        second_moment: str = "element",
        momentum_dtype: torch.dtype | None = None,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "second_moment": second_moment,
            "momentum_dtype": momentum_dtype,
            "stochastic_rounding": stochastic_rounding,
            "seed": seed,
        }
        super().__init__(params, defaults)
        self._in_backward: list[tuple[Tensor, StepInBackward]] = []

    def fuse_into_backward(self, *layers: PEER) -> None:
        """From now on the layers' backward pass updates their tables itself, and no gradient of them is kept.

        The result is that of `step()` after `backward()`, to the bit. `step()` is still to be called after
        every `backward()`: it does the other parameters. What needs the gradient is not possible any more:
        accumulation over micro-batches, clipping by a norm that counts it, a scaler, exchange between
        processes, or a look at it before it changes the weights.

        Args:
            layers: with `sparse_grad=True`; their tables are parameters of this optimiser.

        Raises:
            ValueError: a layer that does not fit, or that steps in backward already.
        """
        for layer in layers:
            self._find(layer.experts)
            self._in_backward.append((layer.experts, register(self, layer)))

    def _find(self, p: Tensor) -> tuple[dict[str, Any], int]:
        """The group of a parameter, and its place among all."""
        index = 0
        for group in self.param_groups:
            for other in group["params"]:
                if other is p:
                    return group, index
                index += 1
        raise ValueError(f"a table of shape {list(p.shape)} is no parameter of this optimiser")

    @torch.no_grad()
    def begin_step(self, p: Tensor) -> Visit:
        """Begins a step of a sparsely trained parameter; what is returned takes it for some rows at a time.

        Meant for the backward pass, see `fuse_into_backward`. Each row must come once. Raises as `step` does.
        """
        group, index = self._find(p)
        _check_table(p, self.state.get(p, {}), group)
        step = self._next_step(p, group)

        def visit(rows: Tensor, values: Tensor) -> None:
            with torch.no_grad():
                self._run(p, group, index, step, rows, values, None, None)

        return visit

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: an option of the group is out of its range.
        """
        _check_options(self.defaults | param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_in_backward", [])  # a copy has layers of its own, or none
        for group in self.param_groups:  # such as those saved by torch's AdamW
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; the state keeps its dtypes.

        torch's own casts every tensor to the parameter's dtype, which would ruin float32 moments and the
        counters of a bfloat16 table.
        """
        saved: dict[str, Any] = {}

        def take_state(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            saved.update(loaded)
            return loaded | {"state": {}}

        def put_state(_: Optimizer) -> None:
            indices = chain.from_iterable(group["params"] for group in saved["param_groups"])
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            by_index = dict(zip(indices, params, strict=True))
            for index, state in saved["state"].items():
                p = by_index.get(index, index)
                self.state[p] = {name: moved(name, value, p) for name, value in state.items()}

        before = self.register_load_state_dict_pre_hook(take_state)
        after = self.register_load_state_dict_post_hook(put_state, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step for every parameter that has a gradient; returns what `closure` returned, if it was given.

        Raises:
            ValueError: a sparse gradient of an unsupported form, lr * weight_decay of 1 or more, momentum for
                a table that was trained without (then no first moment was kept), or a dense
                gradient for a parameter whose state has one second moment a row, or dtypes other than the
                parameter's, from sparse ones. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and _is_sparse(p.grad):
                    _check_form(p.grad)
                    _check_table(p, self.state.get(p, {}), group)
                elif p.grad is not None:
                    _check_dense(p, self.state.get(p, {}))
        for p, in_backward in self._in_backward:
            if p.grad is not None:
                raise ValueError("a gradient came for a table that steps in backward: what made it?")
            in_backward.taken = False
        index = 0
        for group in self.param_groups:
            dense = []
            for p in group["params"]:
                if p.grad is not None and _is_sparse(p.grad):
                    self._sparse_step(p, group, index)
                elif p.grad is not None:
                    self._forget_rows(p, group, index)
                    dense.append(p)
                index += 1
            self._dense_step(dense, group)
        return loss

    @torch.no_grad()
    def flush(self) -> None:
        """Brings every row of every sparsely trained parameter up to date: moments and weight decay."""
        index = 0
        for group in self.param_groups:
            for p in group["params"]:
                if "last_step" in self.state.get(p, {}):
                    self._flush(p, group, index)
                index += 1

    def _flush(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        step = int(self.state[p]["step"])
        if step > 0:
            self._run(p, group, index, step, None, None, None, None)

    def _forget_rows(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        """A state of rows becomes that of torch's AdamW."""
        if "last_step" in self.state.get(p, {}):
            self._flush(p, group, index)
            del self.state[p]["last_step"], self.state[p]["history"]
            if "exp_avg" not in self.state[p]:  # beta1 was 0: nothing of it would count
                self.state[p]["exp_avg"] = torch.zeros_like(p)

    def _dense_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.tensor(0.0, dtype=torch.float32, device="cpu"),
                    "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
                }
        if not params:
            return
        states = [self.state[p] for p in params]
        beta1, beta2 = group["betas"]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            has_complex=any(torch.is_complex(p) for p in params),
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
            fused=all(p.device.type == "cpu" and p.is_floating_point() for p in params) or None,
        )

    def _sparse_step(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        grad = p.grad
        assert grad is not None
        rows, places, starts = merge_rows(grad._indices()[0], len(p))
        step = self._next_step(p, group)
        if len(rows):
            self._run(p, group, index, step, rows, grad._values(), places, starts)

    def _next_step(self, p: Tensor, group: dict[str, Any]) -> int:
        state = self.state[p]
        if "last_step" not in state:
            start_rows(p, state, group)
        state["step"] += 1
        step = int(state["step"])
        record(state, step, group)
        return step

    def _run(
        self,
        p: Tensor,
        group: dict[str, Any],
        index: int,
        step: int,
        rows: Tensor | None,
        values: Tensor | None,
        places: Tensor | None,
        starts: Tensor | None,
    ) -> None:
        state = self.state[p]
        table, exp_avg, exp_avg_sq = _of_rows(p, state)
        whole = all(t is None or t.is_contiguous() for t in (table, exp_avg, exp_avg_sq))
        backend = resolve_backend("auto", p.device.type) if whole else "reference"
        key = mix64(mix64(mix64(group["seed"] % 2**64) ^ step) ^ index)
        implementation(backend).rowwise_adamw(
            table,
            exp_avg,
            exp_avg_sq,
            state["last_step"],
            state["history"],
            step,
            rows,
            values if values is None else values.reshape(len(values), *table.shape[1:]),
            places,
            starts,
            float(group["lr"]),
            tuple(map(float, group["betas"])),
            group["eps"],
            group["weight_decay"],
            key if group["stochastic_rounding"] else None,
        )
        # Kernels write by address: autograd shall notice where an older graph still needs the table.
        torch.autograd.graph.increment_version(p)


def _of_rows(p: Tensor, state: dict[str, Any]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Table and moments as [N, R, D]; the second [N, R] where it is one number for the last dimension.

    The first is None where none is kept.
    """
    D = p.shape[-1] if p.dim() > 1 else 1
    R = math.prod(p.shape[1:]) // D if D else 0
    squares = state["exp_avg_sq"]
    by_row = p.dim() > 1 and squares.dim() < p.dim()
    shape = len(p), R, D
    return (
        p.detach().view(shape),
        state["exp_avg"].view(shape) if "exp_avg" in state else None,
        squares.view(shape[:2] if by_row else shape),
    )


def _is_sparse(grad: Tensor) -> bool:
    return grad.layout != torch.strided


def _check_options(options: dict[str, Any]) -> None:
    lr, betas, eps, weight_decay = (options[name] for name in ("lr", "betas", "eps", "weight_decay"))
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr must be a number or a tensor of one, got a tensor of {lr.numel()}")
    for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
        if not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be a finite number of at least 0, got {value}")
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers of at least 0 and below 1, got {betas}")
    check_choice("second_moment", options["second_moment"], SECOND_MOMENTS)
    if options["momentum_dtype"] not in MOMENTUM_DTYPES:
        raise ValueError(f"momentum_dtype must be None or torch.bfloat16, got {options['momentum_dtype']}")
    if not is_integer(options["seed"]):
        raise ValueError(f"seed must be an int, got {options['seed']!r}")


def _check_form(grad: Tensor) -> None:
    if grad.layout != torch.sparse_coo or grad.sparse_dim() != 1:
        form = f"{grad.sparse_dim()} sparse dimensions" if grad.layout == torch.sparse_coo else grad.layout
        raise ValueError(f"a sparse gradient must be torch.sparse_coo with 1 sparse dimension, got {form}")


def _check_table(p: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """What a sparse step needs, looked at before it changes anything."""
    if p.dtype not in _TABLE_DTYPES:
        raise ValueError(f"a parameter with a sparse gradient must be one of {_TABLE_DTYPES}, got {p.dtype}")
    if not p.is_contiguous():
        raise ValueError(f"a parameter with a sparse gradient must be contiguous, got strides {p.stride()}")
    if p.dtype == torch.float64 and group["momentum_dtype"] is not None:
        raise ValueError(f"momentum_dtype must be None for a float64 table, got {group['momentum_dtype']}")
    if "last_step" in state:
        if "exp_avg" in state:
            check_shape("exp_avg", state["exp_avg"], p.shape)
        check_shape("exp_avg_sq", state["exp_avg_sq"], p.shape[: state["exp_avg_sq"].dim()])
        rows = _of_rows(p, state)
        check_row_state(*rows, state["last_step"], state["history"], int(state["step"]))
        if rows[1] is None and group["betas"][0] != 0:
            raise ValueError(
                "the first of betas must stay 0 for a table that was trained without momentum, got "
                f"{group['betas']}: no first moment was kept"
            )
    if float(group["lr"]) * group["weight_decay"] >= 1:
        raise ValueError(
            f"lr * weight_decay must be below 1, got {float(group['lr'])} * {group['weight_decay']}: "
            "a row cannot catch up with a decay to nothing"
        )


def _check_dense(p: Tensor, state: dict[str, Any]) -> None:
    for name in ("exp_avg", "exp_avg_sq") if "last_step" in state else ():
        moment = state.get(name, p)
        if moment.shape != p.shape or moment.dtype != p.dtype:
            raise ValueError(
                "a dense gradient came for a parameter that sparse ones have trained: its state must have "
                f"the parameter's shape and dtype, {tuple(p.shape)} {p.dtype}, but {name} has "
                f"{tuple(moment.shape)} {moment.dtype}"
            )
