"""With SwiGLU in every block the decoder is Llama, and honours what that honours."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaPreTrainedModel

from million_experts.models import PeerConfig, PeerForCausalLM, PeerModel, PeerPreTrainedModel

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
# What Llama's parts are called in ours: its `gate_proj` is activated, our `down`.
PARTS = {"gate_proj": "down", "up_proj": "gate", "down_proj": "up"}


def pair(**settings):
    """Llama and ours with the same weights."""
    torch.manual_seed(0)
    settings = {**SIZES, **settings}
    llama = LlamaForCausalLM(LlamaConfig(intermediate_size=24, **settings))
    ours = PeerForCausalLM(PeerConfig(mlp_layer_types="swiglu", swiglu={"width": 24}, **settings))
    weights = {}
    for name, weight in llama.state_dict().items():
        for theirs, own in PARTS.items():
            name = name.replace(f"mlp.{theirs}", f"mlp.{own}")
        weights[name] = torch.randn_like(weight) if name.endswith(".bias") else weight
    ours.load_state_dict(weights)
    llama.load_state_dict(dict(zip(llama.state_dict(), weights.values(), strict=True)))
    return llama.eval(), ours.eval()


def tensors(outputs):
    """All that an output holds but for its cache."""
    if isinstance(outputs, tuple):
        return [o for o in outputs if not hasattr(o, "get_seq_length")]
    return {k: v for k, v in outputs.items() if k not in ("cache", "past_key_values")}


def assert_same_outputs(llama, ours, *args, **call):
    assert_close(tensors(ours(*args, **call)), tensors(llama(*args, **call)))


CONFIGURATIONS = {
    "grouped heads": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "wide heads": {"head_dim": 12},
    "biases": {"attention_bias": True},
    "tied": {"tie_word_embeddings": True},
    "epsilon": {"rms_norm_eps": 0.3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}},
    "theta by its older name": {"rope_theta": 7.0},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
    "yarn": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 2.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 8,
        }
    },
    "llama3": {
        "rope_parameters": {
            "rope_type": "llama3",
            "factor": 2.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 8,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        }
    },
    "scaling by its older name": {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "no cache": {"use_cache": False},
    "hidden states": {"output_hidden_states": True},
    "attentions": {"output_attentions": True, "attn_implementation": "eager"},
    "both ways": {"is_causal": False},
    "eager": {"attn_implementation": "eager"},
    "flex": {"attn_implementation": "flex_attention", "num_attention_heads": 1, "head_dim": 16},
    "remote attributes": {"pretraining_tp": 2},
}


@torch.no_grad()  # flex attention has no backward pass on a CPU
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n == "flex" else n for n in CONFIGURATIONS]
)
def test_a_configuration_means_what_it_means_in_llama(name):
    llama, ours = pair(**CONFIGURATIONS[name])
    ids = torch.randint(1, 50, (2, 20))  # beyond max_position_embeddings: dynamic frequencies change there
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    assert_same_outputs(llama, ours, ids)
    real = mask.bool()
    theirs, own = (m(ids, attention_mask=mask, return_dict=True).logits for m in (llama, ours))
    assert_close(own[real], theirs[real])


def positions(*starts):
    return torch.tensor([[*range(s), *range(8 - s)] for s in starts])


IDS = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(1))
LABELS = IDS.masked_fill(IDS % 5 == 0, -100)
CALLS = {
    "positions": {"position_ids": torch.arange(3, 11)[None]},
    "packed documents": {"position_ids": positions(3, 5), "use_cache": False},
    "a mask of four dimensions": {"attention_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool).tril(1)},
    "no cache": {"use_cache": False},
    "hidden states": {"output_hidden_states": True},
    "a tuple": {"return_dict": False},
    "both ways": {"is_causal": False},
    "the last two logits": {"logits_to_keep": 2},
    "some logits": {"logits_to_keep": torch.tensor([1, 4])},
    "labels": {"labels": LABELS},
    "labels in a tuple": {"labels": LABELS, "return_dict": False},
    "a number of items": {"labels": LABELS, "num_items_in_batch": 20},
    "items in a tensor": {"labels": LABELS, "num_items_in_batch": torch.tensor(20)},
    "labels shifted already": {"labels": LABELS, "shift_labels": LABELS.roll(1, 1)},
    "another index to ignore": {"labels": LABELS.clamp(min=0), "ignore_index": 0},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_means_what_it_means_in_llama(name):
    llama, ours = pair()
    assert_same_outputs(llama, ours, IDS, **CALLS[name])
    embeddings = llama.get_input_embeddings()(IDS)
    assert_same_outputs(llama, ours, inputs_embeds=embeddings, **CALLS[name])
    own = {k: v for k, v in CALLS[name].items() if k not in ("labels", "logits_to_keep")}
    if own == CALLS[name]:
        assert_same_outputs(llama.model, ours.model, IDS, **own)


def test_attentions_can_be_asked_for_in_a_call():
    llama, ours = pair(attn_implementation="eager")
    assert_same_outputs(llama, ours, IDS, output_attentions=True, output_hidden_states=True)


def test_logits_of_chosen_tokens_of_each_row():
    """By positions or a mask, as the newer versions of transformers take them; all of ours do."""
    _, ours = pair()
    logits = ours(IDS).logits
    chosen = torch.tensor([[0, 5], [7, 2]])
    assert_close(ours(IDS, logits_to_keep=chosen).logits, logits[torch.arange(2)[:, None], chosen])
    assert_close(ours(IDS, logits_to_keep=LABELS > 9).logits, logits[LABELS > 9])


def test_only_as_many_blocks_work_as_the_configuration_says():
    """`generate(assistant_early_exit=...)` counts on it."""
    llama, ours = pair()
    whole = ours(IDS).logits
    for model in (llama, ours):
        model.config.num_hidden_layers = 1
    assert_same_outputs(llama, ours, IDS)
    assert not torch.allclose(ours(IDS).logits, whole)


def test_training_is_the_same_with_dropout_and_checkpoints():
    llama, ours = pair(attention_dropout=0.5, attn_implementation="eager")
    found = []
    for model in (llama, ours):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        loss = model(IDS, labels=LABELS).loss
        loss.backward()
        found.append((loss.detach(), model.model.embed_tokens.weight.grad))
    assert_close(*found)


@pytest.mark.parametrize(
    ("llama", "ours"),
    [
        (LlamaPreTrainedModel, PeerPreTrainedModel),
        (LlamaModel, PeerModel),
        (LlamaForCausalLM, PeerForCausalLM),
    ],
)
def test_classes_say_of_themselves_what_llamas_say(llama, ours):
    """Whatever flags a version of transformers knows: what they support, and what may be compiled."""
    flags = [
        n for n in dir(llama) if n.startswith(("_supports", "_can_compile", "supports_", "_is_stateful"))
    ]
    assert len(flags) > 5
    for name in flags:
        if isinstance(getattr(llama, name), bool):
            assert getattr(ours, name) == getattr(llama, name), name
    skipped = llama._skip_keys_device_placement
    assert set(skipped) <= set(ours._skip_keys_device_placement)


@pytest.mark.parametrize(
    ("name", "value", "own"),
    [
        ("intermediate_size", 64, "width"),
        ("hidden_act", "silu", "activation"),
        ("mlp_bias", True, "no biases"),
    ],
)
def test_settings_of_llamas_feed_forward_are_not_passed_over(name, value, own):
    with pytest.raises(ValueError, match=rf"'{name}' .*{own}"):
        PeerConfig(**SIZES, **{name: value})
