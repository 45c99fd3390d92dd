"""When the running statistics of MaskedBatchNorm move, and what PyTorch's tools for BatchNorm do with it."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from million_experts import PEER, ExpertUsage
from million_experts.layers import MaskedBatchNorm

X = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))


def make_norm(compiled: bool = False) -> nn.Module:
    """A linear layer and the norm; compiled in place if wanted."""

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.norm = nn.Linear(6, 4), MaskedBatchNorm(4)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.norm(self.proj(x), mask).sin()

    torch.manual_seed(1)
    module = Normed()
    if compiled:
        torch._dynamo.reset()
        module.compile(backend="aot_eager", fullgraph=True)
    return module


def in_hook(module: nn.Module, x: Tensor) -> Tensor:
    y = x * 2

    def forward_pass(grad: Tensor) -> None:
        module(X)

    y.register_hook(forward_pass)
    return y


def in_hook_of_reentrant_backward(module: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(
        lambda x: in_hook(module, x) if torch.is_grad_enabled() else x * 2, x, use_reentrant=True
    )


def checkpointed_in_hook(module: nn.Module, x: Tensor) -> Tensor:
    y = x * 2

    def step(grad: Tensor) -> None:
        with torch.enable_grad():
            checkpoint(module, X, use_reentrant=False).sum().backward()

    y.register_hook(step)
    return y


def saved_tensor_read_outside_backward(module: nn.Module, x: Tensor) -> Tensor:
    y = checkpoint(lambda x: module(x).square(), x, use_reentrant=False)
    assert y.grad_fn._saved_self is not None
    return y


def recomputed_by_a_function_of_another_library(module: nn.Module, x: Tensor) -> Tensor:
    class Recompute(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return module(x)

        @staticmethod
        def backward(ctx, grad):
            x = ctx.saved_tensors[0].detach().requires_grad_()
            with torch.enable_grad():
                module(x).backward(grad)
            return x.grad

    return Recompute.apply(x)


def selective(module: nn.Module, x: Tensor) -> Tensor:
    def policy(ctx, operation, *args, **kwargs) -> CheckpointPolicy:
        saved = "addmm" in str(operation)
        return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return checkpoint(module, x, use_reentrant=False, context_fn=contexts)


def nested(outer: bool, inner: bool):
    def run(module: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda x: checkpoint(module, x, use_reentrant=inner) * 2, x, use_reentrant=outer)

    return run


FORWARD_PASSES = {
    "plain": lambda module, x: module(x),
    "reentrant": lambda module, x: checkpoint(module, x, use_reentrant=True),
    "not reentrant": lambda module, x: checkpoint(module, x, use_reentrant=False),
    "to the end": lambda module, x: checkpoint(module, x, use_reentrant=False, early_stop=False),
    "selective": selective,
    **{f"nested {outer} {inner}": nested(outer, inner) for outer in (True, False) for inner in (True, False)},
    "another library's": recomputed_by_a_function_of_another_library,
    "read outside backward": saved_tensor_read_outside_backward,
    "in a hook": in_hook,
    "in a hook of a reentrant backward": in_hook_of_reentrant_backward,
    "checkpointed in a hook": checkpointed_in_hook,
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", FORWARD_PASSES)
def test_a_forward_pass_counts_once(name, compiled):
    module, once = make_norm(compiled), make_norm()
    once(X)
    FORWARD_PASSES[name](module, X.clone().requires_grad_()).square().sum().backward()
    assert module.norm.num_batches_tracked == 1
    torch.testing.assert_close(module.norm.running_mean, once.norm.running_mean)
    torch.testing.assert_close(module.norm.running_var, once.norm.running_var)


def test_a_checkpoint_inside_a_compiled_function_counts_once():
    module = make_norm()
    torch._dynamo.reset()
    run = torch.compile(
        lambda x: checkpoint(module, x, use_reentrant=False).sin(), backend="aot_eager", fullgraph=True
    )
    run(X.clone().requires_grad_()).sum().backward()
    assert module.norm.num_batches_tracked == 1


def test_two_checkpointed_passes_count_twice():
    module = make_norm()
    x = X.clone().requires_grad_()
    (checkpoint(module, x, use_reentrant=False) + checkpoint(module, x, use_reentrant=False)).sum().backward()
    assert module.norm.num_batches_tracked == 2


def test_usage_leaves_repeated_forward_passes_out():
    layer = PEER(6, 16, 2, 2, 4)
    with ExpertUsage(layer) as usage:
        checkpoint(layer, X.clone().requires_grad_(), use_reentrant=False).sum().backward()
    assert usage.tokens == len(X)


@pytest.mark.parametrize("compiled", [False, True])
def test_momentum_none_is_the_mean_over_all_batches(compiled, assert_close):
    mine, theirs = MaskedBatchNorm(6, momentum=None), nn.BatchNorm1d(6, momentum=None)
    if compiled:
        torch._dynamo.reset()
        mine.compile(backend="aot_eager", fullgraph=True)
    mask = torch.arange(20) % 3 > 0
    for batch in range(4):
        x = X * (batch + 1) + batch
        mine(x, mask)
        theirs(x[mask])
    assert mine.num_batches_tracked == 4
    assert_close(mine.running_mean, theirs.running_mean)
    assert_close(mine.running_var, theirs.running_var)


def test_update_bn_takes_the_mean_over_the_loader(assert_close):
    layer = PEER(6, 16, 2, 2, 4)
    layer.query_norm.running_mean.fill_(7)
    theirs = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8))
    theirs[0].weight = layer.query_proj.weight
    loader = [X, 2 * X + 1, X.square()]
    update_bn(loader, layer.eval())
    update_bn(loader, theirs)
    assert layer.query_norm.momentum == 0.1
    assert not layer.query_norm.training
    assert layer.query_norm.num_batches_tracked == 3
    assert_close(layer.query_norm.running_mean, theirs[1].running_mean)
    assert_close(layer.query_norm.running_var, theirs[1].running_var)


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics_the_batch_decides(training, assert_close):
    mine, theirs = (nn.Sequential(kind(6)) for kind in (MaskedBatchNorm, nn.BatchNorm1d))
    for module in (mine, theirs):
        torch.func.replace_all_batch_norm_modules_(module)
        module.train(training)
    assert mine[0].running_mean is None
    assert_close(mine.double()(X.double()), theirs.double()(X.double()))
    mine.half()
    assert mine[0](X[:0]).shape == (0, 6)


def test_sync_batch_norm_synchronises_the_norm_of_a_layer():
    layer = PEER(6, 16, 2, 2, 4)
    model = nn.Sequential(layer, nn.BatchNorm1d(6))
    own = layer.query_norm
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert converted[0].query_norm is own
    assert own.synchronised
    assert isinstance(converted[1], nn.SyncBatchNorm)
    assert converted[0](X).shape == X.shape


def test_is_a_batch_norm_whose_statistics_stay_wide():
    torch.set_default_dtype(torch.bfloat16)
    try:
        norm = MaskedBatchNorm(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    assert norm.weight.dtype == torch.bfloat16
    assert norm.running_mean.dtype == norm.running_var.dtype == torch.float32
    assert list(norm.state_dict()) == list(nn.BatchNorm1d(3).state_dict())
