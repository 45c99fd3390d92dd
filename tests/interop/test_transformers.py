"""transformers: folders that are loaded by programs that never import us, `Trainer`, and `pipeline`."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, pipeline

from million_experts.models import PeerForCausalLM

PROGRAM = "transformers"


def arguments(folder, **settings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 3, "save_strategy": "no", "lr_scheduler_type": "constant"} | settings,
    )


def rows(tokens: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": row, "labels": row} for row in tokens]


def losses(trainer: Trainer, **settings) -> list[float]:
    trainer.train(**settings)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains(make_model, tokens, tmp_path):
    """`Trainer`: the first loss is the model's own, and it falls"""
    trainer = Trainer(make_model(), arguments(tmp_path), train_dataset=rows(tokens))
    found = losses(trainer)
    expected = make_model().train()(input_ids=tokens, labels=tokens).loss.item()
    assert found[0] == pytest.approx(expected, rel=1e-3)
    assert found[-1] < found[0]


def test_trainer_resumes(make_model, run_model, tokens, tmp_path):
    """`Trainer` goes on from a checkpoint to the same weights"""

    def trained(folder, steps, **settings):
        saving = {"save_strategy": "steps", "save_steps": 2}
        trainer = Trainer(
            make_model(), arguments(folder, max_steps=steps, **saving), train_dataset=rows(tokens)
        )
        trainer.train(**settings)
        return run_model(trainer.model.eval())

    whole = trained(tmp_path / "whole", 4)
    trained(tmp_path / "parts", 2)
    assert torch.equal(trained(tmp_path / "parts", 4, resume_from_checkpoint=True), whole)


def test_trainer_smooths_labels(make_model, tokens, tmp_path):
    """`Trainer(label_smoothing_factor=...)`: the loss is that of shifted labels"""
    trainer = Trainer(
        make_model(), arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=rows(tokens)
    )
    (found, *_) = losses(trainer)
    logits = make_model().train()(input_ids=tokens).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), label_smoothing=0.1)
    assert found == pytest.approx(expected.item(), rel=1e-3)


def test_text_generation(make_model, tokenizer):
    """`pipeline("text-generation")`"""
    model = make_model()
    made = pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    (found,) = made("a be ci", max_new_tokens=4, do_sample=False, return_tensors=True)
    prompt = tokenizer("a be ci", return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert found["generated_token_ids"] == expected[0].tolist()


FRESH = """
    import sys
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    AutoConfig.from_pretrained("model", trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True).eval()
    with torch.no_grad():
        torch.save(model(torch.load("tokens.pt")).logits, "logits.pt")
    model.save_pretrained("again")
    from million_experts.models import PeerForCausalLM
    assert type(model) is PeerForCausalLM
"""


def run(code: str, folder) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_process_that_never_imports_us(make_model, run_model, tokens, tmp_path):
    """`AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)`, a process of its own"""
    make_model().save_pretrained(tmp_path / "model")
    torch.save(tokens, tmp_path / "tokens.pt")
    run(FRESH, tmp_path)
    expected = run_model(make_model())
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)
    run(
        FRESH.replace('"model"', '"again"').replace('save_pretrained("again")', 'save_pretrained("third")'),
        tmp_path,
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected)


def test_a_process_that_imports_us(make_model, run_model, tmp_path):
    """`AutoModelForCausalLM.from_pretrained(FOLDER)` after `import million_experts.models`"""
    make_model().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model) is PeerForCausalLM
    assert torch.equal(run_model(model), run_model(make_model()))
