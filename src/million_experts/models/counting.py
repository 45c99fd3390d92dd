"""How many parameters a model has, how many work on a token, and what memory they take."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from million_experts.layers import MixtureOfExperts, ProductKeyRetrieval

if TYPE_CHECKING:
    from .configuration import PeerConfig

__all__ = ["MemoryEstimate", "ParameterCount", "count_parameters", "memory_estimate"]


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: all parameters, a tied one counted once.
        active: those that take part for one token. Of a table only the rows that a token retrieves (once
            for each layer, where layers share a table), of full-size experts only those that work on it, on
            average; everything else in full, embeddings too, as is usual for mixtures of experts.
        tables: those in tables whose rows are retrieved: PEER's experts, the values of memories.
        embeddings: those in the token embeddings and in the output layer, counted once when tied.
    """

    total: int
    active: int
    tables: int
    embeddings: int

    @property
    def label(self) -> str:
        """A short name: `540M-A12M` has 540 million parameters, of which 12 million are active."""
        return f"{_short(self.total)}-A{_short(self.active)}"

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a model's state, without activations. `table_*` are those of tables of experts or values.

    Gradients and AdamW's two moments are counted for trainable parameters, in the parameter's dtype.
    """

    table_weights: int
    table_gradients: int
    table_optimizer: int
    other_weights: int
    other_gradients: int
    other_optimizer: int

    @property
    def inference(self) -> int:
        """Bytes of the weights and buffers."""
        return self.table_weights + self.other_weights

    @property
    def training_adds(self) -> int:
        """Bytes that training adds to the weights: gradients and optimizer state."""
        return self.table_gradients + self.table_optimizer + self.other_gradients + self.other_optimizer

    @property
    def training(self) -> int:
        """Bytes of weights, gradients and optimizer state."""
        return self.inference + self.training_adds


def count_parameters(model_or_config: nn.Module | PeerConfig) -> ParameterCount:
    """Count the parameters of a model, or of the `PeerForCausalLM` that a configuration describes.

    The latter is built on the meta device, so that no memory is taken.
    """
    model = as_model(model_or_config)
    total = sum(p.numel() for p in model.parameters())
    chosen = list(_chosen(model))
    sparse = {id(parameter): parameter.numel() for parameter, _ in chosen}
    at_work = sum(parameter[0].numel() * slices for parameter, slices in chosen)
    return ParameterCount(
        total=total,
        active=total - sum(sparse.values()) + round(at_work),
        tables=sum(table.numel() for table in _tables(model)),
        embeddings=sum(p.numel() for p in _embeddings(model)),
    )


def memory_estimate(
    model_or_config: nn.Module | PeerConfig, dtype: torch.dtype | None = None
) -> MemoryEstimate:
    """Estimate the bytes of weights, gradients and AdamW state.

    Args:
        model_or_config: a model, or the configuration of a `PeerForCausalLM`.
        dtype: dtype of the parameters; None takes each parameter's own.
    """
    model = as_model(model_or_config)
    tables = {id(table) for table in _tables(model)}
    sizes = dict.fromkeys(MemoryEstimate.__dataclass_fields__, 0)
    for parameter in model.parameters():
        prefix = "table" if id(parameter) in tables else "other"
        element = parameter.element_size() if dtype is None else dtype.itemsize
        size = parameter.numel() * element
        sizes[f"{prefix}_weights"] += size
        if parameter.requires_grad:
            sizes[f"{prefix}_gradients"] += size
            sizes[f"{prefix}_optimizer"] += 2 * size
    sizes["other_weights"] += sum(b.numel() * b.element_size() for b in model.buffers())
    return MemoryEstimate(**sizes)


def describe(model: nn.Module) -> str:
    """One line: the model's class, its label, and the memory that it takes."""
    memory = memory_estimate(model)
    tables, others = _bytes(memory.table_weights), _bytes(memory.other_weights)
    gradients = memory.table_gradients + memory.other_gradients
    moments = memory.table_optimizer + memory.other_optimizer
    return (
        f"{type(model).__name__} {count_parameters(model).label}: tables {tables}, other weights {others}; "
        f"training adds gradients {_bytes(gradients)}, AdamW state {_bytes(moments)}"
    )


def as_model(model_or_config: nn.Module | PeerConfig) -> nn.Module:
    """The model, or that of a configuration on the meta device, where it takes no memory."""
    if isinstance(model_or_config, nn.Module):
        return model_or_config
    from .modeling import PeerForCausalLM

    config = copy.deepcopy(model_or_config)  # a model notes its choice of attention in its configuration
    with torch.device("meta"):
        return PeerForCausalLM(config)


def _tables(model: nn.Module) -> list[nn.Parameter]:
    """The tables whose rows are retrieved, a shared one once."""
    tables = [m.table for m in model.modules() if isinstance(m, ProductKeyRetrieval)]
    return list({id(table): table for table in tables}.values())


def _chosen(model: nn.Module) -> Iterator[tuple[nn.Parameter, float]]:
    """The parameters of which a token chooses slices of the first dimension, and how many in each layer."""
    for module in model.modules():
        if isinstance(module, ProductKeyRetrieval):
            yield module.table, module.num_heads * module.experts_per_head
        elif isinstance(module, MixtureOfExperts):
            for weight in module.expert_weights:
                yield weight, module.active_experts


def _embeddings(model: nn.Module) -> list[nn.Parameter]:
    names = ("get_input_embeddings", "get_output_embeddings")
    modules = [getattr(model, name)() for name in names if hasattr(model, name)]
    return list({id(m.weight): m.weight for m in modules if m is not None}.values())


def _short(number: float) -> str:
    """Three significant digits at most: 5.2M, 540M, 1.07B."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g}{suffix}"
    return f"{number:.0f}"


def _bytes(number: int) -> str:
    for unit, suffix in ((1e9, "GB"), (1e6, "MB")):
        if number >= unit:
            return f"{number / unit:.3g} {suffix}"
    return f"{number / 1e3:.3g} kB"
