"""A whole run of benchmarks: case after case, results written as they come."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from million_experts.benchmarks import machine
from million_experts.benchmarks.case import Case
from million_experts.benchmarks.figures import draw_figures
from million_experts.benchmarks.report import ROWS_FILE, merge, read_rows, write_results
from million_experts.benchmarks.runner import QUICK, SWEEP, CaseRunner, Effort, Row
from million_experts.lm.files import make_folder


def run_cases(
    cases: Sequence[Case],
    console: Console,
    output: Path | None = None,
    quick: bool = False,
    repetitions: int | None = None,
    threads: int | None = None,
) -> list[Row]:
    """Measures cases and returns their rows.

    Args:
        console: where the progress is shown.
        output: folder to which results are written after each case; those of other cases in it stay.
        quick: fewer repetitions.
        repetitions: instead of what the case would have.
        threads: instead of torch's number.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    description = machine.describe() | {"quick": quick}
    before: list[Row] = []
    if output is not None:
        make_folder("output", output)
        if (output / ROWS_FILE).exists():
            before = list(read_rows(output))
    rows: list[Row] = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("", total=len(cases))
            for case in cases:

                def tell(message: str, name: str = case.name) -> None:
                    progress.update(task, description=f"{name}: {message}")

                runner = CaseRunner(case, _effort(case, quick, repetitions), torch.get_num_threads(), tell)
                found = [row | description for row in runner.run()]
                rows += found
                if output is not None:
                    write_results(merge(before, rows), output)
                progress.advance(task)
                measured = sum(row["status"] == "measured" for row in found)
                console.print(f"{case.name}: {measured} of {len(found)} measured", highlight=False)
    finally:
        # An interrupted run leaves what it has finished, with figures.
        if output is not None and rows:
            merged = merge(before, rows)
            draw_figures(merged, output)
            write_results(merged, output)
    return rows


def _effort(case: Case, quick: bool, repetitions: int | None) -> Effort:
    effort = QUICK if quick else Effort() if case.targets else SWEEP
    return effort if repetitions is None else Effort(repetitions, effort.limit)
