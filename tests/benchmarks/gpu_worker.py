"""Stands in for the worker of a GPU check: cases end, die, hang, or never begin, as the part's name says.

It imports nothing of the project, whose import takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser()
    for name in ("--folder", "--run", "--part", "--until", "--text"):
        parser.add_argument(name)
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    if options.part == "no GPU":
        print("there is no GPU", file=sys.stderr)
        return 2
    if options.part == "no start":
        print("an import failed", file=sys.stderr)
        return 1
    path = Path(options.folder) / "rows.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    done = {(row["part"], row["case"]) for row in before if row.get("event") == "end"}

    def write(**row) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"run": options.run, "part": options.part} | row) + "\n")

    for case in ("good", *options.part.split(", "), "last"):
        if (options.part, case) in done:
            continue
        write(case=case, event="begin")
        write(case=case, status="right", error=0.0)
        if case == "dies":
            print("Segmentation fault", file=sys.stderr, flush=True)
            return 139
        while case == "hangs":
            time.sleep(0.1)
        write(case=case, event="end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
