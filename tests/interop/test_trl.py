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


def test_the_routers_loss_counts(make_model, tokenizer, tmp_path):
    """`SFTTrainer` on a mixture of experts: the router learns from its balancing loss"""

    def router(coefficient):
        model = make_model(
            mlp_layer_types=["dense", "moe"],
            moe={"num_experts": 4, "width": 16, "router_loss_coef": coefficient},
        )
        trainer = SFTTrainer(
            model,
            arguments(tmp_path, optim="sgd", max_grad_norm=0.0),
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
        )
        losses(trainer)
        return dict(model.model.layers[1].mlp.named_parameters())

    without, heavy = router(0.0), router(100.0)
    assert any("router" in name and not torch.equal(heavy[name], without[name]) for name in without)


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
