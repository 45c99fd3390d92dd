"""Files that are whole or not there; what keeps them from being written is said in a line."""

import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SCRATCH = ".partial"  # begins the name of all that is being written


class WriteError(OSError):
    """Something that could not be written; the message says what, where, why and what to do."""


@contextmanager
def explained(
    what: str, folder: Path, advice: str = "Make room there, or let it be written to, and try again"
) -> Iterator[None]:
    """Turns what writers raise on a full disk or in a read-only folder into one kind of error.

    Python's errors often do not say where, those of safetensors and tokenizers are no OSError, and torch's do
    not say why.

    Raises:
        WriteError: a write failed. Anything else that went wrong passes as it is.
    """
    try:
        yield
    except Exception as error:
        reason = None if isinstance(error, WriteError) else _why_not_written(error)
        if reason is None:
            raise
        if isinstance(error, FileNotFoundError) and not folder.is_dir():
            message = f"{what} could not be written: the folder {folder} is not there, or no longer"
            raise WriteError(message) from error
        raise WriteError(
            f"{what} could not be written to {folder}: {reason}; {_room(folder, error)}. {advice}"
        ) from error


def _room(folder: Path, error: Exception) -> str:
    """What there is left of what a write takes."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return "this process may open no more files at once (ulimit -n)"
    place = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    try:
        disk = os.statvfs(place)
    except OSError:
        return "the disk does not answer"
    free = f"{disk.f_bavail * disk.f_frsize / 1e6:,.1f} MB are free there"
    if disk.f_files > 0 and disk.f_favail < 1000:  # of its inodes, which are what df -i shows
        return f"{free}, in at most {disk.f_favail} more files (df -i)"
    return free


def _why_not_written(error: Exception) -> str | None:
    """The reason of a failed write, None for any other error."""
    text = str(error)
    if isinstance(error, OSError):
        return error.strerror or text
    if number := re.search(r"\(os error (\d+)\)", text):  # safetensors and tokenizers, both written in Rust
        return os.strerror(int(number[1]))
    if isinstance(error, RuntimeError) and (
        opened := re.search(
            r"open file failed with strerror: (.+)|(Parent directory .+ does not exist)", text
        )
    ):
        return opened[1] or opened[2]
    # Later torch loses the reason: "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534".
    if isinstance(error, RuntimeError) and re.search(r"unexpected pos \d|StreamWriter|iostream", text):
        return "not all of it was taken"
    return None


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, so that its name never stands for half of it."""
    data = content.encode() if isinstance(content, str) else content
    # A name that nobody can foresee: one that is known may be a link that was laid out.
    partial = path.with_name(f"{_SCRATCH}-{secrets.token_hex(8)}-{path.name}")
    with explained(path.name, path.parent):
        try:
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def save_whole(save: Callable[[str], Any], folder: Path, what: str = "files") -> None:
    """Calls `save(folder)` on a temporary folder and moves its files into `folder`, each one whole.

    Raises:
        WriteError: `what` it saves could not be written; nothing in `folder` is half of it.
    """
    with explained(what, folder), scratch_folder(folder) as partial:
        save(str(partial))
        settle(partial)
        for file in sorted(partial.iterdir()):
            os.replace(file, folder / file.name)
        sync(folder)


@contextmanager
def scratch_folder(folder: Path, name: str = "") -> Iterator[Path]:
    """A new folder inside `folder` that nobody else may enter; it is removed with what is left in it.

    A killed process leaves it behind, for `remove_scratch`.
    """
    scratch = Path(tempfile.mkdtemp(prefix=f"{_SCRATCH}-{name}", dir=folder))
    try:
        yield scratch
    finally:  # half a model would take the room that is to be made
        shutil.rmtree(scratch, ignore_errors=True)


def remove_scratch(folder: Path, name: str = "") -> None:
    """Removes what killed processes were writing in `folder`; nobody else may be writing there now."""
    for path in folder.glob(f"{_SCRATCH}*" if name == "" else f"{_SCRATCH}-{name}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def settle(folder: Path) -> None:
    """Puts the files below `folder` on the disk, with the mode that new files have here.

    Some writers, safetensors among them, make files that only their owner may read.
    """
    probe = folder / f"{_SCRATCH}-mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for root, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(root) / name, mode)
            sync(Path(root) / name)
        sync(Path(root))


def sync(path: Path) -> None:
    """Puts a file, or the names in a folder, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


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
