"""docs/robustness.md: the table of what was tried at each boundary, from the rows of `python -m fuzz`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/robustness.md"
ROWS = ROOT / "docs/results/fuzz"
BEGIN, END = "<!-- The table: `make fuzz` writes it. -->\n", "<!-- The end of the table. -->\n"
COLUMNS = ("boundary", "tried", "taken", "refused", "failed", "seconds")


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]


def write_rows(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")


def table(rows: Sequence[dict[str, Any]]) -> str:
    cells: list[tuple[str, ...]] = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1))]
    for row in rows:
        counts = [f"{row[name]:,}" for name in ("tried", "passed", "refused", "failed")]
        cells.append((row["boundary"].replace("_", " "), *counts, f"{row['seconds']:.0f}"))
    return "".join("| " + " | ".join(row) + " |\n" for row in cells)


def render(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """The page's text with the table of these rows between its markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    versions = ", ".join(f"{name} {version}" for name, version in rows[0]["versions"].items())
    return f"{head}{BEGIN}\n{table(rows)}\nWith {versions}.\n\n{END}{tail}"
