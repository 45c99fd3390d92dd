"""Folders that say what is in them: damage is found when they are opened, and not by what a run learns.

A sealed folder holds `meta.json`: the caller's values, the length and digest of each other file, and a digest
of these. A run that opens the folder reads every byte once, about a second per gigabyte. The processes that
it starts compare lengths alone.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from million_experts.lm.files import settle

META_FILE = "meta.json"


class DamagedError(ValueError):
    """A folder that is not as it was sealed; the message says what is wrong with it."""


def seal(folder: Path, values: dict[str, Any]) -> None:
    """Writes `meta.json` beside the files in `folder` and puts all on the disk."""
    files = {
        path.name: {"bytes": path.stat().st_size, "digest": digest_file(path)}
        for path in sorted(folder.iterdir())
    }
    content = {"values": values, "files": files}
    meta = {**content, "digest": _digest_content(content)}
    (folder / META_FILE).write_text(json.dumps(meta), encoding="utf-8")
    settle(folder)


def open_seal(folder: Path, every_byte: bool = True) -> tuple[dict[str, Any], dict[str, str]]:
    """The values and the files' digests, once the folder is known to be as it was sealed.

    Args:
        every_byte: compare digests too, not lengths alone.

    Raises:
        FileNotFoundError: there is no such folder.
        DamagedError: a file is missing, of another length or of other content.
    """
    if not folder.is_dir():
        if folder.exists() or folder.is_symlink():
            raise DamagedError("it is no folder")
        raise FileNotFoundError(folder)
    try:
        meta = json.loads((folder / META_FILE).read_text(encoding="utf-8"))
        content = {"values": meta["values"], "files": meta["files"]}
        if meta["digest"] != _digest_content(content):
            raise DamagedError(f"{META_FILE} is not as it was written")
        files = {name: (file["bytes"], file["digest"]) for name, file in content["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"{META_FILE} cannot be read") from error
    for name, (length, digest) in files.items():
        path = folder / name
        if not path.is_file():
            raise DamagedError(f"{name} is missing")
        if path.stat().st_size != length:
            raise DamagedError(f"{name} has {path.stat().st_size:,} bytes instead of {length:,}")
        if every_byte and digest_file(path) != digest:
            raise DamagedError(f"{name} is not as it was written")
    return content["values"], {name: digest for name, (_, digest) in files.items()}


def digest_file(path: Path) -> str:
    """BLAKE2b of a file's bytes, 16 of its bytes in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _digest_content(content: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
