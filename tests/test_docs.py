"""What README and docs tell people to type is run: Python blocks, commands, and the examples."""

import itertools
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from million_experts.cli import app
from million_experts.studies.report import STUDIES, write_report
from million_experts.studies.runs import Ledger
from million_experts.studies.statistics import paired_difference
from million_experts.studies.texts import PYTHON_TOPICS

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "docs/guide.md")
# Commands that train a model of full size, or speak of the reader's own files.
SLOW = ("million-experts train",)
TINY = (
    "--steps 2 --batch-size 2 --context 32 --vocab-size 300 --hidden-size 16 --num-attention-heads 2 "
    "--peer key_dim=16 --peer num_heads=2 --max-documents 60 --eval-steps 2 --save-steps 2"
).split()

# Of any study, so that its runs take a moment: options given last win, but for the budgets.
TINY_STUDY = (
    "--seeds 1 --vocab-size 300 --context 32 --batch-size 2 --max-documents 20 --cache-dir cache "
    "--peer num_experts=64 --peer num_heads=2 --peer experts_per_head=4 --peer key_dim=8"
).split()
TINY_STUDIES = {
    "isoflop": "--budget 1e8 --methods dense,peer --sizes 16x2 --learning-rates 2e-3".split(),
    "ablation": "--pools 64 --steps 2 --hidden-size 16 --num-hidden-layers 2".split(),
    "ostix360": "--steps 2 --timed-steps 3 --tests moe".split(),
}

LEDGERS = [path for path in sorted((ROOT / "docs/results").rglob("*.jsonl")) if path.stem in STUDIES]
# What the README calls articles and speeches.
TESTS = ("wikipedia-leads", "state-of-the-union")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    lines = [line for page in PAGES for block in blocks(page, "console") for line in block.splitlines()]
    return [line.split("#")[0].strip() for line in lines if line.strip()]


