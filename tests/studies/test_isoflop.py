"""The isoFLOP study: its plan by phases, its numbers against rows made up for it, and its command."""

from __future__ import annotations

import inspect
import json
import math
import re
from dataclasses import replace

import matplotlib.image
import pytest
from report_tables import table_cells
from typer.testing import CliRunner

from million_experts import cli
from million_experts.layers import DenseFeedForward
from million_experts.lm import training
from million_experts.models import PeerForCausalLM, count_parameters
from million_experts.studies import command as study_command
from million_experts.studies import isoflop_report
from million_experts.studies.command import isoflop
from million_experts.studies.flops import training_flops_per_token
from million_experts.studies.isoflop import METHODS, Options, Size, by_budget, format_budget, plan
from million_experts.studies.report import write_report
from million_experts.studies.runs import Ledger, stored_settings
from million_experts.studies.statistics import fit_parabola

TINY_PEER = {"num_experts": 64, "num_heads": 2, "experts_per_head": 4, "key_dim": 8}
TINY_LAYERS = {
    "peer": TINY_PEER,
    "peer_shared": {"shared_width": 24},
    "pkm": TINY_PEER,
    "memory_plus": TINY_PEER,
    "moe": {"num_experts": 4},
    "expert_choice": {"num_experts": 4},
    "dense": {"width": 40},
}


def make_options(tiny_settings, **changes):
    given = {
        "budgets": (3e8, 1e9),
        "methods": ("dense", "peer"),
        "seeds": 2,
        "sizes": (Size(16, 2), Size(24, 2), Size(32, 2)),
        "learning_rates": (1e-3, 2e-3),
        "arguments": TINY_LAYERS,
        "base": tiny_settings(peer={}, dense={}),
    }
    return Options(**{**given, **changes})


def make_row(run, loss, tests=None):
    """A row as `execute` writes it, with losses of our choice."""
    per_token = training_flops_per_token(run.config, run.settings.context).total
    score = {"bits_per_byte": 1.5, "tokens": 100, "bytes": 200}
    count = count_parameters(run.config)
    found = {} if math.isinf(loss) else {"validation": {"loss": loss, **score}, "seconds": 10.0}
    if found:
        losses = {"text": loss + 0.1, "python-topics": loss + 1} if tests is None else tests
        found["tests"] = {name: {"loss": value, **score} for name, value in losses.items()}
        found["expert_usage"] = {}
    return {
        "study": run.study,
        "name": run.name,
        "status": "diverged" if math.isinf(loss) else "finished",
        "labels": run.labels,
        "settings": stored_settings(run.settings),
        "seed": run.settings.seed,
        "flops": {"total": run.flops, "per_token": per_token},
        "steps": run.settings.steps,
        "tokens": 128 * run.settings.steps,
        "epochs": 0.5,
        "parameters": {"label": count.label, "total": count.total, "active": count.active},
        "texts": {"train": {"tokens": 1, "bytes": 2, "digest": "x"}},
        "precision": "float32",
        "command": "million-experts study isoflop --budget 3e8",
        "commit": "0123456789abcdef",
        "machine": {"cpu": "a processor", "cores": 2, "memory_bytes": 2**34, "instruction_set": "AVX2"},
        "threads": 2,
        "versions": {"torch": "2"},
        "backend": "cpu",
        **found,
    }


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "isoflop.jsonl")


def fill(options, ledger, loss):
    """Carries out the whole plan with losses of our choice; returns the phases."""
    seen = []
    while (phase := plan(options, ledger)[-1]).phase not in seen:
        for run in ledger.missing(phase.runs):
            ledger.append(make_row(run, loss(run.labels)))
        seen.append(phase.phase)
    return plan(options, ledger)


# Sizes and methods.


def test_sizes_are_read_and_get_heads_that_fit():
    assert Size.parse(" 128x4") == Size(128, 4)
    assert str(Size(128, 4)) == "128x4"
    heads = {width: Size(width, 1).num_attention_heads for width in (16, 48, 64, 96, 128, 192, 256, 1024)}
    assert heads == {16: 1, 48: 1, 64: 2, 96: 3, 128: 4, 192: 3, 256: 4, 1024: 16}
    with pytest.raises(ValueError, match="sizes must be WIDTHxBLOCKS"):
        Size.parse("128")


