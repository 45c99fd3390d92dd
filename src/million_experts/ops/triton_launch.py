"""What launching a Triton kernel takes, for all of them."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton
from torch import Tensor

#: Kernels run on the CPU, in Triton's interpreter: TRITON_INTERPRET=1 was set before they were defined.
INTERPRETED: bool = triton.knobs.runtime.interpret


def tuned(
    configs: list[triton.Config],
    key: list[str],
    usable: Callable[..., list[triton.Config]] | None = None,
) -> Callable[[Any], Any]:
    """Tries the configurations out when a kernel first meets such shapes; the interpreter takes the first.

    Args:
        usable: gives those that fit every target, for the configurations, the arguments by name and, as
            keywords, the constants.
    """
    prune = None if usable is None else {"early_config_prune": usable}
    return triton.autotune(configs[:1] if INTERPRETED else configs, key, prune_configs_by=prune)


@contextlib.contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """Kernels are launched on the device of their tensors, which need not be the current one."""
    with torch.cuda.device_of(tensor):
        yield


def registers() -> dict[str, int]:
    """Option of a launch: as many registers as a kernel needs.

    By itself NVIDIA's assembler spills a few of 130 to fit one more block on a processor. AMD's has no such
    option.
    """
    if INTERPRETED or triton.runtime.driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": 255}