def run(arguments: list[str]) -> str:
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which `runs/demo` is a finished, tiny run."""
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        run(["train", *TINY, "--peer", "num_experts=1024", "--cache-dir", "cache"])
    return folder


@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run_in_order(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    scope: dict[str, object] = {}
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), scope)


def test_the_readme_shows_six_lines_of_python():
    lines = [line for line in blocks("README.md", "python")[0].splitlines() if line.strip()]
    assert len(lines) <= 6


@pytest.mark.parametrize("command", sorted({c for c in commands() if c.startswith("million-experts")}))
def test_commands_run(command, folder, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = shlex.split(command)[1:]
    if arguments[0] == "train":
        if "--resume" not in arguments:
            (folder / "my-texts").mkdir(exist_ok=True)
            for number in range(40):
                text = f"Text number {number}. " + "Words follow words in it. " * 20
                (folder / "my-texts" / f"{number}.txt").write_text(text)
            if "--output-dir" not in arguments:
                arguments += ["--output-dir", f"runs/{'-'.join(arguments)}"]
            arguments = ["train", *TINY, *arguments[1:], "--cache-dir", "cache"]
    elif arguments[0] in ("evaluate", "inspect") and "--data" in arguments:
        # The whole of the State of the Union takes a minute: a part of it stands in.
        (folder / "speech.txt").write_text("My fellow citizens, the state of the Union is strong. " * 20)
        arguments[arguments.index("--data") + 1] = "speech.txt"
    elif arguments[0] == "study":
        if arguments[1] == "report":
            run(["study", "isoflop", *TINY_STUDY, *TINY_STUDIES["isoflop"]])
        else:
            while "--budget" in arguments:
                del arguments[(place := arguments.index("--budget")) : place + 2]
            arguments += [*TINY_STUDY, *TINY_STUDIES[arguments[1]]]
    run(arguments)


@pytest.mark.parametrize("command", sorted({c for c in commands() if c.startswith("torchrun")}))
def test_torchrun_commands_run(command, folder):
    program = Path(sys.executable).with_name("million-experts")
    if not program.exists():
        pytest.skip("million-experts is not installed beside this python")
    launcher, _, arguments = command.partition(" --no-python million-experts train ")
    flags = shlex.split(launcher)[1:]
    small = [*TINY, "--peer", "num_experts=1024", "--mlp-layer-types", "peer", "--batch-size", "1"]
    small += ["--cache-dir", "cache", "--output-dir", "runs/torchrun"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *flags, "--no-python"]
    done = subprocess.run(
        [*torchrun, str(program), "train", *shlex.split(arguments), *small],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Sample" in done.stdout


@pytest.mark.parametrize("command", sorted({c for c in commands() if c.startswith("make")}))
def test_make_targets_exist(command):
    subprocess.run([*shlex.split(command), "--dry-run"], cwd=ROOT, check=True, capture_output=True)


def test_no_other_kind_of_command_is_shown():
    known = (
        "million-experts ",
        "make ",
        "torchrun ",
        'pip install -c constraints.txt ".[train,data]"',
        # in an environment of the reader's; tests/ops/triton/test_gpu_suite.py runs them
        "pip install -e . pytest pytest-timeout hypothesis psutil",
        "python -m pytest -rs tests/gpu",
        "python -m million_experts.benchmarks.gpu",
        "PYTHONPATH=src python -m million_experts.benchmarks.gpu",
    )
    assert [c for c in commands() if not c.startswith(known)] == []


def test_the_extras_that_are_named_exist():
    project = (ROOT / "pyproject.toml").read_text()
    for page in PAGES:
        text = (ROOT / page).read_text()
        for extras in re.findall(
            r"pip install (?:-c constraints.txt )?\"(?:million-experts|\.)\[([\w,]+)\]", text
        ):
            for extra in extras.split(","):
                assert re.search(rf"^{extra} = \[", project, flags=re.MULTILINE), extra


@pytest.mark.parametrize("page", [*PAGES, "docs/decisions.md", "docs/kernels.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
        if target.startswith("http"):
            continue
        path, _, heading = target.partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(), flags=re.MULTILINE)
            assert heading in [title.lower().replace(" ", "-") for title in titles], target


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_run_as_they_stand(example, tmp_path):
    result = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_the_readmes_figures_are_those_of_the_committed_run():
    results = json.loads((ROOT / "docs/results/demo/results.json").read_text())
    readme = (ROOT / "README.md").read_text()
    assert results["parameters"]["label"] in readme
    for row in (results["test"], *results["yardsticks"].values()):
        assert f"{row['bits_per_byte']:.3f}" in readme
    bigram = results["yardsticks"]["interpolated bigram"]["bits_per_byte"]
    assert results["test"]["bits_per_byte"] < 0.95 * bigram
    minutes = results["training_seconds"] / 60
    assert "in ten to twelve minutes" in readme
    assert 10 < minutes < 12


def test_the_readmes_figures_of_a_million_experts_are_those_of_the_committed_run():
    results = json.loads((ROOT / "docs/results/million/results.json").read_text())
    readme = (ROOT / "README.md").read_text()
    start = readme.index("`million-experts train --preset million`")
    text = readme[start : readme.index("\n\n", start)]
    bigram = results["yardsticks"]["interpolated bigram"]
    (usage,) = results["expert_usage"].values()
    for figure in (
        results["parameters"]["label"],
        f"{results['steps']}\nsteps of {results['tokens_per_step']:,} tokens",
        f"{results['training_seconds'] / 60:.0f} minutes",
        f"{max(entry.get('memory_gb', 0) for entry in results['history']):.1f} GB",
        f"{results['test']['bits_per_byte']:.3f} bits per byte",
        f"{bigram['bits_per_byte']:.3f}",
        f"{usage['usage']:.0%}".replace("%", " %"),
    ):
        assert figure in text, figure


@pytest.mark.parametrize("ledger", LEDGERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_committed_reports_are_those_of_the_committed_rows(ledger, tmp_path):
    report = write_report(Ledger(Path(shutil.copy(ledger, tmp_path))))
    assert report.read_text() == ledger.with_suffix(".md").read_text()
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures <= {path.name for path in ledger.parent.glob("*.png")}


def read_rows(ledger: str) -> list[dict]:
    return Ledger(ROOT / "docs/results" / ledger).rows()


def prose(start: str, end: str) -> str:
    """A part of the README, with single spaces."""
    readme = (ROOT / "README.md").read_text()
    at = readme.index(start)
    return " ".join(readme[at : readme.index(end, at)].split())


def decisions() -> str:
    """The decisions, with single spaces."""
    return " ".join((ROOT / "docs/decisions.md").read_text().split())


def by_seed(rows, figure) -> dict[int, float]:
    return {row["seed"]: figure(row) for row in rows}


def losses_by_seed(rows, test: str) -> dict[int, float]:
    return by_seed(rows, lambda row: row["tests"][test]["loss"])


def best_losses(budget: float, ledger: str = "studies") -> dict[str, dict[str, dict[int, float]]]:
    """Of each method's best model: loss by test, both texts as one too, and by seed."""
    runs = [row for row in read_rows(f"{ledger}/isoflop.jsonl") if row["labels"]["budget"] == budget]
    losses: dict[str, dict[str, dict[int, float]]] = {}
    for method in {row["labels"]["method"] for row in runs}:
        own = [row for row in runs if row["labels"]["method"] == method]
        first = min((row for row in own if row["seed"] == 0), key=lambda row: row["validation"]["loss"])
        same = ("size", "learning_rate")
        best = [row for row in own if all(row["labels"][name] == first["labels"][name] for name in same)]
        losses[method] = {test: losses_by_seed(best, test) for test in (*TESTS, PYTHON_TOPICS)}
        losses[method]["both"] = by_seed(
            best,
            lambda row: (
                sum(row["tests"][test]["loss"] * row["tests"][test]["tokens"] for test in TESTS)
                / sum(row["tests"][test]["tokens"] for test in TESTS)
            ),
        )
    return losses


