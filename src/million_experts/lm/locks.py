"""One process at a time, by the locks of `filelock`: the system frees that of a process that died."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock


@contextmanager
def locked(path: Path, timeout: float = -1) -> Iterator[None]:
    """Keeps other processes out that lock the same path. The file is gone afterwards.

    Args:
        timeout: seconds to wait for it; below 0 without end.

    Raises:
        TimeoutError: another process still holds it.
    """
    with FileLock(path, timeout=timeout):
        mine = path.stat()
        try:
            yield
        finally:
            # While it is held: whoever waits with this file open sees that it lost its name, and tries again.
            # Not where the folder went meanwhile and another process locks one of that name.
            with suppress(OSError):
                if os.path.samestat(mine, path.stat()):
                    path.unlink()
