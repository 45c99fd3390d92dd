"""What `study report` writes of single runs that were kept beside a study: its search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from million_experts.studies.runs import Row
from million_experts.studies.tables import markdown_table


def sections(rows: Sequence[Row], folder: Path) -> list[str]:
    """The losses of every run, by its name; nothing is written into the folder."""
    texts = list(dict.fromkeys(text for row in rows for text in row.get("tests", {})))
    lines = [
        (
            f"`{row['name']}`",
            f"{row['validation']['loss']:.4f}",
            *(f"{row['tests'][text]['loss']:.4f}" if text in row.get("tests", {}) else "—" for text in texts),
        )
        for row in rows
        if "validation" in row
    ]
    return [
        "Runs as those of the other studies, with settings that are in none of their ledgers, each under a "
        "name that says them.",
        "## Losses",
        markdown_table(("run", "validation, nats", *texts), lines),
    ]
