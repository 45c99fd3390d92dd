"""The operations under torch.func and in forward mode: the right numbers, or a sentence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from million_experts.ops import expert_mlp, masked_batch_norm, product_key_topk

T, D, H, K, N = 4, 6, 2, 3, 20
Function = Callable[..., Tensor]


def retrieval(backend: str) -> tuple[Function, tuple[Tensor, ...]]:
    """The scores, as a function of query and keys."""
    inputs = torch.randn(T, H, 2, D), torch.randn(5, D), torch.randn(4, D)
    return lambda *inputs: product_key_topk(*inputs, K, backend)[0], inputs


def experts(
    backend: str, mask: Tensor | None = None, glu: bool = False
) -> tuple[Function, tuple[Tensor, ...]]:
    """The output, as a function of tokens, gates and table."""
    picks = torch.randint(0, N, (T, K))
    inputs = torch.randn(T, D), torch.rand(T, K), torch.randn(N, 3 if glu else 2, D)

    def run(x: Tensor, gates: Tensor, table: Tensor) -> Tensor:
        return expert_mlp(x, picks, gates, table, "gelu", backend, mask=mask)

    return run, inputs


def norm(backend: str, mask: Tensor | None = None) -> tuple[Function, tuple[Tensor, ...]]:
    inputs = torch.randn(T, D), torch.randn(D), torch.randn(D)
    return lambda x, *weights: masked_batch_norm(x, mask, *weights, 1e-3, backend)[0], inputs


MASK = torch.tensor([True, False, True, True])
CASES = {
    "product_key_topk": retrieval,
    "expert_mlp": experts,
    "expert_mlp with GLU": lambda backend: experts(backend, glu=True),
    "expert_mlp of a mask": lambda backend: experts(backend, MASK),
    "masked_batch_norm": norm,
    "masked_batch_norm of a mask": lambda backend: norm(backend, MASK),
}
case = pytest.fixture(params=CASES)(lambda request: request.param)


@pytest.fixture
def function_and_inputs(case, backend) -> tuple[Function, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    return CASES[case](backend)


def scalar(function: Function) -> Function:
    weights = torch.randn(T * H * K * D, generator=torch.Generator().manual_seed(1))

    def weighted(*inputs: Tensor) -> Tensor:
        y = function(*inputs)
        return (y.flatten() * weights[: y.numel()]).sum()

    return weighted


def gradients(function: Function, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in inputs]
    return torch.autograd.grad(function(*leaves), leaves)


def dual(function: Function, x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x))).tangent


FORWARD_MODE = {
    "jvp": lambda function, x: jvp(function, (x,), (x,)),
    "jvp without gradients": torch.no_grad()(lambda function, x: jvp(function, (x,), (x,))),
    "jacfwd": lambda function, x: jacfwd(function)(x),
    "linearize": lambda function, x: linearize(function, x)[1](x),
    "hessian": lambda function, x: hessian(lambda x: function(x).sum())(x),
    "forward over reverse": lambda function, x: jvp(grad(lambda x: function(x).sum()), (x,), (x,)),
    "jvp of a batch": lambda function, x: jvp(vmap(function), (x[None],), (x[None],)),
    "batch of jvp": lambda function, x: vmap(lambda x: jvp(function, (x,), (x,)))(x[None]),
    "dual numbers": dual,
    "dual numbers without gradients": torch.no_grad()(dual),
    "dual numbers in a graph": lambda function, x: dual(function, x.clone().requires_grad_()),
}


@pytest.mark.parametrize("how", FORWARD_MODE)
def test_forward_mode_is_refused(how, case, function_and_inputs):
    function, inputs = function_and_inputs
    for i, x in enumerate(inputs):  # a tangent of any argument

        def of_one(x: Tensor, i: int = i) -> Tensor:
            return function(*inputs[:i], x, *inputs[i + 1 :])

        with pytest.raises(NotImplementedError, match=rf"{case.split()[0]} has no forward-mode derivative"):
            FORWARD_MODE[how](of_one, x)


def test_reverse_mode_gives_the_same_numbers(function_and_inputs):
    function, inputs = function_and_inputs
    loss, every = scalar(function), tuple(range(len(inputs)))
    expected = gradients(loss, inputs)
    for transformed in (
        grad(loss, every)(*inputs),
        jacrev(loss, every)(*inputs),
        vjp(loss, *inputs)[1](torch.ones(())),
    ):
        for actual, right in zip(transformed, expected, strict=True):
            assert torch.equal(actual, right)


def test_a_batch_gives_the_numbers_of_its_elements(function_and_inputs):
    function, inputs = function_and_inputs
    loss, every = scalar(function), tuple(range(len(inputs)))
    batch = tuple(torch.stack([t, t * 2 + 0.1, t - 0.3], 1) for t in inputs)
    elements = [tuple(t[:, i] for t in batch) for i in range(3)]
    assert torch.equal(vmap(function, 1)(*batch), torch.stack([function(*inputs) for inputs in elements]))
    for shared in (None, *every):  # one argument is the same for all
        dims = tuple(None if i == shared else 1 for i in every)
        mixed = tuple(inputs[i] if i == shared else batch[i] for i in every)
        actual = vmap(grad(loss, every), dims)(*mixed)
        for i, element in enumerate(elements):
            element = tuple(inputs[n] if n == shared else t for n, t in enumerate(element))
            for a, b in zip(actual, gradients(loss, element), strict=True):
                assert torch.equal(a[i], b)


def test_levels_underneath_get_their_gradient(function_and_inputs):
    function, (x, *others) = function_and_inputs
    loss = scalar(function)
    others = [t.clone().requires_grad_() for t in others]
    value, _ = vjp(lambda x: loss(x, *others), x)
    outer = torch.autograd.grad(value, others)
    for actual, right in zip(outer, gradients(loss, (x, *others))[1:], strict=True):
        assert torch.equal(actual, right)
    nested = grad(lambda second: vjp(lambda x: loss(x, second, *others[1:]), x)[0])(others[0].detach())
    assert torch.equal(nested, outer[0])


@pytest.mark.parametrize("outer", [grad, jacrev])
def test_a_second_derivative_is_refused(outer, case, function_and_inputs):
    function, (x, *others) = function_and_inputs
    first = grad(lambda x: function(x, *others).square().sum())
    with pytest.raises(RuntimeError, match=rf"{case.split()[0]} has no second derivative"):
        outer(lambda x: first(x).sum())(x)


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_of_each_element_and_sparse_tables(sparse, backend):
    torch.manual_seed(0)
    x, table, picks = torch.randn(3, T, D), torch.randn(N, 2, D), torch.randint(0, N, (3, T, K))
    gates = torch.rand(T, K)

    def loss(table: Tensor, x: Tensor, picks: Tensor) -> Tensor:
        return expert_mlp(x, picks, gates, table, backend=backend, sparse_grad=sparse).square().sum()

    expected = torch.stack(
        [gradients(lambda t, i=i: loss(t, x[i], picks[i]), (table,))[0].to_dense() for i in range(3)]
    )
    one = grad(loss)(table, x[0], picks[0])
    assert one.is_sparse == sparse
    assert torch.equal(one.to_dense(), expected[0])
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        jvp(lambda table: loss(table, x[0], picks[0]), (table,), (table,))
    per_element = vmap(grad(loss), (None, 0, 0))
    if not sparse:
        assert torch.equal(per_element(table, x, picks), expected)
        return
    with pytest.raises((ValueError, RuntimeError), match="sparse"):
        per_element(table, x, picks)


def test_compiled_transforms(function_and_inputs):
    function, inputs = function_and_inputs
    loss = scalar(function)
    torch._dynamo.reset()
    compiled = torch.compile(grad(loss), backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*inputs), gradients(loss, inputs)[0])


def test_the_operations_themselves_are_guarded(backend):
    """Whoever calls them past the public functions gets the same answers."""
    operations = torch.ops.million_experts
    x, table, picks = torch.randn(T, D), torch.randn(N, 2, D), torch.randint(0, N, (T, K))

    def run(x: Tensor) -> Tensor:
        return operations.expert_mlp(x, picks, torch.ones(T, K), table, None, "gelu", backend)[0]

    with pytest.raises(NotImplementedError, match="expert_mlp has no forward-mode derivative"):
        jvp(run, (x,), (x,))
    assert torch.equal(grad(lambda x: run(x).sum())(x), gradients(lambda x: run(x).sum(), (x,))[0])
