"""A run's folder: made of files alone, written to by one process, and whether its run is over."""

import json
import os
import secrets
import shlex
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from million_experts.lm.files import WriteError, explained, remove_scratch, write_whole
from million_experts.lm.locks import locked
from million_experts.lm.settings import SETTINGS_FILE, TrainSettings

RESULTS_FILE = "results.json"
# Hidden, as all that does not make a folder a run.
LOCK_FILE, HOLDER_FILE = ".run.lock", ".run.holder"


class RunInUseError(OSError):
    """Another process trains in the folder; the message names it."""


def is_finished(run: Path, settings: TrainSettings, resume: bool) -> bool:
    """Whether the run is over; raises where its folder must not be used as asked."""
    stored = run / SETTINGS_FILE
    if not stored.exists():
        # Hidden files may be what a run left that was killed before it began.
        if run.exists() and (not run.is_dir() or any(file.name[0] != "." for file in run.iterdir())):
            raise FileExistsError(
                f"output_dir {run} holds files that are not a run's; give another --output-dir"
            )
        return False
    if not resume:
        raise FileExistsError(
            f"output_dir {run} already holds a run: go on with it by --resume, or start another with "
            "another --output-dir"
        )
    differences = settings.differences(TrainSettings.load(stored))
    if differences:
        raise ValueError(
            f"the run in {run} was started with other settings, so it cannot be resumed with these: "
            f"{'; '.join(differences)}. Leave them out to go on with the run ({resume_command(run)}), or "
            "start another with another --output-dir"
        )
    return (run / RESULTS_FILE).exists()


def resume_command(run: Path) -> str:
    """What goes on with a run, for a shell."""
    return f"million-experts train --output-dir {shlex.quote(str(run))} --resume"


@contextmanager
def hold(run: Path) -> Iterator[Callable[[], None]]:
    """Makes this process the only one that writes to a run's folder, and removes what a killed one left half.

    Yields:
        A function that raises WriteError once the folder is another or none.

    Raises:
        RunInUseError: another process holds it.
        ValueError: there is a link, a pipe or a device in it.
    """
    _refuse_links(run)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run / LOCK_FILE, timeout=0))
        except TimeoutError as error:
            raise RunInUseError(_in_use(run)) from error
        except OSError:
            with explained("the lock of the run", run):
                raise
        remove_scratch(run)
        mine = {
            "process": os.getpid(),
            "host": socket.gethostname(),
            "since": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M:%S %z"),
            "token": secrets.token_hex(8),
        }
        write_whole(run / HOLDER_FILE, json.dumps(mine))

        def check() -> None:
            if _read_holder(run) != mine:
                raise WriteError(
                    f"the folder of the run, {run}, was removed, renamed or given to another run while this "
                    "one trained; nothing more is written there"
                )

        try:
            yield check
        finally:
            with suppress(OSError):  # it tells nobody anything once the lock is free
                if _read_holder(run) == mine:
                    (run / HOLDER_FILE).unlink()


def _read_holder(run: Path) -> dict[str, Any]:
    try:
        holder = json.loads((run / HOLDER_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _in_use(run: Path) -> str:
    holder = _read_holder(run)  # empty for the moment between its lock and its name
    who = (
        f"process {holder.get('process')} on {holder.get('host')} has trained in it since "
        f"{holder.get('since')}"
        if holder
        else "another process has just begun to train in it"
    )
    return f"output_dir {run} is in use: {who}. Wait for it or stop it, or give another --output-dir"


def _refuse_links(run: Path) -> None:
    """In a folder from a stranger a link would let the run write, or remove, what lies elsewhere."""
    for root, folders, names in os.walk(run):
        for path in (Path(root) / name for name in (*folders, *names)):
            if path.is_symlink():
                what = f"a link to {os.readlink(path)}"
            elif not (path.is_file() or path.is_dir()):
                what = "neither a file nor a folder"
            else:
                continue
            raise ValueError(
                f"output_dir {run} holds {path.relative_to(run)}, which is {what}; a run is made of files "
                "and folders alone. Remove it, or give another --output-dir"
            )