def test_a_budgets_sizes_lie_on_both_sides_of_twenty_tokens_a_parameter(tiny_settings):
    base = tiny_settings(peer={}, dense={}, vocab_size=4096, context=256, batch_size=16)
    options = Options(budgets=(4e12, 2e13, 1e17), base=base)
    for budget in options.budgets:
        sizes = options.sizes_at(budget)
        assert len(sizes) >= 3
        for size in sizes:
            kinds = options.run("moe", budget, size, 1e-3, 0, "sizes").settings.mlp_layer_types
            at = kinds.index("moe")
            assert 0 < at < len(kinds) - 1, f"no dense blocks on both sides in {size}"
        ratios = []
        for size in sizes:
            config = options.run("dense", budget, size, 1e-3, 0, "sizes").config
            per_token = training_flops_per_token(config, 256).total
            ratios.append(budget / per_token / count_parameters(config).active)
        assert ratios == sorted(ratios, reverse=True)
        assert ratios[0] > 20 > ratios[-1]


@pytest.mark.parametrize("method", METHODS)
def test_methods_differ_in_the_middle_block_alone(method, tiny_settings):
    run = make_options(tiny_settings, methods=(method,)).run(method, 1e9, Size(16, 4), 1e-3, 0, "sizes")
    kinds = run.config.mlp_layer_types
    assert [kinds[i] for i in (0, 1, 3)] == ["dense"] * 3
    assert run.config.dense["width"] == 40
    model = PeerForCausalLM(run.config)
    middle = model.model.layers[2].mlp
    if method not in ("dense", "swiglu"):
        assert type(middle) is not DenseFeedForward
    if method in ("peer", "peer_shared", "pkm", "memory_plus"):
        assert middle.sparse_grad
        assert middle.num_experts == 64
    if method in ("moe", "expert_choice"):
        assert middle.num_experts == 4


def test_the_shared_branch_is_as_wide_as_a_dense_layer_unless_told(tiny_settings):
    def width(method, arguments):
        options = make_options(tiny_settings, arguments=arguments)
        return options.run(method, 1e9, Size(16, 2), 1e-3, 0, "").config.peer["shared_width"]

    assert width("peer_shared", {"peer": TINY_PEER}) == 64
    assert width("peer_shared", TINY_LAYERS) == 24
    assert width("peer", TINY_LAYERS) == 0


def test_swiglu_stands_between_layers_with_gelu_and_has_as_many_parameters(tiny_settings):
    def middle_and_others(method):
        options = make_options(tiny_settings, arguments={})
        run = options.run(method, 1e9, Size(48, 3), 1e-3, 0, "")
        first, middle, last = (block.mlp for block in PeerForCausalLM(run.config).model.layers)
        assert (first.activation, first.glu) == (last.activation, last.glu) == ("gelu", False)
        return middle

    swiglu, dense = map(middle_and_others, ("swiglu", "dense"))
    assert (swiglu.activation, swiglu.glu) == ("silu", True)
    assert sum(p.numel() for p in swiglu.parameters()) == sum(p.numel() for p in dense.parameters())


def test_the_command_compares_all_methods_by_default():
    assert inspect.signature(isoflop).parameters["methods"].default == ",".join(METHODS)


# The plan.


def test_steps_spend_the_budget(tiny_settings):
    options = make_options(tiny_settings)
    for method in options.methods:
        for size in options.sizes:
            run = options.run(method, 1e9, size, 1e-3, 0, "sizes")
            step = run.flops / run.settings.steps
            assert 1e9 - step < run.flops <= 1e9


