"""What kernels read and write, and what of it passes between memory and a cache."""

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

# H100 SXM: bytes a second from memory, and of the second cache.
BANDWIDTH = 3.35e12
CACHE = 50 * 10**6

# Operations a second, a fused multiply-add being two, without sparsity. A float32 instruction that is no such
# pair counts as two as well. There are half as many integer units as float32 ones, and they fuse nothing.
PEAKS = {"float32": 67e12, "tf32": 494.7e12, "narrow": 989.4e12, "integer": 67e12 / 4}

# Programs that run at a time, taking turns: 132 processors with 16 each.
IN_FLIGHT = 132 * 16

INDEX, SUM = 8, 4  # int64 and float32
SECTOR = 32  # what a GPU's memory moves at least


@dataclass(frozen=True)
class Stream:
    """A tensor that is read or written from end to end, each number `times` times."""

    tensor: str
    bytes: float
    times: float = 1
    apart: bool = False  # all of the tensor lies between one time and the next; else they follow closely
    past: bool = False  # written with the hint that nobody will read it soon, so that it takes no room

    @property
    def issued(self) -> float:
        return self.bytes * self.times

    def necessary(self, cache: float) -> float:
        return self.bytes

    def moved(self, cache: float) -> float:
        return self.issued if self.apart and self.bytes > cache else self.bytes


class Picks:
    """Numbers of rows in the order in which they are read."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = rows.ravel()
        self.distinct = len(np.unique(self.rows))
        self._stretches: dict[int, int] = {}

    def in_stretches(self, room: int) -> int:
        """Distinct rows, counted anew for each stretch of picks that has `room` of them."""
        if self.distinct <= room:
            return self.distinct
        if room not in self._stretches:
            found, held = 0, set[int]()
            for row in self.rows.tolist():
                if row not in held:
                    if len(held) == room:
                        held.clear()
                    held.add(row)
                    found += 1
            self._stretches[room] = found
        return self._stretches[room]

    def in_turns(self, each: int, in_flight: int) -> np.ndarray:
        """The rows as programs read them that have `each` picks, `in_flight` of them taking turns."""
        programs = up(split(len(self.rows), each), in_flight)
        rows = np.full(programs * each, -1)
        rows[: len(self.rows)] = self.rows
        rows = rows.reshape(-1, in_flight, each).swapaxes(1, 2).ravel()
        return rows[rows >= 0]


@dataclass(frozen=True)
class Gather:
    """Rows of a tensor that are read as they were picked."""

    tensor: str
    picks: Picks
    row_bytes: int

    @property
    def issued(self) -> float:
        return len(self.picks.rows) * self.row_bytes

    def necessary(self, cache: float) -> float:
        return self.picks.in_stretches(max(1, int(cache // self.row_bytes))) * self.row_bytes


@dataclass(frozen=True)
class Numbers:
    """Single numbers of a tensor at scattered places, all of them: each comes in a sector."""

    tensor: str
    picks: Picks  # of sectors, or of as many sectors side by side as `row_bytes` has
    row_bytes: int
    bytes: float
    times: float  # that each is read

    @property
    def issued(self) -> float:
        return self.bytes * self.times

    def necessary(self, cache: float) -> float:
        return self.bytes


Accesses = list[Stream | Gather | Numbers]


@dataclass(frozen=True)
class Kernel:
    """What a launch loads, stores and computes."""

    accesses: Accesses
    work: dict[str, float]  # operations, by their kind in PEAKS
    each: int = 1  # picks of a program
    products: float = 0  # operations of products of matrices, before any is computed in three

    @property
    def issued(self) -> float:
        return sum(a.issued for a in self.accesses)

    def necessary(self, cache: float) -> float:
        return sum(a.necessary(cache) for a in self.accesses)

    def moved(self, cache: float, in_flight: int = IN_FLIGHT) -> float:
        """What passes between memory and a cache that drops what was used longest ago.

        All tensors share the cache: those that are streamed push picked rows out of it.
        """
        rows: dict[Picks, int] = {}  # bytes of all rows that are picked together
        streamed = past = 0.0
        for access in self.accesses:
            if isinstance(access, Stream) and access.past:
                past += access.moved(cache)
            elif isinstance(access, Stream):
                streamed += access.moved(cache)
            else:
                rows[access.picks] = rows.get(access.picks, 0) + access.row_bytes
        distinct = sum(picks.distinct * size for picks, size in rows.items())
        if streamed + distinct <= cache or distinct == 0:
            return past + streamed + distinct
        turns = [picks.in_turns(self.each, in_flight) for picks in rows]
        return past + streamed + _missed(turns, list(rows.values()), streamed / len(turns[0]), cache)

    @property
    def computing(self) -> float:
        """Seconds on an H100, at least; kinds of units work side by side."""
        return max((count / PEAKS[kind] for kind, count in self.work.items()), default=0.0)


def _missed(picks: list[np.ndarray], sizes: list[int], passing: float, cache: float) -> float:
    """Bytes of rows that the cache lacks when they are read, `passing` other bytes going by at each pick."""
    keys = [(rows * len(picks) + tensor).tolist() for tensor, rows in enumerate(picks)]
    missed, used, held = 0.0, 0.0, OrderedDict[int, float]()
    for at, row in enumerate(zip(*keys, strict=True), 1):
        for key, size in zip(row, sizes, strict=True):
            if key in held:
                held.move_to_end(key)
            else:
                held[key] = size
                missed += size
                used += size
        held[-at] = passing
        used += passing
        while used > cache:
            used -= held.popitem(last=False)[1]
    return missed


def split(width: int, block: int) -> int:
    return -(-width // block)


def up(width: int, block: int) -> int:
    """The next multiple of a block: padding is computed like the rest."""
    return split(width, block) * block


def sectors(picks: np.ndarray, N: int) -> int:
    """Bytes of the sectors of a float32 matrix [T, N] in which the picks [T, K] lie."""
    T = len(picks)
    return len(np.unique((np.arange(T)[:, None] * N + picks) * SUM // SECTOR)) * SECTOR
