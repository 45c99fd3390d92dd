"""Models built without numbers: accelerate's empty weights, the meta device, fake tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from torch._subclasses.fake_tensor import FakeTensorMode

from million_experts.models import PeerForCausalLM

KINDS = ("peer", "pkm", "memory_plus", "moe", "swiglu", "expert_choice")
GROUPED = ("moe", "expert_choice")  # how many tokens an expert gets is a size, unknown without numbers
LAYER = {"num_heads": 2, "experts_per_head": 4, "key_dim": 8}


def settings_of(kind: str) -> dict:
    sizes = {
        "peer": {"num_experts": 64, **LAYER},
        "pkm": {"num_experts": 64, **LAYER},
    }
    return {"mlp_layer_types": ["dense", kind]} | ({kind: sizes[kind]} if kind in sizes else {})


@pytest.mark.parametrize("include_buffers", [False, True])
@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
def test_empty_weights_are_filled_from_a_checkpoint(
    include_buffers, query_norm, tiny_config, tiny_model, tokens, tmp_path
):
    model = tiny_model(peer={"query_norm": query_norm, "shared_width": 4})
    model(tokens)
    model.eval().save_pretrained(tmp_path)
    with init_empty_weights(include_buffers=include_buffers):
        empty = PeerForCausalLM(tiny_config(peer={"query_norm": query_norm, "shared_width": 4}))
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.tie_weights()
    if include_buffers:  # no checkpoint has the frequencies; Llama's are lost as well
        empty.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    weights = str(tmp_path / "model.safetensors")
    loaded = load_checkpoint_and_dispatch(empty.eval(), weights, device_map={"": "cpu"})
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_built_empty(kind, tiny_config):
    for include_buffers in (False, True):
        with init_empty_weights(include_buffers=include_buffers):
            model = PeerForCausalLM(tiny_config(**settings_of(kind)))
        assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in GROUPED])
def test_fake_models_give_fake_outputs(kind, training, tiny_config):
    with FakeTensorMode():
        model = PeerForCausalLM(tiny_config(**settings_of(kind))).train(training)
        tokens = torch.ones(2, 8, dtype=torch.int64)
        output = model(tokens, torch.ones_like(tokens), labels=tokens)
        output.loss.backward()
        assert output.logits.shape == (2, 8, 50)
        block = model.model.layers[1]
        assert all(parameter.grad.shape == parameter.shape for parameter in block.parameters())