def test_phases_follow_from_what_earlier_ones_came_to(tiny_settings, ledger):
    options = make_options(tiny_settings)
    (sweep,) = plan(options, ledger)
    assert sorted(run.name for run in sweep.runs) == sorted(
        f"{method}-3e8-24x2-lr{rate}-seed0" for method in ("dense", "peer") for rate in ("0.001", "0.002")
    )
    # Of 12 runs of all sizes two are in the sweep; one further seed for each method and budget.
    assert sweep.later == 10 + 4
    assert sweep.later_flops == (4 + 2) * 3e8 + (6 + 2) * 1e9

    best = {"dense": 1e-3, "peer": 2e-3}
    sizes = {("dense", 3e8): "16x2", ("dense", 1e9): "24x2", ("peer", 3e8): "24x2", ("peer", 1e9): "32x2"}

    def loss(labels):
        worse = labels["learning_rate"] != best[labels["method"]]
        return 3.0 + worse + (labels["size"] != sizes[labels["method"], labels["budget"]])

    phases = fill(options, ledger, loss)
    assert [phase.phase for phase in phases] == ["learning rates", "sizes", "seeds"]
    assert len(phases[1].runs) == 12
    assert {run.labels["learning_rate"] for run in phases[1].runs if run.labels["method"] == "peer"} == {2e-3}
    assert sorted(run.name for run in phases[2].runs) == [
        "dense-1e9-24x2-lr0.001-seed1",
        "dense-3e8-16x2-lr0.001-seed1",
        "peer-1e9-32x2-lr0.002-seed1",
        "peer-3e8-24x2-lr0.002-seed1",
    ]
    assert len(ledger.rows()) == 4 + sweep.later
    assert phases[1].later == 4
    assert {run.settings.table_learning_rate for run in phases[2].runs if "peer" in run.name} == {8e-3}


def test_what_retrieves_learns_at_its_own_rate_and_a_layer_without_it_is_the_same_run(tiny_settings, ledger):
    usual, slow = make_options(tiny_settings, retrieval_rate=1.0), make_options(tiny_settings)
    assert slow.retrieval_rate is None
    memory = slow.run("pkm", 1e9, Size(24, 2), 2e-3, 0, "sizes")
    assert memory.settings.peak_retrieval_learning_rate == 2e-3
    dense, peer = (slow.run(method, 1e9, Size(24, 2), 2e-3, 0, "sizes") for method in ("dense", "peer"))
    assert peer.settings.peak_retrieval_learning_rate == 5e-4
    ledger.append(make_row(usual.run("dense", 1e9, Size(24, 2), 2e-3, 0, "sizes"), 3.0))
    assert not ledger.missing([dense])
    ledger.append(make_row(usual.run("peer", 1e9, Size(24, 2), 2e-3, 0, "sizes"), 3.0))
    with pytest.raises(ValueError, match=r"retrieval_learning_rate: 0\.0005, not 0\.002"):
        ledger.missing([peer])


def test_the_report_says_what_learns_at_other_rates(tiny_settings, ledger):
    base = replace(make_options(tiny_settings).base, table_adam_beta1=0.0)
    options = make_options(tiny_settings, base=base, table_rate=8.0, retrieval_rate=0.25)
    for run in plan(options, ledger)[0].runs:
        ledger.append(make_row(run, 3.0))
    tables = "Tables learn at 8 times the rate"
    text = write_report(ledger).read_text()
    assert f"{tables}, without momentum; query projections and sub-keys at 0.25 times." in text
    # Rows of an older release do not say it: the rate was that of the rest, the momentum too.
    lines = [json.loads(line) for line in ledger.path.read_text().splitlines()]
    for row in lines:
        for name in ("retrieval_learning_rate", "table_adam_beta1"):
            row["settings"].pop(name, None)
    ledger.path.write_text("".join(json.dumps(row) + "\n" for row in lines))
    assert f"{tables}; query projections and sub-keys at 1 times." in write_report(ledger).read_text()


def test_each_budget_may_have_sizes_of_its_own(tiny_settings, ledger):
    small, large = (Size(16, 2), Size(24, 2)), (Size(24, 2), Size(32, 2), Size(40, 2))
    assert by_budget((3e8, 1e9), []) is None
    assert by_budget((3e8, 1e9), [small]) == small
    assert by_budget((1e9, 3e8), [large, small]) == {3e8: small, 1e9: large}
    with pytest.raises(ValueError, match="once for each of the 3, got 2 lists"):
        by_budget((1.0, 2.0, 3.0), [small, large])
    options = make_options(tiny_settings, sizes=by_budget((3e8, 1e9), [small, large]))
    phases = fill(options, ledger, lambda labels: 3.0)
    assert {run.labels["size"] for run in phases[0].runs} == {"24x2"}  # of the smallest budget the middle one
    trained = {(run.labels["budget"], run.labels["size"]) for run in phases[1].runs}
    assert trained == {(3e8, "16x2"), (3e8, "24x2"), (1e9, "24x2"), (1e9, "32x2"), (1e9, "40x2")}


