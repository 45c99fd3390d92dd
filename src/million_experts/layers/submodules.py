"""How a layer calls its submodules: as modules, whatever somebody has made of them.

Others wrap, hook, offload, quantise or parametrise a submodule, and all of that happens when it is called. A
layer reads a submodule's tensors past it only where `is_plain` says that a call would do nothing else.
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from million_experts.ops.checks import autocast_is_on

_COMPUTED_IN = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of this class, and a call of it is its `forward` and nothing else."""
    return type(module) is kind and not (
        "forward" in module.__dict__
        or module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or _has_any_global_hook()
    )


def call(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), with x in the dtype that the module's weights have; under autocast PyTorch sees to that."""
    if not autocast_is_on(x):
        dtypes = (p.dtype for p in module.parameters())
        x = x.to(next((dtype for dtype in dtypes if dtype in _COMPUTED_IN), x.dtype))
    return module(x)
