"""transformers decides by lists of its own class names and model types: ours are on them, or handled."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import Trainer, TrainingArguments

MOE = {
    "mlp_layer_types": ["dense", "moe"],
    "moe": {"num_experts": 4, "experts_per_token": 2, "router_loss_coef": 0.5},
}
KINDS = {"peer": {}, "moe": MOE}


def trainer_of(model, folder, **arguments):
    return Trainer(
        model=model,
        args=TrainingArguments(
            str(folder), label_smoothing_factor=0.1, use_cpu=True, report_to=[], **arguments
        ),
    )


def smoothed(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_smoothed_labels_are_shifted_and_the_routers_loss_is_kept(tiny_model, tokens, tmp_path, kind):
    model = tiny_model(**KINDS[kind])
    trainer = trainer_of(model, tmp_path)
    labels = tokens.clone()
    labels[0, :4] = -100
    loss, outputs = trainer.compute_loss(model, {"input_ids": tokens, "labels": labels}, return_outputs=True)
    expected = smoothed(outputs.logits, labels)
    if kind == "moe":
        assert outputs.router_loss > 0.1
        expected = expected + outputs.router_loss
    assert_close(loss, expected)
    loss.backward()
    if kind == "moe":  # a router's gradient of both losses
        router = model.model.layers[1].mlp.router.weight
        (own,) = torch.autograd.grad(smoothed(model(tokens).logits, labels), router)
        assert not torch.allclose(router.grad, own, rtol=1e-2)
    loss = trainer.compute_loss(model.eval(), {"input_ids": tokens, "labels": labels})
    assert_close(loss, smoothed(model(tokens).logits, labels))


def test_smoothed_losses_of_micro_batches_add_up(tiny_model, tokens, tmp_path):
    """The router's loss by each one's share of the items, where this transformers hands their number on."""
    model = tiny_model(**MOE)
    trainer = trainer_of(model, tmp_path)
    inputs = {"input_ids": tokens, "labels": tokens}
    loss, outputs = trainer.compute_loss(model, dict(inputs), True, num_items_in_batch=3 * 7 * 2)
    share = (
        0.5 if "num_items_in_batch" in trainer.label_smoother.__call__.__wrapped__.__code__.co_varnames else 1
    )
    assert_close(loss, (smoothed(outputs.logits, tokens) + outputs.router_loss) * share)


def test_smoothing_of_other_models_is_as_before(tiny_model, tokens, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny_model(**MOE)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
    )
    loss = trainer_of(llama, tmp_path).compute_loss(llama, {"input_ids": tokens, "labels": tokens})
    assert_close(loss, smoothed(llama(tokens).logits, tokens))


def test_trained_with_smoothing_it_learns_the_next_token_and_not_its_input(tiny_model, tokens, tmp_path):
    rows = torch.arange(1, 17).repeat(32, 1)
    model = tiny_model()
    trainer = trainer_of(
        model,
        tmp_path,
        max_steps=30,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer.train_dataset = [{"input_ids": row, "labels": row} for row in rows]
    trainer.train()
    said = model.eval()(rows[:1]).logits.argmax(-1)
    assert_close(said[0, :-1], rows[0, 1:])