def test_the_readmes_table_of_the_studies_is_that_of_the_rows():
    """Of the larger budget: every method's loss, and how much lower PEER's is, with the interval."""
    readme = (ROOT / "README.md").read_text()
    start = readme.index("## Does it learn more")
    lines = [line for line in readme[start : readme.index("![", start)].splitlines() if line.startswith("|")]
    shown = {cells[0]: cells[1:] for line in lines for cells in [[c.strip() for c in line[1:-1].split("|")]]}
    names = {
        "peer:k64": "**PEER**, 65,536 experts, 4 x 64 a token",
        "peer": "the same, 4 x 32 a token",
        "pkm": "product-key memory, 65,536 values",
        "memory_plus": "Memory+, 65,536 values",
        "expert_choice": "expert choice, 128 experts",
        "moe": "mixture of 8 experts, 2 a token",
        "dense": "dense",
    }
    losses = best_losses(2e13)
    assert losses.keys() == names.keys()
    for method, name in names.items():
        cells = []
        for test in TESTS:
            theirs = losses[method][test]
            assert len(theirs) == 3
            mean = f"{sum(theirs.values()) / 3:.3f}"
            if method == "peer:k64":
                cells += [f"**{mean}**", ""]
            else:
                lower = paired_difference(theirs, losses["peer:k64"][test])
                cells += [mean, f"{lower.mean:.3f} ({lower.low:.3f} to {lower.high:.3f})"]
        assert shown[name] == cells, name


