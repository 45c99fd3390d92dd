"""Linear layers of bitsandbytes, in 8 and 4 bits, as they run on a CPU."""

from __future__ import annotations

import pytest

pytest.importorskip("bitsandbytes", reason="needs the extra `interop`")

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import BitsAndBytesConfig

from million_experts.models import PeerForCausalLM

PROGRAM = "bitsandbytes"


def eight_bits(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


def four_bits(linear: nn.Linear) -> nn.Module:
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
    made.load_state_dict(linear.state_dict())
    return made.to("cpu")


QUANTISE = {"8 bits": eight_bits, "4 bits": four_bits}


class Calls(nn.Module):
    """Nothing of the module inside can be had but what it computes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = [module]

    def forward(self, x):
        return self.module[0](x)


@pytest.mark.parametrize("quantise", QUANTISE.values(), ids=QUANTISE)
def test_a_quantised_query_projection(layer, run_layer, x, assert_close, quantise):
    """`Linear8bitLt` and `Linear4bit` for `query_proj`: what they compute is what the layer takes"""
    with torch.no_grad():
        plain = layer.query_proj(x)
        quantised = quantise(layer.query_proj)
        error = (quantised(x) - plain).norm() / plain.norm()
    assert 0 < error < 0.15  # the quantised layer itself is sound
    layer.query_proj = Calls(quantised)
    expected = run_layer(layer)
    layer.query_proj = quantised
    assert_close(run_layer(layer), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_from_pretrained_quantises(make_model, run_model, assert_close, tmp_path, bits):
    """`from_pretrained(quantization_config=BitsAndBytesConfig(...))` in 8 and in 4 bits"""
    plain = make_model()
    plain.save_pretrained(tmp_path)
    model = PeerForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}),
        device_map="cpu",
        dtype=torch.float32,
    )
    mlp = model.model.layers[1].mlp
    assert isinstance(mlp.query_proj, bnb.nn.Linear8bitLt if bits == 8 else bnb.nn.Linear4bit)
    assert mlp.experts.dtype == torch.float32
    expected, logits = run_model(plain), run_model(model)
    if bits == 8:  # most tokens find the experts that they found before
        assert ((logits - expected).norm(dim=-1) / expected.norm(dim=-1)).median() < 0.1
    mlp.query_proj = Calls(mlp.query_proj)
    assert_close(logits, run_model(model))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_model_generates(make_model, run_model, tokens, tmp_path, bits):
    """`generate` of a model in 8 and in 4 bits: greedy text is what the logits say"""
    make_model().save_pretrained(tmp_path)
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = PeerForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    made = model.generate(tokens, max_new_tokens=4, do_sample=False)
    assert torch.equal(made[:, 12], run_model(model)[:, -1].argmax(-1))


def test_adapters_beside_eight_bits(make_model, tokens, tmp_path):
    """LoRA of PEFT on a model in 8 bits: the adapter of `query_proj` gets gradients"""
    import peft

    make_model().save_pretrained(tmp_path)
    model = PeerForCausalLM.from_pretrained(
        tmp_path,
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
        device_map="cpu",
        dtype=torch.float32,
    )
    config = peft.LoraConfig(target_modules=["query_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model(input_ids=tokens, labels=tokens).loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert len(grads) == 2
    assert all(grad is not None and grad.abs().max() > 0 for grad in grads)


def test_an_optimiser_of_eight_bits(make_model, tokens):
    """`AdamW8bit` trains a model"""
    model = make_model().train()
    optimizer = bnb.optim.AdamW8bit(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
