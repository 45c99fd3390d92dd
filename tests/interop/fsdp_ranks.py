"""What each of two processes runs: FSDP2 around a layer, and around the blocks of a model."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


def run_layer(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Outputs for 24 and 4 tokens, statistics and gradients."""
    with torch.no_grad():
        found = {"24 tokens": layer(x), "4 tokens": layer(x[:4])}
    layer.train()(x).square().sum().backward()
    found |= dict(layer.named_buffers())
    for name, parameter in layer.named_parameters():
        grad = parameter.grad
        found[name] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def run_model(model: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """Logits for 24 and 4 tokens, and the losses of three steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)  # while the parameters are the shards
    with torch.no_grad():
        found = {"24": model(input_ids=tokens).logits, "4": model(input_ids=tokens[:1, :4]).logits}
    model.train()
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
    return found | {"losses": torch.stack(losses).detach()}


def run(module: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    return run_layer(module, tokens) if tokens.is_floating_point() else run_model(module, tokens)


def start(rank: int, world: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    try:
        found = {}
        for case, (module, tokens) in torch.load(f"{folder}/cases.pt", weights_only=False).items():
            for block in module.model.layers if case == "model" else ():
                fully_shard(block)
            fully_shard(module)
            assert all(isinstance(parameter, DTensor) for parameter in module.parameters())
            found[case] = run(module, tokens)
        torch.save(found, f"{folder}/{rank}")
    finally:
        dist.destroy_process_group()