def test_the_readmes_leads_of_both_budgets_are_those_of_the_rows():
    text = prose("## Does it learn more", "At equal numbers of training tokens")
    large, small = (best_losses(2e13), "peer:k64"), (best_losses(5e12), "peer")

    def over_dense(losses, ours):
        return [paired_difference(losses["dense"][test], losses[ours][test]) for test in (*TESTS, "both")]

    lead = over_dense(*large)[-1]
    assert f"the lead over dense layers is {lead.mean:.3f} ({lead.low:.3f} to {lead.high:.3f})" in text
    losses = best_losses(4e13, "isoflop-4e13")
    more = losses["dense"]["both"][0] - losses["peer:k64"]["both"][0]
    assert (
        "With twice the FLOPs the lead over dense layers is no larger, "
        f"{more:.3f} on both texts as one ([one seed]" in text
    )
    assert more < lead.mean
    claims = (
        "2e13: articles {:.3f}, speeches {:.3f}, both {:.3f} ({:.3f} to {:.3f}); 5e12: {:.3f}, {:.3f}, {:.3f}"
    )
    numbers = [*(found.mean for found in over_dense(*large)), lead.low, lead.high]
    numbers += [found.mean for found in over_dense(*small)]
    assert claims.format(*numbers) in (ROOT / "docs/decisions.md").read_text()
    losses = small[0]
    for method, words in (
        ("dense", "over dense layers"),
        ("moe", "over the mixture"),
        ("expert_choice", "over expert choice"),
    ):
        leads = [paired_difference(losses[method][test], losses["peer"][test]) for test in TESTS]
        assert all(lead.low > 0 for lead in leads)
        assert f"{leads[0].mean:.3f} and {leads[1].mean:.3f} {words}" in text
    articles, speeches = (
        paired_difference(losses["memory_plus"][test], losses["peer"][test]) for test in TESTS
    )
    assert articles.verdict == "tie"
    assert f"{articles.mean:.3f} (barely a tie) and {speeches.mean:.3f} over Memory+" in text
    for test in TESTS:
        assert paired_difference(losses["pkm"][test], losses["peer"][test]).verdict == "tie"
    for (losses, ours), exceptions in ((large, {"expert_choice": "higher"}), (small, {})):
        for method in losses.keys() - {ours}:
            topics = paired_difference(losses[method][PYTHON_TOPICS], losses[ours][PYTHON_TOPICS])
            assert topics.verdict == exceptions.get(method, "tie"), method


def test_what_the_readme_says_of_cost_and_of_the_search_is_what_the_rows_say():
    text = prose("Equal FLOPs are not equal cost", "![Validation loss over size")
    rows = read_rows("studies/isoflop.jsonl")

    def runs(**labels):
        return [row for row in rows if all(row["labels"][name] == labels[name] for name in labels)]

    peer = runs(method="peer:k64", budget=2e13, size="64x3")
    dense = runs(method="dense", budget=2e13, size="96x3")

    def seconds(rows):
        times = [row["seconds"] for row in rows if row["machine"]["cpu"] == "AMD EPYC"]
        return sum(times) / len(times)

    smaller = seconds(runs(method="peer", budget=2e13, size="64x3"))
    assert (
        f"PEER's takes {seconds(peer) / seconds(dense):.1f} times as long to train as the dense one "
        f"(AMD EPYC; with 4 x 32 experts {smaller / seconds(dense):.1f} times)"
    ) in text
    epochs = peer[0]["epochs"], dense[0]["epochs"]
    assert "reads the text {:.1f} times, the dense one {:.1f} times".format(*epochs) in text
    # Memory+ at half its rate, and what other rates gave the memories.
    search = {}
    for row in read_rows("studies/search.jsonl"):
        if row["name"].endswith(f"-float32-seed{row['seed']}"):
            labels = row["labels"]
            search.setdefault((labels["method"], labels["learning_rate"]), {})[row["seed"]] = row
    slower = search["memory_plus", 0.002]
    assert len(slower) == 3
    leads = [
        paired_difference(losses_by_seed(slower.values(), test), losses_by_seed(peer, test)) for test in TESTS
    ]
    assert all(lead.low > 0 for lead in leads)
    assert "PEER lower by {:.3f} and {:.3f}, no ties".format(*(lead.mean for lead in leads)) in text
    assert (
        f"lead of {leads[0].mean:.3f} ({leads[0].low:.3f} to {leads[0].high:.3f}) "
        f"and {leads[1].mean:.3f} ({leads[1].low:.3f} to {leads[1].high:.3f}) over them"
    ) in decisions()
    for method, words in (
        ("peer", "({})"),
        ("pkm", "({})"),
        ("memory_plus", "({})"),
        ("moe", "by token choice {}"),
        ("expert_choice", "by expert choice {}"),
    ):
        found = [rows[0] for (name, _), rows in search.items() if name == method]
        found += runs(method=method, budget=2e13, size="64x3", seed=0)
        rates = {row["labels"]["learning_rate"]: row for row in found}
        sweep = ", ".join(f"{rate:g}: {row['validation']['loss']:.4f}" for rate, row in sorted(rates.items()))
        assert len(rates) == len(found) == 3
        assert words.format(sweep) in decisions()
    # The best size is the smallest that was tried for all kinds at the one budget, for some at the other.
    methods = {row["labels"]["method"] for row in runs(budget=5e12)}
    for budget, some in ((5e12, methods), (2e13, {"moe", "expert_choice", "memory_plus"})):
        for method in some:
            sizes = runs(method=method, budget=budget, seed=0)
            best = min(sizes, key=lambda row: row["validation"]["loss"])
            assert best["flops"]["per_token"] == min(row["flops"]["per_token"] for row in sizes), method


