"""What is printed: text of strangers cannot steer the terminal, and every terminal can show it."""

import errno
import os
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from typing import Any, NoReturn

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.status import Status

# Control characters but for the tab and the ends of lines, and those that turn the direction of writing.
_STEERING = re.compile(
    r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]|\r(?!\n)"
)


def printable(text: str, encoding: str | None = None) -> str:
    """The text with escapes, such as `\\x1b`, for what steers a terminal or its encoding does not have."""
    text = _STEERING.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
    encoding = encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


class Terminal(Console):
    """rich's `Console`, of which all output is `printable`; rich's own colours and bars stay.

    Where the terminal is gone, because its window was closed or its line broke, output is dropped: whoever
    prints has work to do.
    """

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text, self.encoding), style, control)

    def status(self, status: RenderableType, **options: Any) -> Status:
        if self.options.ascii_only:
            options.setdefault("spinner", "line")
        return super().status(status, **options)

    def _write_buffer(self) -> None:
        try:
            super()._write_buffer()
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.file.fileno())
            os.close(nowhere)


def escape_what_cannot_be_encoded() -> None:
    """Lets help and other packages' messages appear on terminals that lack some of their characters."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


errors = Terminal(stderr=True)


@contextmanager
def user_errors() -> Iterator[None]:
    """Errors that are the user's to mend are a line on stderr, not a traceback."""
    from million_experts.ops.backends import BackendError

    # tensorboard's thread hands the main one what keeps it from writing, and would print a traceback too.
    show = threading.excepthook
    threading.excepthook = lambda thread: None if issubclass(thread.exc_type, OSError) else show(thread)
    try:
        yield
    except (ValueError, OSError, EOFError, MemoryError, FloatingPointError, BackendError) as error:
        _fail(str(error) or type(error).__name__, 1)
    except KeyboardInterrupt as interrupt:
        _fail(str(interrupt) or "Interrupted", 130)
    finally:
        threading.excepthook = show


def _fail(message: str, code: int) -> NoReturn:
    if code == 1:
        errors.print("[bold red]Error[/bold red]", end=" ")
    one_line = " ".join(message.split())  # some of transformers' messages are paragraphs
    errors.print(one_line, markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(code)
