"""AdamW whose step costs the rows touched."""

from collections.abc import Callable
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from million_experts.layers import PEER
from million_experts.ops.backends import implementation, resolve_backend
from million_experts.ops.reference import Visit
from million_experts.ops.reference_rowwise import mix64
from million_experts.optim.row_state import has_rows, merge_rows, of_rows, record, start_rows
from million_experts.optim.rowwise_checks import (
    check_dense,
    check_form,
    check_options,
    check_state,
    check_table,
    is_sparse,
)
from million_experts.optim.step_in_backward import StepInBackward, register
from million_experts.optim.stored_state import fitted_states


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
        accumulation over micro-batches, clipping by a norm that counts it, a `GradScaler`, exchange between
        processes. A backward pass that is not asked for the table's gradient, or hands it out
        (`torch.autograd.grad`), does not move the table; one whose gradient is not finite raises
        FloatingPointError before it does.

        Args:
            layers: with `sparse_grad=True`; their tables are parameters of this optimiser.

        Raises:
            ValueError: a layer that does not fit, or that steps in backward already.
        """
        for layer in layers:
            self._find(layer.experts)
            self._in_backward.append((layer.experts, register(self, layer)))

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What a GradScaler asks before it steps: here it learns that it came too late."""
        if self._in_backward:
            raise ValueError(
                "fuse_into_backward and a GradScaler exclude each other: tables moved by gradients that were "
                "still scaled. Leave one of them out"
            )
        return False

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
        check_table(p, self.state.get(p, {}), group)
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
        check_options(self.defaults | param_group)
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_in_backward", [])  # a copy has layers of its own, or none
        for group in self.param_groups:  # such as those saved by torch's AdamW
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See `torch.optim.Optimizer.load_state_dict`; the state keeps its dtypes.

        States of torch's AdamW are taken, too.

        Raises:
            ValueError: a state that does not fit its parameter: shapes, dtypes, steps that a row or the
                parameter cannot have taken, something missing. Nothing has changed then.
        """
        fitted: dict[Any, dict[str, Any]] = {}

        def take_state(_: Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            states = fitted_states(self.param_groups, self.defaults, loaded)
            indices = chain.from_iterable(group["params"] for group in loaded["param_groups"])
            params = chain.from_iterable(group["params"] for group in self.param_groups)
            by_index = dict(zip(indices, params, strict=False))  # torch refuses another number, after this
            fitted.update({by_index.get(index, index): state for index, state in states.items()})
            return loaded | {"state": {}}

        def put_state(_: Optimizer) -> None:
            self.state.update(fitted)

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
        merged: dict[Tensor, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state.get(p, {})
                if is_sparse(p.grad):
                    check_form(p.grad)
                    merged[p] = merge_rows(p.grad._indices()[0], len(p))
                    check_table(p, state, group, merged[p][0])
                else:
                    check_dense(p, state)
        for p, in_backward in self._in_backward:
            if p.grad is not None:
                raise ValueError("a gradient came for a table that steps in backward: what made it?")
            in_backward.taken = False
        index = 0
        for group in self.param_groups:
            dense = []
            for p in group["params"]:
                if p.grad is not None and is_sparse(p.grad):
                    self._sparse_step(p, group, index, *merged.pop(p))
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
                state = self.state.get(p, {})
                if has_rows(state):
                    check_state(p, state)
                    self._flush(p, group, index)
                index += 1

    def _flush(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        step = int(self.state[p]["step"])
        if step > 0:
            self._run(p, group, index, step, None, None, None, None)

    def _forget_rows(self, p: Tensor, group: dict[str, Any], index: int) -> None:
        """A state of rows becomes that of torch's AdamW."""
        if has_rows(self.state.get(p, {})):
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
            for name in ("exp_avg", "exp_avg_sq"):  # as torch does on loading, for parameters of other dtypes
                self.state[p][name] = self.state[p][name].to(p.dtype)
        one_pass = [p for p in params if _in_one_pass(p, self.state[p])]
        others = [p for p in params if not _in_one_pass(p, self.state[p])]
        for some, fused in ((one_pass, True), (others, None)):
            if not some:
                continue
            states = [self.state[p] for p in some]
            beta1, beta2 = group["betas"]
            adamw(
                some,
                [p.grad for p in some if p.grad is not None],
                [state["exp_avg"] for state in states],
                [state["exp_avg_sq"] for state in states],
                [],
                [state["step"] for state in states],
                has_complex=any(torch.is_complex(p) for p in some),
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
                fused=fused,
            )

    def _sparse_step(
        self,
        p: Tensor,
        group: dict[str, Any],
        index: int,
        rows: Tensor,
        places: Tensor | None,
        starts: Tensor | None,
    ) -> None:
        assert p.grad is not None
        step = self._next_step(p, group)
        if len(rows):
            self._run(p, group, index, step, rows, p.grad._values(), places, starts)

    def _next_step(self, p: Tensor, group: dict[str, Any]) -> int:
        state = self.state[p]
        if not has_rows(state):
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
        table, exp_avg, exp_avg_sq = of_rows(p, state)
        backend = resolve_backend("auto", p.device.type)
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


def _in_one_pass(p: Tensor, state: dict[str, Any]) -> bool:
    """Whether torch's fused AdamW is right for a parameter: it reads all tensors in the order of memory.

    A gradient that a user assigns may be laid out otherwise, or repeat one number.
    """
    if p.device.type != "cpu" or not p.is_floating_point() or p.grad is None:
        return False
    tensors = (p.grad, state["exp_avg"], state["exp_avg_sq"])
    if p.is_contiguous():
        return all(t.is_contiguous() for t in tensors)
    dense = torch.ops.aten.is_non_overlapping_and_dense.default(p)
    return dense and all(t.stride() == p.stride() for t in tensors)