def test_the_readmes_figures_of_pools_and_norms_are_those_of_the_rows():
    text = prose("At equal numbers of training tokens", "![Validation loss over the number")

    def setups(ledger):
        found: dict[tuple[int, str], list[dict]] = {}
        for row in read_rows(ledger):
            setup = row["labels"]["setup"]
            if row["labels"]["variant"] == "base" or set(row["labels"]["variant"].split(",")) <= {
                f"{name}={setup[name]}" for name in ("num_experts", "query_norm")
            }:
                found.setdefault((setup["num_experts"], setup["query_norm"]), []).append(row)
        return found

    def lower(larger, smaller):
        return paired_difference(
            *(by_seed(rows, lambda row: row["validation"]["loss"]) for rows in (smaller, larger))
        )

    pools = [16_384, 65_536, 262_144, 1_048_576]
    ends = [pools[0], pools[-1]]

    def steps_of(found):
        return [lower(found[b, "batch"], found[a, "batch"]) for a, b in itertools.pairwise(pools)]

    found = setups("pools-heads8/ablation.jsonl")
    steps = steps_of(found)
    assert all(step.low > 0 and step.n == 6 for step in steps)
    means = "by {:.3f}, {:.3f} and {:.3f} nats, no ties (six seeds)".format(*(step.mean for step in steps))
    whole = lower(found[pools[-1], "batch"], found[pools[0], "batch"])
    assert f"{means}; from end to end by {whole.mean:.3f} ({whole.low:.3f} to {whole.high:.3f})" in text

    wide = setups("pools-2e13/ablation.jsonl")
    dearer = []
    for some in (found, wide):
        costs = [some[pool, "batch"][0]["flops"]["per_token"] for pool in ends]
        dearer.append(100 * (costs[1] / costs[0] - 1))
    assert (
        "a token costs {:.0f} % more FLOPs in the narrower models, {:.0f} % in the wider".format(*dearer)
        in text
    )
    found = setups("pools/ablation.jsonl")
    verdicts = [step.verdict for step in steps_of(found)]
    assert verdicts == ["higher", "tie", "tie"]  # the smaller one's loss minus the larger one's
    assert all(row["flops"]["total"] >= 2e13 for rows in wide.values() for row in rows)
    steps = steps_of(wide)
    assert [(step.verdict, step.n) for step in steps] == [("tie", 3), ("higher", 3), ("tie", 3)]
    assert (
        f"lower by {steps[0].mean:.3f} (a tie) and {steps[1].mean:.3f}, and the last is none: a million "
        f"experts are {-steps[2].mean:.3f} higher (a tie; three seeds)"
    ) in text

    def usages(pool, norm, figure="usage"):
        def of_layer(row):
            (layer,) = row["measured"]["usage"].values()
            return layer[figure]

        return by_seed(found[pool, norm], of_layer)

    def used(pool, norm):
        shares = usages(pool, norm).values()
        return f"{100 * sum(shares) / len(shares):.0f} %"

    norms = []
    for ledger, named, ties, words in (
        (
            "pools-2e13/ablation.jsonl",
            pools,
            [],
            "{} of 16,384 used where it is {} without, {} of 65,536 where it is {}, {} of 262,144 where it "
            "is {}, and {} of a million where it is {}, no ties.",
        ),
        (
            "studies/ablation.jsonl",
            ends,
            [],
            "{} of 16,384 where it is {} without, {} of a million where it is {};",
        ),
        (
            "pools/ablation.jsonl",
            ends,
            ends,
            "after four million {} where it is {}, and {} where it is {} (both ties;",
        ),
    ):
        found = setups(ledger)
        norms.append([lower(found[pool, "batch"], found[pool, "none"]) for pool in pools])
        assert all(gain.n == 3 for gain in norms[-1])
        for pool in pools:
            with_norm, without = usages(pool, "batch"), usages(pool, "none")
            assert all(share > without[seed] for seed, share in with_norm.items())
            assert paired_difference(with_norm, without).verdict == ("tie" if pool in ties else "higher")
            even, uneven = (usages(pool, norm, "unevenness") for norm in ("batch", "none"))
            assert all(own < uneven[seed] for seed, own in even.items())
            assert paired_difference(uneven, even).low > 0
        shares = [used(pool, norm) for pool in named for norm in ("batch", "none")]
        assert words.format(*shares) in text
    assert [gain.verdict for gain in norms[0]] == ["tie", "higher", "higher", "higher"]
    assert min(norms[0], key=lambda gain: gain.mean) is norms[0][0]
    assert all(gain.low > 0 for gain in norms[1])
    assert [gain.verdict for gain in norms[2]] == ["higher", "higher", "tie", "tie"]
    bounds = [bound(gain.mean for gain in gains) for gains in norms for bound in (min, max)]
    assert (
        "is worth {:.3f} (a tie) to {:.3f} nats at 2e13 FLOPs, {:.3f} to {:.3f} after a million tokens, and "
        "{:.3f} to {:.3f} after four million, ties in the two larger pools"
    ).format(*bounds) in text


