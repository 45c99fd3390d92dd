"""What is printed cannot steer a terminal, and every terminal can show it."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys

import pytest
from rich.progress import Progress
from rich.table import Table

from million_experts._terminal import Terminal, printable

HOSTILE = "a\x1b[31mb\x1b]0;title\x07c\x9b2Jd\x7fe\u202ef\x00g\x08h"
ESCAPED = r"a\x1b[31mb\x1b]0;title\x07c\x9b2Jd\x7fe\u202ef\x00g\x08h"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HOSTILE, ESCAPED),
        ("two\nlines\r\nand\ta tab", "two\nlines\r\nand\ta tab"),
        ("over\rwritten", r"over\rwritten"),
        ("grüße, 日本, 🙂", "grüße, 日本, 🙂"),
        (os.fsdecode(b"file-\xff"), r"file-\udcff"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected
    assert printable(printable(text)) == expected


def test_what_an_encoding_lacks_is_escaped():
    assert printable("grüße", "ascii") == r"gr\xfc\xdfe"
    assert printable("grüße", "latin-1") == "grüße"
    assert printable("日", "latin-1") == r"\u65e5"


def print_everything(terminal, text):
    terminal.print(text, markup=False, soft_wrap=True)
    table = Table(title=text)
    table.add_column(text)
    table.add_row(text)
    terminal.print(table)
    with terminal.status(text), Progress(console=terminal) as bar:
        bar.add_task(text, total=1)
    terminal.rule(text)


@pytest.mark.parametrize("is_terminal", [False, True])
def test_no_console_prints_control_characters_of_others(is_terminal):
    stream = io.StringIO()
    terminal = Terminal(file=stream, force_terminal=is_terminal, width=300, color_system=None)
    print_everything(terminal, HOSTILE.replace("[", "("))
    written = stream.getvalue()
    for sequence in ("\x1b(31m", "\x1b]0;", "\x07", "\x9b", "\x7f", "\u202e", "\x00", "\x08"):
        assert sequence not in written
    assert r"\x1b(31mb" in written
    assert ("\x1b[" in written) == is_terminal, "rich's own"


@pytest.mark.parametrize("is_terminal", [False, True])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_every_encoding_will_do(encoding, is_terminal):
    raw = io.BytesIO()
    terminal = Terminal(file=io.TextIOWrapper(raw, encoding=encoding), force_terminal=is_terminal, width=300)
    print_everything(terminal, "grüße 日")
    terminal.file.flush()
    assert rb"\u65e5" in raw.getvalue()


def test_help_appears_on_a_terminal_of_ascii():
    main, terminal = pty.openpty()
    command = [sys.executable, "-m", "million_experts.cli", "train", "--help"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen(command, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    written = b""
    while True:
        try:
            written += os.read(main, 65536)
        except OSError:
            break
    assert process.wait(60) == 0, written
    assert b"--output-dir" in re.sub(rb"\x1b\[[\d;]*m", b"", written)
    assert b"UnicodeEncodeError" not in written
