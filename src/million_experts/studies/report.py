"""`study report`: a page and figures from the ledger of each study in a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from million_experts.lm.files import write_whole
from million_experts.studies import ablation_report, isoflop_report, ostix360_report, search_report, tables
from million_experts.studies.runs import Ledger, Row

# A study's name -> its title, and what writes its figures into a folder and gives the parts of its page.
Sections = Callable[[Sequence[Row], Path], list[str]]
STUDIES: dict[str, tuple[str, Sections]] = {
    "isoflop": ("Equal training FLOPs", isoflop_report.sections),
    "ablation": ("One choice of the layer at a time", ablation_report.sections),
    "ostix360": ("The predecessor's three tests", ostix360_report.sections),
    "search": ("Single runs of the search", search_report.sections),
}


def ledger_path(folder: Path, study: str) -> Path:
    """Where a study's ledger is in a folder; its report lies beside it.

    A name such as "ostix360-full" keeps runs of a study apart that cannot be compared with its others.
    """
    return folder / f"{study}.jsonl"


def write_report(ledger: Ledger) -> Path:
    """Writes the report of a ledger beside it, whole; returns its path.

    Raises:
        ValueError: no rows, or rows that are not of one known study.
    """
    rows = ledger.rows()
    studies = {row["study"] for row in rows}
    if len(studies) != 1 or not studies <= STUDIES.keys():
        raise ValueError(
            f"{ledger.path} must hold runs of one of {', '.join(STUDIES)}; its runs are of "
            f"{', '.join(sorted(studies)) or 'none'}"
        )
    title, sections = STUDIES[studies.pop()]
    ledger.path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        f"# {title}",
        f"{_count(rows)}, a row each in [{ledger.path.name}]({ledger.path.name}) under the name that "
        "stands with every number. Losses are of whole documents, in nats per token; choices were made by "
        "the validation text alone.",
        tables.provenance(rows),
        *sections(rows, ledger.path.parent),
        "## Texts",
        tables.texts_table(rows),
        "## Runs",
        tables.runs_table(rows),
        "## Commands",
        tables.commands(rows),
    ]
    path = ledger.path.with_suffix(".md")
    write_whole(path, "\n\n".join(part for part in parts if part) + "\n")
    return path


def _count(rows: Sequence[Row]) -> str:
    runs = sum("steps" in row for row in rows)
    return f"{runs} runs" + (f" and {len(rows) - runs} timings" if runs < len(rows) else "")


def write_reports(folder: Path) -> list[Path]:
    """Writes the report of every study that has a ledger in a folder.

    Raises:
        NotADirectoryError: it is no folder.
        FileNotFoundError: there is none.
    """
    if folder.is_file():
        raise NotADirectoryError(f"folder must be that of the ledgers, got the file {folder}")
    found = [path for path in sorted(folder.glob("*.jsonl")) if path.stem.split("-")[0] in STUDIES]
    if not found:
        names = ", ".join(f"{study}.jsonl" for study in STUDIES)
        raise FileNotFoundError(f"no ledger of a study in {folder}: it would be one of {names}")
    return [write_report(Ledger(path)) for path in found]
