"""docs/interoperability.md: the table of what works with what, from the rows that the tests leave."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/interoperability.md"
ROWS = ROOT / "docs/results/interop"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"


class Row(NamedTuple):
    program: str
    version: str
    tried: str
    result: str


def read_rows() -> list[Row]:
    return [
        Row(**json.loads(line))
        for path in sorted(ROWS.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def write_rows(program: str, rows: Iterable[Row]) -> None:
    ROWS.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in sorted(rows)]
    (ROWS / f"{program}.jsonl").write_text("".join(lines), encoding="utf-8")


def table(rows: list[Row]) -> str:
    lines = ["| program | version | tried | result |", "|---|---|---|---|"]
    before = None
    for row in rows:
        program = ("", "") if row.program == before else (row.program, row.version)
        lines.append(f"| {' | '.join((*program, row.tried, row.result))} |")
        before = row.program
    return "\n".join(lines) + "\n"


def render(text: str, rows: list[Row]) -> str:
    """The page's text with the table of these rows between its markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{table(rows)}\n{END}{tail}"


def write_page() -> None:
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8"), read_rows()), encoding="utf-8")
