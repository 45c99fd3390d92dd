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


def test_predictions_are_logits_alone(tiny_model, tokens, tmp_path):
    """Trainer gathers what an output holds, except for what the configuration says: no cache, no routing."""
    model = tiny_model(output_routing=True)
    trainer = Trainer(model=model, args=TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    predicted = trainer.predict(rows).predictions
    assert_close(torch.from_numpy(predicted), model.eval()(tokens).logits.detach())


def test_pipelines_and_servers_take_it_for_a_language_model(tiny_model, tmp_path, caplog):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast, pipeline
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils import logging

    words = Tokenizer(WordLevel({f"w{i}": i for i in range(50)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        writer = pipeline("text-generation", model=str(tmp_path), device="cpu")
        (written,) = writer("w1 w2 w3", max_new_tokens=2, do_sample=False)
    finally:
        logging.disable_propagation()
    assert "not supported" not in caplog.text
    assert written["generated_text"].startswith("w1 w2 w3")
    assert type(writer.model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()  # as a server asks
