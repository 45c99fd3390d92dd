"""`PeerModel` and `PeerForCausalLM`: a Llama decoder whose feed-forwards may be PEER or its competitors.

Attention, norms, rotary embeddings, masks, caches and generation are transformers' own; the feed-forwards
are ours, and how the loss is computed. The feed-forwards' words are the paper's: an expert *down*-projects
the token to one number and *up*-projects that number back, the other way round from Llama's `up_proj` and
`down_proj`.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaForCausalLM, LlamaRMSNorm
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from million_experts.layers import MaskedBatchNorm, MemoryPlus, Routing

from .blocks import PeerDecoderLayer, PeerRotaryEmbedding
from .configuration import PeerConfig
from .counting import describe
from .initialisation import initialise_missing, is_feed_forward
from .loss import causal_language_model_loss
from .outputs import PeerCausalLMOutput, PeerModelOutput, named_cache
from .placement import check_places
from .router_loss import keep_router_loss_when_smoothing, share_of_items
from .weights import check_shapes

__all__ = ["PeerCausalLMOutput", "PeerForCausalLM", "PeerModel", "PeerModelOutput", "PeerPreTrainedModel"]


class PeerPreTrainedModel(PreTrainedModel):
    """What the models have in common: initialisation, and what transformers may do with them."""

    config: PeerConfig
    config_class = PeerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PeerDecoderLayer"]  # noqa: RUF012 (transformers' form)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
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
        super()._initialize_weights(module, is_custom_code and not is_feed_forward(module))

    def _move_missing_keys_from_meta_to_device(
        self, missing_keys: list[str], device_map: dict[str, Any] | None, *others: Any
    ) -> None:
        # Here transformers has the map, and has not yet sent anything where it does not find it again.
        check_places(self.all_tied_weights_keys, device_map or {})
        super()._move_missing_keys_from_meta_to_device(missing_keys, device_map, *others)

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
        if is_feed_forward(module):
            initialise_missing(module)
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
        cache: Cache | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> PeerModelOutput:
        """Hidden states of a batch of sequences.

        Args:
            input_ids: [batch, sequence] token ids; or `inputs_embeds`.
            attention_mask: [batch, past + sequence], nonzero for a real token. Padded tokens are not
                attended to and enter no statistic of a PEER layer. A mask with four dimensions goes to the
                attention as it is, and all tokens count as real.
            position_ids: [batch, sequence]. Where they restart within a row, and `attention_mask` and
                `cache` are None, documents packed into the row do not attend to one another.
            past_key_values: `cache` by its older name.
            inputs_embeds: [batch, sequence, D] instead of `input_ids`.
            use_cache: whether to return a cache; by default as configured.
            output_routing: whether to return the routing of each layer with product keys; by default as
                configured.
            cache: earlier tokens' keys and values.
            output_router_logits: whether to return the logits of each router that has a loss; by default as
                configured. Programs that compute such a loss themselves, TRL among them, ask for them.
            kwargs: `output_hidden_states`, `output_attentions`, `return_dict`, and what the attention takes.

        Raises:
            ValueError: if not exactly one of `input_ids` and `inputs_embeds` is given, or two caches.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        cache = _one_cache(cache, past_key_values)
        if output_routing is None:
            output_routing = self.config.output_routing
        if output_router_logits is None:  # a setting of configurations with routers alone
            output_router_logits = getattr(self.config, "output_router_logits", False)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)

        # Packed documents are looked for only where a caller gave positions and no cache. A cache made
        # below, empty and by default there in training too, must not switch the search off.
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **named_cache(cache),
        )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past
            position_ids = position_ids.unsqueeze(0)

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        token_mask = _token_mask(attention_mask, inputs_embeds)
        routing: list[Routing] = []
        router_losses: list[Tensor] = []
        router_logits: list[Tensor] = []
        # Fewer than there are where `generate` drafts with the first blocks alone (`assistant_early_exit`).
        for layer in self.layers[: self.config.num_hidden_layers]:
            outputs = layer(
                hidden_states,
                attention_mask=causal_mask,
                token_mask=token_mask,
                position_ids=position_ids,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                output_routing=output_routing,
                output_router_logits=output_router_logits,
                **named_cache(cache),
                **kwargs,
            )
            if not isinstance(outputs, tuple):
                hidden_states = outputs
                continue
            hidden_states, *rest = outputs
            if layer.mlp_has_router_loss:
                router_losses += rest[:1] if layer.training else []
                router_logits += rest[1:]
            else:
                routing.append(Routing(*rest))

        return PeerModelOutput(
            last_hidden_state=self.norm(hidden_states),
            **named_cache(cache),
            routing=tuple(routing) if output_routing else None,
            router_loss=torch.stack(router_losses).sum() if router_losses else None,
            router_logits=tuple(router_logits) if output_router_logits else None,
        )


