"""Records what kernels load and store in Triton's interpreter, address by address, and their products."""

from __future__ import annotations

import contextlib
import inspect
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from triton._C.libtriton.ir import CACHE_MODIFIER
from triton.runtime import interpreter

SECTOR = 32  # bytes that a GPU's memory moves at least
READS, WRITES, STREAMS = "reads", "writes", "streams"


@dataclass
class Trace:
    """The accesses of one kernel: tensor, addresses, bytes of each, how they pass the cache."""

    accesses: list[tuple[str, np.ndarray, int, str]] = field(default_factory=list)
    operations: int = 0  # of its products of matrices, an addition and a multiplication for each pair
    narrow: int = 0  # of these, where both matrices have 16 bits a number

    def issued(self) -> dict[str, int]:
        """Bytes of all loads and stores, by tensor."""
        total: dict[str, int] = defaultdict(int)
        for tensor, addresses, size, _ in self.accesses:
            total[tensor] += len(addresses) * size
        return dict(total)

    def moved(self, cache: int) -> int:
        """Bytes that pass between memory and a cache that drops what was used longest ago, in sectors.

        A sector comes when it is read, and goes back when it has been written: at once where it is streamed.
        """
        held, room, sectors_moved = OrderedDict[int, bool](), cache // SECTOR, 0
        for _, addresses, size, how in self.accesses:
            writes = how != READS
            sectors = np.stack([addresses, addresses + np.uint64(size - 1)]) // np.uint64(SECTOR)
            flat = sectors.T.ravel()
            keep = np.ones(len(flat), dtype=bool)
            keep[1:] = flat[1:] != flat[:-1]
            for sector in flat[keep].tolist():
                if sector in held:
                    held.move_to_end(sector)
                    held[sector] |= writes
                    continue
                if how == STREAMS:
                    sectors_moved += 1
                    continue
                sectors_moved += not writes
                held[sector] = writes
                if len(held) > room:
                    _, written = held.popitem(last=False)
                    sectors_moved += written
        return (sectors_moved + sum(held.values())) * SECTOR


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    numbers = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (numbers if tensor.numel() else 0) * tensor.element_size()


@contextlib.contextmanager
def record() -> Iterator[dict[str, list[Trace]]]:
    """The traces of each kernel's launches while the context is open, by the kernel's name."""
    traces: dict[str, list[Trace]] = defaultdict(list)
    current: list[tuple[Trace, dict[str, tuple[int, int]]]] = []
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    launch, load, store = executor.__call__, builder.create_masked_load, builder.create_masked_store
    dot = builder.create_dot

    def note(pointers, mask, how: str) -> None:
        addresses = np.broadcast_to(pointers.data, np.broadcast_shapes(pointers.data.shape, mask.data.shape))
        addresses = addresses[np.broadcast_to(mask.data, addresses.shape)]
        if len(addresses) == 0:
            return
        trace, extents = current[-1]
        name = next(n for n, (begin, end) in extents.items() if begin <= addresses[0] < end)
        assert extents[name][0] <= addresses.min(), name
        assert addresses.max() < extents[name][1], name
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        trace.accesses.append((name, addresses.astype(np.uint64), size, how))

    def recorded_load(self, pointers, mask, *others):
        note(pointers, mask, READS)
        return load(self, pointers, mask, *others)

    def recorded_store(self, pointers, value, mask, cache_modifier, *others):
        note(pointers, mask, STREAMS if cache_modifier == CACHE_MODIFIER.CS else WRITES)
        return store(self, pointers, value, mask, cache_modifier, *others)

    def recorded_dot(self, a, b, *others):
        count = 2 * a.data.size * b.data.shape[-1]
        current[-1][0].operations += count
        if all(m.get_element_ty().primitive_bitwidth == 16 for m in (a, b)):
            current[-1][0].narrow += count
        return dot(self, a, b, *others)

    def recorded_launch(self, *arguments, **named):
        known = inspect.getfullargspec(self.fn).args
        bound = inspect.getcallargs(
            self.fn, *arguments, **{name: value for name, value in named.items() if name in known}
        )
        tensors = {name: _extent(value) for name, value in bound.items() if isinstance(value, torch.Tensor)}
        trace = Trace()
        traces[self.fn.__name__].append(trace)
        current.append((trace, tensors))
        try:
            return launch(self, *arguments, **named)
        finally:
            current.pop()

    executor.__call__ = recorded_launch
    builder.create_masked_load, builder.create_masked_store = recorded_load, recorded_store
    builder.create_dot = recorded_dot
    try:
        yield traces
    finally:
        executor.__call__ = launch
        builder.create_masked_load, builder.create_masked_store = load, store
        builder.create_dot = dot
