"""Runs of `train`: what stands in them at the end, what is kept when they stop, and how they go on."""

from __future__ import annotations

import gc
import io
import json
import math
import os
import random
import shutil
import signal

import datasets
import matplotlib.image
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from million_experts import PEER
from million_experts.lm import data, report, training
from million_experts.lm.checkpoints import list_checkpoints
from million_experts.lm.data import load_test_stream
from million_experts.lm.memory import expected_peak, resident_bytes
from million_experts.lm.ngram import bigram_nats, unigram_nats
from million_experts.lm.scoring import score_documents
from million_experts.lm.settings import TrainSettings
from million_experts.lm.trainer import LanguageModelTrainer
from million_experts.lm.training import check_memory, make_optimizer, model_config, train
from million_experts.models import PeerForCausalLM, count_parameters
from million_experts.models.attention import WIDE_ATTENTION
from million_experts.optim import RowwiseAdamW

WORDS = "the a of in city river mountain king house small old new water light stone was has great".split()


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    gc.collect()
    gc.freeze()  # the trainer collects garbage twice a run, and looks at all that was imported each time
    yield
    gc.unfreeze()


@pytest.fixture(scope="module", autouse=True)
def _own_caches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the text, the cache and the shared run are."""
    folder = tmp_path_factory.mktemp("training")
    pick = random.Random(0)
    texts = [" ".join(pick.choices(WORDS, k=pick.randint(10, 50))) + "." for _ in range(200)]
    (folder / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return folder


def make_settings(folder, run, **changes):
    tiny = {
        "data": [str(folder / "text.jsonl")],
        "cache_dir": str(folder / "cache"),
        "output_dir": str(run),
        "vocab_size": 300,
        "context": 32,
        "validation_share": 0.1,
        "test_share": 0.1,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "peer": {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8},
        "dense": {"width": 32},
        "attention_dropout": 0.1,
        "precision": "float32",
        "batch_size": 16,
        "gradient_accumulation_steps": 2,
        "steps": 16,
        "logging_steps": 1,
        "eval_steps": 8,
        "save_steps": 4,
        "save_total_limit": 10,
        "report_to": ["none"],
    }
    return TrainSettings(**{**tiny, **changes})


def run_train(settings, **arguments):
    out = io.StringIO()
    results = train(settings, console=Console(file=out, width=100), **arguments)
    return results, out.getvalue()


@pytest.fixture(scope="module")
def finished(folder):
    """A finished run: its folder, its results and what it printed."""
    run = folder / "run"
    results, printed = run_train(make_settings(folder, run, report_to=["tensorboard"]))
    return run, results, printed


@pytest.fixture
def copy_of(finished, tmp_path):
    """Copies the finished run, as it was after its checkpoint of some step."""

    def copy(step):
        run = shutil.copytree(finished[0], tmp_path / "copy")
        for number, checkpoint in list_checkpoints(run):
            if number > step:
                shutil.rmtree(checkpoint)
        for name in ("results.json", "model.safetensors", "config.json"):
            (run / name).unlink()
        for figure in run.glob("*.png"):
            figure.unlink()
        return run

    return copy


@pytest.fixture
def no_figures(monkeypatch):
    for name in ("loss_figure", "resources_figure", "usage_figure"):
        monkeypatch.setattr(report, name, lambda *arguments: None)


def losses(results, key="loss"):
    return {row["step"]: row[key] for row in results["history"] if key in row}


def test_figures_of_the_end_are_right(finished, folder):
    run, results, _ = finished
    assert json.loads((run / "results.json").read_text()) == results
    model = AutoModelForCausalLM.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)
    assert type(model) is PeerForCausalLM
    count = count_parameters(model)
    assert results["parameters"] == {"label": count.label, "total": count.total, "active": count.active}
    assert results["steps"] == 16
    stored = TrainSettings.load(run / "settings.yaml")
    assert stored == make_settings(folder, run, report_to=["tensorboard"])
    test = load_test_stream(stored, tokenizer, run)
    score = score_documents(model, test, context=32)
    assert results["test"]["loss"] == pytest.approx(score.loss, rel=1e-5)
    assert (results["test"]["tokens"], results["test"]["bytes"]) == (score.tokens, score.bytes)
    splits = data._load_splits(stored)
    text_bytes = sum(len(text.encode()) for text in splits["test"]["text"])
    train_stream = data._tokenize(splits["train"], tokenizer, stored.cache_dir)
    for name, nats in (("unigram", unigram_nats), ("interpolated bigram", bigram_nats)):
        assert results["yardsticks"][name]["loss"] == pytest.approx(nats(train_stream, test) / len(test))
    for row in (results["test"], *results["yardsticks"].values()):
        assert row["tokens"] == len(test)
        assert row["bytes"] == text_bytes
        assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
        bits = row["loss"] * len(test) / math.log(2) / text_bytes
        assert row["bits_per_byte"] == pytest.approx(bits)
    (usage,) = results["expert_usage"].values()
    assert list(results["expert_usage"]) == ["model.layers.1.mlp"]
    assert 0 < usage["usage"] <= 1
    assert 1 / (64 * usage["usage"]) <= usage["top_share"] <= 1, "no less than the mean of the used ones"


def test_the_history_holds_losses_and_usage(finished):
    _, results, _ = finished
    assert list(losses(results)) == list(range(1, 17))
    assert list(losses(results, "eval_loss")) == [8, 16]
    for figure in ("expert_usage", "expert_unevenness", "expert_top_share"):
        assert list(losses(results, f"{figure}/model.layers.1.mlp")) == [8, 16]
    assert losses(results)[16] < losses(results)[1], "it learns"
    assert list(losses(results, "seconds_per_step")) == list(range(1, 17))
    assert all(0 < seconds < 60 for seconds in losses(results, "seconds_per_step").values())
    here = resident_bytes() / 1e9
    assert all(here / 4 < gb < 4 * here for gb in losses(results, "memory_gb").values())
    assert results["tokens_per_step"] == 2 * 16 * 32


def test_figures_are_pictures(finished):
    run, results, _ = finished
    names = ("loss.png", "resources.png", "expert_usage.png")
    assert results["figures"] == [str(run / name) for name in names]
    for path in results["figures"]:
        pixels = matplotlib.image.imread(path)
        assert min(pixels.shape[:2]) > 400
        assert len(np.unique(pixels[..., 0])) > 20


def test_everything_is_told(finished):
    run, results, printed = finished
    plan = printed.index("expected at the peak")
    count = results["parameters"]
    assert f"{count['total']:,} parameters, {count['active']:,} active for a token" in printed[:plan]
    assert plan < printed.index("200 documents") < printed.index("step 1/16") < printed.index("step 16/16")
    assert printed.count("tokens/s") == 16 + 2
    assert " s left" in printed
    for name in ("this model", "unigram", "interpolated bigram", "perplexity", "bits per byte", "Sample"):
        assert name in printed[printed.index("Test split") :]
    assert f"{results['test']['bits_per_byte']:.3f}" in printed
    assert results["sample"].startswith("The")
    assert results["sample"].strip() in printed
    assert str(run / "loss.png") in printed


def test_metrics_go_to_tensorboard(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, results, _ = finished
    (events,) = run.rglob("events.out.tfevents*")
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    loss = {event.step: event.value for event in accumulator.Scalars("train/loss")}
    assert loss == pytest.approx(losses(results))
    assert any("expert_usage" in tag for tag in accumulator.Tags()["scalars"])


@pytest.mark.parametrize("step", [4, 12, 16])
def test_a_resumed_run_is_the_uninterrupted_one(finished, copy_of, folder, no_figures, step):
    # 16 steps are more than an epoch, and attention drops out: order and random numbers have to come back.
    run = copy_of(step)
    results, printed = run_train(make_settings(folder, run), resume=True)
    assert f"Going on from {run / f'checkpoint-{step}'}" in printed
    straight = finished[1]
    assert straight["history"][-1]["epoch"] > 1
    assert losses(results) == losses(straight)
    assert losses(results, "eval_loss") == losses(straight, "eval_loss")
    assert results["test"] == straight["test"]
    assert results["sample"] == straight["sample"]
    assert results["steps"] == 16
    weights = [load_file(folder / "model.safetensors") for folder in (finished[0], run)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_resuming_a_finished_run_prints_it_and_does_nothing(finished, folder, monkeypatch):
    run, results, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    monkeypatch.setattr(training, "prepare_data", lambda *_: pytest.fail("it reads text"))
    again, printed = run_train(make_settings(folder, run), resume=True)
    assert again == results
    assert f"{run} is finished; its results:" in printed
    assert "interpolated bigram" in printed
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_what_a_run_killed_before_it_began_left_is_no_obstacle(finished, folder, tmp_path, no_figures):
    run = tmp_path / "killed"
    (run / ".partial").mkdir(parents=True)
    (run / ".partial" / "tokenizer.json").write_text("{")
    (run / ".settings.yaml-x1").write_text("da")
    results, _ = run_train(make_settings(folder, run))
    assert losses(results) == losses(finished[1])


def test_a_tokenizer_half_moved_is_trained_again(finished, copy_of, folder, no_figures):
    run = copy_of(0)
    (run / "tokenizer_config.json").unlink()
    results, _ = run_train(make_settings(folder, run), resume=True)
    assert losses(results) == losses(finished[1])


@pytest.mark.parametrize(
    "changes",
    [
        {"context": 5000},
        {"vocab_size": 100},
        {"report_to": ["no-such-thing"]},
        {"data": ["no-such-corpus"]},
    ],
    ids=str,
)
def test_a_run_that_cannot_begin_leaves_its_folder_free(folder, tmp_path, changes):
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="^" + next(iter(changes)).removesuffix("_size")):
        run_train(make_settings(folder, run, **changes))
    assert not run.exists() or not list(run.iterdir())


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 6), (signal.SIGTERM, 16)])
def test_interruption_keeps_the_step_and_names_the_way_on(
    finished, folder, tmp_path, monkeypatch, number, step, no_figures
):
    run, step_of = tmp_path / "a run", LanguageModelTrainer.training_step

    sent = []

    def interrupted(self, *arguments):
        if self.state.global_step == step - 1 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return step_of(self, *arguments)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(LanguageModelTrainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt, match=f"Stopped after step {step} of 16; ") as stop:
        run_train(make_settings(folder, run))
    assert str(stop.value).endswith(f"Go on with: million-experts train --output-dir '{run}' --resume")
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert list_checkpoints(run)[-1][0] == step
    assert not (run / "results.json").exists()
    monkeypatch.setattr(LanguageModelTrainer, "training_step", step_of)
    results, _ = run_train(make_settings(folder, run), resume=True)
    assert losses(results) == losses(finished[1])


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(folder, tmp_path):
    settings = make_settings(
        folder, tmp_path / "run", learning_rate=1e18, table_learning_rate=1e18, warmup_steps=12
    )
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with pytest.raises(FloatingPointError, match=r"became (nan|inf) in step \d+; training stopped before"):
        train(settings.with_overrides({"save_steps": 1, "max_grad_norm": 0.0}), console=console)
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h"), "the terminal is given back"
    _, last = list_checkpoints(tmp_path / "run")[-1]
    weights = PeerForCausalLM.from_pretrained(last).state_dict()
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_what_cannot_fit_is_refused_before_anything_is_made(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda: 10**8)
    monkeypatch.setattr(training, "prepare_data", lambda *_: pytest.fail("it reads text"))
    out = io.StringIO()
    with pytest.raises(MemoryError, match=r"expected to take 0\.\d GB .* 0\.1 GB are available") as error:
        train(make_settings(folder, tmp_path / "run"), console=Console(file=out, width=100))
    for way_out in (
        "num_experts",
        "--batch-size",
        "--gradient-accumulation-steps",
        "--gradient-checkpointing",
    ):
        assert way_out in str(error.value)
    assert "active for a token" in out.getvalue()
    assert not (tmp_path / "run").exists()


def test_processes_of_one_machine_share_its_memory(folder, tmp_path, monkeypatch):
    settings = make_settings(folder, tmp_path / "run")
    config = model_config(settings, settings.vocab_size)
    peak = expected_peak(config, settings)
    monkeypatch.setattr(training, "available_memory", lambda: int(1.5 * peak))
    check_memory(config, settings)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(MemoryError, match=r"the run, each of 2 processes, is expected to take"):
        check_memory(config, settings)


def test_the_plan_of_a_million_experts_takes_no_memory(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda: 10**8)
    big = {"num_experts": 4096**2, "num_heads": 8, "experts_per_head": 16, "key_dim": 128}
    with pytest.raises(MemoryError, match=r"expected to take \d\d\d\.\d GB"):
        run_train(make_settings(folder, tmp_path / "run", hidden_size=512, num_attention_heads=8, peer=big))


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (0, {"mlp_layer_types": "dense"}),
        (2, {"mlp_layer_types": ["peer", "dense", "peer"], "document_mask": False}),
        (1, {"gradient_checkpointing": True, "tie_word_embeddings": False}),
        (1, {"gradient_accumulation_steps": 1, "precision": "bfloat16"}),
        (1, {"num_key_value_heads": 1, "peer": {"num_experts": [16, 8], "glu": True, "experts_per_head": 4}}),
    ],
    ids=str,
)
def test_other_settings_train_too(folder, tmp_path, monkeypatch, expected, changes):
    if expected == 1:  # as in the shared run
        monkeypatch.setattr(report, "usage_figure", lambda usages, title, path: path.touch())
        for name in ("loss_figure", "resources_figure"):
            monkeypatch.setattr(report, name, lambda *arguments: None)
    settings = make_settings(folder, tmp_path / "run", steps=3, **changes)
    results, _ = run_train(settings)
    assert losses(results)[3] < losses(results)[1]
    layers = len(results["expert_usage"])
    assert layers == expected
    assert (tmp_path / "run" / "expert_usage.png").exists() == (layers > 0)
    assert len(results["figures"]) == 2 + (layers > 0)
    assert not list((tmp_path / "run").rglob("events*")), "report_to none"
    model = PeerForCausalLM.from_pretrained(tmp_path / "run")
    assert model.generate(torch.tensor([[0, 5]]), max_new_tokens=2, do_sample=False).shape[1] <= 4


def test_accumulated_micro_batches_are_one_large_batch(folder, tmp_path, no_figures):
    layer = {"query_norm": "layer", "num_experts": 64, "experts_per_head": 4, "key_dim": 8, "num_heads": 2}
    common = {"steps": 3, "attention_dropout": 0.0, "peer": layer}
    large = {"batch_size": 16, "gradient_accumulation_steps": 1}
    small = {"batch_size": 4, "gradient_accumulation_steps": 4}
    runs = [
        run_train(make_settings(folder, tmp_path / name, **common, **sizes))[0]
        for name, sizes in (("large", large), ("small", small))
    ]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-4)


def test_gradient_checkpointing_computes_twice_and_changes_no_loss(folder, tmp_path, monkeypatch, no_figures):
    forward, passes = PEER.forward, {True: 0, False: 0}

    def counted(self, *arguments, **kwargs):
        passes[on] += self.training and torch._C._current_graph_task_id() != -1  # within backward
        return forward(self, *arguments, **kwargs)

    monkeypatch.setattr(PEER, "forward", counted)
    runs = {}
    for on in (True, False):
        settings = make_settings(folder, tmp_path / str(on), steps=3, gradient_checkpointing=on)
        runs[on], _ = run_train(settings)
    assert passes == {True: 3 * 2, False: 0}
    assert losses(runs[True]) == pytest.approx(losses(runs[False]), rel=1e-5)


def test_documents_do_not_see_one_another_unless_told_to(folder, tmp_path, no_figures):
    common = {"steps": 1, "attention_dropout": 0.0}
    masked, stream = (
        run_train(make_settings(folder, tmp_path / str(mask), document_mask=mask, **common))[0]
        for mask in (True, False)
    )
    assert losses(masked) != losses(stream)


def test_a_sample_may_look_like_markup(finished):
    _, results, _ = finished
    out = io.StringIO()
    report.print_results({**results, "sample": "The [/bold] [red]x"}, Console(file=out, width=100))
    assert "The [/bold] [red]x" in out.getvalue()


@pytest.mark.parametrize("sparse_grad", [False, True])
def test_the_optimiser_is_what_the_settings_say(folder, tmp_path, sparse_grad):
    settings = make_settings(
        folder,
        tmp_path,
        learning_rate=1e-3,
        table_learning_rate=5e-3,
        adam_beta2=0.97,
        table_adam_beta1=0.0,
        table_second_moment="row",
        retrieval_learning_rate=2e-4,
        seed=7,
    ).with_overrides({"peer": {"sparse_grad": sparse_grad}})
    model = PeerForCausalLM(model_config(settings, 300))
    optimizer = make_optimizer(model, settings)
    *others, table, retrieval = optimizer.param_groups
    (experts,) = table["params"]
    assert (retrieval["lr"], retrieval["betas"]) == (2e-4, (0.9, 0.97))
    assert experts is next(m for m in model.modules() if isinstance(m, PEER)).experts
    assert (table["lr"], table["betas"], table["weight_decay"]) == (5e-3, (0.0, 0.97), 0.0)
    assert {(group["lr"], group["betas"]) for group in others} == {(1e-3, (0.9, 0.97))}
    assert isinstance(optimizer, RowwiseAdamW) == sparse_grad
    if sparse_grad:
        assert (table["second_moment"], table["seed"]) == ("row", 7)


@pytest.mark.parametrize(("precision", "attention"), [("float32", "sdpa"), ("bfloat16", WIDE_ATTENTION)])
def test_attention_is_what_is_fastest_on_a_cpu(folder, finished, precision, attention, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    tokenizer = AutoTokenizer.from_pretrained(finished[0])
    settings = make_settings(folder, finished[0], precision=precision)
    assert training.build_model(settings, tokenizer).config._attn_implementation == attention
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert training.build_model(settings, tokenizer).config._attn_implementation == "sdpa"
