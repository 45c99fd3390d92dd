"""The expected peak against the peak of a real run; what counts as available."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch

from million_experts.lm import memory
from million_experts.lm.memory import available_memory, expected_peak, takes_bfloat16
from million_experts.lm.settings import TrainSettings
from million_experts.lm.training import model_config

BASE = {
    "vocab_size": 300,
    "context": 128,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "peer": {"num_experts": 65536, "num_heads": 4, "experts_per_head": 8, "key_dim": 32},
    "batch_size": 8,
    "precision": "float32",
}


def estimate(**changes):
    settings = TrainSettings(**BASE).with_overrides(changes)
    return expected_peak(model_config(settings, settings.vocab_size), settings)


RUN = """
import os, pathlib, re, sys
from rich.console import Console
from million_experts.lm.settings import TrainSettings
from million_experts.lm.training import train
settings = TrainSettings.load(pathlib.Path(sys.argv[1]))
train(settings, console=Console(file=open(os.devnull, "w")))
print(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's /proc/self/status")
@pytest.mark.parametrize(
    "changes", [{}, {"peer": {"sparse_grad": True}, "gradient_accumulation_steps": 3}], ids=str
)
def test_the_estimate_is_near_the_peak_of_a_real_run(tmp_path, changes):
    words = random.Random(0).choices(["tea", "at", "four", "or", "coffee", "then"], k=6_000)
    documents = [" ".join(words[at : at + 100]) for at in range(0, len(words), 100)]
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    settings = TrainSettings(
        **BASE,
        data=[str(tmp_path / "text.jsonl")],
        steps=2,
        validation_share=0.1,
        test_share=0.1,
        eval_steps=2,
        report_to=["none"],
        output_dir=str(tmp_path / "run"),
        cache_dir=str(tmp_path / "cache"),
    ).with_overrides(changes)
    settings.save(tmp_path / "settings.yaml")
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "datasets"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "settings.yaml")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout) * 1024
    expected = estimate(**changes)
    assert 0.85 < expected / peak < 1.5, f"expected {expected / 1e6:.0f} MB, took {peak / 1e6:.0f} MB"


def test_the_state_of_the_tables_is_counted_exactly():
    added = estimate(peer={"num_experts": 4 * 65536}) - estimate()
    rows = 3 * 65536 * 2 * 256  # weights, gradient and two moments of 4 bytes each; and 2 x 256 more sub-keys
    gate_mass = 2 * 4 * (3 * 65536) * 8  # two measurements of 4 heads in float64
    assert added == 16 * (rows + 2 * 256 * 16) + gate_mass


def with_moments(**changes) -> int:
    """`estimate` with both moments of every element, as for dense gradients."""
    return estimate(table_adam_beta1=0.9, table_second_moment="element", **changes)


def test_sparse_gradients_are_counted_by_the_picks():
    sparse, rows = {"sparse_grad": True}, 3 * 65536 * 2 * 256
    added = with_moments(peer={"num_experts": 4 * 65536, **sparse}) - with_moments(peer=sparse)
    gate_mass = 2 * 4 * (3 * 65536) * 8
    # Weights and two moments of the rows that came; no gradient, as the picks are no more.
    assert added == 12 * rows + 16 * 2 * 256 * 16 + gate_mass
    table, picked = 65536 * 2 * 256 * 4, 8 * 128 * 4 * 8 * 2 * 256 * 4
    assert picked == table // 2
    base = estimate() - table
    assert with_moments(peer=sparse) == base + picked
    assert with_moments(peer=sparse, batch_size=32) == estimate(batch_size=32), "every expert, at most"
    for count, size in ((2, 2 * picked + table), (3, 3 * picked + table)):  # each, and their sum
        assert with_moments(peer=sparse, gradient_accumulation_steps=count) == base + size


def test_a_table_without_momentum_is_expected_to_take_less():
    sparse, table = {"sparse_grad": True}, 65536 * 2 * 256 * 4
    base = estimate(peer=sparse)
    assert estimate(peer=sparse, table_adam_beta1=0.9) == base + table
    assert estimate(peer=sparse, adam_beta1=0.0) == base, "it is not that of the tables"
    assert estimate(peer=sparse, table_second_moment="element") == base + table - table // 256
    # torch's AdamW, which dense gradients go to, keeps both moments for each element.
    assert estimate(table_adam_beta1=0.9, table_second_moment="element") == estimate()


def test_tables_of_memories_are_counted_like_those_of_experts():
    layer = {"num_experts": 65536, "num_heads": 4, "experts_per_head": 8, "key_dim": 32}
    table, picked = 65536 * 256 * 4, 8 * 128 * 4 * 8 * 256 * 4
    saved = table - picked + table + table - table // 256
    for kind, tables in (("pkm", 2), ("memory_plus", 1)):  # the latter's layers share one
        base = {"mlp_layer_types": kind, kind: layer}
        sparse = base | {kind: layer | {"sparse_grad": True}}
        more = 0 if tables == 2 else min(2 * picked, table) - picked
        assert estimate(**base) - estimate(**sparse) == tables * saved - more


def test_logits_are_counted_with_what_the_loss_makes_of_them():
    tokens, more = 8 * 128, 30_000 - 300
    embeddings = 16 * more * 256  # tied; weights, gradient and two moments
    for changes, per_logit in (
        ({"precision": "float32"}, 8),
        ({"precision": "bfloat16"}, 6),
        ({"precision": "float32", "torch_compile": True}, 16),
        ({"precision": "bfloat16", "torch_compile": True}, 12),
    ):
        added = estimate(vocab_size=30_000, **changes) - estimate(**changes)
        assert added == tokens * more * per_logit + embeddings


def test_what_takes_more_is_expected_to_take_more():
    base = estimate()
    assert estimate(batch_size=16) > base
    assert estimate(context=512) > base
    assert estimate(vocab_size=30_000) > base
    assert estimate(num_hidden_layers=4) > base
    assert estimate(mlp_layer_types="peer") > base
    assert estimate(gradient_checkpointing=True) < base
    assert estimate(precision="bfloat16") < base
    assert estimate(gradient_accumulation_steps=8) == base
    assert estimate(mlp_layer_types="dense") < base
    assert estimate() == base, "asking changes nothing"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000),
        ({"memory.max": "max\n", "memory.current": "5\n", "memory.stat": "anon 5\n"}, 1000),
        ({"memory.max": "700\n", "memory.current": "300\n", "memory.stat": "anon 5\n"}, 400),
        ({"memory.max": "700\n", "memory.current": "300\n", "memory.stat": "inactive_file 250\n"}, 650),
        ({"memory.max": "9000\n", "memory.current": "300\n", "memory.stat": ""}, 1000),
    ],
)
def test_available_memory_keeps_to_the_control_group(monkeypatch, tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    held = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=30))
    monkeypatch.setattr(psutil, "Process", lambda: held)
    assert available_memory() == expected + 30  # what the process holds already is its own


@pytest.mark.parametrize("can", [True, False])
def test_auto_takes_bfloat16_where_the_processor_multiplies_in_it(monkeypatch, can):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: can)
    assert takes_bfloat16("auto") is can
    assert takes_bfloat16("bfloat16") is True
    assert takes_bfloat16("float32") is False


def test_memory_without_proc(monkeypatch, tmp_path):
    def missing(*arguments):
        raise FileNotFoundError(2, "No such file or directory", "/proc/meminfo")

    monkeypatch.setattr("psutil.virtual_memory", missing)
    monkeypatch.setattr("psutil.Process", missing)
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert 10**7 < memory.resident_bytes() < 10**11
    assert available_memory() > memory.resident_bytes()
