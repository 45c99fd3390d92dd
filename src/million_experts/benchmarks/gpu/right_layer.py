"""Part 1, the whole layer: against Algorithm 1 of the paper, written out in float64 with gathers.

Shapes: T tokens, D model width, H heads, k experts per head, N = n1*n2 experts, d numbers per sub-key.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from million_experts.benchmarks.gpu.compare import Error, compare, poisoned
from million_experts.benchmarks.gpu.kernels import forced
from million_experts.benchmarks.gpu.right import Drawing, Row, fresh_seed, judge
from million_experts.layers import PEER
from million_experts.ops import product_key_topk

# Queries in bfloat16 carry 8 bits into the softmax, and gradients back: at the plan's shapes 5e-3 on the CPU.
NARROW = (2e-2, 5e-2)
# float32 rounds scores of size 3, on which gates depend: 6e-7 there. Products in TF32 would come to 3e-4.
WIDE = (1e-5, 5e-5)


def new_layer(
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    experts: nn.Parameter | None = None,
    **arguments: Any,
) -> PEER:
    """A layer with random parameters, or with a table given; its output has not been brought to a scale."""
    with torch.device("meta"):
        layer = PEER(**arguments).to(dtype)
    if experts is not None:
        layer.experts = nn.Parameter(layer.experts[:0])  # no memory for a second table
    layer.to_empty(device=device)
    with torch.no_grad():
        layer.reset_retrieval()
        if experts is None:
            nn.init.normal_(layer.experts, std=layer.dim**-0.5)
    if experts is not None:
        layer.experts = experts
    return layer


def algorithm(
    layer: PEER, p: dict[str, Tensor], x_TD: Tensor, picks_TK: Tensor, rows_TKRD: Tensor
) -> tuple[Tensor, Tensor]:
    """The output in training for given picks and the rows of their experts; and the queries [T, H, 2, d].

    `p` are the parameters by name, but for the experts.
    """
    T, H, k, n2 = len(x_TD), layer.num_heads, layer.experts_per_head, layer.codebook_sizes[1]
    query = x_TD @ p["query_proj.weight"].T
    centred = query - query.mean(0)
    query = centred * (centred.square().mean(0) + 1e-5).rsqrt()
    query = (query * p["query_norm.weight"] + p["query_norm.bias"]).view(T, H, 2, -1)
    first, second = query.repeat_interleave(k, 1).unbind(2)  # [T, K, d]
    scores = (first * p["keys1"][picks_TK // n2]).sum(-1) + (second * p["keys2"][picks_TK % n2]).sum(-1)
    gates = scores.view(T, H, k).softmax(-1).view(T, H * k)
    down, up, *gate = rows_TKRD.unbind(2)
    hidden = F.gelu(torch.einsum("tkd,td->tk", down, x_TD))
    if gate:
        hidden = hidden * torch.einsum("tkd,td->tk", gate[0], x_TD)
    return torch.einsum("tk,tkd->td", gates * hidden, up), query


def compare_layer(
    layer: PEER,
    x: Tensor,
    grad_y: Tensor,
    real: Tensor | None = None,
    autocast: torch.dtype | None = None,
    bounds: tuple[float, float] = WIDE,
) -> tuple[list[Error], list[str | None]]:
    """Errors of a layer in training for tokens [T, D], outputs and all gradients, and what else is wrong.

    At the experts that it retrieves, whose scores must be the best. It is left without gradients.

    Args:
        real: [T], a mask.
    """
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, autocast, enabled=autocast is not None):
        y, routing = layer(x, mask=real, return_routing=True)
    y.backward(grad_y.to(y.dtype))
    actual = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad}
    layer.zero_grad(set_to_none=True)
    kept = torch.ones(len(x), dtype=torch.bool, device=x.device) if real is None else real
    faults: list[str | None] = []
    if actual["x"] is not None:
        if bool(y[~kept].any()) or bool(actual["x"][~kept].any()):
            faults.append("masked tokens give or receive something else than zeros")
        actual["x"] = actual["x"][kept]

    wide = {n: p.detach().double().requires_grad_() for n, p in layer.named_parameters() if n != "experts"}
    picks = routing.indices[kept].flatten(1)
    rows, places = picks.unique(return_inverse=True)
    experts = layer.experts.detach()[rows].double().requires_grad_()
    tokens = x.detach()[kept].double().requires_grad_()
    truth, query = algorithm(layer, wide, tokens, picks, experts[places])
    truth.backward(grad_y[kept].to(y.dtype).double())
    best, _ = product_key_topk(
        query.detach(), wide["keys1"].detach(), wide["keys2"].detach(), layer.experts_per_head, "reference"
    )
    errors = [
        compare("y", y.detach()[kept], truth.detach(), bounds),
        compare("scores of what was retrieved", routing.scores.detach()[kept], best, bounds),
    ]
    table = actual["experts"]
    if table is not None:
        if table.is_sparse and not torch.equal(table._indices()[0], rows):
            faults.append("the table's gradient has other rows than those retrieved")
        else:
            actual["experts"] = table._values() if table.is_sparse else table[rows]
    grads = {name: p.grad for name, p in wide.items()} | {"x": tokens.grad, "experts": experts.grad}
    for name, right in grads.items():
        mine = actual[name]
        if mine is None or right is None:
            faults.append(f"no gradient of {name}")
        elif not mine.is_sparse:
            errors.append(compare(f"gradient of {name}", mine, right, bounds))
    return errors, faults


def layer(
    device: torch.device,
    *,
    T: int,
    D: int,
    n: int,
    H: int = 8,
    k: int = 16,
    key_dim: int = 128,
    glu: bool = False,
    autocast: str | None = None,
    sparse: bool = False,
    mask: bool = False,
) -> Row:
    """A layer of a shape, forward and backward in training."""
    seed = fresh_seed()
    torch.manual_seed(seed)
    made = new_layer(
        device, dim=D, num_experts=(n, n), num_heads=H, experts_per_head=k, key_dim=key_dim, glu=glu,
        sparse_grad=sparse, backend="triton",
    ).train()  # fmt: skip
    draw = Drawing(device, seed, "float32")
    x, grad_y, real = draw(T, D), draw(T, D), None
    if mask:
        real = torch.ones(T, dtype=torch.bool, device=device)
        real[1::5] = False
        x[~real] = float("nan")
    narrow = None if autocast is None else getattr(torch, autocast)
    with poisoned(), forced(0):
        errors, faults = compare_layer(made, x, grad_y, real, narrow, NARROW if autocast else WIDE)
    return judge(errors, faults, seed=seed)
