"""Mixtral's names for what other programs ask about routers, and the logits of which they make its loss."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from torch.testing import assert_close
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from million_experts.models import PeerConfig, PeerForCausalLM

MOE = {"num_experts": 4, "experts_per_token": 2, "router_loss_coef": 0.3}
NAMES = ("num_experts", "num_experts_per_tok", "router_aux_loss_coef", "output_router_logits")


def mixture(tiny_model, kinds=("dense", "moe"), **settings):
    return tiny_model(num_hidden_layers=len(kinds), mlp_layer_types=list(kinds), moe=MOE, **settings)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [None, True, False])  # or None: reentrant or not
def test_mixtrals_function_gives_the_routers_loss(tiny_model, tokens, padded, checkpointing):
    model = mixture(tiny_model).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    mask = None
    if padded:
        mask = torch.ones_like(tokens)
        mask[0, :5] = 0
    weight, config = model.model.layers[1].mlp.router.weight, model.config
    losses, gradients = [], []
    for whose in ("ours", "Mixtral's"):
        outputs = model(tokens, attention_mask=mask, output_router_logits=True)
        loss = outputs.router_loss
        if whose == "Mixtral's":
            loss = config.router_aux_loss_coef * load_balancing_loss_func(
                outputs.router_logits, config.num_experts, config.num_experts_per_tok, mask
            )
        losses.append(loss.detach())
        weight.grad = None
        loss.backward()
        gradients.append(weight.grad)
    assert_close(*losses)
    assert_close(*gradients)
    assert gradients[0].abs().max() > 1e-4


def test_the_factor_is_that_of_a_mean_over_layers(tiny_model, tokens):
    model = mixture(tiny_model, ("moe", "dense", "moe"))
    assert model.config.router_aux_loss_coef == pytest.approx(0.6)
    with torch.no_grad():
        for block in (model.model.layers[0], model.model.layers[2]):
            block.mlp.router.weight.zero_()  # even probabilities: both definitions give k
    outputs = model.train()(tokens, output_router_logits=True)
    assert [tuple(logits.shape) for logits in outputs.router_logits] == [(tokens.numel(), 4)] * 2
    loss = 0.6 * load_balancing_loss_func(outputs.router_logits, 4, 2)
    assert_close(loss, outputs.router_loss)
    assert_close(loss, torch.tensor(0.6 * 2))


def test_logits_change_nothing_else(tiny_model, tokens):
    model = mixture(tiny_model)
    for mode in (model.train(), model.eval()):
        plain = mode(tokens, labels=tokens)
        asked = mode(tokens, labels=tokens, output_router_logits=True)
        assert plain.router_logits is None
        assert len(asked.router_logits) == 1
        assert torch.equal(plain.loss, asked.loss)
        assert (asked.router_loss is None) == (not mode.training)
    model.config.output_router_logits = True
    assert len(model(tokens).router_logits) == 1
    assert model(tokens, output_router_logits=False).router_logits is None


@pytest.mark.parametrize("kind", ["peer", "expert_choice", "dense"])
def test_other_configurations_have_none_of_the_names(tiny_model, tokens, kind):
    for extra in ({}, {"moe": MOE}):  # arguments of a kind that no layer has
        config = PeerConfig(num_hidden_layers=1, mlp_layer_types=kind, **extra)
        assert not any(hasattr(config, name) for name in NAMES)
        with pytest.raises(AttributeError, match="'moe' layers"):
            config.output_router_logits = True


def test_none_is_stored(tmp_path):
    config = PeerConfig(num_hidden_layers=3, mlp_layer_types="moe", moe=MOE | {"router_loss_coef": 0.1})
    before = config.to_dict()
    config.router_aux_loss_coef = config.router_aux_loss_coef  # as TRL does
    config.output_router_logits = True
    for other in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert other.output_router_logits
    assert config.to_dict() == before
    config.save_pretrained(tmp_path)
    assert not set(NAMES) & json.loads((tmp_path / "config.json").read_text()).keys()
    again = PeerConfig.from_pretrained(tmp_path)
    assert again.moe == config.moe
    assert not again.output_router_logits
    assert not hasattr(PeerConfig.from_pretrained(tmp_path, mlp_layer_types="dense"), "num_experts")


def test_a_factor_is_set_for_each_layer():
    config = PeerConfig(num_hidden_layers=2, mlp_layer_types="moe", moe=MOE)
    config.router_aux_loss_coef = 0.5
    assert config.moe["router_loss_coef"] == 0.25
    with pytest.raises(ValueError, match="router_loss_coef must be at least 0"):
        config.router_aux_loss_coef = -1.0
    assert config.moe["router_loss_coef"] == 0.25


@pytest.mark.parametrize(
    ("name", "ours"),
    [("num_experts_per_tok", "experts_per_token"), ("router_aux_loss_coef", "router_loss_coef")],
)
def test_mixtrals_names_are_not_given(name, ours):
    with pytest.raises(ValueError, match=f"{name}.*{ours}"):
        PeerConfig(mlp_layer_types="moe", **{name: 2})


def test_the_layer_returns_what_is_asked_for():
    from million_experts.layers import TokenChoiceMoE

    layer, x = TokenChoiceMoE(8, 4, width=8), torch.randn(2, 3, 8)
    y, loss, logits = layer(x, return_router_loss=True, return_router_logits=True)
    assert logits.shape == (6, 4)
    assert_close(logits, layer.router(x).flatten(0, 1))
    for asked, expected in (
        ({"return_router_loss": True}, [y, loss]),
        ({"return_router_logits": True}, [y, logits]),
    ):
        got = layer(x, **asked)
        assert len(got) == 2
        assert all(map(torch.equal, got, expected))
    assert torch.equal(layer(x), y)


def test_a_saved_model_trained_by_others_loads(tiny_model, tokens, tmp_path):
    model = mixture(tiny_model).eval()
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path)
    again = PeerForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert again(tokens).router_logits is None
