"""Says what trains a table whose gradient comes as rows, where programs would fail on it without a reason.

PyTorch has no norm of a sparse gradient, most of its optimisers take none, and DistributedDataParallel and
`fully_shard` do not exchange one. A loop that does not know `sparse_grad=True` meets one of them before its
first step.
"""

import sys
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, Adagrad, Optimizer, SparseAdam
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

_ADVICE = (
    "train with million_experts.lm.trainer.LanguageModelTrainer in place of transformers' Trainer; in a loop "
    "of your own with RowwiseAdamW and clip_grad_norm_ of million_experts.optim; or with sparse_grad=False"
)
_TAKE_ROWS = (SparseAdam, SGD, Adagrad, LBFGS)

#: Tables that have been promised a sparse gradient.
_tables: MutableMapping[Tensor, None] = WeakIdKeyDictionary()
_refusals: dict[str, torch.library.Library] = {}  # what is registered with PyTorch, once there is a table


def expect_row_gradient(table: Tensor) -> None:
    """To be called where a forward pass will give a table a sparse gradient.

    Raises:
        ValueError: DistributedDataParallel would have to exchange it.
    """
    if (
        torch.compiler.is_compiling() or type(table) is not nn.Parameter
    ):  # traced, or computed from another tensor
        return
    if not _refusals:
        register_optimizer_step_pre_hook(_refuse_optimizer)
        # A norm is what loops that clip gradients ask for first.
        _refuse("aten::linalg_vector_norm", "PyTorch has no norm of a sparse tensor")
    sharding = "torch.distributed.fsdp" in sys.modules
    if sharding and "fsdp::chunk_cat" not in _refusals and hasattr(torch.ops.fsdp, "chunk_cat"):
        _refuse("fsdp::chunk_cat", "fully_shard does not exchange sparse gradients")
    _tables[table] = None
    wrapper = DistributedDataParallel._active_ddp_module
    if wrapper is not None and any(p is table for p in wrapper._module_parameters):
        raise ValueError(
            "DistributedDataParallel cannot exchange the gradient of a layer with sparse_grad=True: before "
            "the model is wrapped call take_tables_from_ddp(model) of million_experts.distributed, and in "
            f"each step exchange_row_gradients(model); or {_ADVICE}"
        )


def _refuse(operation: str, reason: str) -> None:
    """Puts a reason where PyTorch has no kernel for sparse tensors."""

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise NotImplementedError(
            f"{reason}. If it is the gradient of a layer with sparse_grad=True: {_ADVICE}"
        )

    namespace, _, name = operation.partition("::")
    library = torch.library.Library(namespace, "IMPL")
    for key in ("SparseCPU", "SparseCUDA"):
        library.impl(name, refuse, key)
    _refusals[operation] = library


def _refuse_optimizer(optimizer: Optimizer, *_: Any) -> None:
    """Before a step of any optimiser: whether it is one of PyTorch's that take no sparse gradient."""
    if isinstance(optimizer, _TAKE_ROWS) or not type(optimizer).__module__.startswith("torch.optim"):
        return
    waiting = {id(table) for table in _tables if table.grad is not None and table.grad.is_sparse}
    if waiting and any(id(p) in waiting for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"{type(optimizer).__name__} does not take the gradient of a layer with sparse_grad=True: "
            + _ADVICE
        )
