"""`PeerModel` and `PeerForCausalLM`: a Llama decoder whose feed-forwards may be PEER or its competitors.

Attention, norms, rotary embeddings, masks, caches and generation are transformers' own; the feed-forwards
are ours, and how the loss is computed. The feed-forwards' words are the paper's: an expert *down*-projects
the token to one number and *up*-projects that number back, the other way round from Llama's `up_proj` and
`down_proj`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from million_experts.layers import MemoryPlus, Routing

from .configuration import PeerConfig
from .counting import describe
from .feed_forwards import FEED_FORWARDS, build_feed_forward
from .loss import causal_language_model_loss
from .weights import check_shapes

__all__ = ["PeerCausalLMOutput", "PeerForCausalLM", "PeerModel", "PeerModelOutput", "PeerPreTrainedModel"]


@dataclass
class PeerModelOutput(BaseModelOutputWithPast):
    """What `PeerModel` returns.

    `routing`, if asked for, has one `Routing` for each layer with product keys, in order: its `indices`,
    `gates` and `scores` are [batch, sequence, heads, experts per head]. `router_loss` is the sum of the
    routers' own losses, in training alone and where a layer has one.
    """

    routing: tuple[Routing, ...] | None = None
    router_loss: Tensor | None = None


@dataclass
class PeerCausalLMOutput(CausalLMOutputWithPast):
    """What `PeerForCausalLM` returns; `routing` and `router_loss` as in `PeerModelOutput`.

    In training `loss` contains `router_loss`.
    """

    routing: tuple[Routing, ...] | None = None
    router_loss: Tensor | None = None


class PeerRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, whose frequencies stay float32 when the model is cast.

    In bfloat16 a frequency is off by up to 1 part in 512: by 4 radians at position 2048.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> PeerRotaryEmbedding:
        before = self.inv_freq, self.original_inv_freq
        super()._apply(fn, recurse)
        for name, old in zip(("inv_freq", "original_inv_freq"), before, strict=True):
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self


class PeerDecoderLayer(GradientCheckpointingLayer):
    """One block: attention and a feed-forward of the configured kind, each with a norm before it."""

    def __init__(self, config: PeerConfig, layer_idx: int) -> None:
        super().__init__()
        kind = cast("list[str]", config.mlp_layer_types)[layer_idx]
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)  # type: ignore[arg-type]
        feed_forward: Any = build_feed_forward(kind, config.hidden_size, getattr(config, kind))
        self.mlp, spec = feed_forward, FEED_FORWARDS[kind]
        self.mlp_takes_mask, self.mlp_is_routed = spec.takes_mask, spec.is_routed
        self.mlp_has_router_loss = spec.has_router_loss
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

        # Keeps the sum of 2L residual updates as large as one.
        scale = (2 * config.num_hidden_layers) ** -0.5
        self.self_attn.o_proj.initializer_std = config.initializer_range * scale
        feed_forward.initializer_scales = {spec.output: scale} if spec.output else {}
        _leave_initialisation_to(feed_forward)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        token_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        output_routing: bool = False,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, ...]:
        """The block's output [batch, sequence, D].

        If `output_routing` and the feed-forward is routed: (output, indices, gates, scores). They are not
        packed into a `Routing` here, since reentrant checkpointing sees no gradient in nested tuples. If its
        router has a loss, in training: (output, loss).
        """
        attended, _ = self.self_attn(
            hidden_states=self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        normed = self.post_attention_layernorm(hidden_states)
        masked = {"mask": token_mask} if self.mlp_takes_mask else {}
        if self.mlp_has_router_loss and self.training:
            update, loss = self.mlp(normed, **masked, return_router_loss=True)
            return hidden_states + update, loss
        if self.mlp_is_routed and output_routing:
            update, routing = self.mlp(normed, **masked, return_routing=True)
            return hidden_states + update, *routing
        return hidden_states + self.mlp(normed, **masked)


class PeerPreTrainedModel(PreTrainedModel):
    """What the models have in common: initialisation, and what transformers may do with them."""

    config: PeerConfig
    config_class = PeerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PeerDecoderLayer"]  # noqa: RUF012 (transformers' form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": PeerDecoderLayer,
        "attentions": LlamaAttention,
    }
    # Statistics averaged over thousands of steps: bfloat16 would not register a step's change.
    _keep_in_fp32_modules_strict = [  # noqa: RUF012
        "query_norm.running_mean",
        "query_norm.running_var",
    ]

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any
    ) -> PeerPreTrainedModel:
        """transformers' own; what is wrong with the weights of a local folder is said with the file's name.

        Raises:
            ValueError: a file is damaged, or its tensors have other shapes than the model.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, *model_args, **kwargs)
        except Exception:
            if os.path.isdir(pretrained_model_name_or_path or ""):
                config = kwargs.pop("config", None) or cls.config_class.from_pretrained(
                    pretrained_model_name_or_path, **kwargs
                )
                with torch.device("meta"):
                    check_shapes(Path(pretrained_model_name_or_path), cls(config))
            raise

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Only for derived classes: transformers would save a copy of this file beside every model."""
        if cls.__module__ != __name__:
            super().register_for_auto_class(auto_class)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For classes outside its own tree, transformers passes over a module whose own tensors are all
        # loaded. A feed-forward also has to hear of its children's, whose initialisation it derives.
        super()._initialize_weights(module, is_custom_code and not _is_feed_forward(module))

    def mark_tied_weights_as_initialized(self, loading_info: Any) -> None:
        # On the meta device tied parameters are one object. transformers marks those that will be tied as
        # loaded, and would so mark what they are tied to: nobody would notice that a checkpoint lacks it.
        for name in self.all_tied_weights_keys:
            parent, _, own = name.rpartition(".")
            parameter = self.get_parameter(name)
            if parameter.is_meta:
                setattr(self.get_submodule(parent), own, nn.Parameter(torch.empty_like(parameter)))
        super().mark_tied_weights_as_initialized(loading_info)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = getattr(module, "initializer_std", None)
        if _is_feed_forward(module):
            _initialise_missing(module)
        elif isinstance(module, nn.Linear) and std is not None:
            init.normal_(module.weight, mean=0.0, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)


class PeerModel(PeerPreTrainedModel):
    """The decoder without its output layer."""

    def __init__(self, config: PeerConfig) -> None:
        super().__init__(config)
        config.validate_layer_type()  # its dicts may have been changed since it was made
        self.vocab_size = config.vocab_size
        # No padding_idx: it would keep the embedding of an end-of-text token that also pads at zero.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList()
        self._tied_weights_keys = {}
        for i in range(config.num_hidden_layers):
            self.layers.append(PeerDecoderLayer(config, i))
            if config.share_memory_values:
                self._share_values(i)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = PeerRotaryEmbedding(config=config)  # type: ignore[arg-type]
        self.gradient_checkpointing = False
        self.post_init()

    def _share_values(self, index: int) -> None:
        """Give a Memory+ layer the values of the first one, if there is one before it."""
        mlps: list[Any] = [layer.mlp for layer in self.layers]
        first = next((i for i, mlp in enumerate(mlps) if isinstance(mlp, MemoryPlus)), index)
        if first < index and isinstance(mlps[index], MemoryPlus):
            mlps[index].values = mlps[first].values
            self._tied_weights_keys[f"layers.{index}.mlp.values"] = f"layers.{first}.mlp.values"

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """The values that layers share. transformers' own answer is that nothing is tied where
        `tie_word_embeddings` is False."""
        return dict(self._tied_weights_keys)

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool | None = None,
        **kwargs: Any,
    ) -> PeerModelOutput:
        """Hidden states of a batch of sequences.

        Args:
            input_ids: [batch, sequence] token ids; or `inputs_embeds`.
            attention_mask: [batch, past + sequence], nonzero for a real token. Padded tokens are not
                attended to and enter no statistic of a PEER layer. A mask with four dimensions goes to the
                attention as it is, and all tokens count as real.
            position_ids: [batch, sequence]. Where they restart within a row, and `attention_mask` and
                `past_key_values` are None, documents packed into the row do not attend to one another.
            past_key_values: cache of earlier tokens' keys and values.
            inputs_embeds: [batch, sequence, D] instead of `input_ids`.
            use_cache: whether to return a cache; by default as configured.
            output_routing: whether to return the routing of each layer with product keys; by default as
                configured.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and what the attention takes.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if output_routing is None:
            output_routing = self.config.output_routing
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        # Packed documents are looked for only where a caller gave positions and no cache. A cache made
        # below, empty and by default there in training too, must not switch the search off.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
            position_ids = position_ids.unsqueeze(0)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        token_mask = _token_mask(attention_mask, inputs_embeds)
        routing: list[Routing] = []
        router_losses: list[Tensor] = []
        for layer in self.layers:
            outputs = layer(
                hidden_states,
                attention_mask=causal_mask,
                token_mask=token_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                output_routing=output_routing,
                **kwargs,
            )
            if not isinstance(outputs, tuple):
                hidden_states = outputs
                continue
            hidden_states, *rest = outputs
            if layer.mlp_has_router_loss:
                router_losses += rest
            else:
                routing.append(Routing(*rest))

        return PeerModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=past_key_values,
            routing=tuple(routing) if output_routing else None,
            router_loss=torch.stack(router_losses).sum() if router_losses else None,
        )