def test_all_sizes_may_get_all_seeds(tiny_settings, ledger):
    options = make_options(tiny_settings, all_sizes=True, seeds=3)
    later = plan(options, ledger)[0].later
    phases = fill(options, ledger, lambda labels: 3.0 + labels["learning_rate"])
    assert len(phases[2].runs) == 2 * 2 * 3 * 2
    assert len(ledger.rows()) == 4 + later


def test_other_settings_in_the_same_ledger_are_refused(tiny_settings, ledger):
    fill(make_options(tiny_settings), ledger, lambda labels: 3.0)
    with pytest.raises(ValueError, match="context: 16, not 32"):
        plan(make_options(tiny_settings, base=tiny_settings(peer={}, dense={}, context=16)), ledger)


def test_another_layer_in_the_same_ledger_is_refused_though_no_run_has_its_name(tiny_settings, ledger):
    fill(make_options(tiny_settings), ledger, lambda labels: 3.0)
    other = {**TINY_LAYERS, "peer": {**TINY_PEER, "num_heads": 1}}
    changes = {"arguments": other, "budgets": (2e9,), "learning_rates": (3e-3,)}
    with pytest.raises(ValueError, match=r"peer\.num_heads: 1, not 2"):
        plan(make_options(tiny_settings, **changes), ledger)
    assert plan(make_options(tiny_settings, **changes, methods=("dense",)), ledger)


def test_a_variants_rows_stand_beside_those_of_its_method(tiny_settings, ledger):
    """Under its own name, with its own arguments, rate and size; next to its method in the report."""
    fill(make_options(tiny_settings, learning_rates=(1e-3, 2e-3)), ledger, lambda labels: 3.0)
    layers = {**TINY_LAYERS, "peer": {**TINY_PEER, "num_heads": 1}}
    options = make_options(tiny_settings, methods=("peer:h1",), arguments=layers, learning_rates=(1e-3, 2e-3))

    def loss(labels):
        return 2.5 - 20 * labels["learning_rate"] + (labels["size"] != "32x2")

    runs = [run for phase in fill(options, ledger, loss) for run in phase.runs]
    assert runs[0].name == "peer:h1-3e8-24x2-lr0.001-seed0"
    assert {run.labels["method"] for run in runs} == {"peer:h1"}
    assert {run.settings.peer["num_heads"] for run in runs} == {1}
    assert runs[-1].labels["size"] == "32x2"
    assert runs[-1].labels["learning_rate"] == 2e-3
    # Neither's command is refused because of the other's rows.
    assert not ledger.missing([run for phase in plan(options, ledger) for run in phase.runs])
    assert plan(make_options(tiny_settings, learning_rates=(1e-3, 2e-3)), ledger)

    page = write_report(ledger).read_text()
    methods = table_after(page, "Only the middle block differs")
    assert [line[0] for line in methods[1:]] == ["dense", "peer", "peer:h1"]
    assert "num_heads=2" in methods[2][2]
    assert "num_heads=1" in methods[3][2]
    differences = table_after(page, "### peer:h1, 1e9 FLOPs")
    assert [line[:2] for line in differences[1:]] == [
        ["peer:h1 − dense", "-0.5400 [-0.5400, -0.5400], n=2, lower"],
        ["peer:h1 − peer", "-0.5400 [-0.5400, -0.5400], n=2, lower"],
    ]
    assert table_after(page, "### peer, 1e9 FLOPs")[2][0] == "peer − peer:h1"


def test_what_cannot_be_trained_is_refused_before_the_sweep(tiny_settings, ledger, monkeypatch):
    large = (Size(16, 2), Size(24, 2), Size(512, 8))
    with pytest.raises(ValueError, match="steps of hidden_size=512"):
        plan(make_options(tiny_settings, sizes=large), ledger)
    monkeypatch.setattr(training, "available_memory", lambda: 1)
    with pytest.raises(MemoryError, match=r"dense-3e8-16x2-lr0\.001-seed0: the run is expected to take"):
        plan(make_options(tiny_settings), ledger)