def test_the_readmes_figures_of_the_predecessors_tests_are_those_of_the_rows():
    text = prose("In the three tests of", "## On a GPU")
    rows = read_rows("studies/ostix360.jsonl")
    runs: dict[str, list[dict]] = {}
    speeds = {row["labels"]["name"]: row["speed"] for row in rows if "speed" in row}
    for row in rows:
        if "speed" not in row:
            runs.setdefault(row["labels"]["name"], []).append(row)

    def differences(ours, theirs):
        return [
            paired_difference(losses_by_seed(runs[ours], test), losses_by_seed(runs[theirs], test))
            for test in TESTS
        ]

    (variant,) = (name for name in runs if "experts_per_head=20" in name)
    articles, speeches = differences("moe", variant)
    assert articles.n == speeches.n == 3
    assert (
        f"has {articles.mean:.3f} nats less test loss on articles and {speeches.mean:.3f} on speeches than "
        f"Mixtral's mixture ({articles.low:.3f} to {articles.high:.3f} and {speeches.low:.3f} to "
        f"{speeches.high:.3f}, three seeds), in {speeds[variant]['time_ratio']:.2f} of its time and "
        f"{speeds[variant]['memory_ratio']:.2f} of its memory"
    ) in text
    # The table of learning rates, one seed: the mixture, that variant, and what a search at 2e-3 found.
    rates: dict[tuple[str, float], dict] = {}
    for row in read_rows("ostix360-rates/ostix360.jsonl"):
        settings, kind = row["settings"], row["labels"]["test"]
        if "speed" in row:
            speeds[row["labels"]["name"]] = row["speed"]
            continue
        if kind == "peer":
            layer = settings["peer"]
            kind = layer["score"], layer["experts_per_head"], settings["table_adam_beta1"]
        rates.setdefault((kind, settings["learning_rate"]), row)
    before, found = ("softmax", 20, 0), ("sigmoid", 30, 0.9)
    for kind, name in ((before, variant), ("moe", "moe")):
        (rates[kind, 5e-4],) = (row for row in runs[name] if row["seed"] == 0)

    def cell(kind, rate):
        if (row := rates.get((kind, rate))) is None:
            return ""
        assert row["seed"] == 0
        return ", ".join(f"{row['tests'][test]['loss']:.3f}" for test in TESTS)

    for name in ("5e-4", "1e-3", "2e-3", "4e-3"):
        cells = " | ".join(cell(kind, float(name)) for kind in ("moe", before, found))
        assert " ".join(f"| {name} | {cells} |".split()) in text
    speed = speeds[rates[found, 2e-3]["labels"]["name"]]
    assert (
        f"takes {speed['time_ratio']:.2f} of the mixture's time and {speed['memory_ratio']:.2f} of its memory"
    ) in text
    (more,) = (speeds[name] for name in speeds if "experts_per_head=30" in name and "score" not in name)
    assert f"30 experts a head with the softmax took {more['time_ratio']:.2f} of the time" in text
    precisions = {run: row["precision"] for run, row in rates.items()}
    assert {run for run in precisions if precisions[run] == "bfloat16"} == {("moe", 5e-4), (before, 5e-4)}
    losses = [f"{rates[found, rate]['validation']['loss']:.4f}" for rate in (5e-4, 1e-3, 2e-3)]
    assert "has {}, {} and {}: lower than the mixture at each rate".format(*losses) in decisions()
    leads = [
        rates["moe", rate]["tests"][test]["loss"] - rates[found, 2e-3]["tests"][test]["loss"]
        for rate in (2e-3, 4e-3)
        for test in TESTS
    ]
    assert (
        "2e-3 and 4e-3, {:.3f} and {:.3f}, and {:.3f} and {:.3f}, with sigmoids".format(*leads) in decisions()
    )
    articles, speeches = differences("peer", "moe")
    assert articles.n == speeches.n == 3
    assert (
        f"has {articles.mean:.3f} and {speeches.mean:.3f} nats more ({articles.low:.3f} to "
        f"{articles.high:.3f} and {speeches.low:.3f} to {speeches.high:.3f})"
    ) in text
    assert (
        f"in {speeds['peer']['time_ratio']:.2f} of the time and {speeds['peer']['memory_ratio']:.2f} of"
        in text
    )


@pytest.mark.slow
@pytest.mark.timeout(3700)
@pytest.mark.parametrize("command", SLOW)
def test_training_commands_run_in_full(command, tmp_path):
    """Each takes a quarter of an hour on two cores, and has to end 5 % below the bigram."""
    assert command in commands()
    program = Path(sys.executable).parent / "million-experts"
    subprocess.run([str(program), *shlex.split(command)[1:]], cwd=tmp_path, check=True, timeout=3600)
    results = json.loads((tmp_path / "runs/demo/results.json").read_text())
    bigram = results["yardsticks"]["interpolated bigram"]["bits_per_byte"]
    assert results["test"]["bits_per_byte"] < 0.95 * bigram
    assert results["training_seconds"] < 15 * 60
