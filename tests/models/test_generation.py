"""generate(): caches, whatever transformers calls them, and padding must not change what is generated."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache
from transformers.models.llama.modeling_llama import LlamaModel

NAMES = ["past_key_values", "cache"]


@pytest.fixture
def model(tiny_model, tokens):
    """In eval mode, with weights large enough that no two logits are close, and moved statistics."""
    model = tiny_model(peer={"query_norm": "batch"}, num_key_value_heads=1, initializer_range=0.5)
    model(tokens)
    return model.eval()


def generate(model, ids, **settings):
    settings = {
        "do_sample": False,
        "max_new_tokens": 10,
        "min_new_tokens": 10,
        "pad_token_id": 0,
        "eos_token_id": 0,
        **settings,
    }
    torch.manual_seed(0)
    return model.generate(ids, **settings)


def counted(model):
    """How many tokens each forward pass of the model reads, from now on."""
    seen = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    return seen


STRATEGIES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 5, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampled beams": {"num_beams": 3, "do_sample": True, "temperature": 2.0},
    "repetition penalty": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "prompt in chunks": {"prefill_chunk_size": 3},
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_cache_does_not_change_what_is_generated(model, tokens, strategy):
    settings = STRATEGIES[strategy]
    without = {name: value for name, value in settings.items() if name != "prefill_chunk_size"}
    expected = generate(model, tokens, use_cache=False, **without)
    seen = counted(model)
    assert_close(generate(model, tokens, **settings), expected)
    assert seen[-9:] == [1] * 9  # each token was read once


@pytest.mark.parametrize("strategy", ["greedy", "sampling", "beams"])
def test_a_static_cache_does_not_change_what_is_generated(model, tokens, strategy):
    settings = STRATEGIES[strategy]
    expected = generate(model, tokens, use_cache=False, **settings)
    seen = counted(model)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert_close(generate(model, tokens, **static, **settings), expected)
    assert seen[-9:] == [1] * 9


def test_drafts_from_the_prompt_do_not_change_what_is_generated(model, tokens):
    prompt = tokens[:1].repeat(1, 3)  # something to find again
    expected = generate(model, prompt, use_cache=False)
    seen = counted(model)
    generated = generate(model, prompt, prompt_lookup_num_tokens=3)
    assert_close(generated[:, :34], expected)  # transformers 5.4 may go one token too far, in Llama, too
    assert max(seen[1:]) > 1  # drafts were tried


@pytest.mark.parametrize("draft", ["another model", "the first block"])
def test_an_assistant_does_not_change_what_is_generated(model, tiny_model, tokens, draft):
    expected = generate(model, tokens[:1], use_cache=False)
    first, last = (counted_calls(model.model.layers[i]) for i in (0, 1))
    if draft == "another model":
        generated = generate(model, tokens[:1], assistant_model=tiny_model().eval())
        assert len(first) == len(last)
    else:
        generated = generate(model, tokens[:1], assistant_early_exit=1)
        assert len(first) > len(last)  # drafts skip the second block
    assert_close(generated, expected)
    assert model.config.num_hidden_layers == 2


def counted_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda module, args: calls.append(1))
    return calls


def test_no_strategy_of_transformers_is_left_out():
    """Those that take a cache and a model of its own making: a new one has to be tried above."""
    from transformers.generation import GenerationMixin

    loops = {name for name, _ in inspect.getmembers(GenerationMixin) if name in GENERATION_LOOPS}
    assert loops == {"_sample", "_beam_search", "_assisted_decoding"}


# Contrastive, diverse and constrained search are not in transformers any more, but code on its hub.
GENERATION_LOOPS = {
    "_sample",
    "_beam_search",
    "_assisted_decoding",
    "_contrastive_search",
    "_group_beam_search",
    "_constrained_beam_search",
    "_dola_decoding",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_a_cache_may_be_given_by_either_name(model, tokens, name, kind):
    cache = kind(config=model.config, **({"max_cache_len": 16} if kind is StaticCache else {}))
    expected = model(tokens).logits
    first = model(tokens[:, :5], **{name: cache})
    assert first.cache is first.past_key_values is cache
    assert_close(first.logits, expected[:, :5])
    rest = model(tokens[:, 5:], **{name: cache}).logits
    assert_close(rest, expected[:, 5:])
    assert int(cache.get_seq_length()) == 8
    base = model.model(tokens[:, :1], **{name: cache})
    assert base.cache is base.past_key_values is cache


def test_two_caches_are_refused(model, tokens):
    one, other = DynamicCache(config=model.config), DynamicCache(config=model.config)
    for part in (model, model.model):
        with pytest.raises(ValueError, match="cache and past_key_values are two names of one argument"):
            part(tokens, cache=one, past_key_values=other)
        assert part(tokens, cache=one, past_key_values=one).cache is one


def test_what_was_generated_can_be_gone_on_from(model, tokens):
    expected = generate(model, tokens, max_new_tokens=14, min_new_tokens=14, use_cache=False)
    cache = DynamicCache(config=model.config)
    own_name = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else NAMES[0]
    half = generate(model, tokens, max_new_tokens=6, min_new_tokens=6, **{own_name: cache})
    assert_close(half, expected[:, :14])
    rest = generate(model, half, max_new_tokens=8, min_new_tokens=8, **{own_name: cache})
    assert_close(rest, expected)


def test_padded_prompts_generate_what_they_generate_alone(model, tokens):
    prompts = [tokens[0, :8], tokens[1, :3], tokens[2, :5]]
    ids = torch.stack([torch.cat([p.new_full((8 - len(p),), 13), p]) for p in prompts])
    mask = torch.stack([torch.arange(8) >= 8 - len(p) for p in prompts]).long()
    for static in ({}, {"cache_implementation": "static", "disable_compile": True}):
        together = generate(model, ids, attention_mask=mask, **static)
        for row, prompt in zip(together, prompts, strict=True):
            assert_close(row[8:], generate(model, prompt[None])[0, len(prompt) :])


def test_prompts_can_be_read_in_pieces(model, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(tokens, mask, position_ids=positions).logits
    first = model(tokens[:, :5], mask[:, :5], position_ids=positions[:, :5])
    second = model(tokens[:, 5:], mask, position_ids=positions[:, 5:], cache=first.cache)
    assert_close(second.logits, whole[:, 5:])


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


def test_generating_and_training_print_nothing_of_what_is_deprecated(model, tmp_path):
    model.save_pretrained(tmp_path)
    script = f"""
import torch, million_experts
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}).eval()
ids = torch.arange(1, 9)[None]
for settings in ({{}}, {{"num_beams": 2}}, {{"cache_implementation": "static", "disable_compile": True}}):
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, pad_token_id=0, **settings)
outputs = model(ids)
model(ids[:, :1], cache=outputs.cache)
model.train()(ids, labels=ids).loss.backward()
"""
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr + done.stdout
