"""What a training run will need, before anything is allocated."""

from pathlib import Path

import psutil
import torch

from million_experts.lm.settings import TrainSettings
from million_experts.models import PeerConfig, memory_estimate

# Resident memory of a process that has imported everything and trains nothing, measured.
PROCESS_BYTES = 700 * 2**20


def expected_peak(config: PeerConfig, settings: TrainSettings) -> int:
    """Bytes that training will take at its peak: the process, the model's state and a step's activations.

    Weights, gradients and AdamW's moments are counted exactly. Of the activations the logits dominate, kept
    in the working precision and twice more in float32 for the loss and its gradient; a block keeps about 20
    numbers a token and unit of width, and a PEER layer about 16 numbers a chosen expert, indices included.

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
    return PROCESS_BYTES + memory_estimate(config).training + logits + activations + peer


def available_memory() -> int:
    """Bytes that this process may still take: what the system has free, within its control group's limit."""
    free = psutil.virtual_memory().available
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


def takes_bfloat16(precision: str) -> bool:
    """Whether a run computes in bfloat16: asked for, or "auto" on a processor that multiplies in it."""
    if precision != "auto":
        return precision == "bfloat16"
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
