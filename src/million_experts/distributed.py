"""Data parallel training: what DistributedDataParallel does not do for expert tables and query statistics.

Under `torchrun`, before the model is wrapped:

    take_tables_from_ddp(model)        # DDP refuses sparse gradients; from now on they are exchanged below
    synchronise_query_norm(model)      # BatchNorm of queries over the tokens of all ranks
    model = DistributedDataParallel(model)

and in each step, after the last `backward()` and before the gradients are clipped or used:

    exchange_row_gradients(model)

`million-experts train` and `LanguageModelTrainer` do all of it.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from million_experts.layers import MaskedBatchNorm, ProductKeyRetrieval
from million_experts.optim.clip import merge_repeated_rows

Group = dist.ProcessGroup | None


def take_tables_from_ddp(model: nn.Module, group: Group = None) -> int:
    """Makes DistributedDataParallel leave the tables with sparse gradients alone; returns how many there are.

    DDP can reduce sparse gradients of `nn.Embedding` only, and NCCL none. The tables of rank 0 are sent to
    the other ranks, as DDP does with the rest of the model.

    Args:
        model: not wrapped yet.
        group: the ranks that train together; all of them by default.
    """
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    tables = dict(_row_tables(model))
    own = {id(table) for table in tables.values()}
    # DDP asks for a shared parameter by each of its names.
    every_name = model.named_parameters(remove_duplicate=False)
    names = {name for name, parameter in every_name if id(parameter) in own}
    # It calls a parameter of the model itself "experts" in one place and ".experts" in another.
    names |= {f".{name}" for name in names if "." not in name}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, sorted(ignored | names))
    for table in tables.values():
        dist.broadcast(table.detach(), group_src=0, group=group)
    return len(tables)


@torch.no_grad()
def exchange_row_gradients(model: nn.Module, group: Group = None) -> None:
    """Gives every rank the mean over the ranks of each table's sparse gradient.

    Call it on all ranks, once a step, when the gradients of all micro-batches are there. What is sent are
    the rows that a rank's tokens touched, each once, by all-gather, which every back end has. A rank may have
    none, or no gradient at all. All ranks end with the same bits: rows ascend, and those of several ranks
    are summed in the order of the ranks.

    Args:
        model: the model, wrapped or not.
        group: the ranks that train together; all of them by default.

    Raises:
        ValueError: the gradient of a table with `sparse_grad=True` is dense.
    """
    world = dist.get_world_size(group)
    for name, table in _row_tables(model):
        grad = table.grad
        if grad is not None and not grad.is_sparse:
            raise ValueError(f"the gradient of {name} must be sparse, got a dense one")
        if grad is not None and not grad.is_coalesced():
            grad = merge_repeated_rows(grad)
        rows = table.new_empty(0, dtype=torch.int64) if grad is None else grad._indices()[0]
        values = table.new_empty(0, *table.shape[1:]) if grad is None else grad._values()
        # A rank without a gradient differs from one without a row where no rank has any: then nobody steps.
        here = torch.tensor([len(rows), grad is not None], device=table.device)
        counts = torch.stack(_gather(here, world, group)).tolist()
        if not any(has_gradient for _, has_gradient in counts):
            continue
        longest = max(count for count, _ in counts)
        all_rows = _gather(_padded(rows, longest), world, group)
        all_values = _gather(_padded(values, longest), world, group)
        lengths = [count for count, _ in counts]
        gathered = torch.sparse_coo_tensor(
            torch.cat([part[:n] for part, n in zip(all_rows, lengths, strict=True)])[None],
            torch.cat([part[:n] for part, n in zip(all_values, lengths, strict=True)]),
            table.shape,
            check_invariants=False,
        )
        del all_rows, all_values
        table.grad = merge_repeated_rows(gathered)
        table.grad._values().div_(world)


def synchronise_query_norm(model: nn.Module, group: Group = None) -> int:
    """Makes query BatchNorm take the statistics of all ranks' real tokens in training; returns how many.

    Then the number of ranks does not matter to what a step computes, and a rank may have no real token. All
    ranks have to run each layer equally often, as with `nn.SyncBatchNorm`.

    Args:
        model: whose `PEER` and other retrieval layers have `query_norm="batch"`.
        group: the ranks that train together; all of them by default.
    """
    norms = [module for module in model.modules() if isinstance(module, MaskedBatchNorm)]
    for norm in norms:
        norm.synchronise(group)
    return len(norms)


def _row_tables(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and tables of the layers that train theirs by sparse gradients; a shared table comes once."""
    tables = {
        id(module.table)
        for module in model.modules()
        if isinstance(module, ProductKeyRetrieval) and module.sparse_grad
    }
    for name, parameter in model.named_parameters():
        if id(parameter) in tables and parameter.requires_grad:
            yield name, parameter


def _gather(tensor: Tensor, world: int, group: Group) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return parts


def _padded(tensor: Tensor, length: int) -> Tensor:
    padded = tensor.new_zeros(length, *tensor.shape[1:])
    padded[: len(tensor)] = tensor
    return padded
