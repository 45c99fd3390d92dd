"""What predictions owe to later tokens: nothing, but for BatchNorm and expert choice in training."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from million_experts.layers import ExpertChoiceMoE, MaskedBatchNorm
from million_experts.lm.packing import PackedBlocks, TokenStream
from million_experts.models import PeerConfig, PeerForCausalLM
from million_experts.studies.causality import (
    choice_of_training,
    draw_batches,
    evaluate_modes,
    future_effect,
    losses_by_mode,
    mean_loss,
)

VOCABULARY, CONTEXT, ROWS = 60, 32, 24
PEER = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8, "init_std": 1.0}


def make_model(kind="peer", **arguments):
    torch.manual_seed(0)
    if kind == "peer":
        arguments = {**PEER, **arguments}
    config = PeerConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        mlp_layer_types=["dense", kind], dense={"width": 16}, initializer_range=0.2, **{kind: arguments},
    )  # fmt: skip
    model = PeerForCausalLM(config)
    # Statistics of some text, as after training; those that it starts with are of none.
    model.train()
    with torch.no_grad():
        for _ in range(30):
            model(torch.randint(VOCABULARY, (8, CONTEXT)))
    return model


@pytest.fixture
def blocks():
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, ROWS * CONTEXT).astype(np.uint16)
    starts = np.arange(0, len(tokens), 20)
    tokens[starts] = 0
    return PackedBlocks(TokenStream(tokens, starts, 2 * len(tokens), VOCABULARY), CONTEXT)


def replace_future(ids, generator):
    """The same tokens up to the middle, others after it."""
    others = torch.randint(VOCABULARY, ids.shape, generator=generator)
    return torch.cat([ids[:, : CONTEXT // 2], others[:, CONTEXT // 2 :]], 1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("query_norm", ["batch", "layer", "none"])
def test_in_evaluation_later_tokens_change_no_bit(query_norm, packed, blocks):
    model = make_model(query_norm=query_norm).eval()
    generator = torch.Generator().manual_seed(1)
    (batch,) = draw_batches(blocks, ROWS, ROWS * CONTEXT)
    ids = batch["input_ids"]
    given = {"position_ids": batch["position_ids"]} if packed else {}
    with torch.no_grad():
        before = model(ids, **given).logits
        after = model(replace_future(ids, generator), **given).logits
    first, second = before.split(CONTEXT // 2, 1), after.split(CONTEXT // 2, 1)
    assert torch.equal(first[0], second[0])
    assert not torch.equal(first[1], second[1])


@pytest.mark.parametrize(("query_norm", "changes"), [("batch", True), ("layer", False), ("none", False)])
def test_in_training_later_tokens_change_earlier_logits_under_batch_norm_alone(query_norm, changes, blocks):
    model = make_model(query_norm=query_norm).train()
    generator = torch.Generator().manual_seed(1)
    (batch,) = draw_batches(blocks, ROWS, ROWS * CONTEXT)
    ids = batch["input_ids"]
    with torch.no_grad():
        before = model(ids).logits[:, : CONTEXT // 2]
        after = model(replace_future(ids, generator)).logits[:, : CONTEXT // 2]
    difference = (after - before).abs().max()
    assert (difference > 1e-4) == changes
    assert changes or difference == 0


def test_the_effect_is_none_in_evaluation_and_small_in_training(blocks):
    model = make_model()
    nothing = future_effect(model, blocks, 6, ROWS * CONTEXT, as_in_training=False)
    assert nothing.largest_logit_change == nothing.logit_change == nothing.divergence == 0
    assert nothing.loss_own_future == nothing.loss_other_future
    # Two pairs of batches of 6 rows; 15 predictions in the first half of a row.
    assert nothing.tokens == 2 * 6 * 15
    effect = future_effect(model, blocks, 6, ROWS * CONTEXT, as_in_training=True)
    assert 1e-4 < effect.logit_change < effect.largest_logit_change
    assert 0 < effect.divergence < 0.1
    assert effect.loss_own_future != effect.loss_other_future
    larger = future_effect(model, blocks, 1, ROWS * CONTEXT, as_in_training=True)
    assert larger.logit_change > effect.logit_change  # fewer tokens share the statistics


def test_the_effect_is_that_of_two_passes(blocks):
    """The figures, from logits of plain passes in training mode."""
    model = make_model()
    effect = future_effect(model, blocks, 12, ROWS * CONTEXT, as_in_training=True)
    own, other = draw_batches(blocks, 12, ROWS * CONTEXT)
    half = CONTEXT // 2
    mixed = torch.cat([own["input_ids"][:, :half], other["input_ids"][:, half:]], 1)
    model.train()
    with torch.no_grad():
        logits = [
            model(ids, position_ids=own["position_ids"]).logits[:, :half] for ids in (own["input_ids"], mixed)
        ]
    change = (logits[1] - logits[0]).double()
    assert effect.logit_change == pytest.approx(change.square().mean().sqrt().item(), rel=1e-4)
    assert effect.largest_logit_change == pytest.approx(change.abs().max().item(), rel=1e-4)
    before, after = (x.double().softmax(-1) for x in logits)
    divergence = (before * (before / after).log()).sum(-1).mean().item()
    assert effect.divergence == pytest.approx(divergence, rel=1e-3)
    targets = own["input_ids"][:, 1:half].flatten()
    losses = [F.cross_entropy(x[:, :-1].flatten(0, 1), targets).item() for x in logits]
    assert [effect.loss_own_future, effect.loss_other_future] == pytest.approx(losses, rel=1e-5)


def test_losses_of_both_modes_are_the_models_own(blocks):
    model = make_model()
    losses = losses_by_mode(model, blocks, 8, ROWS * CONTEXT)
    assert losses.tokens == ROWS * (CONTEXT - 1)
    expected = {}
    for mode in (True, False):
        own = copy.deepcopy(model).train(mode)
        with torch.no_grad():
            expected[mode] = [
                own(
                    batch["input_ids"], position_ids=batch["position_ids"], labels=batch["input_ids"],
                    use_cache=False,
                ).loss.item()
                for batch in draw_batches(blocks, 8, ROWS * CONTEXT)
            ]  # fmt: skip
    assert losses.loss_train_mode == pytest.approx(np.mean(expected[True]), rel=1e-5)
    assert losses.loss_eval_mode == pytest.approx(np.mean(expected[False]), rel=1e-5)
    assert losses.loss_train_mode != pytest.approx(losses.loss_eval_mode, rel=1e-4)


def test_layer_norm_has_one_loss(blocks):
    losses = losses_by_mode(make_model(query_norm="layer"), blocks, 8, ROWS * CONTEXT)
    assert losses.loss_train_mode == losses.loss_eval_mode


@pytest.mark.parametrize("training", [True, False])
def test_measuring_leaves_the_model_as_it_was(training, blocks):
    model = make_model().train(training)
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    evaluate_modes(model, blocks, 8, ROWS * CONTEXT)
    assert [module.training for module in model.modules()] == modes
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_an_interruption_leaves_the_statistics_too():
    model = make_model()
    (norm,) = (module for module in model.modules() if isinstance(module, MaskedBatchNorm))
    before = norm.running_mean.clone()
    moved = []

    def interrupted():
        with choice_of_training(model), torch.no_grad():
            model(torch.randint(VOCABULARY, (2, CONTEXT)))
            moved.append(not torch.equal(norm.running_mean, before))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert moved == [True]
    assert torch.equal(norm.running_mean, before)
    assert norm.training


def test_few_tokens_take_the_batchs_statistics_too(blocks):
    """Where evaluation would go through one fused operation, which has only the running ones."""
    model = make_model()
    few = PackedBlocks(blocks.stream, 8)
    losses = losses_by_mode(model, few, 1, 80)
    assert losses.loss_train_mode != losses.loss_eval_mode


def test_expert_choice_sees_the_future_unless_tokens_choose(blocks):
    model = make_model("expert_choice", num_experts=4, width=16)
    (layer,) = (module for module in model.modules() if isinstance(module, ExpertChoiceMoE))
    figures = evaluate_modes(model, blocks, 8, ROWS * CONTEXT)
    assert figures.keys() == {"expert_choice"}
    assert layer.eval_choice == "token"
    found = figures["expert_choice"]
    for choice, name in (("token", "loss_eval_mode"), ("expert", "loss_train_mode")):
        layer.eval_choice = choice
        model.eval()
        assert found[name] == mean_loss(model, draw_batches(blocks, 8, ROWS * CONTEXT))[0]
    assert found["loss_train_mode"] != found["loss_eval_mode"]
    assert found["future"]["logit_change"] > 1e-3
    layer.eval_choice = "token"
    assert future_effect(model, blocks, 8, ROWS * CONTEXT, as_in_training=False).logit_change < 1e-6


def test_models_whose_layers_choose_alike_have_no_modes(blocks):
    assert evaluate_modes(make_model(query_norm="layer"), blocks, 8, 100) == {}
    assert evaluate_modes(make_model(), blocks, 8, 100).keys() == {"batch_norm"}


def test_tokens_are_rounded_up_to_rows_and_pass_once(blocks):
    batches = draw_batches(blocks, 4, 5 * CONTEXT + 1)
    assert [len(batch["input_ids"]) for batch in batches] == [4, 2]
    rows = torch.cat([batch["input_ids"] for batch in batches])
    first = torch.stack([blocks[i]["input_ids"] for i in range(6)])
    assert sorted(rows.tolist()) == sorted(first.tolist())
    assert not torch.equal(rows, first)  # shuffled
    assert sum(len(batch["input_ids"]) for batch in draw_batches(blocks, 5, 10**9)) == ROWS


def test_too_little_text_is_named(blocks):
    model = make_model()
    with pytest.raises(ValueError, match="blocks must hold at least 2 rows of text, got 1"):
        future_effect(model, blocks, 8, CONTEXT, as_in_training=True)
    short = PackedBlocks(replace(blocks.stream), 3)
    with pytest.raises(ValueError, match="rows of at least 4 tokens, got 3"):
        future_effect(model, short, 8, 100, as_in_training=True)


def test_a_token_that_comes_alone_is_taken_by_every_expert(blocks):
    """`loss_alone` is the loss of reading token by token with a cache while experts choose."""
    model = make_model("expert_choice", num_experts=4, width=16)
    (layer,) = (module for module in model.modules() if isinstance(module, ExpertChoiceMoE))
    found = evaluate_modes(model, blocks, 8, 2 * CONTEXT)["expert_choice"]
    assert (layer.eval_choice, layer.capacity_factor) == ("token", 2.0)
    model.eval()
    layer.eval_choice = "expert"
    nats = []
    (batch,) = draw_batches(blocks, 2, 2 * CONTEXT)
    for ids, places in zip(batch["input_ids"], batch["position_ids"], strict=True):
        cache = None
        for token, place, target in zip(ids, places, ids[1:], strict=False):
            if place == 0:
                cache = None  # another document
            with torch.no_grad():
                out = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            nats.append(F.cross_entropy(out.logits[0], target.view(1)).item())
    assert found["loss_alone"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert abs(found["loss_alone"] - found["loss_eval_mode"]) > 1e-3
