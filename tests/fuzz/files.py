"""Files as plain data: bytes that were damaged, and JSON of which somebody changed a part."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

DAMAGES = (
    "emptied", "truncated", "flipped", "zeroed", "all zeros", "cut out", "put in", "noise", "doubled",
    "utf-16", "byte order mark", "latin-1", "nested", "missing", "folder", "dangling link",
)  # fmt: skip

damages = st.fixed_dictionaries(
    {
        "file": st.integers(0, 15),
        "what": st.sampled_from(DAMAGES),
        "place": st.one_of(st.integers(0, 200), st.integers(0, 2**20)),
        "length": st.integers(1, 64),
        "bytes": st.binary(max_size=16),
    }
)

HUGE = [0, -1, 2**31, 2**53, 2**63, 10**30, 1e308, math.inf, math.nan, "\ud800", "a" * 5000]
junk = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-9, 99),
        st.floats(),
        st.text(max_size=9),
        st.sampled_from(HUGE),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=6,
)

edits = st.fixed_dictionaries(
    {
        "path": st.lists(st.integers(0, 60), min_size=1, max_size=4),
        "what": st.sampled_from(["replaced", "replaced", "replaced", "removed", "renamed", "copied", "root"]),
        "value": junk,
    }
)


def damage(path: Path, wrong: dict[str, Any]) -> None:
    """Does one thing to a file that makes another of it."""
    what, data = wrong["what"], path.read_bytes()
    if what in ("missing", "folder", "dangling link"):
        path.unlink()
        if what == "folder":
            path.mkdir()
        elif what == "dangling link":
            path.symlink_to(path.with_name("nowhere"))
        return
    at = wrong["place"] % (len(data) + 1)
    end = at + wrong["length"]
    path.write_bytes(
        {
            "emptied": b"",
            "truncated": data[:at],
            "flipped": data[:at] + bytes(byte ^ 1 << at % 8 for byte in data[at : at + 1]) + data[at + 1 :],
            "zeroed": data[:at] + bytes(len(data[at:end])) + data[end:],
            "all zeros": bytes(len(data)),
            "cut out": data[:at] + data[end:],
            "put in": data[:at] + wrong["bytes"] + data[at:],
            "noise": wrong["bytes"],
            "doubled": data + data,
            "utf-16": data.decode("latin-1").encode("utf-16"),
            "byte order mark": b"\xef\xbb\xbf" + data,
            "latin-1": data[:at] + "é".encode("latin-1") + data[at:],
            "nested": b"[" * 100_000,
        }[what]
    )


def edit(content: Any, change: dict[str, Any]) -> Any:
    """JSON with one change at a place in it."""
    if change["what"] == "root":
        return change["value"]
    content = copy.deepcopy(content)
    place = content
    keys: list[Any] = []
    for number in change["path"]:
        inner = place[keys[-1]] if keys else place
        if not isinstance(inner, dict | list) or not inner:
            break
        place = inner
        keys.append(sorted(place)[number % len(place)] if isinstance(place, dict) else number % len(place))
    if not keys:
        return change["value"]
    key = keys[-1]
    if change["what"] == "removed":
        del place[key]
    elif isinstance(place, dict) and change["what"] in ("renamed", "copied"):
        value = place.pop(key) if change["what"] == "renamed" else place[key]
        place[str(change["value"])] = value
    else:
        place[key] = change["value"]
    return content
