"""The ledger, and runs carried out: finished ones are kept whatever happens to those after them."""

from __future__ import annotations

import builtins
import dataclasses
import io
import json
import math

import pytest
import torch
from rich.console import Console
from transformers import TrainerCallback

from million_experts.lm import training
from million_experts.lm.scoring import score_documents
from million_experts.models import PeerConfig, PeerForCausalLM
from million_experts.models.feed_forwards import FEED_FORWARDS
from million_experts.studies import runs as module
from million_experts.studies.flops import training_flops_per_token
from million_experts.studies.runs import (
    Ledger,
    Run,
    execute,
    resolved_precision,
    stored_settings,
    train_and_measure,
    training_steps,
)
from million_experts.studies.texts import load_texts


def make_row(run, **changes):
    return {
        "study": run.study,
        "name": run.name,
        "status": "finished",
        "labels": run.labels,
        "settings": stored_settings(run.settings),
        "precision": resolved_precision(run.settings),
        **changes,
    }


@pytest.fixture
def make_run(tiny_settings):
    def make(name="one", labels=None, **changes):
        return Run("a study", name, tiny_settings(**changes), labels or {})

    return make


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "folder" / "study.jsonl")


def run_all(runs, ledger, **arguments):
    out = io.StringIO()
    execute(runs, ledger, Console(file=out, width=200), **arguments)
    return out.getvalue()


# The ledger.


def test_a_ledger_holds_what_was_appended(ledger, make_run):
    assert ledger.rows() == []
    assert ledger.missing([make_run()])
    rows = [make_row(make_run("one")), make_row(make_run("two"), note="a line\nand another")]
    for row in rows:
        ledger.append(row)
    assert ledger.rows() == rows == Ledger(ledger.path).rows()
    assert not ledger.missing([make_run("two")])
    assert [run.name for run in ledger.missing([make_run(n) for n in ("two", "three", "one")])] == ["three"]


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_torn_last_line_is_ignored_and_overwritten(ledger, make_run, kept):
    first, second = make_row(make_run("one")), make_row(make_run("two"))
    ledger.append(first)
    whole = ledger.path.read_bytes()
    ledger.append(second)
    torn = ledger.path.read_bytes()[len(whole) :][:kept]
    ledger.path.write_bytes(whole + torn)
    assert ledger.rows() == [first]
    assert ledger.missing([make_run("two")])
    ledger.append(second)
    assert ledger.rows() == [first, second]
    assert ledger.path.read_bytes().startswith(whole)


def test_what_another_process_appends_meanwhile_is_kept(ledger, make_run, monkeypatch):
    one, two, three = (make_row(make_run(name)) for name in ("one", "two", "three"))
    ledger.append(one)
    open_, others = builtins.open, []

    def slow_open(*arguments, **options):
        file = open_(*arguments, **options)
        if not others:  # between all that is read before a row is written, and the writing
            others.append(two)
            Ledger(ledger.path).append(two)
        return file

    monkeypatch.setattr("builtins.open", slow_open)
    ledger.append(three)
    assert ledger.rows() == [one, two, three]


def test_a_name_has_one_row(ledger, make_run):
    ledger.append(make_row(make_run("one")))
    whole = ledger.path.read_bytes()
    with pytest.raises(ValueError, match="has a row of one already, and keeps it"):
        ledger.append(make_row(make_run("one")))
    assert ledger.path.read_bytes() == whole


def test_a_damaged_line_is_named(ledger, make_run):
    ledger.append(make_row(make_run("one")))
    ledger.path.write_text("{}\n" + ledger.path.read_text())
    with pytest.raises(
        ValueError, match=r"line 1 of .*study\.jsonl is no row of a study: KeyError\('name'\)"
    ):
        ledger.rows()


def test_a_number_that_json_does_not_know_is_not_written(ledger, make_run):
    with pytest.raises(ValueError, match="not JSON compliant"):
        ledger.append(make_row(make_run(), loss=math.nan))
    assert ledger.rows() == []


def test_a_name_with_other_settings_is_refused(ledger, make_run):
    ledger.append(make_row(make_run(learning_rate=1e-3)))
    with pytest.raises(
        ValueError, match=r"run one in .* other settings: learning_rate: 0.002, not 0.001; table"
    ):
        ledger.missing([make_run(learning_rate=2e-3)])
    with pytest.raises(ValueError, match=r"other settings: peer.num_experts: 81, not 64\. Give the options"):
        ledger.missing([make_run(learning_rate=1e-3, peer={**make_run().settings.peer, "num_experts": 81})])


def test_a_precision_that_this_machine_resolves_otherwise_is_refused(ledger, make_run, monkeypatch):
    """A row may have been made with "auto" on a processor with bfloat16, or ask for it by name."""
    row = make_row(make_run(precision="bfloat16"))
    ledger.append({**row, "settings": {**row["settings"], "precision": "auto"}})
    monkeypatch.setattr(
        "million_experts.studies.runs.takes_bfloat16", lambda precision: precision != "float32"
    )
    assert not ledger.missing([make_run(precision="auto")])
    assert not ledger.missing([make_run(precision="bfloat16")])
    monkeypatch.setattr(
        "million_experts.studies.runs.takes_bfloat16", lambda precision: precision == "bfloat16"
    )
    assert not ledger.missing([make_run(precision="bfloat16")])
    with pytest.raises(ValueError, match="other settings: precision: 'float32', not 'bfloat16'"):
        ledger.missing([make_run(precision="auto")])


