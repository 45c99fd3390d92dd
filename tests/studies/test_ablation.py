"""The ablations: which runs an axis asks for, what rows hold, and what the report makes of them."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, replace

import matplotlib.image
import pytest
from report_tables import table_cells
from typer.testing import CliRunner

from million_experts import cli
from million_experts.layers import ExpertUsage
from million_experts.lm.callbacks import retrieval_layers
from million_experts.lm.packing import PackedBlocks
from million_experts.lm.training import build_model
from million_experts.models import count_parameters
from million_experts.studies.ablation import AXES, TRAINING, Setup, ablation_runs, usage_and_modes
from million_experts.studies.ablation_report import sections
from million_experts.studies.causality import draw_batches
from million_experts.studies.runs import Run, stored_settings
from million_experts.studies.texts import load_texts

POOLS = (64, 256)


def make_base(tiny_settings, **peer):
    own = {"num_experts": 64, "num_heads": 4, "experts_per_head": 6, "key_dim": 8}
    return tiny_settings(num_hidden_layers=3, learning_rate=1e-3, peer={**own, **peer})


def setups_of(runs):
    return [Setup(**run.labels["setup"]) for run in runs]


def changes(base, axis, pools=POOLS):
    """What an axis varies, as names of its runs without the seed."""
    return [run.labels["variant"] for run in ablation_runs(base, [axis], [0], pools)]


def test_axes_ask_for_what_they_say(tiny_settings):
    base = make_base(tiny_settings)
    found = {axis: changes(base, axis) for axis in AXES}
    assert all(variants[0] == "base" for variants in found.values())
    assert {axis: variants[1:] for axis, variants in found.items()} == {
        "num_experts": ["num_experts=256"],
        # 16 and 32 experts a head are more than the codebooks of 8 sub-keys have.
        "active": ["experts_per_head=4", "experts_per_head=8"],
        # 24 experts a token: 12 x 2 heads and 3 x 8; 16 heads do not divide them.
        "heads": ["num_heads=8,experts_per_head=3"],
        "query_norm": [
            "query_norm=layer",
            "query_norm=none",
            "num_experts=256",
            "num_experts=256,query_norm=layer",
            "num_experts=256,query_norm=none",
        ],
        "share_keys": ["share_keys=False"],
        "score": ["score=sigmoid", "score=relu"],
        "glu": ["experts_per_head=4,glu=True"],
        "placement": ["placement=all", "placement=first", "placement=last"],
        "table_rate": ["table_rate=1.0", "table_rate=2.0", "table_rate=8.0"],
        "table_beta1": ["table_beta1=0.9"],
        "retrieval_rate": ["retrieval_rate=0.125", "retrieval_rate=0.5", "retrieval_rate=1.0"],
        "init_std": ["init_std=0.003", "init_std=0.03", "init_std=0.1"],
        "shared_width": ["shared_width=256"],
    }


def test_heads_keep_the_experts_at_work(tiny_settings):
    base = make_base(tiny_settings, num_experts=128**2, num_heads=8, experts_per_head=16)
    setups = setups_of(ablation_runs(base, ["heads"], [0], ()))
    assert sorted((s.num_heads, s.experts_per_head) for s in setups) == [(2, 64), (4, 32), (8, 16), (16, 8)]
    assert {s.active for s in setups} == {128}


def test_gated_experts_are_two_thirds_as_many(tiny_settings):
    base = make_base(tiny_settings, num_experts=128**2, num_heads=8, experts_per_head=16)
    (_, gated) = ablation_runs(base, ["glu"], [0], ())
    plain, own = (count_parameters(run.config) for run in ablation_runs(base, ["glu"], [0], ()))
    assert gated.config.peer["experts_per_head"] == 11
    # 8 * 16 * 2 rows of the table at work, and 8 * 11 * 3.
    assert own.active - plain.active == (264 - 256) * 16
    # The other way round, for a base with gated experts.
    (_, ungated) = setups_of(
        ablation_runs(make_base(tiny_settings, num_experts=256, glu=True), ["glu"], [0], ())
    )
    assert (ungated.glu, ungated.experts_per_head) == (False, 9)


def test_runs_train_what_their_setup_says(tiny_settings):
    base = make_base(tiny_settings)
    for run in ablation_runs(base, seeds=[3], pools=POOLS):
        setup, config = Setup(**run.labels["setup"]), run.config
        for name, value in asdict(setup).items():
            if name not in TRAINING:
                assert config.peer[name] == value
        assert config.peer["sparse_grad"]
        assert config.peer["key_dim"] == 8
        assert run.settings.peak_table_learning_rate == setup.table_rate * 1e-3
        assert run.settings.table_adam_beta1 == setup.table_beta1
        assert run.settings.peak_retrieval_learning_rate == setup.retrieval_rate * 1e-3
        blocks = {"middle": [1], "all": [0, 1, 2], "first": [0], "last": [2]}[setup.placement]
        assert [i for i, kind in enumerate(config.mlp_layer_types) if kind == "peer"] == blocks
        assert run.settings.seed == 3
        assert run.settings.steps == base.steps
        assert run.name == f"{run.labels['variant']}-seed3"


def test_shared_runs_are_trained_once(tiny_settings):
    runs = ablation_runs(make_base(tiny_settings), seeds=[0, 1], pools=POOLS)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    for seed in (0, 1):
        own = [json.dumps(asdict(run.settings)) for run in runs if run.settings.seed == seed]
        assert len(set(own)) == len(own) == len(names) / 2
    assert names.count("num_experts=256-seed0") == 1  # of num_experts and of query_norm


def test_the_base_is_what_the_layer_is_told(tiny_settings):
    base = replace(make_base(tiny_settings, init_std=0.3, query_norm="layer"), table_learning_rate=2e-3)
    assert changes(base, "init_std") == [
        "base",
        "init_std=0.003",
        "init_std=0.01",
        "init_std=0.03",
        "init_std=0.1",
    ]
    assert changes(base, "table_rate") == ["base", "table_rate=1.0", "table_rate=4.0", "table_rate=8.0"]
    assert "query_norm=batch" in changes(base, "query_norm")


def test_a_budget_decides_on_the_steps(tiny_settings):
    runs = ablation_runs(make_base(tiny_settings), ["shared_width"], [0], (), budget=2e8)
    plain, shared = runs
    assert plain.settings.steps > shared.settings.steps
    for run in runs:
        step = run.flops / run.settings.steps
        assert 2e8 - step < run.flops <= 2e8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"axes": ["trees"]}, "axes must be among num_experts, .*, got 'trees'"),
        ({"pools": (64, 25)}, r"^pools must .* at least experts_per_head=6 sub-keys, got 25 = 5 \* 5"),
        ({"pools": (67,)}, "num_experts=67 has no factorisation"),
        ({"budget": 10.0}, "budget must pay for 10 steps at least"),
        ({"budget": math.nan}, "budget must be finite, got nan"),
        ({"budget": math.inf}, "budget must be finite, got inf"),
    ],
)
def test_what_cannot_be_trained_is_refused(arguments, message, tiny_settings):
    with pytest.raises(ValueError, match=message):
        ablation_runs(make_base(tiny_settings), **arguments)


def test_a_base_that_retrieves_more_than_there_is_is_refused(tiny_settings):
    base = make_base(tiny_settings)
    base.peer |= {"num_experts": 25}
    with pytest.raises(ValueError, match=r"^num_experts must .* got 25 = 5 \* 5"):
        ablation_runs(base, pools=(64,))


def test_usage_is_that_of_the_tokens_asked_for(tiny_settings):
    settings = replace(make_base(tiny_settings), mlp_layer_types=["peer", "peer", "dense"])
    texts = load_texts(settings)
    model = build_model(settings, texts.tokenizer, settings.vocab_size)
    run = Run("ablation", "x", settings, {})
    found = usage_and_modes(100)(run, model, texts)
    assert found.keys() == {"usage", "batch_norm"}
    blocks = PackedBlocks(texts.validation, 32)
    rows = draw_batches(blocks, 4, 100)[0]
    assert len(rows["input_ids"]) == 4  # 128 tokens, in rows of 32
    model.eval()
    for name, layer in retrieval_layers(model).items():
        with ExpertUsage(layer) as usage:
            model(rows["input_ids"], position_ids=rows["position_ids"], use_cache=False)
        assert found["usage"][name] == asdict(usage.figures()) | {"tokens": 128}
    assert found["batch_norm"]["tokens"] == 4 * 31
    everything = usage_and_modes(10**9)(run, model, texts)["usage"]
    assert {figures["tokens"] for figures in everything.values()} == {32 * len(blocks)}


# The report.


def make_row(run, loss, usage=0.9, unevenness=1.0, gap=0.0):
    """A row as `execute` writes it, with figures of our choice."""
    measured = {"usage": {"model.layers.1.mlp": {"usage": usage, "unevenness": unevenness, "tokens": 5000}}}
    if run.settings.peer["query_norm"] == "batch":
        measured["batch_norm"] = {
            "loss_train_mode": loss + gap,
            "loss_eval_mode": loss,
            "tokens": 4000,
            "future": {
                "logit_change": 0.02,
                "largest_logit_change": 0.2,
                "divergence": 1e-4,
                "loss_own_future": 3.0,
                "loss_other_future": 3.001,
                "tokens": 2000,
            },
        }
    return {
        "name": run.name,
        "status": "finished",
        "labels": run.labels,
        "seed": run.settings.seed,
        "settings": stored_settings(run.settings),
        "steps": run.settings.steps,
        "tokens": run.settings.steps * run.settings.tokens_per_step(),
        "flops": {"per_token": 2e6},
        "seconds_per_step": 0.5,
        "machine": {"cpu": "a processor"},
        "threads": 2,
        "validation": {"loss": loss},
        "measured": measured,
    }


def part_after(parts, heading, number=1):
    """The first table after a heading, or a later one."""
    at = parts.index(f"## {heading}")
    tables = [part for part in parts[at + 1 :] if part.startswith("|")]
    return table_cells(tables[number - 1])


@pytest.fixture
def report(tiny_settings, tmp_path):
    runs = ablation_runs(make_base(tiny_settings), seeds=[0, 1, 2], pools=POOLS)
    rows = []
    for run in runs:
        setup = Setup(**run.labels["setup"])
        spread = [0.0, 0.02, 0.01][run.settings.seed]
        bonus = -0.5 * (setup.num_experts == 256) + 0.1 * (setup.query_norm == "none")
        bonus += 0.2 * (setup.score == "relu") + [1, -1, 0][run.settings.seed] * (setup.score == "sigmoid")
        none = setup.query_norm == "none"
        rows.append(make_row(run, 3 + spread + bonus, 0.8 if none else 0.9, 2.0 if none else 1.5, -0.01))
    return sections(rows, tmp_path), tmp_path, rows


def test_differences_are_paired_with_the_base(report):
    parts, _, rows = report
    lines = {line[0]: line for line in part_after(parts, AXES["score"].question)[1:]}
    assert lines["base"][1:5] == ["3.0100", "20.29", "—", ""]
    # The seeds' own spread falls out of the difference.
    assert lines["score=relu"][3:5] == ["+0.2000 ± 0.0000", "higher"]
    assert lines["score=sigmoid"][4] == "tie"
    # Differences +1, -1 and 0: 4.303 standard errors of 1/sqrt(3).
    assert lines["score=sigmoid"][3] == "+0.0000 ± 2.4841"
    assert lines["score=relu"][5:7] == ["90.0%", "1.50"]
    names = {row["name"] for row in rows}
    assert lines["score=relu"][-1] == "`score=relu-seed0,1,2`"
    for stem, ends in re.findall(r"`([^`]*seed)([\d,]+)`", "\n".join(parts)):
        assert {stem + end for end in ends.split(",")} <= names


def test_norms_are_compared_within_a_pool(report):
    parts, _, _ = report
    lines = {line[0]: line for line in part_after(parts, AXES["query_norm"].question)[1:]}
    assert lines["num_experts=256,query_norm=none"][3:5] == ["+0.1000 ± 0.0000", "higher"]
    assert lines["num_experts=256"][3:5] == ["—", ""]
    steps = part_after(parts, AXES["num_experts"].question, 2)
    runs = "`base-seed0,1,2`, `num_experts=256-seed0,1,2`"
    assert steps[1] == ["64 to 256", "-0.5000 ± 0.0000", "3", "lower", runs]


def test_table_2_stands_beside_the_papers(report, tiny_settings, tmp_path):
    parts, _, _ = report
    lines = part_after(parts, "Query norm: the paper's Table 2")
    # Perplexities of 3.11, 3.01 and 3.01.
    assert lines[1][:7] == [
        "64", "22.42 / 20.29 / 20.29", "—", "80.0 / 90.0 / 90.0", "—", "2.00 / 1.50 / 1.50", "—",
    ]  # fmt: skip
    # 10 points of usage more and 0.5 nats of unevenness less than without a norm, with every seed.
    gains = part_after(parts, "Query norm: the paper's Table 2", 2)
    assert gains[1] == [
        "64", "-0.1000 ± 0.0000", "lower", "+10.0 ± 0.0", "higher", "-0.50 ± 0.00", "lower", "3",
    ]  # fmt: skip
    base = make_base(tiny_settings)
    base.peer |= {"num_experts": 128**2, "experts_per_head": 16}
    runs = ablation_runs(base, ["query_norm"], [0], (128**2,))
    parts = sections([make_row(run, 3.0) for run in runs], tmp_path)
    (_, line) = part_after(parts, "Query norm: the paper's Table 2")
    assert [line[2], line[4], line[6]] == ["23.47 / 23.47", "100 / 100", "0.45 / 0.3"]
    (_, gain) = part_after(parts, "Query norm: the paper's Table 2", 2)
    assert gain[1:] == ["+0.0000", "?", "+0.0", "?", "+0.00", "?", "1"]


def test_times_stand_in_a_table_of_one_machine_alone(report, tmp_path):
    parts, _, rows = report
    for axis in ("score", "share_keys"):
        assert part_after(parts, AXES[axis].question)[0][8] == "seconds a step"
    for row in rows:
        if row["labels"]["setup"]["score"] == "relu":
            row["machine"] = {"cpu": "another processor"}
    parts = sections(rows, tmp_path)
    header, *lines = part_after(parts, AXES["score"].question)
    assert "seconds a step" not in header
    assert {len(line) for line in lines} == {len(header)}
    assert "seconds a step" in part_after(parts, AXES["share_keys"].question)[0]


def test_the_modes_of_batch_norm_are_told(report):
    parts, _, _ = report
    lines = {line[0]: line for line in part_after(parts, "Query BatchNorm: does it see the future?")[1:]}
    assert "query_norm=none" not in lines
    assert lines["base"][1:9] == [
        "3.0000", "3.0100", "-0.0100 ± 0.0000", "0.02", "0.2", "0.0001", "-0.00100 ± 0.00000", "4,000",
    ]  # fmt: skip


def test_figures_are_drawn(report):
    parts, folder, _ = report
    for name in ("ablation-loss.png", "ablation-usage.png"):
        assert f"({name})" in "\n".join(parts)
        assert matplotlib.image.imread(folder / name).shape[1] > 800


def test_each_of_the_papers_axes_has_a_panel(tiny_settings, tmp_path):
    widths = []
    for axes in (["heads"], ["heads", "active"], ["heads", "active", "num_experts"]):
        runs = ablation_runs(make_base(tiny_settings), axes, [0], POOLS)
        parts = sections([make_row(run, 3.0) for run in runs], tmp_path)
        assert any("(ablation-loss.png)" in part for part in parts)
        widths.append(matplotlib.image.imread(tmp_path / "ablation-loss.png").shape[1])
    assert widths == [widths[0], 2 * widths[0], 3 * widths[0]]


def test_a_study_that_has_just_begun_has_a_report(tiny_settings, tmp_path):
    runs = ablation_runs(make_base(tiny_settings), seeds=[0], pools=POOLS)
    parts = sections([make_row(runs[0], 3.0)], tmp_path)
    assert len(parts) == 4  # the introduction, and the modes of the one run
    diverged = make_row(runs[0], 0.0) | {"name": "gone-seed0", "status": "diverged"}
    del diverged["validation"], diverged["measured"]
    parts = sections([make_row(runs[0], 3.0), diverged, make_row(runs[1], 3.1)], tmp_path)
    assert "in no mean, are `gone-seed0`" in parts[1]
    assert "gone" not in "".join(parts[2:])


def test_under_a_budget_the_report_says_how_far_steps_differ(tiny_settings, tmp_path):
    runs = ablation_runs(make_base(tiny_settings), ["num_experts"], [0], POOLS)
    same = [make_row(run, 3.0) for run in runs]
    assert f"{same[0]['steps']} steps, {same[0]['tokens'] / 1e6:.2f}M tokens. " in sections(same, tmp_path)[0]
    budgeted = [
        row | {"steps": steps, "tokens": steps * 5000, "flops": {"per_token": 1e6, "total": flops}}
        for row, steps, flops in zip(same, (1200, 1000), (2.9e9, 3e9), strict=True)
    ]
    words = "1,000 to 1,200 steps, 5.00M to 6.00M tokens, as many as 3e+09 training FLOPs pay for. "
    assert words in sections(budgeted, tmp_path)[0]


def test_the_base_stands_in_every_table(tiny_settings, tmp_path):
    base = make_base(tiny_settings, init_std=0.3, num_experts=144)
    runs = ablation_runs(base, ["init_std", "num_experts"], [0], POOLS)
    parts = sections([make_row(run, 3 - run.settings.peer["num_experts"] / 1e3) for run in runs], tmp_path)
    lines = part_after(parts, AXES["init_std"].question)
    assert [line[0] for line in lines[1:]] == [
        "base",
        "init_std=0.003",
        "init_std=0.01",
        "init_std=0.03",
        "init_std=0.1",
    ]
    steps = part_after(parts, AXES["num_experts"].question, 2)
    assert [line[:2] for line in steps[1:]] == [["64 to 144", "-0.0800"], ["144 to 256", "-0.1120"]]


# The command.


def test_the_study_runs_from_plan_to_report(text_file, tmp_path):
    command = (
        "study ablation --axes query_norm,active,glu --pools 64,144 --budget 6e8 --seeds 2 "
        "--usage-tokens 200 --num-experts 64 --peer num_heads=2 --peer experts_per_head=4 --peer key_dim=8 "
        "--dense width=32 "
        "--hidden-size 16 --num-hidden-layers 2 --num-attention-heads 2 --vocab-size 300 --context 32 "
        "--batch-size 4 --precision float32 --max-documents 100 --table-beta1 0.3 --retrieval-rate 0.25 "
        "--table-second-moment element"
    ).split()
    command += ["--data", str(text_file), "--cache-dir", str(tmp_path / "cache")]
    command += ["--output", str(tmp_path / "out")]
    invoke = CliRunner().invoke
    planned = invoke(cli.app, [*command, "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "16 runs" in planned.output
    assert {"base-seed0", "query_norm=none-seed1"} <= set(planned.output.split())
    assert re.search(r"FLOPs, about \d+\.\d\d hours", planned.output)
    assert not (tmp_path / "out" / "ablation.jsonl").exists()

    done = invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "ablation.jsonl").read_text().splitlines()]
    # Three norms of two pools, 8 experts a head and 3 gated ones, with two seeds; 4 a head is the base.
    assert len(rows) == 2 * (6 + 2)
    for row in rows:
        assert math.isfinite(row["validation"]["loss"])
        assert 0.9 * 6e8 < row["flops"]["total"] <= 6e8
        assert "tests" not in row, "nothing is chosen by the test texts"
        ((figures),) = row["measured"]["usage"].values()
        assert figures["tokens"] == 224  # 200, in rows of 32
        settings = row["settings"]
        assert (settings["table_adam_beta1"], settings["table_second_moment"]) == (0.3, "element")
        assert settings["retrieval_learning_rate"] == 0.25 * settings["learning_rate"]
        batch = row["settings"]["peer"]["query_norm"] == "batch"
        assert ("batch_norm" in row["measured"]) == batch
    old = [json.loads(line) for line in (out / "ablation.jsonl").read_text().splitlines()]
    for row in old:  # as an older release wrote them
        for setup in (row["labels"]["setup"], row["labels"]["base"]):
            del setup["table_beta1"], setup["retrieval_rate"]
    assert sections(old, tmp_path)
    page = (out / "ablation.md").read_text()
    assert "Usage and unevenness (KL from uniform, nats) are over 224 validation tokens" in page
    assert {path.name for path in out.iterdir()} == {
        "ablation.jsonl", "ablation.md", "ablation-loss.png", "ablation-usage.png",
    }  # fmt: skip
    again = invoke(cli.app, [*command, "--axes", "query_norm"])
    assert again.exit_code == 0, again.output
    assert len((out / "ablation.jsonl").read_text().splitlines()) == len(rows)
    wrong = invoke(cli.app, [*command, "--axes", "query_norm,size"])
    assert wrong.exit_code == 1
    assert "axes must be among" in wrong.stderr
