"""`torchrun` with two processes trains as one process does, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys

import pytest
import torch.distributed as dist
import yaml
from transformers import TrainingArguments

from million_experts.lm.checkpoints import CheckpointError, check_checkpoint
from million_experts.lm.settings import load_preset
from million_experts.lm.trainer import LanguageModelTrainer
from million_experts.lm.training import model_config
from million_experts.models import PeerForCausalLM

pytestmark = pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs gloo")

WORDS = "the a of in city river mountain king house small old new water light stone was has long".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchrun")
    pick = random.Random(0)
    texts = [" ".join(pick.choices(WORDS, k=pick.randint(10, 50))) + "." for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def settings(folder, query_norm, batch_size):
    peer = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8, "sparse_grad": True}
    return {
        "data": [str(folder / "text.jsonl")],
        "cache_dir": str(folder / f"cache-{query_norm}-{batch_size}"),
        "vocab_size": 300,
        "context": 32,
        "validation_share": 0.1,
        "test_share": 0.1,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "peer": {**peer, "query_norm": query_norm},
        "dense": {"width": 32},
        "precision": "float32",
        "steps": 6,
        "batch_size": batch_size,
        "gradient_accumulation_steps": 2,
        "max_grad_norm": 0.3,
        "warmup_steps": 0,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 3,
        "report_to": ["none"],
    }


def train(folder, run, processes, query_norm, batch_size, *arguments, code=0):
    """Trains in that many processes; returns the log by key, and what was printed."""
    preset = folder / f"{run.name}.yaml"
    preset.write_text(yaml.safe_dump(settings(folder, query_norm, batch_size)))
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "million_experts.cli", "train", "--preset", str(preset), "--output-dir", str(run)]
    done = subprocess.run(
        [*command, *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(folder / "datasets")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    if code:
        return {}, done.stderr
    history = json.loads((run / "results.json").read_text())["history"]
    # Times differ, and the mean loss that transformers ends with is of the steps of this process.
    keys = {key for row in history for key in row if not re.search("second|runtime|memory|train_loss", key)}
    return {key: [row[key] for row in history if key in row] for key in keys}, done.stdout


@pytest.mark.parametrize("query_norm", ["layer", "batch"])
def test_two_processes_train_as_one(query_norm, folder):
    one, _ = train(folder, folder / f"one-{query_norm}", 1, query_norm, 8)
    run = folder / f"two-{query_norm}"
    two, printed = train(folder, run, 2, query_norm, 4)
    assert len(two["loss"]) == 6
    assert min(two["grad_norm"]) > 0.3, "otherwise nothing is clipped"
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    # The mean over batches, whose sizes differ; a document's first token has no label.
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=2e-4)
    usage = "expert_usage/model.layers.1.mlp"
    assert two[usage] == pytest.approx(one[usage], abs=2 / 64)
    assert printed.count("6 steps of 512 tokens") == 1, "one process prints, for both"

    if query_norm == "layer":
        return
    # It goes on in two processes alone, and then as if nothing had been.
    for gone in (run / "results.json", run / "checkpoint-6"):
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    _, error = train(folder, run, 1, query_norm, 4, "--resume", code=1)
    assert "was written by 2 processes and cannot go on in 1: use torchrun --nproc-per-node 2" in error
    again, printed = train(folder, run, 2, query_norm, 4, "--resume")
    assert "Going on from" in printed
    assert again == two


def test_a_checkpoint_of_one_process_is_refused_by_two(tmp_path):
    (tmp_path / "rng_state.pth").touch()
    with pytest.raises(
        CheckpointError, match="written by 1 processes and cannot go on in 2: use one process"
    ):
        check_checkpoint(tmp_path, None, processes=2)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_other_parallelism_is_refused_before_the_first_step(kind, tmp_path, monkeypatch):
    preset = load_preset("demo").with_overrides({"peer": {"num_experts": 64, "sparse_grad": True}})
    preset = preset.with_overrides({"hidden_size": 16, "peer": {"experts_per_head": 4}})
    model = PeerForCausalLM(model_config(preset, 100))
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    monkeypatch.setattr("accelerate.Accelerator.distributed_type", kind_of(kind))
    with pytest.raises(ValueError, match=f"torchrun --nproc-per-node N.*not under {kind}"):
        LanguageModelTrainer(model=model, args=arguments)


def kind_of(name):
    from accelerate.utils import DistributedType

    return DistributedType(name)
