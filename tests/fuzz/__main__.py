"""`python -m fuzz --minutes M --output FOLDER` tries every boundary and writes FOLDER/rows.jsonl.

With the rows in docs/results/fuzz docs/robustness.md is written anew, too.
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fuzz import BOUNDARIES
from fuzz.harness import fuzz
from fuzz.robustness_page import PAGE, ROWS, render, write_rows

PROGRAMS = ("torch", "transformers", "safetensors", "datasets", "pyarrow", "hypothesis")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=60, help="in all, of which each boundary has its share"
    )
    parser.add_argument("--output", type=Path, default=ROWS, help="folder of rows.jsonl")
    arguments = parser.parse_args()
    versions = {"Python": platform.python_version(), **{name: version(name) for name in PROGRAMS}}
    rows: list[dict[str, Any]] = []
    for boundary in BOUNDARIES:
        tally = fuzz(boundary, 60 * arguments.minutes / len(BOUNDARIES))
        rows.append(
            {
                "boundary": boundary,
                "tried": tally.tried,
                "passed": tally.passed,
                "refused": tally.refused,
                "failed": tally.failed,
                "seconds": round(tally.seconds, 1),
                "seeds": tally.seeds,
                "versions": versions,
            }
        )
        print(rows[-1], tally.failure, sep="\n", flush=True)
    write_rows(arguments.output, rows)
    if arguments.output.resolve() == ROWS:
        PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), rows), encoding="utf-8")
    return int(any(row["failed"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