class PeerForCausalLM(PeerPreTrainedModel, GenerationMixin):
    """The decoder with an output layer that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: PeerConfig) -> None:
        super().__init__(config)
        self.model = PeerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_language_model_loss
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_routing: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> PeerCausalLMOutput:
        """Logits [batch, sequence, vocabulary] for the next token, and the loss if `labels` are given.

        Args:
            labels: [batch, sequence] token ids, not shifted; -100 where no loss is wanted. The loss is the
                mean over the labels, in nats per token; in training plus `router_loss`, where there is one.
            logits_to_keep: compute logits for that many last positions only (0: for all), or for the
                positions in a tensor.
            kwargs: also `num_items_in_batch`: the loss is then the labels' sum over it, so that the losses
                of accumulated micro-batches add up to the large batch's; a micro-batch's router loss counts
                by its share of the items.

        The other arguments are those of `PeerModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=output_routing,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            if outputs.router_loss is not None:
                loss = loss + outputs.router_loss * _share_of_items(labels, kwargs.get("num_items_in_batch"))
        return PeerCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routing=outputs.routing,
            router_loss=outputs.router_loss,
        )

    def __repr__(self) -> str:
        return f"{describe(self)}\n{super().__repr__()}"


def _token_mask(attention_mask: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
    """[batch, sequence] bool, True for a real token. With a cache the current tokens come last."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -inputs_embeds.shape[1] :].to(inputs_embeds.device).bool()


def _share_of_items(labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor | float:
    """The part of a batch's items that a micro-batch's labels are; 1 where there is no larger batch."""
    return 1.0 if num_items_in_batch is None else (labels[:, 1:] != -100).sum() / num_items_in_batch


def _is_feed_forward(module: nn.Module) -> bool:
    return isinstance(module, tuple(spec.layer for spec in FEED_FORWARDS.values()))


def _leave_initialisation_to(feed_forward: Any) -> None:
    """Keep transformers' initialisation off a feed-forward, which derives its own.

    The layer has drawn its weights already when it was built on a real device. On the meta device it has
    not: it is asked again if a checkpoint lacks some of them (see `_initialise_missing`).
    """
    for child in feed_forward.modules():
        child._is_hf_initialized = True
    if any(parameter.is_meta for parameter in feed_forward.parameters()):
        feed_forward._is_hf_initialized = False
    else:
        _scale_output(feed_forward)


@torch.no_grad()
def _scale_output(feed_forward: Any) -> None:
    for name, scale in feed_forward.initializer_scales.items():
        feed_forward.get_parameter(name).mul_(scale)


def _initialise_missing(feed_forward: Any) -> None:
    """Draw those tensors of a feed-forward that were not loaded; transformers marks the ones that were."""
    tensors = [*feed_forward.parameters(), *feed_forward.buffers()]
    loaded = [t for t in tensors if getattr(t, "_is_hf_initialized", False)]
    if len(loaded) == len(tensors):
        return
    kept = [t.clone() for t in loaded]
    feed_forward.reset_parameters()
    _scale_output(feed_forward)
    for tensor, value in zip(loaded, kept, strict=True):
        tensor.copy_(value)
