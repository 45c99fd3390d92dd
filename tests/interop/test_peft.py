"""Adapters of PEFT on models with PEER layers."""

from __future__ import annotations

import pytest

pytest.importorskip("peft", reason="needs the extra `interop`")

import copy

import peft
import torch
from torch import nn

from million_experts.layers import PEER

PROGRAM = "peft"
ADAPTERS = {
    "lora": peft.LoraConfig(target_modules=["query_proj"], init_lora_weights=False),
    "rslora": peft.LoraConfig(target_modules=["query_proj"], init_lora_weights=False, use_rslora=True),
    "dora": peft.LoraConfig(target_modules=["query_proj"], init_lora_weights=False, use_dora=True),
    "lora-bias": peft.LoraConfig(target_modules=["query_proj"], init_lora_weights=False, lora_bias=True),
    "loha": peft.LoHaConfig(target_modules=["query_proj"], init_weights=False),
    "lokr": peft.LoKrConfig(target_modules=["query_proj"], init_weights=False),
    "ia3": peft.IA3Config(target_modules=["query_proj"], feedforward_modules=[], init_ia3_weights=False),
    "oft": peft.OFTConfig(target_modules=["query_proj"], oft_block_size=8, r=0, init_weights=False),
    "vera": peft.VeraConfig(target_modules=["query_proj"], init_weights=False, d_initial=0.5),
    "hra": peft.HRAConfig(target_modules=["query_proj"], init_weights=False),
}


LORA_ZERO = {"target_modules": "all-linear"}  # PEFT's own initialisation: the adapter adds zero


def all_linear(**settings) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules="all-linear", init_lora_weights=False, **settings)


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def train(model: nn.Module, tokens: torch.Tensor, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        optimizer.step()
    model.eval()


def adapter_gradients(model: nn.Module, name: str) -> dict[str, bool]:
    return {
        key: parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and name in key
    }


@pytest.mark.parametrize("training", [False, True])
def test_gradients_reach_the_adapter_of_the_query_projection(make_model, tokens, training):
    """LoRA with `target_modules="all-linear"`: the adapter of `query_proj` gets gradients"""
    model = peft.get_peft_model(make_model(), all_linear()).train(training)
    loss_of(model, tokens).backward()
    found = adapter_gradients(model, "query_proj")
    assert len(found) == 2
    assert all(found.values()), found


@pytest.mark.parametrize(
    "peer", [{}, {"query_norm": "layer"}, {"shared_width": 16, "glu": True}, {"sparse_grad": True}]
)
def test_merging_changes_nothing(make_model, run_model, assert_close, peer):
    """LoRA with `target_modules="all-linear"`: merged and unmerged give the same logits"""
    base = run_model(make_model(peer))
    model = peft.get_peft_model(make_model(peer), all_linear())
    unmerged = run_model(model)
    assert not torch.allclose(unmerged, base, atol=0.1), "the adapter must show"
    with model.disable_adapter():
        assert torch.equal(run_model(model), base)
    model.merge_adapter()
    assert_close(run_model(model), unmerged, torch.bfloat16)
    model.unmerge_adapter()
    assert_close(run_model(model), unmerged, torch.bfloat16)
    plain = model.merge_and_unload()
    assert type(plain.model.layers[1].mlp) is PEER
    assert_close(run_model(plain), unmerged, torch.bfloat16)


def test_every_feed_forward_hears_its_adapters(any_model, run_model, tokens, assert_close):
    """LoRA with `target_modules="all-linear"` on each kind of feed-forward: gradients, merged as unmerged"""
    model = peft.get_peft_model(any_model(), all_linear()).eval()
    loss_of(model, tokens).backward()
    assert (found := adapter_gradients(model, "mlp"))
    assert all(found.values()), found
    unmerged = run_model(model)
    model.merge_adapter()
    assert_close(run_model(model), unmerged, torch.bfloat16)


def test_the_modules_have_to_be_named(make_model, refused):
    """LoRA without `target_modules`: PEFT does not know the model type"""
    with refused(ValueError, match="target_modules"):
        peft.get_peft_model(make_model(), peft.LoraConfig())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_other_adapters_work_as_on_any_linear_layer(make_layer, run_layer, assert_close, x, kind):
    """LoRA, rsLoRA, DoRA, LoHa, LoKr, IA3, OFT, VeRA, HRA on `query_proj`: gradients, merged as unmerged"""
    base = run_layer(make_layer())
    layer = nn.Sequential()  # PEFT wants modules inside of the one it is given
    layer.add_module("mlp", make_layer())
    model = peft.get_peft_model(layer, copy.deepcopy(ADAPTERS[kind]))
    model.eval()
    unmerged = run_layer(model)
    assert not torch.allclose(unmerged, base, atol=1e-3), "the adapter must show"
    model(x).square().sum().backward()
    found = adapter_gradients(model, "query_proj")
    assert found
    assert all(found.values()), found
    if kind == "lora-bias":  # a bias cannot be merged into a projection without one: PEFT says so
        return
    model.merge_adapter()
    assert_close(run_layer(model), unmerged, torch.bfloat16)


def test_a_norm_in_modules_to_save_changes_nothing(make_model, run_model):
    """`modules_to_save=["query_norm"]`: the logits stay as they were"""
    model = peft.get_peft_model(make_model(), peft.LoraConfig(modules_to_save=["query_norm"], **LORA_ZERO))
    assert torch.equal(run_model(model), run_model(make_model()))


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_an_adapter_reloads_to_the_same_logits(make_model, run_model, tokens, tmp_path, norm):
    """An adapter with `modules_to_save=["query_norm"]`, trained and saved, reloads to the same logits"""
    peer = {"query_norm": norm}
    config = peft.LoraConfig(modules_to_save=["query_norm"], **LORA_ZERO)
    model = peft.get_peft_model(make_model(peer), config)
    before = run_model(model)
    train(model, tokens)
    after = run_model(model)
    assert not torch.allclose(before, after, atol=0.1)
    model.save_pretrained(tmp_path)
    assert torch.equal(run_model(peft.PeftModel.from_pretrained(make_model(peer), tmp_path).eval()), after)


def test_an_adapter_reloads_without_the_norm_where_it_has_no_statistics(
    make_model, run_model, tokens, tmp_path
):
    """A plain LoRA adapter of a model with `query_norm="layer"` reloads to the same logits"""
    peer = {"query_norm": "layer"}
    model = peft.get_peft_model(make_model(peer), peft.LoraConfig(**LORA_ZERO))
    train(model, tokens)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make_model(peer), tmp_path).eval()
    assert torch.equal(run_model(again), run_model(model))


