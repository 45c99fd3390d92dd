"""`python -m million_experts.benchmarks.gpu --minutes 8 --output FOLDER`."""

import argparse
import os
import sys
import time
from pathlib import Path

from million_experts.benchmarks.gpu import plan, rows, summary, supervise

SUMMARY = "summary.txt"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m million_experts.benchmarks.gpu",
        description="Checks and times the Triton kernels on a GPU; rows are written as they come.",
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (8)")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder of the rows (runs/gpu)")
    parser.add_argument("--only", default=",".join(plan.PARTS), help="parts: " + ",".join(plan.PARTS))
    parser.add_argument("--text", help="a file of text, which part `learns` needs")
    parser.add_argument(
        "--resume", action="store_true", help="leave out what earlier runs of this source ended"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and end")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes in Triton's interpreter, no GPU")
    parser.add_argument("--commit", help="what rows name as the source, where git is not")
    options = parser.parse_args(arguments)
    asked = tuple(part.strip() for part in options.only.split(",") if part.strip())
    if not asked or (unknown := [part for part in asked if part not in plan.PARTS]):
        parser.error(f"--only takes parts of {', '.join(plan.PARTS)}, got {unknown if asked else 'none'}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be positive, got {options.minutes}")
    if options.text is not None and not Path(options.text).is_file():
        parser.error(f"--text must be a file, got {options.text}")
    options.parts = tuple(part for part in plan.PARTS if part in asked and (part != "learns" or options.text))
    if not options.parts:
        parser.error("--only learns needs --text")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    cases = [c for c in plan.make_plan(options.rehearse, options.text) if c.part in options.parts]
    if options.dry_run:
        print(plan.describe(cases, options.minutes))
        return 0
    options.output.mkdir(parents=True, exist_ok=True)
    file = rows.Rows(options.output, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
    file.write(
        rows.header(options.commit, options.rehearse, sys.argv[1:] if arguments is None else arguments)
    )

    def show(row: rows.Row) -> None:
        if text := summary.line(row):
            print(text, flush=True)

    run = supervise.Run(
        file,
        plan.budget(options.minutes, options.parts),
        options.rehearse,
        options.resume,
        options.text,
        show,
    )
    ended, status = None, 0
    try:
        with supervise.stoppable():
            run.parts()
    except supervise.Stopped as signal:
        ended, status = f"stopped by {signal}", 130
    except RuntimeError as error:
        print(f"bench-gpu: {error}", file=sys.stderr)
        return 1
    found = rows.read(file.path)
    if not options.resume:
        found = [row for row in found if row["run"] == file.run]
    text = summary.summarise(found, cases, supervise.not_reached(cases, found), ended)
    (options.output / SUMMARY).write_text(text + "\n")
    print(text, f"\nRows: {file.path}", flush=True)
    return status or (1 if summary.failed(found) else 0)


if __name__ == "__main__":
    sys.exit(main())