def test_where_files_go_and_how_often_is_logged_makes_no_difference(ledger, make_run):
    ledger.append(make_row(make_run()))
    free = {"output_dir": "elsewhere", "cache_dir": "elsewhere", "logging_steps": 3, "prompt": "A"}
    assert not ledger.missing([make_run(**free)])


def test_defaults_are_written_out_so_a_changed_one_is_noticed(ledger, make_run, monkeypatch):
    run = make_run()
    stored = stored_settings(run.settings)
    assert stored["peer"]["init_std"] == 0.01
    assert stored["table_learning_rate"] == 4 * stored["learning_rate"]
    assert stored["mlp_layer_types"] == ["dense", "peer"]
    assert stored["moe"] == {}
    assert "backend" not in stored["peer"]
    assert "cache_dir" not in stored
    ledger.append(json.loads(json.dumps(make_row(run))))
    assert not ledger.missing([run])
    new = dataclasses.replace(FEED_FORWARDS["peer"], defaults={"init_std": 0.2})
    monkeypatch.setitem(FEED_FORWARDS, "peer", new)
    with pytest.raises(ValueError, match=r"peer.init_std: 0.2, not 0.01"):
        ledger.missing([make_run()])
    assert not ledger.missing([make_run(peer={**run.settings.peer, "init_std": 0.01})])


# Steps and FLOPs.


def test_steps_are_what_the_budget_pays_for(tiny_settings):
    settings = tiny_settings(mlp_layer_types="dense", dense={"width": 32})
    config = PeerConfig(
        vocab_size=300,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_layer_types="dense",
        dense={"width": 32},
    )
    step = training_flops_per_token(config, 32).total * 4 * 32
    assert training_steps(25.5 * step, settings) == 25
    with pytest.raises(ValueError, match=r"budget must pay for 10 steps at least, got .*9\.0 steps"):
        training_steps(9 * step, settings)


def test_a_runs_flops_are_those_of_all_its_tokens(make_run):
    run = make_run()
    per_token = training_flops_per_token(run.config, 32).total
    assert run.flops == per_token * 12 * 4 * 32
    assert run.config.vocab_size == 300


# Runs carried out.


@pytest.fixture
def one(ledger, make_run):
    """A finished run, its row and what was printed."""
    run = make_run(labels={"method": "peer"}, seed=3)
    printed = run_all([run], ledger, command="million-experts study x")
    return run, ledger.rows()[0], printed


def test_a_row_says_what_was_done_and_what_came_of_it(one):
    run, row, printed = one
    assert (row["study"], row["name"], row["status"]) == ("a study", "one", "finished")
    assert row["labels"] == {"method": "peer"}
    assert row["settings"] == stored_settings(run.settings)
    assert row["seed"] == 3
    assert row["flops"]["total"] == run.flops
    assert sum(row["flops"]["parts"].values()) == pytest.approx(row["flops"]["per_token"])
    assert (row["steps"], row["tokens"]) == (12, 12 * 4 * 32)
    assert row["epochs"] == pytest.approx(row["tokens"] / row["texts"]["train"]["tokens"])
    assert 0 < row["parameters"]["active"] < row["parameters"]["total"]
    assert len(row["tests"]) == 2
    for score in (row["validation"], *row["tests"].values()):
        assert 0 < score["loss"] < 2 * math.log(300)
        assert score["bits_per_byte"] == pytest.approx(
            score["loss"] * score["tokens"] / score["bytes"] / math.log(2)
        )
    (usage,) = row["expert_usage"].values()
    assert 0 < usage["usage"] <= 1
    # Windows over documents longer than the context overlap.
    assert usage["tokens"] >= row["texts"]["validation"]["tokens"]
    assert row["seconds"] > 0
    assert row["seconds_per_step"] > 0
    assert [step for step, _ in row["training_loss"]] == list(range(1, 13))
    assert row["command"] == "million-experts study x"
    assert row["versions"]["torch"] == torch.__version__
    assert "peak_bytes" in row
    assert "commit" in row
    assert "1/1 one: 12 steps" in printed
    assert f"validation {row['validation']['loss']:.4f}" in printed


def test_a_run_is_the_training_that_train_does(one, tmp_path):
    """Same text, seed and settings: the same losses to the bit, though one is watched and the other not."""
    run, row, _ = one
    texts = load_texts(run.settings)
    settings = dataclasses.replace(run.settings, logging_steps=1, eval_steps=5, report_to=["none"])
    model = training.build_model(settings, texts.tokenizer, 300)
    trainer = training._make_trainer(settings, tmp_path / "run", model, texts.tokenizer, texts.streams)
    trainer.train()
    history = [[entry["step"], entry["loss"]] for entry in trainer.state.log_history if "loss" in entry]
    assert history == row["training_loss"]
    score = score_documents(model, texts.validation, context=32)
    assert score.loss == row["validation"]["loss"]