class PeerForCausalLM(PeerPreTrainedModel, GenerationMixin):
    """The decoder with an output layer that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = LlamaForCausalLM._tp_plan
    _pp_plan = LlamaForCausalLM._pp_plan

    def __init__(self, config: PeerConfig) -> None:
        super().__init__(config)
        self.model = PeerModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_language_model_loss
        if any(block.mlp_has_router_loss for block in self.model.layers):
            keep_router_loss_when_smoothing()
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
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> PeerCausalLMOutput:
        """Logits [batch, sequence, vocabulary] for the next token, and the loss if `labels` are given.

        Args:
            labels: [batch, sequence] token ids, not shifted; -100 where no loss is wanted. The loss is the
                mean over the labels, in nats per token; in training plus `router_loss`, where there is one.
            logits_to_keep: compute logits for that many last positions only (0: for all), or for the
                positions in a tensor: [positions] for all rows, [batch, positions] for each, or, bool,
                [batch, sequence], which gives logits [chosen, vocabulary].
            kwargs: also `num_items_in_batch`: the loss is then the labels' sum over it, so that the losses
                of accumulated micro-batches add up to the large batch's; a micro-batch's router loss counts
                by its share of the items.

        The other arguments are those of `PeerModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_routing=output_routing,
            cache=_one_cache(cache, past_key_values),
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
            if outputs.router_loss is not None:
                loss = loss + outputs.router_loss * _share_of_items(labels, **kwargs)
        return PeerCausalLMOutput(
            loss=loss,
            logits=logits,
            **named_cache(outputs.cache),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            routing=outputs.routing,
            router_loss=outputs.router_loss,
            router_logits=outputs.router_logits,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which in training mode warns where what it reads would move statistics."""
        if any(isinstance(module, MaskedBatchNorm) and module.training for module in self.modules()):
            warnings.warn(
                "generate() in training mode moves BatchNorm's running statistics, and what a row gives "
                "depends on the rows beside it: call .eval() first",
                stacklevel=2,
            )
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"{describe(self)}\n{super().__repr__()}"


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache under its name of transformers 5.24 and later, or under the one before."""
    if cache is not None and past_key_values is not None and cache is not past_key_values:
        raise ValueError("cache and past_key_values are two names of one argument: give one of them")
    return past_key_values if cache is None else cache


def _positions(hidden_states: Tensor, keep: int | Tensor) -> Tensor:
    """The hidden states for which logits are wanted (see `logits_to_keep`)."""
    if isinstance(keep, int):
        return hidden_states[:, -keep:]
    if keep.ndim == 1:
        return hidden_states[:, keep]
    if keep.dtype == torch.bool:
        return hidden_states[keep]
    return hidden_states.take_along_dim(keep[..., None], 1)


def _token_mask(attention_mask: Tensor | None, inputs_embeds: Tensor) -> Tensor | None:
    """[batch, sequence] bool, True for a real token. With a cache the current tokens come last."""
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -inputs_embeds.shape[1] :].to(inputs_embeds.device).bool()


def _share_of_items(
    labels: Tensor,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The arguments are those of the loss."""
    targets = labels[:, 1:] if shift_labels is None else shift_labels
    return share_of_items(targets, num_items_in_batch, ignore_index)