def test_sizes_are_taken_by_rising_width(tiny_settings, ledger):
    given = (Size(32, 2), Size(16, 2), Size(24, 2))
    assert make_options(tiny_settings, sizes=given).sizes_at(3e8) == (Size(16, 2), Size(24, 2), Size(32, 2))
    sweep = plan(make_options(tiny_settings, sizes=given), ledger)[0].runs
    assert {run.labels["size"] for run in sweep} == {"24x2"}


def test_a_later_sweep_of_another_budget_decides_nothing(tiny_settings, ledger, tmp_path):
    fill(make_options(tiny_settings, seeds=1), ledger, lambda labels: 3.0 + labels["learning_rate"])
    before = table_after("\n\n".join(isoflop_report.sections(ledger.rows(), tmp_path)), "## Learning rates")
    later = make_options(tiny_settings, seeds=1, budgets=(2e9,), sizes=(Size(24, 2),), learning_rates=(2e-3,))
    for run in plan(later, ledger)[0].runs:
        ledger.append(make_row(run, 1.0))
    page = "\n\n".join(isoflop_report.sections(ledger.rows(), tmp_path))
    assert table_after(page, "## Learning rates") == before
    assert "Validation loss at 3e8 FLOPs" in page
    assert {cells[1] for cells in before[1:]} == {"24x2"}
    assert "Validation loss at 2e9 FLOPs" not in page


def test_every_budget_may_have_a_sweep_of_its_own(tiny_settings, ledger, tmp_path):
    options = make_options(tiny_settings, sweep_every_budget=True)
    sweep = plan(options, ledger)[0]
    assert {(run.labels["budget"], run.labels["size"]) for run in sweep.runs} == {
        (3e8, "24x2"),
        (1e9, "24x2"),
    }
    assert len(sweep.runs) == 8
    best = {("dense", 3e8): 2e-3, ("dense", 1e9): 1e-3, ("peer", 3e8): 1e-3, ("peer", 1e9): 1e-3}

    def loss(labels):
        return 3.0 + (labels["learning_rate"] != best[labels["method"], labels["budget"]])

    phases = fill(options, ledger, loss)
    assert len(ledger.rows()) == 8 + sweep.later
    for phase in phases[1:]:
        assert {
            (run.labels["method"], run.labels["budget"], run.labels["learning_rate"]) for run in phase.runs
        } == {(*key, rate) for key, rate in best.items()}
    page = "\n\n".join(isoflop_report.sections(ledger.rows(), tmp_path))
    lines = {
        budget: [cells[:4] for cells in table_after(page, f"Validation loss at {budget} FLOPs")[1:]]
        for budget in ("3e8", "1e9")
    }
    assert lines["3e8"] == [
        ["dense", "24x2", "4.0000", "**3.0000**"],
        ["peer", "24x2", "**3.0000**", "4.0000"],
    ]
    assert lines["1e9"] == [
        ["dense", "24x2", "**3.0000**", "4.0000"],
        ["peer", "24x2", "**3.0000**", "4.0000"],
    ]
    # All sizes of the larger budget are compared at its own rate.
    assert "`dense-1e9-16x2-lr0.001-seed0`, `dense-1e9-24x2-lr0.001-seed0`" in page
    assert "`dense-1e9-16x2-lr0.001-seed0,1`" in page
    # A command without the option goes by the sweep that is there, and so repeats nothing.
    again = plan(replace(options, sweep_every_budget=False), ledger)
    assert [phase.runs for phase in again] == [phase.runs for phase in phases]


