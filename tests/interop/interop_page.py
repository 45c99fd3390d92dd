"""docs/interoperability.md: the table of what works with what, from the rows that the tests leave."""

from __future__ import annotations

import difflib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/interoperability.md"
ROWS = ROOT / "docs/results/interop"
BEGIN, END = "<!-- The table: `make interop-rows` writes it. -->\n", "<!-- The end of the table. -->\n"


class Row(NamedTuple):
    program: str
    version: str
    tried: str
    result: str


def lines(rows: Sequence[Row]) -> list[str]:
    return [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows]


def read_rows() -> list[Row]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(ROWS.glob("*.jsonl"))]
    return [Row(**json.loads(line)) for text in texts for line in text.splitlines()]


def write(rows: Sequence[Row]) -> None:
    """Writes the rows, a file per program, and the page."""
    ROWS.mkdir(parents=True, exist_ok=True)
    for program, group in itertools.groupby(sorted(rows), key=lambda row: row.program):
        (ROWS / f"{program}.jsonl").write_text("".join(lines(list(group))), encoding="utf-8")
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read_rows()), encoding="utf-8")


def difference(ran: Sequence[Row], recorded: Sequence[Row]) -> str:
    return "".join(difflib.unified_diff(lines(recorded), lines(ran), "recorded", "ran", n=0))


def table(rows: Sequence[Row]) -> str:
    cells = [("program", "what was tried", "result"), ("---",) * 3]
    for program, group in itertools.groupby(rows, key=lambda row: (row.program, row.version)):
        names = itertools.chain([" ".join(program)], itertools.repeat(""))
        cells += [(name, row.tried, row.result) for name, row in zip(names, group, strict=False)]
    return "".join("| " + " | ".join(map(escape, row)) + " |\n" for row in cells)


def escape(cell: str) -> str:
    return " ".join(cell.split()).replace("|", "\\|")


def render(text: str, rows: Sequence[Row]) -> str:
    """The page's text with the table of these rows between its markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}"
