"""What a training run will need, before anything is allocated."""

import ctypes
import math
import os
import sys
from pathlib import Path

import psutil
import torch
from torch import nn

from million_experts.layers import ProductKeyRetrieval
from million_experts.layers.retrieval import factorise
from million_experts.lm.settings import TrainSettings
from million_experts.models import PeerConfig, memory_estimate
from million_experts.models.counting import as_model

# Resident memory of a process that has imported everything and trains nothing, measured.
PROCESS_BYTES = 700 * 2**20
CONTROL_GROUP = Path("/sys/fs/cgroup")


def expected_peak(config: PeerConfig, settings: TrainSettings) -> int:
    """Bytes that training will take at its peak: the process, the model's state and a step's activations.

    Weights, gradients and AdamW's moments are counted exactly, moments that are not kept left out; a sparse
    gradient as if every pick were of another expert, once for each micro-batch and once more for their sum.
    Of the activations the logits dominate, and their gradient, under autocast a float32 copy of them. A block
    keeps about 20 numbers a token and unit of width, and where attention widens them 4 in float32; a PEER
    layer about 16 numbers a chosen expert, indices included.

    Measured on a CPU, the estimate was 1.0 to 1.4 times the peak resident memory of 0.5 to 2.9 GB: the demo
    with batches of 4 and 16 in float32 and bfloat16, with 262,144 experts, and `ostix360-test1` with batches
    of 4, with and without gradient checkpointing.
    """
    tokens = settings.tokens_per_micro_batch
    narrow = takes_bfloat16(settings.precision)
    width = 2 if narrow else 4
    # transformers' loss, which a compiler takes, makes four float32 tensors of the logits' size.
    per_logit = 2 * width + 8 if settings.torch_compile else (width + 4 if narrow else 2 * width)
    blocks = 1 if settings.gradient_checkpointing else config.num_hidden_layers
    per_unit = 20 * width + (16 if narrow else 0)
    activations = tokens * (config.vocab_size * per_logit + config.hidden_size * per_unit * blocks)
    peer = 0
    layers = list(config.mlp_layer_types or []).count("peer")
    if config.peer is not None and layers:
        peer = tokens * config.peer["num_heads"] * config.peer["experts_per_head"] * 16 * 4
        peer *= 1 if settings.gradient_checkpointing else layers
        # Gate mass by head and expert in float64: the callback's, and that of the final measurement.
        peer += layers * 2 * config.peer["num_heads"] * math.prod(factorise(config.peer["num_experts"])) * 8
    model = as_model(config)
    state = memory_estimate(model).training + _added_by_sparse_gradients(model, settings)
    return PROCESS_BYTES + state + activations + peer


def _added_by_sparse_gradients(model: nn.Module, settings: TrainSettings) -> int:
    """Bytes that sparse gradients, and moments that are not kept, add to the state: often below 0."""
    sharing: dict[int, list[ProductKeyRetrieval]] = {}
    for layer in model.modules():
        if isinstance(layer, ProductKeyRetrieval) and layer.sparse_grad:
            sharing.setdefault(id(layer.table), []).append(layer)
    total = 0
    for layers in sharing.values():
        table = layers[0].table
        size = table.numel() * table.element_size()
        picks = sum(layer.num_heads * layer.experts_per_head for layer in layers)
        rows = min(settings.tokens_per_micro_batch * picks * (size // len(table)), size)
        gradients = settings.gradient_accumulation_steps * rows
        if settings.gradient_accumulation_steps > 1:
            gradients += min(gradients, size)
        total += gradients - size
        if settings.table_adam_beta1 == 0:
            total -= size
        if settings.table_second_moment == "row":
            total -= size - size // table.shape[-1]
    return total


def available_memory() -> int:
    """Bytes that this process may have in all: on a GPU what is free there, else what it holds already and
    what the system can still give it, within the limit of its control group.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    try:
        free = psutil.virtual_memory().available
    except OSError:  # no /proc; this leaves out what the system would take back from its caches
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit = (CONTROL_GROUP / "memory.max").read_text().strip()
        used = int((CONTROL_GROUP / "memory.current").read_text())
        cache = dict(line.split() for line in (CONTROL_GROUP / "memory.stat").read_text().splitlines())
        if limit != "max":
            # Files that were read stay in the group's account until their memory is needed.
            free = min(free, int(limit) - used + int(cache.get("inactive_file", 0)))
    except OSError:
        pass  # no control group of the second version
    return free + resident_bytes()


def keep_freed_memory() -> bool:
    """Lets the C library keep what it frees; whether it can be told so (glibc's can).

    By default glibc gives each large tensor's memory back, so that a training step touches a gigabyte of new
    pages: 10 % of the demo's time, and keeping them takes 4 % more memory.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    return bool(mallopt and mallopt(mmap_threshold, 2**30) and mallopt(trim_threshold, 2**31 - 1))


def resident_bytes() -> int:
    """Memory that this process has in RAM; without /proc the most that it ever had."""
    try:
        return psutil.Process().memory_info().rss
    except (OSError, psutil.Error):
        import resource  # Unix alone has it

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def takes_bfloat16(precision: str) -> bool:
    """Whether a run computes in bfloat16: asked for, or "auto" on a processor that multiplies in it."""
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