def test_a_diverged_rate_is_not_chosen_and_all_diverged_is_an_error(tiny_settings, ledger, tmp_path):
    options = make_options(tiny_settings, seeds=1)
    fill(options, ledger, lambda labels: math.inf if labels["learning_rate"] == 2e-3 else 4.0)
    assert {row["labels"]["learning_rate"] for row in ledger.rows() if row["labels"]["phase"] == "sizes"} == {
        1e-3
    }
    with pytest.raises(ValueError, match=r"have diverged, so there is no best: give lower --learning-rates"):
        fill(options, Ledger(tmp_path / "other.jsonl"), lambda labels: math.inf)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ("dense", "tree")}, "methods must be of dense, .*; got 'tree'"),
        ({"methods": ("peer:",)}, "variants of them such as peer:k64 .*; got 'peer:'"),
        ({"methods": ("tree:a",)}, "methods must be of dense, .*; got 'tree:a'"),
        ({"methods": ("peer", "peer:a")}, "methods must not hold a method and a variant.*; got peer, peer:a"),
        ({"arguments": {"peer:a": {}}}, "arguments must be of dense, .*; got those of 'peer:a'"),
        ({"methods": ("dense", "dense")}, "methods must be one or more different values"),
        ({"budgets": ()}, "budgets must be one or more different values"),
        ({"budgets": (-1.0,)}, "budgets must be positive"),
        ({"learning_rates": (0.0,)}, "learning_rates must be positive"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"sizes": (Size(16, 2), Size(16, 2))}, "sizes must be different, got 16x2, 16x2"),
        ({"table_rate": 0}, "table_rate must be positive"),
        ({"retrieval_rate": -1}, "retrieval_rate must be positive"),
    ],
)
def test_options_that_make_no_sense_are_refused(changes, message, tiny_settings):
    with pytest.raises(ValueError, match=message):
        make_options(tiny_settings, **changes)


def test_budgets_are_written_as_people_do():
    assert [format_budget(b) for b in (4e12, 2.5e13, 5e9, 123456789.0)] == [
        "4e12",
        "2.5e13",
        "5e9",
        "1.23457e8",
    ]


# The report.


def table_after(page, text):
    """The cells of the first table after a text."""
    return table_cells(page[page.index(text) :])


def test_the_report_says_what_the_rows_say(tiny_settings, ledger):
    options = make_options(tiny_settings, seeds=3, learning_rates=(1e-3, 2e-3, 4e-3))
    shifts = {"16x2": 0.3, "24x2": 0.0, "32x2": 0.2}
    seeds = [0.0, 0.02, 0.01]

    def loss(labels):
        peer = labels["method"] == "peer"
        rate = abs(labels["learning_rate"] - (2e-3 if peer else 4e-3)) * 100
        return 3.0 - 0.5 * peer + rate + shifts[labels["size"]] + seeds[labels["seed"]] * (1 + peer)

    fill(options, ledger, loss)
    path = write_report(ledger)
    assert path == ledger.path.with_suffix(".md")
    page = path.read_text()

    sweep = table_after(page, "## Learning rates")
    assert sweep[0] == ["method", "size", "0.001", "0.002", "0.004", "runs"]
    assert sweep[1][:5] == ["dense", "24x2", "3.3000", "3.2000", "**3.0000**"]
    assert sweep[2][:5] == ["peer", "24x2", "2.6000", "**2.5000**", "2.7000"]
    assert "At the edge of the sweep, where a rate beyond might do better: dense at 3e8." in page
    assert "edge of the sizes" not in page

    best = table_after(page, "Test text text:")
    # Mean of 3.1, 3.12, 3.11; 4.303 standard errors of 0.01/sqrt(3).
    assert best[1][:3] == ["dense", "3.1100 ± 0.0248", "22.42"]
    assert best[1][5] == "`dense-3e8-24x2-lr0.004-seed0,1,2`"
    assert best[2][1] == "2.6200 ± 0.0497"

    differences = table_after(page, "### peer, 1e9 FLOPs")
    assert differences[0][1:3] == ["text, nats", "python-topics, nats"]
    # -0.5, -0.48, -0.49.
    assert differences[1][:2] == ["peer − dense", "-0.4900 [-0.5148, -0.4652], n=3, lower"]
    runs = table_after(page, "## Runs")
    assert {line[0].strip("`") for line in runs[1:]} == {row["name"] for row in ledger.rows()}
    assert page.count("million-experts study isoflop --budget 3e8\n") == 1
    image = matplotlib.image.imread(ledger.path.parent / "isoflop.png")
    assert image.shape[1] > image.shape[0] > 300
    # Every run that a table names is in the ledger.
    names = {row["name"] for row in ledger.rows()}
    for stem, ends in re.findall(r"`((?:dense|peer)-[^`]*?)([\d,]+)`", page):
        assert {stem + end for end in ends.split(",")} <= names


