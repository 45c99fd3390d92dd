"""Files that are whole or not there."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, text: str) -> None:
    """Writes a text file so that its name never stands for half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def save_whole(save: Callable[[str], Any], folder: Path) -> None:
    """Calls `save(folder)` on a temporary folder and moves its files into `folder`, each one whole."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    save(str(partial))
    for file in sorted(partial.iterdir()):
        os.replace(file, folder / file.name)
    partial.rmdir()