def test_a_run_can_be_repeated_and_its_seed_matters(one, make_run, tmp_path):
    run, row, _ = one
    again = Ledger(tmp_path / "again.jsonl")
    run_all([run, make_run("other", seed=4)], again)
    same, other = again.rows()
    assert same["validation"] == row["validation"]
    assert same["tests"] == row["tests"]
    assert other["texts"] == row["texts"]
    assert other["validation"]["loss"] != row["validation"]["loss"]


def test_nothing_is_left_in_folders(one, ledger, tmp_path):
    assert {path.name for path in ledger.path.parent.iterdir()} == {"study.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "cache"}


def test_finished_runs_are_not_repeated(one, ledger, make_run, monkeypatch):
    run, row, _ = one
    trained = []
    fit = module.fit
    monkeypatch.setattr(module, "fit", lambda s, *rest: trained.append(s.seed) or fit(s, *rest))
    run_all([make_run("two", seed=5), run], ledger)
    assert trained == [5]
    assert ledger.rows()[0] == row
    assert run_all([run, make_run("two", seed=5)], ledger) == ""


def test_further_figures_are_kept(ledger, make_run):
    def measure(run, model, texts):
        assert not any(parameter.is_meta for parameter in model.parameters())
        return {"name": run.name, "tokens": len(texts.validation)}

    run_all([make_run()], ledger, measure=measure)
    (row,) = ledger.rows()
    assert row["measured"] == {"name": "one", "tokens": row["texts"]["validation"]["tokens"]}


def test_a_diverged_run_gets_a_row_and_the_next_one_trains(ledger, make_run):
    printed = run_all([make_run("wild", learning_rate=1e30, max_grad_norm=0.0), make_run("tame")], ledger)
    wild, tame = ledger.rows()
    assert wild["status"] == "diverged"
    assert "step" in wild["reason"]
    assert "validation" not in wild
    assert tame["status"] == "finished"
    assert "1/2 wild: diverged" in printed
    assert ledger.missing([make_run("tame")]) == []


def test_an_interruption_keeps_the_finished_runs(ledger, make_run, monkeypatch):
    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    fit = module.fit

    def interrupted(settings, model, tokenizer, streams, callbacks):
        extra = [Interrupt()] if settings.seed == 1 else []
        return fit(settings, model, tokenizer, streams, [*callbacks, *extra])

    monkeypatch.setattr(module, "fit", interrupted)
    runs = [make_run("one"), make_run("two", seed=1), make_run("three")]
    with pytest.raises(KeyboardInterrupt, match=r"1 of 3 runs in .*study\.jsonl; the same command goes on"):
        run_all(runs, ledger)
    assert [row["name"] for row in ledger.rows()] == ["one"]
    monkeypatch.setattr(module, "fit", fit)
    run_all(runs, ledger)
    assert [row["name"] for row in ledger.rows()] == ["one", "two", "three"]


def test_other_text_under_the_same_name_is_refused(one, ledger, make_run, text_file, tmp_path):
    run, row, _ = one
    lines = ledger.path.read_text().replace(row["texts"]["train"]["digest"], "0" * 32)
    ledger.path.write_text(lines)
    with pytest.raises(
        ValueError, match=r"data is not what one in .*study\.jsonl was made with \(train differs"
    ):
        run_all([run, make_run("two")], ledger)


def test_what_does_not_fit_is_refused_before_anything_is_trained(ledger, make_run, monkeypatch):
    monkeypatch.setattr(training, "available_memory", lambda: 10**6)
    with pytest.raises(MemoryError, match="one: the run is expected to take"):
        run_all([make_run()], ledger)
    assert ledger.rows() == []


def test_names_must_be_unique(ledger, make_run):
    with pytest.raises(ValueError, match="unique"):
        run_all([make_run(), make_run(seed=1)], ledger)


def test_the_training_loss_is_the_language_models_alone(make_run, tmp_path, monkeypatch):
    """The router's balancing loss is trained on, and logged beside it."""
    found = []
    forward = PeerForCausalLM.forward

    def watched(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        if out.router_loss is not None:
            found.append((out.loss.item(), out.router_loss.item()))
        return out

    monkeypatch.setattr(PeerForCausalLM, "forward", watched)
    run = make_run(
        mlp_layer_types="moe",
        peer={},
        dense={},
        moe={"num_experts": 4, "router_loss_coef": 0.3},
        gradient_accumulation_steps=2,
        steps=3,
    )
    row = train_and_measure(run, load_texts(run.settings))
    assert len(found) == 6
    for i, (step, loss) in enumerate(row["training_loss"]):
        assert step == i + 1
        # Of a micro-batch's loss, both parts are shares of a step's.
        whole = sum(loss for loss, _ in found[2 * i : 2 * i + 2])
        router = sum(router for _, router in found[2 * i : 2 * i + 2]) / 2
        assert router > 0.3
        assert loss == pytest.approx(whole - router, rel=1e-5)
