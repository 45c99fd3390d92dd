"""docs/interoperability.md shows the rows, and their versions are those that are pinned."""

from __future__ import annotations

import re

import interop_page


def test_the_page_shows_the_rows():
    text = interop_page.PAGE.read_text(encoding="utf-8")
    assert interop_page.BEGIN in text
    assert interop_page.END in text
    assert text == interop_page.render(text, interop_page.read_rows())


def test_the_versions_are_those_of_the_constraints():
    text = (interop_page.ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = {
        name.lower().replace("_", "-"): pin for name, pin in re.findall(r"^(\S+)==(\S+)", text, re.MULTILINE)
    }
    rows = interop_page.read_rows()
    assert {"accelerate", "bitsandbytes", "lm-eval", "peft", "torchao", "trl"} <= {
        row.program for row in rows
    }
    assert {(row.program, row.version) for row in rows} <= pins.items()
