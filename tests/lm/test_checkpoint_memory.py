"""Saving and resuming hold no second copy of the table, nor of the moments beside it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from million_experts.benchmarks.memory import can_measure

# A table of 64 MiB, and twice that in moments; everything else is small.
RUN = """
import json, sys
from pathlib import Path
import torch
from transformers import TrainingArguments, default_data_collator
from transformers.utils.logging import disable_progress_bar
from million_experts.benchmarks.memory import release, reset_peak, resident_bytes
from million_experts.layers import peer
from million_experts.lm.checkpoints import list_checkpoints
from million_experts.lm.files import save_whole
from million_experts.lm.trainer import LanguageModelTrainer
from million_experts.models import PeerConfig, PeerForCausalLM
from million_experts.optim import RowwiseAdamW, parameter_groups

disable_progress_bar()
peer.INIT_PAIRS = 2**12
run = Path(sys.argv[1])
grown = {}


def make_trainer(steps):
    experts = {"num_experts": [512, 256], "num_heads": 2, "experts_per_head": 4, "key_dim": 8}
    model = PeerForCausalLM(
        PeerConfig(
            vocab_size=40, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, dense={"width": 32},
            peer={**experts, "sparse_grad": True},
        )
    )
    rows = torch.randint(0, 40, (64, 8))
    data = [{"input_ids": row, "labels": row} for row in rows]
    groups = parameter_groups(model, 1e-3, table_weight_decay=0.1)
    arguments = TrainingArguments(
        output_dir=str(run), max_steps=steps, per_device_train_batch_size=4, save_steps=2, report_to=[],
        use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False, gradient_accumulation_steps=2,
    )
    return LanguageModelTrainer(
        model=model, args=arguments, train_dataset=data, data_collator=default_data_collator,
        optimizers=(RowwiseAdamW(groups), None),
    )


def watched(name, call):
    release()
    reset_peak()
    before = resident_bytes()
    call()
    grown[name] = resident_bytes("VmHWM") - before


write = LanguageModelTrainer._write_checkpoint


def write_watched(self, *arguments):
    # Rows that were never touched take no memory in the moments yet, but would in a copy.
    for state in self.optimizer.state.values():
        state["exp_avg"].add_(1e-30)
        state["exp_avg_sq"].add_(1e-30)
    watched("checkpoint", lambda: write(self, *arguments))


LanguageModelTrainer._write_checkpoint = write_watched
trainer = make_trainer(2)
trainer.train()
assert [step for step, _ in list_checkpoints(run)] == [2]
watched("model", lambda: save_whole(trainer.model.save_pretrained, run))
LanguageModelTrainer._write_checkpoint = write
del trainer

trainer = make_trainer(3)
load_model, load_optimizer = trainer._load_from_checkpoint, trainer._load_optimizer_and_scheduler
trainer._load_from_checkpoint = lambda *a: watched("weights read", lambda: load_model(*a))
trainer._load_optimizer_and_scheduler = lambda *a: watched("moments read", lambda: load_optimizer(*a))
release()
before = resident_bytes()
trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
assert trainer.state.global_step == 3
release()
grown["resumed"] = resident_bytes() - before
print(json.dumps(grown))
"""
TABLE = 512 * 256 * 2 * 64 * 4


@pytest.mark.skipif(not can_measure(), reason="needs a system that resets and shows a process's peak")
def test_no_second_copy_of_the_table(tmp_path):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    grown = {name: size / TABLE for name, size in json.loads(done.stdout.splitlines()[-1]).items()}
    assert grown["checkpoint"] < 0.1, grown
    assert grown["model"] < 0.1, grown
    # The file is mapped, not read, while the weights are copied from it, and the moments are not there yet.
    assert grown["weights read"] < 1.1, grown
    assert grown["moments read"] < 2.1, grown
    assert grown["resumed"] < 2.3, "moments, and a little for what a first step loads"
