"""How operations become known to PyTorch: schema, kernel, fake, derivative, and their part in `torch.func`.

`library.py` and `library_layer.py` say what is registered.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _AutoDispatchBelowAutograd as below_autograd
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import Function, forward_ad

from million_experts.ops.checks import autocast_is_on, check_stored, check_tensors

LIBRARY = torch.library.Library("million_experts", "DEF")

_NO_FORWARD_MODE = (
    "{} has no forward-mode derivative: torch.func.jvp, jacfwd, hessian and linearize, and dual numbers are "
    "not supported; use reverse mode: backward, torch.func.grad, vjp or jacrev"
)
_NO_SECOND = (
    "{} has no second derivative: double backward is not supported; call backward without create_graph=True"
)


def define(name: str, schema: str, kernel, fake, tags: tuple[torch.Tag, ...] = ()) -> None:
    """Registers an operation: `kernel` computes it, `fake` gives its outputs' shapes."""
    LIBRARY.define(f"{name}{schema}", tags=(torch.Tag.pt2_compliant_tag, *tags))
    arguments = [argument.split() for argument in schema[1 : schema.index(")")].split(",")]
    types = {names[0].split("=")[0]: type_ for type_, *names in arguments}
    LIBRARY.impl(name, _guarded(kernel, types), "CompositeExplicitAutograd")
    torch.library.register_fake(f"million_experts::{name}", fake, lib=LIBRARY)
    torch.library.register_vmap(f"million_experts::{name}", _one_by_one(name), lib=LIBRARY)


def _guarded(kernel, types: dict[str, str]):
    """The kernel, for tensors whose memory is there, and without autocast.

    Autocast would narrow the sums that are promised in float32.
    """

    def run(first: Tensor, *others):
        given = dict(zip(types, (first, *others), strict=False))
        # PyTorch itself takes None for a tensor.
        check_tensors(**{name: given[name] for name in given if types[name] == "Tensor"})
        check_stored(**given)
        if not autocast_is_on(first):
            return kernel(first, *others)
        with torch.autocast(first.device.type, enabled=False):
            return kernel(first, *others)

    return run


def _one_by_one(name: str) -> Callable[..., Any]:
    """The rule for `torch.func.vmap`: the operation for each element of the batch, results stacked."""

    def rule(info, in_dims, *arguments):
        operation = getattr(torch.ops.million_experts, name)
        results = [
            operation(*(_element(a, dim, i) for a, dim in zip(arguments, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(results[0], Tensor):
            return _stacked(name, results), 0
        stacked = tuple(_stacked(name, parts) for parts in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    return rule


def _element(argument: Any, dim: Any, i: int) -> Any:
    if isinstance(argument, list | tuple):
        dims = dim if isinstance(dim, list | tuple) else [dim] * len(argument)
        return [_element(a, d, i) for a, d in zip(argument, dims, strict=True)]
    return argument if dim is None else argument.select(dim, i)


def _stacked(name: str, parts: Any) -> Tensor:
    if any(part.shape != parts[0].shape for part in parts):
        raise ValueError(
            f"torch.func.vmap of {name}: elements of a batch touch different numbers of experts; use "
            "sparse_grad=False"
        )
    return torch.stack(tuple(parts))


def forward_mode_is_on() -> bool:
    """Whether tensors may carry a tangent now."""
    return forward_ad._current_level >= 0


def register_autograd(
    name: str,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> None:
    """Registers an operation's derivative; without a `backward`, that it has none.

    `torch.library.register_autograd` drops tangents silently and knows nothing of `torch.func`, whose
    transforms nest: each level is one pass through the kernel below, which adds that level's node and leaves
    the levels under it to the dispatcher.
    """
    operation = getattr(torch.ops.million_experts, name).default
    public = name.removesuffix("_backward").removesuffix("_touched")
    arguments = operation._schema.arguments

    class Node(Function):
        @staticmethod
        def forward(ctx, *inputs_and_keys):
            *inputs, keyset = inputs_and_keys
            # PyTorch switches derivatives off in here; the levels underneath have some of their own.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True), below_autograd():
                output = operation.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
            if setup_context is not None:
                setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            if backward is None:
                raise RuntimeError(_NO_SECOND.format(public))
            return (*backward(ctx, *grads), None)

    def kernel(keyset, *inputs):
        if forward_mode_is_on():
            _refuse_tangents(public, inputs)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)):
            with below_autograd():
                return operation.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
        # The dispatcher leaves out arguments that have their default value.
        inputs += tuple(argument.default_value for argument in arguments[len(inputs) :])
        if not torch._C._are_functorch_transforms_active():
            return Node.apply(*inputs, keyset)
        with enable_single_level_autograd_function():
            return super(Function, Node).apply(*inputs, keyset)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _refuse_tangents(name: str, inputs: tuple[Any, ...]) -> None:
    for argument in inputs:
        if isinstance(argument, list | tuple):
            _refuse_tangents(name, tuple(argument))
        elif isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(_NO_FORWARD_MODE.format(name))
