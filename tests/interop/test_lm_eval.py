"""Evaluation by lm-eval, of a local task."""

from __future__ import annotations

import pytest

pytest.importorskip("lm_eval", reason="needs the extra `interop`")

import json
import os
import subprocess
import sys

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

PROGRAM = "lm-eval"
QUESTIONS = [
    {"question": "a be ci", "choices": ["do", "fa gi"], "answer": 0},
    {"question": "e fa", "choices": ["u", "ha"], "answer": 1},
    {"question": "be da fe gi ko a e i o u a be ci do fa gi ha", "choices": ["ko", "bi bi"], "answer": 1},
]


@pytest.fixture
def folder(make_model, tokenizer, tmp_path, monkeypatch):
    """A saved model, and beside it a task with three questions."""
    make_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = [json.dumps(question) for question in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    task = {
        "task": "letters",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "letters.yaml").write_text(json.dumps(task))  # which is YAML, too
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def likelihood(model, tokenizer, question: str, choice: str) -> float:
    """The log-probability of ` choice` after the question, by the model itself."""
    start = tokenizer(question)["input_ids"]
    whole = tokenizer(f"{question} {choice}", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        predicted = model(input_ids=whole).logits.log_softmax(-1)[0, len(start) - 1 : -1]
    return predicted.gather(-1, whole[0, len(start) :, None]).sum().item()


def expected_accuracy(model, tokenizer) -> float:
    right = 0
    for question in QUESTIONS:
        scores = [
            likelihood(model, tokenizer, question["question"], choice) for choice in question["choices"]
        ]
        right += scores.index(max(scores)) == question["answer"]
    return right / len(QUESTIONS)


def test_likelihoods_are_the_models_own(make_model, tokenizer, folder):
    """A local task, in the process that has the model: its log-likelihoods, in batches with padding"""
    model = make_model()
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, device="cpu"),
        tasks=["letters"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )
    assert results["results"]["letters"]["acc,none"] == pytest.approx(expected_accuracy(model, tokenizer))
    for sample in results["samples"]["letters"]:
        question = QUESTIONS[sample["doc_id"]]
        for choice, ((found, _),) in zip(question["choices"], sample["resps"], strict=True):
            expected = likelihood(model, tokenizer, question["question"], choice)
            assert float(found) == pytest.approx(expected, rel=1e-4)


def test_the_command_in_a_process_that_never_imports_us(make_model, tokenizer, folder):
    """`lm_eval run --model hf --model_args pretrained=FOLDER,trust_remote_code=True`, a process of its own"""
    command = [
        *[sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "3"],
        *["--model_args", f"pretrained={folder / 'model'},trust_remote_code=True,dtype=float32"],
        *["--tasks", "letters", "--include_path", str(folder), "--output_path", str(folder / "results.json")],
    ]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = folder.glob("results*.json")
    results = json.loads(written.read_text())["results"]["letters"]
    assert results["acc,none"] == pytest.approx(expected_accuracy(make_model(), tokenizer))
