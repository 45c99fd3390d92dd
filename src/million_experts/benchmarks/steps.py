"""Builders of what is trained with an optimiser of its own: the layer, PEER-pytorch, language models.

Shapes: T tokens, D model width, H heads, k experts a head, N experts in the pool.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from million_experts.benchmarks import peers
from million_experts.benchmarks.optimizers import OPTIMIZERS, AsInTraining, Rowwise
from million_experts.benchmarks.peers import Shared
from million_experts.benchmarks.workload import Unavailable, Workload, share_key
from million_experts.layers import PEER, Routing
from million_experts.lm.memory import takes_bfloat16
from million_experts.ops import advise_huge_pages
from million_experts.ops.backends import BackendError

PICKS = ("retrieved", "uniform")


class GivenPicks(PEER):
    """A PEER layer that does all of its work, and then takes other experts than those it retrieved."""

    _picks: Tensor | None = None

    def forward(self, x_TD: Tensor, picks_THk: Tensor | None = None) -> Tensor:  # type: ignore[override]
        self._picks = picks_THk
        try:
            return super().forward(x_TD)
        finally:
            self._picks = None

    def retrieve(self, x: Tensor, mask: Tensor | None = None) -> Routing:
        routing = super().retrieve(x, mask)
        return routing if self._picks is None else routing._replace(indices=self._picks)


def layer(
    shared: Shared,
    *,
    optimizer: str,
    tokens: int,
    backend: str = "auto",
    dtype: str = "float32",
    picks: str = "retrieved",
    **shape: Any,
) -> Workload:
    """This project's layer with the gradients that the optimiser takes: of the touched experts, or of all.

    Args:
        optimizer: one of `OPTIMIZERS`.
        dtype: of the expert table; the other parameters are float32.
        picks: "uniform" for experts drawn at random in place of those that the layer retrieves: of a million
            few are picked twice, so that a step touches as many as it can.
    """
    key = share_key("PEER for steps", {**shape, "dtype": dtype})
    if key not in shared:
        try:
            shared[key] = _new_layer(getattr(torch, dtype), shape)
        except BackendError as error:
            raise Unavailable(str(error)) from error
    first = shared[key]
    own = copy.deepcopy(first, memo={id(parameter): parameter for parameter in first.parameters()})
    assert isinstance(own, GivenPicks)
    own.backend, own.sparse_grad = backend, isinstance(OPTIMIZERS[optimizer], Rowwise)

    def draw(generator: torch.Generator) -> tuple[Tensor, ...]:
        x = torch.randn(tokens, own.dim, generator=generator)
        if picks == "retrieved":
            return (x,)
        chosen = (tokens, own.num_heads, own.experts_per_head)
        return x, torch.randint(own.num_experts, chosen, generator=generator)

    def ambiguous(inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        return peers.ambiguous_tokens(own, inputs[0], training)

    return Workload(
        own,
        draw,
        ambiguous=ambiguous,
        optimizer=OPTIMIZERS[optimizer],
        touched=None if picks == "retrieved" else lambda inputs: inputs[1].unique().numel(),
    )


def _new_layer(dtype: torch.dtype, shape: dict[str, Any]) -> GivenPicks:
    """A layer whose table is of a dtype from the start: in float32 first it might not fit."""
    device = torch.get_default_device()
    with torch.device("meta"):
        made = GivenPicks(**shape)
        made.experts = nn.Parameter(made.experts.to(dtype))
    made.to_empty(device=device)
    if device.type != "meta":
        advise_huge_pages(made.experts)
        made.reset_parameters()
    return made


def peer_pytorch(shared: Shared, *, optimizer: str, **shape: Any) -> Workload:
    """PEER-pytorch as in the other cases."""
    return replace(peers.peer_pytorch(shared, **shape), optimizer=OPTIMIZERS[optimizer])


class LanguageModel(nn.Module):
    """The loss of a language model in the precision of its training, bfloat16 if `narrow`."""

    def __init__(self, model: nn.Module, narrow: bool):
        super().__init__()
        self.model, self.narrow = model, narrow

    def forward(self, ids_BS: Tensor, positions_BS: Tensor | None = None) -> Tensor:
        with torch.autocast(ids_BS.device.type, torch.bfloat16, enabled=self.narrow):
            return self.model(
                input_ids=ids_BS, position_ids=positions_BS, labels=ids_BS, use_cache=False
            ).loss


def language_model(
    shared: Shared, *, optimizer: str, tokens: int, context: int, vocab_size: int, **shape: Any
) -> Workload:
    """A decoder one of whose blocks has a PEER layer, or with `num_experts` 0 none; tokens are random ids."""
    model = _shared_model(shared, {"context": context, "vocab_size": vocab_size, **shape}, optimizer)
    sizes = (max(1, tokens // context), min(tokens, context))
    found = _peer_layer(model)
    part = None
    if found is not None:
        part = Workload(found, peers.draw_tokens(tokens, found.dim))
    return Workload(
        LanguageModel(model, takes_bfloat16("auto")),
        lambda generator: (torch.randint(vocab_size, sizes, generator=generator),),
        like_tokens=False,
        optimizer=AsInTraining(OPTIMIZERS[optimizer]),
        part=part,
    )


def layer_of_language_model(shared: Shared, *, optimizer: str, tokens: int, **shape: Any) -> Workload:
    """The PEER layer of that language model on the reference backend."""
    found = _peer_layer(_shared_model(shared, shape, optimizer))
    assert found is not None
    own = copy.deepcopy(found, memo={id(parameter): parameter for parameter in found.parameters()})
    own.backend, own.sparse_grad = "reference", False

    def ambiguous(inputs: tuple[Tensor, ...], training: bool) -> Tensor:
        return peers.ambiguous_tokens(own, inputs[0], training)

    draw = peers.draw_tokens(tokens, own.dim)
    return Workload(own, draw, ambiguous=ambiguous, optimizer=OPTIMIZERS["AdamW, fused"])


def _peer_layer(model: nn.Module) -> PEER | None:
    return next((module for module in model.modules() if isinstance(module, PEER)), None)


def _shared_model(shared: Shared, shape: dict[str, Any], optimizer: str) -> nn.Module:
    key = share_key("language model", shape)
    if key not in shared:
        shared[key] = _new_model(sparse_grad=isinstance(OPTIMIZERS[optimizer], Rowwise), **shape)
    return shared[key]


def _new_model(
    *,
    dim: int,
    blocks: int,
    attention_heads: int,
    context: int,
    vocab_size: int,
    sparse_grad: bool,
    num_experts: int = 0,
    **peer: Any,
) -> nn.Module:
    try:
        from million_experts.models import PeerConfig, PeerForCausalLM
        from million_experts.models.attention import with_fast_attention
    except ImportError as error:
        raise Unavailable(f"transformers cannot be imported ({error}): pip install transformers") from error
    kinds = ["dense"] * blocks
    arguments = None
    if num_experts:
        kinds[blocks // 2] = "peer"
        arguments = {"num_experts": num_experts, "sparse_grad": sparse_grad, **peer}
    config = PeerConfig(
        vocab_size=vocab_size,
        hidden_size=dim,
        num_hidden_layers=blocks,
        num_attention_heads=attention_heads,
        max_position_embeddings=context,
        mlp_layer_types=kinds,
        peer=arguments,
        dense={"width": 4 * dim},
    )
    return with_fast_attention(PeerForCausalLM(config), takes_bfloat16("auto"))