def test_modules_to_save_may_name_the_whole_layer(make_model, run_model, tokens, tmp_path):
    """`modules_to_save=["mlp"]`: the whole PEER layer is trained and reloads to the same logits"""
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    model = peft.get_peft_model(make_model(), config)
    assert torch.equal(run_model(model), run_model(make_model()))
    train(model, tokens)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        run_model(peft.PeftModel.from_pretrained(make_model(), tmp_path).eval()), run_model(model)
    )


def test_the_statistics_of_a_frozen_norm_stay(make_model, tokens):
    """A LoRA run with `query_norm` in eval mode leaves its statistics alone"""
    model = peft.get_peft_model(make_model(), peft.LoraConfig(**LORA_ZERO))
    norm = model.base_model.model.model.layers[1].mlp.query_norm
    before = norm.running_mean.clone()
    model.train()
    norm.eval()
    loss_of(model, tokens).backward()
    assert torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("parameter", ["keys1", "keys2"])
def test_an_adapter_of_the_keys_works(make_model, run_model, tokens, assert_close, parameter):
    """`target_parameters` on the sub-keys: gradients, merged as unmerged"""
    peer = {"query_norm": "layer"}
    base = run_model(make_model(peer))
    config = peft.LoraConfig(
        target_modules=[], target_parameters=[f"mlp.{parameter}"], r=2, init_lora_weights=False
    )
    model = peft.get_peft_model(make_model(peer), config).eval()
    unmerged = run_model(model)
    assert not torch.allclose(unmerged, base, atol=1e-2)
    loss_of(model, tokens).backward()
    found = adapter_gradients(model, "lora")
    assert found
    assert all(found.values()), found
    model.merge_adapter()
    assert_close(run_model(model), unmerged, torch.bfloat16)


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
    ],
    ids=lambda config: str(config.peft_type),
)
def test_virtual_tokens_train_and_generate(make_model, tokens, config):
    """Prompt tuning, prefix tuning and p-tuning: gradients, and `generate`"""
    model = peft.get_peft_model(make_model(), copy.deepcopy(config))
    loss_of(model, tokens).backward()
    found = adapter_gradients(model, "prompt")
    assert found
    assert all(found.values()), found
    model.eval()
    made = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4)
    # Greedy text is what the whole sequence's logits say.
    text = made[:, :-1] if made.shape[1] > 12 else tokens
    with torch.no_grad():
        logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[
            :, -(made.shape[1] - 12) :
        ]
    assert torch.equal(logits.argmax(-1), made[:, 12:])


def test_several_adapters_in_one_batch(make_model, tokens, assert_close):
    """Two LoRA adapters of the attention, one per row of the batch (`adapter_names`)"""
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make_model(), config).eval()
    torch.manual_seed(1)
    model.add_adapter("other", config)
    with torch.no_grad():
        mixed = model(input_ids=tokens, adapter_names=["default", "other"]).logits
        for row, name in enumerate(("default", "other")):
            model.set_adapter(name)
            assert_close(mixed[row], model(input_ids=tokens).logits[row], torch.bfloat16)


def test_several_adapters_of_the_query_projection_in_one_batch(make_model, tokens, refused):
    """The same with `query_proj`, to which a batch comes as one list of tokens"""
    model = peft.get_peft_model(make_model(), all_linear()).eval()
    model.add_adapter("other", all_linear())
    with torch.no_grad(), refused(ValueError, match="adapter_names"):
        model(input_ids=tokens, adapter_names=["default", "other"])
