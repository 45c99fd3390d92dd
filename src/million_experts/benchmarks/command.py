"""`million-experts bench`. Light to import, so that the command line's help stays quick."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from million_experts._terminal import Terminal

if TYPE_CHECKING:
    from million_experts.benchmarks.targets import Outcome

DEFAULT_OUTPUT = Path("runs/bench")


def bench(
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.jsonl, results.md and figures; results of other cases in it stay. By "
            f"default {DEFAULT_OUTPUT}, with --check nowhere.",
            show_default=False,
        ),
    ] = None,
    cases: Annotated[
        str | None,
        typer.Option(
            help="Cases by name, separated by commas: P1, P1g, P2, P2s, P3 ... P7 and S1 ... S5 (training "
            "with sparse gradients) have targets; N, T, k and D are sweeps over the pool, the tokens, the "
            "experts a head and the width, steps is one of training steps over the pool. By default all.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The targets alone, with fewer repetitions: some minutes.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            help="Compare with results in this file or folder: fail when a ratio got worse.",
            show_default=False,
        ),
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0, help="With --check: how much worse is worse, 0.25 is 25 %.")
    ] = 0.25,
    repetitions: Annotated[
        int | None,
        typer.Option(
            min=3,
            help="Most repetitions of each measurement; by default what the case needs.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; by default all that torch uses.", show_default=False)
    ] = None,
) -> None:
    """Measure the layer beside others: time and peak memory, at the cases of the targets and in sweeps.

    One process, competitors in turns, new random tokens in every iteration. Results are compared with the
    reference first: a wrong one is not timed, and the command fails.
    """
    from million_experts.benchmarks.cases import select_cases
    from million_experts.benchmarks.report import TABLES_FILE, outcomes
    from million_experts.benchmarks.session import run_cases

    console = Terminal()
    selected = select_cases(cases, quick or check is not None)
    if check is not None:
        _check(selected, check, margin, output, repetitions, threads, console)
        return
    folder = output or DEFAULT_OUTPUT
    rows = run_cases(selected, Terminal(stderr=True), folder, quick, repetitions, threads)
    _print_targets(outcomes(rows), console)
    console.print(f"Results: {folder / TABLES_FILE}", markup=False, soft_wrap=True)
    _print_faults(rows)


def _check(selected, committed: Path, margin: float, output, repetitions, threads, console: Console) -> None:
    from million_experts.benchmarks.check import check
    from million_experts.benchmarks.machine import describe
    from million_experts.benchmarks.report import read_rows
    from million_experts.benchmarks.session import run_cases

    before = read_rows(committed)
    machines = {row["machine"]["cpu"] for row in before if "machine" in row}
    here = describe()["machine"]["cpu"]
    if machines and here not in machines:
        console.print(
            f"{committed} was measured on {', '.join(sorted(machines))}, this is {here}: ratios may differ",
            markup=False,
            soft_wrap=True,
        )
    measured = []

    def measure(remaining):
        rows = run_cases(remaining, Terminal(stderr=True), output, True, repetitions, threads)
        measured.extend(rows)
        return rows

    verdicts = check(selected, before, margin, measure)
    table = Table(show_header=False, box=None, padding=(0, 2))
    for verdict in verdicts:
        mark = "[bold red]worse[/bold red]" if verdict.failed else "ok" if verdict.compared else "?"
        table.add_row(mark, verdict.target.name, verdict.text)
    console.print(table)
    _print_faults(measured)
    if not any(verdict.compared for verdict in verdicts):
        raise ValueError(f"none of the ratios could be compared with those in {committed}")
    if failed := [verdict.target.name for verdict in verdicts if verdict.failed]:
        raise ValueError(f"worse than in {committed} by more than {margin:.0%}: {', '.join(failed)}")


def _print_targets(found: "list[Outcome]", console: Console) -> None:
    if not found:
        return
    table = Table(title="Targets", title_justify="left")
    for column in ("", "ratio", "bound", "", "over, or why not"):
        table.add_column(column, justify="right" if column in ("ratio", "bound") else "left")
    for outcome in found:
        target = outcome.target
        if outcome.ratio is None:
            table.add_row(target.name, "-", target.bound_text, "not measured", outcome.reason)
        else:
            met = "met" if outcome.met else "[red]not met[/red]"
            table.add_row(target.name, target.show(outcome.ratio), target.bound_text, met, outcome.over)
    console.print(table)


def _print_faults(rows) -> None:
    """Fails when a result was wrong; what could not run is said in the tables."""
    wrong = {
        f"{row['case']}, {row['competitor']}: {row['reason']}" for row in rows if row["status"] == "refused"
    }
    own = sorted(text for text in wrong if "another result in this case" not in text)
    if own:
        raise ValueError("wrong results, not timed: " + "; ".join(own))