def test_texts_in_domain_are_also_given_as_one(tiny_settings, ledger, tmp_path):
    fill(make_options(tiny_settings, seeds=1), ledger, lambda labels: 3.0)
    rows = ledger.rows()
    assert "in domain" not in "".join(isoflop_report.sections(rows, tmp_path))
    for row in rows:
        bonus = 0.5 * (row["labels"]["method"] == "peer")
        row["settings"]["data"] = ["leads", "speeches"]
        row["tests"] = {
            "leads": {"loss": 4.0 - bonus, "bits_per_byte": 2.0, "tokens": 100, "bytes": 300},
            "speeches": {"loss": 3.0, "bits_per_byte": 1.0, "tokens": 300, "bytes": 100},
            "topics": {"loss": 9.0, "bits_per_byte": 9.0, "tokens": 999, "bytes": 999},
        }
    page = "\n\n".join(isoflop_report.sections(rows, tmp_path))
    assert "is the test text of what was trained on as one: leads, speeches." in page
    dense, peer = table_after(page, "Test text in domain:")[1:]
    assert dense[1:4] == ["3.2500", f"{math.exp(3.25):.2f}", "1.7500"]  # by tokens 1 to 3, by bytes 3 to 1
    assert peer[1] == "3.1250"
    differences = table_after(page, "### peer, 1e9 FLOPs")
    assert differences[0][1:3] == ["in domain, nats", "leads, nats"]
    assert differences[1][1:3] == ["-0.1250, n=1", "-0.5000, n=1"]


def test_a_curve_goes_through_the_best_size_and_its_neighbours(tiny_settings, ledger):
    """A size far from the best bends no curve; a best size at the edge is named."""
    sizes = tuple(Size(width, 2) for width in (16, 24, 32, 40, 48))
    options = make_options(tiny_settings, sizes=sizes, budgets=(1e9,), seeds=1)
    losses = {"16x2": 3.2, "24x2": 3.0, "32x2": 3.1, "40x2": 5.0, "48x2": 9.0}
    fill(options, ledger, lambda labels: losses[labels["size"]] - (labels["method"] == "dense"))
    page = write_report(ledger).read_text()
    rows = [row for row in ledger.rows() if row["labels"]["size"] in ("16x2", "24x2", "32x2")]
    for line, method in zip(table_after(page, "## Loss against size")[1:], ("dense", "peer"), strict=True):
        own = [row for row in rows if row["labels"]["method"] == method]
        own = {row["labels"]["size"]: row for row in own if row["labels"]["learning_rate"] == 1e-3}
        curve = fit_parabola(
            [row["flops"]["per_token"] for row in own.values()],
            [row["validation"]["loss"] for row in own.values()],
        )
        assert line[3] == f"{curve.bottom:.4f} at {curve.best:.3g} FLOPs a token"
    assert "edge of the sizes" not in page

    edge = Ledger(ledger.path.parent / "edge.jsonl")
    fill(options, edge, lambda labels: labels["learning_rate"] + int(labels["size"][:2]))
    assert "one beyond might do better: dense at 1e9, peer at 1e9." in write_report(edge).read_text()


@pytest.mark.parametrize("methods", [("dense",), ("peer",), ("dense", "peer")])
def test_differences_are_given_where_there_is_another_method(tiny_settings, ledger, methods):
    fill(make_options(tiny_settings, methods=methods, seeds=1), ledger, lambda labels: 3.0)
    assert ("## Differences" in write_report(ledger).read_text()) == (len(methods) == 2)


def test_a_report_of_a_study_that_has_just_begun_is_whole(tiny_settings, ledger):
    options = make_options(tiny_settings)
    with pytest.raises(ValueError, match="its runs are of none"):
        write_report(ledger)
    runs = plan(options, ledger)[0].runs
    ledger.append(make_row(runs[0], math.inf))
    page = write_report(ledger).read_text()
    assert "| dense | 24x2 | diverged |" in page
    assert f"in no mean, are `{runs[0].name}`, which diverged." in page
    ledger.append(make_row(runs[1], 3.0))
    assert "**3.0000**" in write_report(ledger).read_text()


# The command.


