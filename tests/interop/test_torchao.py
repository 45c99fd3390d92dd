"""Weights quantised by torchao: tensor subclasses, which no kernel may read as plain memory."""

from __future__ import annotations

import pytest

pytest.importorskip("torchao", reason="needs the extra `interop`")

import copy

import torch
from torch import nn
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    quantize_,
)
from torchao.quantization.granularity import PerAxis
from transformers import TorchAoConfig

from million_experts.models import PeerForCausalLM

PROGRAM = "torchao"
INT4 = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerAxis(0))
WEIGHT_ONLY = {"int8": Int8WeightOnlyConfig(), "int4": INT4, "float8": Float8WeightOnlyConfig()}


def dequantised(model: nn.Module) -> nn.Module:
    """A copy whose quantised weights are plain tensors of the values that they stand for."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.Linear) and type(module.weight) is not nn.Parameter:
            module.weight = nn.Parameter(module.weight.dequantize())
    return plain


@pytest.mark.parametrize("config", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_a_quantised_layer_computes_with_what_the_codes_stand_for(layer, run_layer, assert_close, config):
    """`quantize_` of a layer, weights in int8, int4 and float8: as with the dequantised weights"""
    quantize_(layer, config)
    assert type(layer.query_proj.weight) is not nn.Parameter
    plain = dequantised(layer)
    assert type(plain.query_proj.weight) is nn.Parameter
    assert_close(run_layer(layer), run_layer(plain))


def test_quantised_activations(layer, run_layer):
    """`quantize_` of a layer, weights and activations in int8: 24 tokens and 4 give the same"""
    before = run_layer(layer)
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    # Another expert may come before one that scores the same to 8 bits; most outputs hardly move.
    error = (run_layer(layer) - before).abs().amax(-1) / before.abs().max()
    assert error.median() < 0.05


@pytest.mark.parametrize("config", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY)
def test_a_quantised_model(any_model, run_model, tokens, assert_close, config):
    """`quantize_` of a model, each kind of feed-forward: as with dequantised weights, and `generate`"""
    model = any_model()
    quantize_(model, config)
    logits = run_model(model)
    assert_close(logits, run_model(dequantised(model)))
    made = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(made[:, 12], logits[:, -1].argmax(-1))


def test_from_pretrained_quantises(make_model, run_model, assert_close, tmp_path):
    """`from_pretrained(quantization_config=TorchAoConfig(...))`"""
    make_model().save_pretrained(tmp_path)
    model = PeerForCausalLM.from_pretrained(
        tmp_path, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu"
    )
    assert type(model.model.layers[1].mlp.query_proj.weight) is not nn.Parameter
    assert type(model.model.layers[1].mlp.experts) is nn.Parameter
    assert_close(run_model(model), run_model(dequantised(model)))


def test_a_quantised_model_is_saved_and_loaded(make_model, run_model, tmp_path):
    """A model quantised by `TorchAoConfig`, saved and loaded again"""
    make_model().save_pretrained(tmp_path / "plain")
    settings = {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig()), "device_map": "cpu"}
    model = PeerForCausalLM.from_pretrained(tmp_path / "plain", **settings)
    model.save_pretrained(tmp_path / "quantised")
    again = PeerForCausalLM.from_pretrained(tmp_path / "quantised", device_map="cpu")
    assert torch.equal(run_model(again), run_model(model))


def test_lora_beside_quantised_weights(make_model, tokens):
    """LoRA of PEFT on a model quantised by torchao: the adapter of `query_proj` gets gradients"""
    import peft

    model = make_model()
    quantize_(model, Int8WeightOnlyConfig())
    config = peft.LoraConfig(target_modules=["query_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model(input_ids=tokens, labels=tokens).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 2
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)
