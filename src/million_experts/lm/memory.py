"""What a training run will need, before anything is allocated."""

import ctypes
import math
import sys
from pathlib import Path

import psutil
import torch

from million_experts.layers.retrieval import factorise
from million_experts.lm.settings import TrainSettings
from million_experts.models import PeerConfig, memory_estimate

# Resident memory of a process that has imported everything and trains nothing, measured.
PROCESS_BYTES = 700 * 2**20
CONTROL_GROUP = Path("/sys/fs/cgroup")


def expected_peak(config: PeerConfig, settings: TrainSettings) -> int:
    """Bytes that training will take at its peak: the process, the model's state and a step's activations.

    Weights, gradients and AdamW's moments are counted exactly; a sparse gradient as if every pick were of
    another expert, once for each micro-batch and once more for their sum. Of the activations the logits
    dominate, kept in the working precision and twice more in float32 for the loss and its gradient; a block
    keeps about 20 numbers a token and unit of width, and a PEER layer about 16 numbers a chosen expert,
    indices included.

    Measured on a CPU, the estimate was 1.0 to 1.4 times the peak resident memory of 0.5 to 2.9 GB: the demo
    with batches of 4 and 16 in float32 and bfloat16, with 262,144 experts, and `ostix360-test1` with batches
    of 4, with and without gradient checkpointing.
    """
    tokens = settings.tokens_per_micro_batch
    width = 2 if takes_bfloat16(settings.precision) else 4
    logits = tokens * config.vocab_size * (2 * width + 8)
    blocks = 1 if settings.gradient_checkpointing else config.num_hidden_layers
    activations = tokens * config.hidden_size * 20 * width * blocks
    peer = 0
    layers = list(config.mlp_layer_types or []).count("peer")
    if config.peer is not None and layers:
        peer = tokens * config.peer["num_heads"] * config.peer["experts_per_head"] * 16 * 4
        peer *= 1 if settings.gradient_checkpointing else layers
        # Gate mass by head and expert in float64: the callback's, and that of the final measurement.
        peer += layers * 2 * config.peer["num_heads"] * math.prod(factorise(config.peer["num_experts"])) * 8
    memory = memory_estimate(config)
    state = memory.training
    if config.peer is not None and config.peer.get("sparse_grad"):
        picks = tokens * config.peer["num_heads"] * config.peer["experts_per_head"] * layers
        expert = (3 if config.peer.get("glu") else 2) * config.hidden_size * 4
        gradients = settings.gradient_accumulation_steps * min(picks * expert, memory.table_gradients)
        if settings.gradient_accumulation_steps > 1:
            gradients += min(gradients, memory.table_gradients)
        state += gradients - memory.table_gradients
        moment = memory.table_optimizer // 2
        if settings.table_beta1 == 0:
            state -= moment
        if settings.table_second_moment == "row":
            state -= moment - moment // config.hidden_size
    return PROCESS_BYTES + state + logits + activations + peer


def available_memory() -> int:
    """Bytes that this process may have in all: on a GPU what is free there, else what it holds already and
    what the system can still give it, within the limit of its control group.
    """
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
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
    """Memory that this process has in RAM."""
    return psutil.Process().memory_info().rss


def takes_bfloat16(precision: str) -> bool:
    """Whether a run computes in bfloat16: asked for, or "auto" on a processor that multiplies in it."""
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
