"""Files that are whole or not there."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that its name never stands for half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def save_whole(save: Callable[[str], Any], folder: Path) -> None:
    """Calls `save(folder)` on a temporary folder and moves its files into `folder`, each one whole."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    save(str(partial))
    for file in sorted(partial.iterdir()):
        os.replace(file, folder / file.name)
    partial.rmdir()


def make_folder(argument: str, folder: Path) -> None:
    """Makes a folder that files can be written to.

    Raises:
        ValueError: it cannot be made or not be written to; `argument` is named.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{argument} {folder} cannot be made: {error.strerror or error}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{argument} {folder} must be a folder that can be written to")
