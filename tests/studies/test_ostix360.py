"""The predecessor's three tests: equal parameters, fair times, and the table with its figures."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from matplotlib.image import imread
from report_tables import table_cells
from rich.console import Console
from typer.testing import CliRunner

from million_experts import cli
from million_experts.benchmarks.memory import Peak
from million_experts.lm.settings import TABLE_SETTINGS, TrainSettings, load_preset
from million_experts.models.attention import WIDE_ATTENTION
from million_experts.studies import ostix360, ostix360_report, speed
from million_experts.studies.ostix360 import (
    BASELINE,
    PRESETS,
    choose_tests,
    name_variants,
    ostix360_runs,
    parameters,
    run_study,
    speed_runs,
)
from million_experts.studies.runs import Ledger
from million_experts.studies.texts import load_texts

SMALL = {"vocab_size": 4096, "steps": 1000}


@pytest.fixture
def narrow(monkeypatch):
    """The tests with models of a third of the blocks and a quarter of the width."""
    monkeypatch.setattr(
        ostix360,
        "load_preset",
        lambda name: replace(load_preset(name), hidden_size=64, num_hidden_layers=2),
    )


def sizes(tests):
    return {name: settings.peer.get("num_experts") for name, settings in tests.items()}


def test_the_original_is_the_predecessors_table():
    tests = choose_tests()
    for name, settings in tests.items():
        assert settings == load_preset(PRESETS[name])
        assert settings.mlp_layer_types == ("moe" if name == BASELINE else "peer")
        published = ostix360.PUBLISHED[name].parameters
        assert parameters(settings) / 1e6 == pytest.approx(published, abs=0.06)
        if name != BASELINE:  # which has no table; plain AdamW, as there
            learning = [getattr(settings, name) for name in TABLE_SETTINGS]
            assert learning == [5e-4, 0.0, 0.9, "element", 5e-4]
    assert tests[BASELINE].table_learning_rate is None
    apart = {"peer": {}, "moe": {}, "mlp_layer_types": None, "output_dir": None}
    apart |= {name: getattr(TrainSettings(), name) for name in TABLE_SETTINGS}
    assert len({str(replace(settings, **apart)) for settings in tests.values()}) == 1


def test_with_a_small_vocabulary_pools_make_the_parameters_equal():
    tests = choose_tests(SMALL)
    assert sizes(tests) == {"peer": 35**2, "peer_glu": 29**2, BASELINE: None}
    target = parameters(tests[BASELINE])
    for name, original in (("peer", 36), ("peer_glu", 30)):
        peer = tests[name].peer
        best = abs(parameters(tests[name]) - target)
        assert best < 0.01 * target
        for side in range(30, 40):
            other = replace(tests[name], peer={**peer, "num_experts": side**2})
            assert abs(parameters(other) - target) >= best
        assert peer["num_experts"] != original**2
        assert {k: v for k, v in peer.items() if k != "num_experts"} == {
            k: v for k, v in load_preset(PRESETS[name]).peer.items() if k != "num_experts"
        }
    assert {settings.warmup_steps for settings in tests.values()} == {0.2}
    assert {settings.steps for settings in tests.values()} == {1000}


def test_other_arguments_keep_the_parameters_equal():
    learning = {
        "table_learning_rate": 2e-3,
        "table_weight_decay": 0.01,
        "table_adam_beta1": 0.0,
        "table_second_moment": "row",
        "retrieval_learning_rate": 1e-4,
    }
    tests = choose_tests(SMALL, {"key_dim": 128, "share_keys": True, **learning})
    target = parameters(tests[BASELINE])
    for name in ("peer", "peer_glu"):
        assert tests[name].peer["key_dim"] == 128
        assert {key: getattr(tests[name], key) for key in TABLE_SETTINGS} == learning
        assert parameters(tests[name]) == pytest.approx(target, rel=0.01)
    # A query projection twice as wide leaves room for fewer experts.
    assert sizes(tests)["peer"] < 35**2
    assert tests[BASELINE] == choose_tests(SMALL)[BASELINE]
    original = choose_tests({}, {"init_std": 0.2})
    assert parameters(original["peer"]) == pytest.approx(parameters(original[BASELINE]), rel=0.005)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"peer": {"num_experts": 128**2}},
            r"peer must have the baseline's 7,709,952 parameters within 2%, got",
        ),
        ({"peer": {"trees": 3}}, "PEER has no argument 'trees'.* and of training table_learning_rate, .*"),
        ({"tests": ["peer", "dense"]}, "tests must be among peer, peer_glu, moe, got 'dense'"),
    ],
)
def test_unequal_or_unknown_tests_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        choose_tests(SMALL, **arguments)


def test_a_variant_stands_beside_the_tests():
    plain = ostix360_runs(choose_tests(SMALL), [0, 1])
    peer = {"init_std": 0.2}
    varied = ostix360_runs(choose_tests(SMALL, peer), [0, 1], name_variants(peer))
    assert [run.name for run in plain] == [
        "peer-seed0", "peer_glu-seed0", "moe-seed0", "peer-seed1", "peer_glu-seed1", "moe-seed1",
    ]  # fmt: skip
    assert [run.name for run in varied][:3] == [
        "peer(init_std=0.2)-seed0",
        "peer_glu(init_std=0.2)-seed0",
        "moe-seed0",
    ]
    assert plain[2].settings == varied[2].settings
    faster = choose_tests(SMALL, {**peer, "table_learning_rate": 4e-3}, learning_rate=1e-3)
    assert [run.name for run in ostix360_runs(faster, [0], name_variants(peer, 1e-3))] == [
        "peer(learning_rate=0.001,init_std=0.2)-seed0",
        "peer_glu(learning_rate=0.001,init_std=0.2)-seed0",
        "moe(learning_rate=0.001)-seed0",
    ]
    rates = ("learning_rate", "table_learning_rate", "retrieval_learning_rate")
    assert [getattr(faster["peer"], rate) for rate in rates] == [1e-3, 4e-3, 1e-3]
    assert [getattr(faster[BASELINE], rate) for rate in rates] == [1e-3, None, None]
    assert [run.name for run in speed_runs(choose_tests(SMALL))] == [
        "peer-speed",
        "peer_glu-speed",
        "moe-speed",
    ]


def tiny_tests(text_file, tmp_path, peer=None):
    changes = {
        "data": [str(text_file)], "max_documents": 100, "cache_dir": str(tmp_path / "cache"),
        "vocab_size": 300, "context": 16, "batch_size": 2, "steps": 4, "precision": "float32",
    }  # fmt: skip
    return choose_tests(changes, peer)


@pytest.mark.parametrize(("precision", "attention"), [("float32", "sdpa"), ("bfloat16", WIDE_ATTENTION)])
def test_steps_are_timed_in_turns_and_compared_round_by_round(
    text_file, tmp_path, precision, attention, narrow, monkeypatch
):
    """With times and peaks made up: what is made of them, and that each model trains as `train` does."""
    tests = tiny_tests(text_file, tmp_path, {"table_adam_beta1": 0.25})
    tests = {name: replace(settings, precision=precision) for name, settings in tests.items()}
    order = []
    times = {"moe": [1.0, 2.0, 3.0], "peer": [3.0, 2.0, 3.0]}

    def make_run(workload, phase):
        assert phase == "step"
        name = "moe" if "TokenChoiceMoE" in str(workload.module.model.model.layers[0].mlp) else "peer"
        optimizer = workload.optimizer(workload.module)
        assert type(optimizer).__name__ == "AdamW"
        assert workload.module.model.config._attn_implementation == attention
        if name == "peer":
            assert optimizer.param_groups[-1]["betas"] == (0.25, 0.999)
        assert len(optimizer.param_groups) > 1

        def run(count):
            order.append(name)
            return times[name][count]

        return run

    monkeypatch.setattr(speed, "make_run", make_run)
    monkeypatch.setattr(speed, "warm_up", lambda run: None)
    monkeypatch.setattr(speed, "can_measure", lambda: True)
    peaks = {"moe": 10_000_000, "peer": 5_000_000}
    monkeypatch.setattr(
        speed, "measure_peaks", lambda c, phases, threads: {"step": Peak(peaks[c.name], None, 0)}
    )
    stream = load_texts(tests["moe"]).train
    chosen = {name: tests[name] for name in ("moe", "peer")}
    figures = speed.compare_steps(chosen, stream, Console(quiet=True), 3)
    assert order == ["moe", "peer", "peer", "moe", "moe", "peer"]
    assert figures["moe"]["seconds"]["median"] == 2.0
    assert figures["moe"]["time_ratio"] == figures["moe"]["memory_ratio"] == 1
    # Ratios of the rounds are 3, 1 and 1.
    assert figures["peer"]["time_ratio"] == 1.0
    weights = 4 * parameters(tests["peer"])
    assert figures["peer"]["weight_bytes"] == weights
    assert figures["peer"]["peak_bytes"] == weights + 5_000_000
    baseline = 4 * parameters(tests["moe"]) + 10_000_000
    assert figures["peer"]["memory_ratio"] == (weights + 5_000_000) / baseline


def test_a_timed_step_trains_on_the_text(text_file, tmp_path, narrow):
    tests = tiny_tests(text_file, tmp_path)
    stream = load_texts(tests["peer"]).train
    competitor = speed._competitor("peer", tests["peer"], stream)
    workload = competitor.build({}, **competitor.arguments)
    ids, positions = workload.draw(torch.Generator().manual_seed(1))
    assert ids.shape == positions.shape == (2, 16)
    text = stream.tokens.tolist()
    rows = [text[i : i + 16] for i in range(0, len(text) - 15, 16)]
    assert all(row in rows for row in ids.tolist())
    run = speed.make_run(workload, "step")
    before = workload.module.model.model.layers[0].mlp.experts.detach().clone()
    assert run(0) > 0
    assert not before.equal(workload.module.model.model.layers[0].mlp.experts)
    # What loads libraries before memory is measured is small, and runs.
    tiny = competitor.tiny()
    few = tiny.build({}, **tiny.arguments)
    assert few.draw(torch.Generator().manual_seed(0))[0].numel() == 8
    assert speed.make_run(few, "step")(0) > 0


def test_memory_is_measured_in_a_process_of_its_own(text_file, tmp_path, narrow):
    settings = tiny_tests(text_file, tmp_path)["peer"]
    stream = load_texts(settings).train
    figures = speed.compare_steps({"peer": settings}, stream, Console(quiet=True), 3)["peer"]
    weights = 4 * parameters(settings)
    assert figures["weight_bytes"] == weights
    # Two moments an element, which the first step makes, and the gradient, at least.
    assert 3 * weights <= figures["added_bytes"] < 3 * weights + 2**26
    assert figures["peak_bytes"] == weights + figures["added_bytes"]
    assert figures["memory_ratio"] == figures["time_ratio"] == 1


# The report and the command.


def make_row(run, loss, training):
    return {
        "name": run.name, "status": "finished", "labels": run.labels, "seed": run.settings.seed,
        "settings": {
            **{name: getattr(run.settings, name) for name in (
                "num_hidden_layers", "hidden_size", "vocab_size", "batch_size", "context", "learning_rate",
                "lr_scheduler_type", "warmup_steps",
            )},
            "peer": run.config.peer, "moe": run.config.moe,
        },
        "steps": 20, "parameters": {"total": parameters(run.settings)},
        "training_loss": [[step, training + 1 / step] for step in range(1, 21)],
        "validation": {"loss": loss}, "tests": {"leads": {"loss": loss + 0.1}, "topics": {"loss": loss + 2}},
    }  # fmt: skip


def test_the_report_puts_the_predecessors_figures_beside_ours(tmp_path):
    tests = choose_tests(SMALL)
    rows = []
    for run in ostix360_runs(tests, range(3)):
        bonus = {"peer": -0.1, "peer_glu": [0.1, -0.1, 0][run.settings.seed], BASELINE: 0.0}[
            run.labels["test"]
        ]
        rows.append(make_row(run, 4.0 + bonus + 0.01 * run.settings.seed, 4.5 + bonus))
    for run in speed_runs(tests):
        ratio = {"peer": 0.5, "peer_glu": 2.0, BASELINE: 1.0}[run.labels["test"]]
        rows.append(
            {
                "name": run.name, "status": "measured", "labels": run.labels,
                "other_cores": 0.5 if ratio == 2 else 0.25,
                "baseline": {"seconds": {"median": 1.0}},
                "speed": {
                    "seconds": {"median": ratio, "q1": ratio * 0.9, "q3": ratio * 1.1, "repetitions": 36},
                    "time_ratio": ratio, "memory_ratio": ratio,
                    "weight_bytes": 3e7, "peak_bytes": ratio * 2e8,
                },
            }
        )  # fmt: skip
    diverged = {**make_row(run, 0.0, 0.0), "name": "gone-seed0", "status": "diverged"}
    del diverged["validation"]
    parts = ostix360_report.sections([*rows, diverged], tmp_path)
    assert any(f"]({ostix360_report.FIGURE})" in part for part in parts)
    height, width, _ = imread(tmp_path / ostix360_report.FIGURE).shape
    assert width > height > 300
    assert "The predecessor had vocabulary 32,000" in parts[0]
    assert "in no mean, are `gone-seed0`" in parts[1]
    assert "learning rate 0.0005 with a" in parts[0]
    faster = ostix360_runs(choose_tests(SMALL, learning_rate=2e-3), range(1))
    mixed = [*rows, *(make_row(run, 4.0, 4.5) for run in faster)]
    assert "learning rate 0.0005 or 0.002 with a" in ostix360_report.sections(mixed, tmp_path)[0]
    original = {"steps": 2500, "training_loss": [[2500, 4.0]]}
    full = [
        row | original | {"settings": row["settings"] | {"vocab_size": 32_000}}
        for row in rows
        if "steps" in row
    ]
    assert "The predecessor had" not in ostix360_report.sections(full, tmp_path)[0]
    summary, training, differences, times = (table_cells(part) for part in parts if part.startswith("|"))
    peer = dict(zip(summary[0], summary[1], strict=True))
    assert summary[1][:3] == ["peer", "8 x 30 of 1225", "7.65M"]
    assert peer["validation"] == "3.910 ± 0.025"
    assert peer["leads"] == "4.010 ± 0.025"
    assert summary[1][6:10] == ["500 ms", "0.50", "100 MB", "0.50"]
    assert summary[3][1] == "2 of 4 experts of width 256"
    assert summary[3][6:10] == ["1000 ms", "1.00", "200 MB", "1.00"]
    assert summary[1][-1] == "`peer-seed0,1,2`, `peer-speed`"
    # The last tenth of 20 steps: 1/19 and 1/20 above 4.4.
    assert training[1][:4] == ["peer (1: PEER, 8 x 30 of 36^2)", "22.2M", "4.451 ± 0.000", "4.58"]
    assert training[1][-1] == "`peer-seed0,1,2`"
    assert differences[1][0] == "peer − moe"
    assert differences[1][3] == "-0.1000 [-0.1000, -0.1000], n=3, lower"
    assert differences[2][3].endswith("n=3, tie")
    assert times[1] == ["peer", "450 to 550 ms", "1000 ms", "at least 7", "at least 3", "`peer-speed`"]
    assert times[3][3:5] == ["1", "1"]
    untimed = [row for row in rows if row["name"] != "peer-speed"]
    summary = next(table_cells(p) for p in ostix360_report.sections(untimed, tmp_path) if p.startswith("|"))
    assert summary[1][6:10] == ["—"] * 4
    assert "while others kept 0.25 to 0.50 cores busy" in "".join(parts)


def test_an_interruption_of_the_timing_says_how_to_go_on(tmp_path, monkeypatch):
    tests, ledger = choose_tests(SMALL), Ledger(tmp_path / "ostix360.jsonl")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ostix360, "execute", lambda *arguments, **options: None)
    monkeypatch.setattr(ostix360, "load_texts", lambda settings: SimpleNamespace(train=None))
    monkeypatch.setattr(ostix360, "compare_steps", interrupt)
    with pytest.raises(KeyboardInterrupt, match="the same command goes on with the times"):
        run_study(tests, [0], ledger, Console())
    assert ledger.rows() == []


def test_the_study_runs_from_plan_to_report(text_file, tmp_path, narrow, monkeypatch):
    monkeypatch.setattr(  # a process for each model would take a minute
        speed, "measure_peaks", lambda c, phases, threads: {"step": Peak(1_000_000, None, 0)}
    )
    command = (
        "study ostix360 --budget 2.5e9 --seeds 2 --vocab-size 300 --context 16 --batch-size 2 "
        "--timed-steps 3 --max-documents 100 --precision float32"
    ).split()
    command += ["--data", str(text_file), "--cache-dir", str(tmp_path / "cache")]
    command += ["--output", str(tmp_path / "out")]
    invoke = CliRunner().invoke
    planned = invoke(cli.app, [*command, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "6 runs" in planned.output
    assert {"peer-seed0", "peer_glu-seed1", "moe-seed1"} <= set(planned.output.split())
    assert re.search(r"FLOPs, about \d+\.\d\d hours", planned.output)
    assert not (tmp_path / "out").exists()

    done = invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "ostix360.jsonl").read_text().splitlines()]
    assert {row["steps"] for row in rows[:6]} == {rows[2]["steps"]}
    assert 0.9 * 2.5e9 < rows[2]["flops"]["total"] <= 2.5e9
    assert [row["name"] for row in rows[6:]] == ["peer-speed", "peer_glu-speed", "moe-speed"]
    for row in rows[:6]:
        assert row["parameters"]["total"] == pytest.approx(rows[2]["parameters"]["total"], rel=0.02)
    page = (out / "ostix360.md").read_text()
    assert "`peer-seed0,1`" in page
    assert "`peer-speed`" in page

    varied = invoke(cli.app, [*command, "--seeds", "1", "--tests", "peer,moe", "--peer", "init_std=0.2"])
    assert varied.exit_code == 0, varied.output
    rows = [json.loads(line) for line in (out / "ostix360.jsonl").read_text().splitlines()]
    assert [row["name"] for row in rows[9:]] == ["peer(init_std=0.2)-seed0", "peer(init_std=0.2)-speed"]
    page = (out / "ostix360.md").read_text()
    assert "| peer, variant 1 − moe |" in page
    assert "- peer, variant 1: init_std=0.2.\n" in page

    faster = invoke(cli.app, [*command, "--seeds", "1", "--tests", "moe", "--learning-rate", "1e-2"])
    assert faster.exit_code == 0, faster.output
    assert "No times: they are taken beside those of moe" in faster.output
    page = (out / "ostix360.md").read_text()
    assert "- moe, variant 1: learning_rate=0.01.\n" in page
    differences = [
        line[0] for line in table_cells(page[page.index("## Differences") : page.index("## How time")])
    ]
    assert differences[1:] == [
        f"{name} − {baseline}"
        for baseline in ("moe", "moe, variant 1")
        for name in ("peer", "peer, variant 1", "peer_glu")
    ]

    full = invoke(cli.app, [*command, "--full", "--dry-run"])
    assert full.exit_code == 0, full.output  # the other ledger's runs have other settings
    (out / "ostix360.jsonl").rename(out / "ostix360-full.jsonl")
    (out / "ostix360.md").unlink()
    reported = invoke(cli.app, ["study", "report", str(out)])
    assert reported.exit_code == 0, reported.output
    assert "`peer-speed`" in (out / "ostix360-full.md").read_text()
