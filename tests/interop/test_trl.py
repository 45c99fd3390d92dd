"""Training by TRL."""

from __future__ import annotations

import pytest

pytest.importorskip("trl", reason="needs the extra `interop`")

import peft
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from million_experts.models import PeerForCausalLM

PROGRAM = "trl"
ROWS = [{"text": text} for text in ("a be ci do", "e fa gi", "ha be da fe gi ko", "u a", "bi bi bi di")]
PAIRS = [
    {"prompt": "a be", "chosen": " ci do", "rejected": " u u u"},
    {"prompt": "e fa", "chosen": " gi", "rejected": " ha ha"},
    {"prompt": "ha", "chosen": " be da fe", "rejected": " a"},
]


def arguments(folder, kind=SFTConfig, **settings):
    return kind(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        max_steps=3,
        per_device_train_batch_size=5,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )


def losses(trainer) -> list[float]:
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 3
    return found


def batch_of(tokenizer) -> dict[str, torch.Tensor]:
    batch = tokenizer([row["text"] + "<end>" for row in ROWS], return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_supervised_fine_tuning(make_model, tokenizer, tmp_path, checkpointing):
    """`SFTTrainer` on five rows: the loss of the model's own, and it falls"""
    model = make_model()
    trainer = SFTTrainer(
        model,
        arguments(tmp_path, gradient_checkpointing=checkpointing),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    found = losses(trainer)
    assert found[-1] < found[0]
    expected = make_model().train()(**batch_of(tokenizer)).loss.item()
    assert found[0] == pytest.approx(expected, rel=1e-3)
    mlp, before = model.model.layers[1].mlp, make_model().model.layers[1].mlp
    for name in ("experts", "keys1", "query_proj.weight"):
        assert not torch.equal(mlp.get_parameter(name), before.get_parameter(name))
    assert int(mlp.query_norm.num_batches_tracked) == 3


def test_fine_tuning_with_lora(make_model, run_model, tokenizer, tmp_path):
    """`SFTTrainer` with a `LoraConfig` that saves `query_norm`, too: it reloads to the same logits"""
    config = peft.LoraConfig(
        target_modules="all-linear", modules_to_save=["query_norm"], task_type="CAUSAL_LM"
    )
    trainer = SFTTrainer(
        make_model(),
        arguments(tmp_path),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=config,
    )
    found = losses(trainer)
    assert found[-1] < found[0]
    trainer.save_model(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(make_model(), tmp_path / "adapter").eval()
    assert torch.equal(run_model(again), run_model(trainer.model.eval()))


def test_fine_tuning_of_a_folder(make_model, tokenizer, tmp_path):
    """`SFTTrainer("folder")`"""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    trainer = SFTTrainer(
        str(tmp_path / "model"),
        arguments(tmp_path, model_init_kwargs={"dtype": "float32"}),
        train_dataset=Dataset.from_list(ROWS),
    )
    found = losses(trainer)
    assert found[-1] < found[0]


MOE = {"num_experts": 4, "width": 16, "router_loss_coef": 0.5}


def mixture(make_model, **arguments):
    return make_model(mlp_layer_types=["dense", "moe"], moe=MOE | arguments)


def tuner(model, tokenizer, folder, **settings):
    return SFTTrainer(
        model,
        arguments(folder, **settings),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )


@pytest.mark.parametrize("how", ["plain", "checkpointing", "smoothing", "padding_free"])
def test_the_routers_loss_counts(make_model, tokenizer, tmp_path, how):
    """`SFTTrainer` on a mixture of experts: the balancing loss counts once, as in the model's own loss"""
    settings = {
        "checkpointing": {"gradient_checkpointing": True},
        "smoothing": {"label_smoothing_factor": 0.1},
        "padding_free": {"padding_free": True, "max_length": None},
    }.get(how, {})
    model = mixture(make_model)
    trainer = tuner(model, tokenizer, tmp_path, **settings)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model.train(), dict(batch))
    loss.backward()

    own = mixture(make_model).train()
    outputs = own(**batch)
    expected = outputs.loss
    if how == "smoothing":
        expected = trainer.label_smoother(outputs, batch["labels"], shift_labels=True)
    assert 0.9 < outputs.router_loss < 2  # 0.5 times k = 2 where even, E = 4 at most
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    got, wanted = (m.model.layers[1].mlp.router.weight.grad for m in (model, own))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert wanted.abs().max() > 1e-3


def test_the_routers_loss_in_training(make_model, tokenizer, tmp_path):
    """`SFTTrainer(router_aux_loss_coef=...)`: that factor counts, and is saved as `moe`'s"""
    found = {}
    for factor in (0.0, 2.0):
        model = mixture(make_model)
        trainer = tuner(model, tokenizer, tmp_path, router_aux_loss_coef=factor)
        found[factor] = losses(trainer)[0]
    assert "output_router_logits" not in model.config.to_dict()
    trainer.save_model(tmp_path / "model")
    again = PeerForCausalLM.from_pretrained(tmp_path / "model")
    assert again.config.moe["router_loss_coef"] == 2.0
    assert not again.config.output_router_logits
    outputs = mixture(make_model).train()(**batch_of(tokenizer))
    assert found[2.0] - found[0.0] == pytest.approx(outputs.router_loss.item() / 0.5 * 2.0, rel=1e-2)


def test_preferences(make_model, tokenizer, tmp_path):
    """`DPOTrainer` on three pairs: the loss falls"""
    make_model({"query_norm": "layer"}).save_pretrained(tmp_path)  # it loads its reference from there
    trainer = DPOTrainer(
        PeerForCausalLM.from_pretrained(tmp_path),
        args=arguments(tmp_path, DPOConfig),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    found = losses(trainer)
    assert found[0] == pytest.approx(0.6931, abs=1e-3)
    assert found[-1] < found[0]


def test_preferences_and_routers(make_model, tokenizer, tmp_path):
    """`DPOTrainer` on a mixture of experts: its loss and the balancing loss"""
    mixture(make_model).save_pretrained(tmp_path)
    model = PeerForCausalLM.from_pretrained(tmp_path)
    trainer = DPOTrainer(
        model,
        args=arguments(tmp_path, DPOConfig),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(model.train(), dict(batch))
    own = model(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert loss.item() == pytest.approx(0.6931 + own.router_loss.item(), abs=1e-3)
