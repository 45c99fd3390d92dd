"""`PeerConfig`: the configuration of a decoder whose feed-forwards may be PEER layers or its competitors."""

import os
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import CONFIG_NAME

from million_experts._arguments import did_you_mean

from .feed_forwards import FEED_FORWARDS, check_feed_forward, complete_arguments
from .hub import AUTO_MAP, write_module
from .registration import register_models
from .router_settings import RouterSettings
from .weights import read_json_object

__all__ = ["PeerConfig"]

# Larger ones are damage, not models: a file may say anything, and each layer that it names is built, if only
# on the meta device. Products of two sizes stay within what a tensor can address.
MAX_LAYERS = 10_000
MAX_SIZE = 2**30
SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)


@strict  # which checks the fields' types, as long as their annotations are no strings
class PeerConfig(RouterSettings, PreTrainedConfig):
    """Configuration of `PeerModel` and `PeerForCausalLM`.

    Attention, norms and rotary embeddings are Llama's and so are the names of their settings. The
    feed-forward of each layer is chosen by `mlp_layer_types` and set up by one dict for each kind in use:

        PeerConfig(hidden_size=256, num_hidden_layers=3, num_attention_heads=4,
                   mlp_layer_types=["dense", "peer", "dense"],
                   peer=dict(num_experts=128**2), dense=dict(width=1024))

    Args:
        vocab_size: number of tokens in the vocabulary.
        hidden_size: width D of the residual stream; a multiple of `num_attention_heads`.
        num_hidden_layers: number of blocks, each of one attention and one feed-forward.
        num_attention_heads: number of query heads.
        num_key_value_heads: number of key and value heads; None means `num_attention_heads`.
        head_dim: width of an attention head; None means `hidden_size // num_attention_heads`.
        max_position_embeddings: longest sequence, in tokens.
        rope_parameters: rotary embeddings in transformers' form, e.g.
            `{"rope_type": "default", "rope_theta": 10000.0}`.
        rms_norm_eps: epsilon of the RMS norms.
        attention_dropout: probability of dropping an attention weight in training.
        attention_bias: whether the attention's projections have a bias.
        initializer_range: standard deviation of embeddings and linear layers at the start. The output
            projections of attention get it divided by sqrt(2 * num_hidden_layers). Feed-forwards
            initialise themselves. The output matrices of dense ones, of full-size experts and of Memory+ are
            divided by the same root; PEER's `init_std` and PKM's paper say how large their outputs are.
        tie_word_embeddings: whether the output layer is the embedding table.
        use_cache: whether the forward pass returns keys and values for generation.
        output_routing: whether the forward pass returns the routing of each layer with product keys:
            PEER and both memories.
        mlp_layer_types: the kind of each layer's feed-forward, or one kind for all layers. None follows
            the paper: `"peer"` in the middle block, which is block `num_hidden_layers // 2` counted
            from 0, and `"dense"` in the others.
        peer: arguments of `million_experts.layers.PEER`, all but `dim`.
        dense: arguments of `million_experts.layers.DenseFeedForward`, all but `dim`.
        swiglu: the same, by default with `activation="silu"` and `glu=True`.
        moe: those of `TokenChoiceMoE`, whose balancing loss is added to the model's in training.
        expert_choice: those of `ExpertChoiceMoE`, which is not causal in training.
        pkm: those of `ProductKeyMemory`.
        memory_plus: those of `MemoryPlus`.
        share_memory_values: whether all `"memory_plus"` layers share one table of values, as in the paper.

    The dicts are completed with the layers' defaults when their kind is in use, so that a stored
    configuration says everything. `from_pretrained(path, peer={...})` changes only the arguments named.

    Raises:
        ValueError: if a kind or an argument does not exist, has an impossible value, or if
            `mlp_layer_types` has not one entry per layer.
    """

    model_type = "peer"
    keys_to_ignore_at_inference = ["cache", "past_key_values", "routing", "router_logits"]  # noqa: RUF012 (no field)
    default_theta = 10000.0
    # Tensor parallelism cuts the attention as Llama's; each rank has the feed-forwards whole.
    base_model_tp_plan = {  # noqa: RUF012
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
    }
    base_model_pp_plan = {  # noqa: RUF012
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rope_parameters: dict[str, Any] | None = None
    rms_norm_eps: float | int = 1e-6
    attention_dropout: float | int = 0.0
    attention_bias: bool = False
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    output_routing: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mlp_layer_types: str | list[str] | tuple[str, ...] | None = None
    peer: dict[str, Any] | None = None
    dense: dict[str, Any] | None = None
    swiglu: dict[str, Any] | None = None
    moe: dict[str, Any] | None = None
    expert_choice: dict[str, Any] | None = None
    pkm: dict[str, Any] | None = None
    memory_plus: dict[str, Any] | None = None
    share_memory_values: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_misplaced(kwargs)
        # Both are written out below, one entry for each.
        for name, size in {
            "num_hidden_layers": self.num_hidden_layers,
            "num_labels": kwargs.get("num_labels"),
        }.items():
            if isinstance(size, int) and size > MAX_LAYERS:
                raise ValueError(f"{name} must be at most {MAX_LAYERS}, got {size}")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // max(1, self.num_attention_heads)
        if self.rope_parameters is not None:
            self.rope_parameters = dict(self.rope_parameters)  # transformers completes it in place

        layers = self.num_hidden_layers
        if self.mlp_layer_types is None:
            self.mlp_layer_types = ["peer" if i == layers // 2 else "dense" for i in range(layers)]
        elif isinstance(self.mlp_layer_types, str):
            self.mlp_layer_types = [self.mlp_layer_types] * layers
        else:
            self.mlp_layer_types = list(self.mlp_layer_types)
        for kind in FEED_FORWARDS:
            if kind in self.mlp_layer_types or getattr(self, kind) is not None:
                setattr(self, kind, complete_arguments(kind, getattr(self, kind)))

        super().__post_init__(**kwargs)
        if type(self) is PeerConfig:  # what a folder said is not carried on into the next one
            self.auto_map = dict(AUTO_MAP)
        # `strict` wraps what validators raise in an error that is no ValueError: run them before it does.
        self.validate_architecture()
        self.validate_layer_type()
        register_models()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # An unpickled configuration never ran `__post_init__` in this process.
        self.__dict__.update(state)
        register_models()

    def validate_architecture(self) -> None:
        """Raise ValueError if the attention's sizes do not fit together."""
        for name in SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) > MAX_SIZE:
                raise ValueError(f"{name} must be at most {MAX_SIZE}, got {getattr(self, name)}")
        heads = self.num_attention_heads
        head_dim = self.hidden_size // heads if self.head_dim is None else self.head_dim
        if head_dim == self.hidden_size // heads and self.hidden_size % heads != 0:
            raise ValueError(
                f"hidden_size ({self.hidden_size}) must be a multiple of num_attention_heads ({heads})."
            )
        rope = self.rope_parameters or {}
        if rope.get("rope_type", "default") not in {"default", *ROPE_INIT_FUNCTIONS}:
            known = ", ".join(sorted({"default", *ROPE_INIT_FUNCTIONS}))
            raise ValueError(f"rope_type must be one of {known}, got {rope['rope_type']!r}")
        if not isinstance(theta := rope.get("rope_theta", 1.0), int | float) or not theta > 0:
            raise ValueError(f"rope_theta must be a positive number, got {theta!r}")
        if head_dim * heads > MAX_SIZE:
            raise ValueError(f"head_dim ({head_dim}) times {heads} heads must be at most {MAX_SIZE}.")
        if head_dim < 1 or head_dim % 2 != 0:
            raise ValueError(f"head_dim ({head_dim}) must be even: rotary embeddings turn pairs.")
        groups = heads if self.num_key_value_heads is None else self.num_key_value_heads
        if groups < 1 or heads % groups != 0:
            raise ValueError(
                f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})."
            )

    def validate_layer_type(self) -> None:
        """Raise ValueError if `mlp_layer_types` or the arguments of a kind are wrong.

        Replaces transformers' check of the same name, which knows other kinds than ours.
        """
        kinds = cast("list[str]", self.mlp_layer_types)
        if len(kinds) != self.num_hidden_layers:
            raise ValueError(
                f"mlp_layer_types has {len(kinds)} entries for num_hidden_layers={self.num_hidden_layers}: "
                "give one for each layer, or one string for all."
            )
        for kind in kinds:
            if not isinstance(kind, str) or kind not in FEED_FORWARDS:
                raise ValueError(
                    f"mlp_layer_types has no kind {kind!r}{did_you_mean(kind, FEED_FORWARDS)}; "
                    f"allowed: {', '.join(sorted(FEED_FORWARDS))}"
                )
        for kind in FEED_FORWARDS:
            if getattr(self, kind) is not None:
                check_feed_forward(kind, self.hidden_size, getattr(self, kind))

    def to_json_file(self, json_file_path: str | os.PathLike, use_diff: bool = True) -> None:
        """Write this configuration, and beside it what programs need that never import this package.

        Every way to save or push a model or a configuration comes through here.
        """
        write_module(Path(json_file_path).parent)
        super().to_json_file(json_file_path, use_diff)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Only for derived classes: transformers would save a copy of this file beside every model."""
        if cls is not PeerConfig:
            super().register_for_auto_class(auto_class)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a folder's config.json says.

        Raises:
            ValueError: it is no JSON object.
        """
        if os.path.isfile(path := Path(pretrained_model_name_or_path) / CONFIG_NAME):
            read_json_object(path)
        return super().get_config_dict(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration in `config_dict`, changed by `kwargs`.

        A dict for a kind of feed-forward is merged into the stored one; transformers would put it in the
        stored one's place. Changes are made before the configuration is checked, not after.
        """
        config_dict = dict(config_dict)
        own = {f.name for f in fields(cls)} - {f.name for f in fields(PreTrainedConfig)}
        for name in own & kwargs.keys():
            value = kwargs.pop(name)
            if name in FEED_FORWARDS and isinstance(value, dict):
                value = {**(config_dict.get(name) or {}), **value}
            config_dict[name] = value
        if not isinstance(kind := config_dict.get("model_type", cls.model_type), str | None):
            raise ValueError(f"model_type must be text, got {kind!r}")
        if not isinstance(dtype := config_dict.get("dtype"), str | torch.dtype | None):
            raise ValueError(f"dtype must be text, got {dtype!r}")
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:  # no ValueError, though all it says is that a value is wrong
            raise ValueError(str(error.__cause__ or error)) from error
        except (
            AttributeError,
            KeyError,
            TypeError,
        ) as error:  # a value of a kind that transformers never meets
            raise ValueError(f"the configuration has a value that cannot be read: {error}") from error


# What Llama calls the settings of its feed-forward, and what stands for them here.
_LLAMAS = {
    "intermediate_size": "give the width of a kind's layers, as in dense=dict(width=...)",
    "hidden_act": "give the activation of a kind's layers, as in dense=dict(activation=...)",
    "mlp_bias": "the feed-forwards have no biases",
}

# What Mixtral calls the settings of its experts: programs read these names, nobody gives them.
_MIXTRALS = {"num_experts_per_tok": "experts_per_token", "router_aux_loss_coef": "router_loss_coef"}


def _refuse_misplaced(kwargs: dict[str, Any]) -> None:
    # transformers keeps unknown settings as attributes: `PeerConfig(num_experts=...)` would do nothing.
    for name, value in kwargs.items():
        for kind, spec in FEED_FORWARDS.items():
            if name in spec.arguments:
                raise ValueError(
                    f"{name!r} is an argument of the {kind!r} layers: give {kind}=dict({name}=...)."
                )
        if name in _MIXTRALS:
            raise ValueError(f"{name!r} is Mixtral's name: give moe=dict({_MIXTRALS[name]}=...).")
        if value and name in _LLAMAS:
            raise ValueError(
                f"{name!r} is a setting of Llama's feed-forward, got {value!r}: {_LLAMAS[name]}."
            )
