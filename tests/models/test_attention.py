"""Attention that is computed in float32: transformers' own, whatever the dtypes."""

from __future__ import annotations

import pytest
import torch

from million_experts.models import PeerForCausalLM
from million_experts.models.attention import WIDE_ATTENTION


def logits_and_gradients(model, implementation, **inputs):
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(**inputs).logits
    logits.float().square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("key_value_heads", [1, 2])
def test_in_float32_it_is_that_of_transformers(tiny_model, tokens, padded, key_value_heads):
    model = tiny_model(num_attention_heads=2, num_key_value_heads=key_value_heads)
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, -3:] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask}
    ours, theirs = (logits_and_gradients(model, name, **inputs) for name in (WIDE_ATTENTION, "sdpa"))
    real = mask.bool()
    assert torch.equal(ours[0][real], theirs[0][real])
    assert all(torch.equal(ours[1][name], gradient) for name, gradient in theirs[1].items())


def test_bfloat16_is_widened_and_comes_back(tiny_model, tokens, monkeypatch):
    model = tiny_model()
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **kwargs):
        output = attention(query, key, value, **kwargs)
        seen.append((query.dtype, key.dtype, value.dtype, output.dtype))
        return output

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    model.set_attn_implementation(WIDE_ATTENTION)
    with torch.autocast("cpu", torch.bfloat16):
        wide = model(tokens).logits
    assert set(seen) == {(torch.float32,) * 4}
    model.set_attn_implementation("sdpa")
    with torch.autocast("cpu", torch.bfloat16):
        narrow = model(tokens).logits
    exact = model(tokens).logits
    assert wide.dtype == narrow.dtype == torch.bfloat16
    assert (wide - exact).square().mean() <= 1.1 * (narrow - exact).square().mean()


def test_a_model_in_bfloat16_stays_so(tiny_model, tokens):
    model = tiny_model().bfloat16()
    B, L = tokens.shape
    causal = torch.full((B, 1, L, L), -torch.inf, dtype=torch.bfloat16).triu(1)
    model.set_attn_implementation(WIDE_ATTENTION)
    ours = [model(tokens, attention_mask=mask).logits for mask in (None, causal)]
    assert {logits.dtype for logits in ours} == {torch.bfloat16}
    assert torch.equal(*ours)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(ours[0], model(tokens).logits, rtol=0.1, atol=0.1)


def test_a_saved_model_does_not_ask_for_it(tiny_model, tmp_path):
    model = tiny_model()
    model.set_attn_implementation(WIDE_ATTENTION)
    model.save_pretrained(tmp_path)
    assert WIDE_ATTENTION not in (tmp_path / "config.json").read_text()
    assert PeerForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