@pytest.fixture
def command(text_file, tmp_path):
    tiny = (
        "study isoflop --budget 300000001 --methods dense,peer --seeds 2 --sizes 16x2,24x2 "
        "--learning-rates 2e-3,8e-3 --vocab-size 300 --context 32 --batch-size 4 --precision float32 "
        "--peer num_experts=64 --peer num_heads=2 --peer experts_per_head=4 --peer key-dim=8 "
        "--max-documents 100 --table-beta1 0.3 --table-second-moment element --retrieval-rate 0.5"
    )
    where = [
        "--data",
        str(text_file),
        "--cache-dir",
        str(tmp_path / "cache"),
        "--output",
        str(tmp_path / "out"),
    ]
    return [*tiny.split(), *where]


def invoke(*arguments):
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_the_study_runs_from_plan_to_report(command, tmp_path):
    planned = invoke(*command, "--dry-run")
    assert planned.exit_code == 0, planned.output
    assert "4 runs, and 4 later ones" in planned.output
    assert re.search(r"FLOPs, about \d+\.\d\d hours", planned.output)
    assert not (tmp_path / "out" / "isoflop.jsonl").exists()

    done = invoke(*command)
    assert done.exit_code == 0, done.output
    out = tmp_path / "out"
    rows = [json.loads(line) for line in (out / "isoflop.jsonl").read_text().splitlines()]
    assert len(rows) == 8
    assert {path.name for path in out.iterdir()} == {"isoflop.jsonl", "isoflop.md", "isoflop.png"}
    assert "Report:" in done.output
    for row in rows:
        budget = row["labels"]["budget"]
        assert 0.9 * budget < row["flops"]["total"] <= budget
        learning = {name: row["settings"].get(name) for name in ("table_adam_beta1", "table_second_moment")}
        rate = row["settings"].get("retrieval_learning_rate", 0) / row["labels"]["learning_rate"]
        if row["labels"]["method"] == "peer":
            assert (learning, rate) == ({"table_adam_beta1": 0.3, "table_second_moment": "element"}, 0.5)
        else:  # nothing that it could mean
            assert (learning, rate) == ({"table_adam_beta1": None, "table_second_moment": None}, 0)
        # The options as they were typed, for the shell.
        assert row["command"].split()[:5] == ["million-experts", *command[:2], "--budget", "300000001.0"]
        assert "--peer key-dim=8" in row["command"]
    # Runs of one seed and size read the same text, whatever the method.
    assert len({row["texts"]["train"]["digest"] for row in rows}) == 1

    # All is done: nothing is trained, and the report comes out the same.
    page = (out / "isoflop.md").read_text()
    again = invoke(*command)
    assert again.exit_code == 0
    assert len((out / "isoflop.jsonl").read_text().splitlines()) == 8
    (out / "isoflop.md").unlink()
    reported = invoke("study", "report", out)
    assert reported.exit_code == 0
    assert (out / "isoflop.md").read_text() == page
    assert "0 runs, and 0 later ones" in invoke(*command, "--dry-run").output


def test_the_commands_methods_are_those_of_the_study():
    assert tuple(METHODS) == study_command.METHODS


def test_mistakes_are_named_in_a_line(command, tmp_path):
    for arguments, message in (
        ([*command, "--sizes", "16"], "sizes must be WIDTHxBLOCKS"),
        ([*command, "--methods", "dense,tree"], "methods must be of"),
        ([*command, "--peer", "num_experts"], "--peer must be name=value, got 'num_experts'"),
        ([*command, "--learning-rates", "fast"], "learning_rates must be numbers"),
        (["study", "ablation", "--pools", "64.5"], "pools must be whole numbers"),
        ([*command, "--budget", "1e3"], "budget must pay for 10 steps at least"),
        (["study", "report", str(tmp_path / "nowhere")], "no ledger of a study in"),
        (["study", "report", __file__], "folder must be that of the ledgers, got the file"),
        (
            ["study", "ablation", "--steps", "9", "--budget", "1e9"],
            "--steps and --budget exclude each other, got --steps 9 and --budget 1e+09",
        ),
        (
            ["study", "ostix360", "--steps", "9", "--budget", "1e9"],
            "--steps and --budget exclude each other, got --steps 9 and --budget 1e+09",
        ),
        (
            ["study", "ablation", "--num-experts", "64", "--peer", "num_experts=64"],
            "--num-experts and --peer num_experts exclude each other",
        ),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 1, result.output
        (line,) = result.stderr.splitlines()
        assert message in line
