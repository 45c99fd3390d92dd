"""generate(): caches and padding must not change what is generated."""

import warnings

import pytest
import torch
from torch.testing import assert_close


@pytest.fixture
def model(tiny_model, tokens):
    """In eval mode, with weights large enough that no two logits are close, and moved statistics."""
    model = tiny_model(peer={"query_norm": "batch"}, num_key_value_heads=1, initializer_range=0.5)
    model(tokens)
    return model.eval()


def generate(model, ids, **settings):
    return model.generate(
        ids, max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0, **settings
    )


def test_the_cache_does_not_change_what_is_generated(model, tokens):
    assert_close(generate(model, tokens), generate(model, tokens, use_cache=False))


def test_a_static_cache_does_not_change_what_is_generated(model, tokens):
    settings = {"cache_implementation": "static", "disable_compile": True}
    assert_close(generate(model, tokens, **settings), generate(model, tokens))


def test_padded_prompts_generate_what_they_generate_alone(model, tokens):
    prompts = [tokens[0, :8], tokens[1, :3], tokens[2, :5]]
    ids = torch.stack([torch.cat([p.new_full((8 - len(p),), 13), p]) for p in prompts])
    mask = torch.stack([torch.arange(8) >= 8 - len(p) for p in prompts]).long()
    together = generate(model, ids, attention_mask=mask)
    for row, prompt in zip(together, prompts, strict=True):
        assert_close(row[8:], generate(model, prompt[None])[0, len(prompt) :])


def test_prompts_can_be_read_in_pieces(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(tokens, mask, position_ids=positions).logits
    first = model(tokens[:, :5], mask[:, :5], position_ids=positions[:, :5])
    second = model(tokens[:, 5:], mask, position_ids=positions[:, 5:], past_key_values=first.past_key_values)
    assert_close(second.logits, whole[:, 5:])


def test_beams_and_sampling_run(model, tokens):
    torch.manual_seed(0)
    assert generate(model, tokens, num_beams=2).shape == (3, 18)
    assert model.generate(tokens, max_new_tokens=4, do_sample=True, pad_token_id=0).shape == (3, 12)


def test_routing_can_be_switched_on_while_generating(model, tokens):
    expected = generate(model, tokens)
    model.config.output_routing = True
    assert_close(generate(model, tokens), expected)


def test_training_mode_is_warned_of(model, tokens):
    message = r"moves BatchNorm's running statistics.*call \.eval\(\) first"
    with pytest.warns(UserWarning, match=message) as seen:
        generate(model.train(), tokens)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model.eval(), tokens)


def test_a_layer_norm_has_nothing_to_warn_of(tiny_model, tokens):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(tiny_model().train(), tokens)
