"""The kernels of `ops.triton_retrieval`."""

from dataclasses import dataclass

import numpy as np

from million_experts.benchmarks.triton_traffic.accesses import (
    INDEX,
    SECTOR,
    SUM,
    Accesses,
    Gather,
    Kernel,
    Numbers,
    Picks,
    Stream,
    split,
    up,
)
from million_experts.ops import triton_retrieval as kernels


@dataclass(frozen=True)
class Retrieval:
    """Sizes of the retrieval kernels, with one pair of codebooks for all heads."""

    T: int
    H: int
    k: int
    n1: int
    n2: int
    d: int
    query: int
    keys: int

    @property
    def selections(self) -> int:
        return self.T * self.H * self.k

    @property
    def queries(self) -> int:
        return self.T * self.H * 2 * self.d * self.query


def _sorting(block: int, k: int) -> int:
    """Numbers times steps to merge a block of sub-keys into the best k: `_merge`, and `tl.topk` within."""
    log = k.bit_length() - 1
    steps = block * log * (log + 1) // 2 + k * (1 + log)
    while block > k:
        block //= 2
        steps += block * (1 + log)
    return steps


def topk(s: Retrieval) -> Kernel:
    """`topk_kernel`."""
    k = kernels.padded(s.k)
    wide = s.query != s.keys or s.query == SUM
    whole, block_n, block_d = kernels.blocks(s.d, k, wide)
    programs = split(s.T * s.H, kernels.BLOCK_Q)
    rounds = split(s.n1, block_n) + split(s.n2, block_n)
    accesses: Accesses = [
        Stream("query", s.queries, 1 if whole else rounds / 2),
        Stream("keys1", s.n1 * s.d * s.keys, programs, apart=True),
        Stream("keys2", s.n2 * s.d * s.keys, programs, apart=True),
        Stream("scores", s.selections * SUM),
        Stream("indices", s.selections * INDEX),
    ]
    queries = programs * kernels.BLOCK_Q
    products = 2 * queries * rounds * block_n * up(s.d, block_d)
    # 64 bits in units of 32: two instructions to compare, two to select.
    sorting = 4 * queries * rounds * _sorting(block_n, k)
    work: dict[str, float] = {"float32" if wide else "narrow": products, "integer": sorting}
    return Kernel(accesses, work, products=products)


def query_grad(s: Retrieval, indices: np.ndarray, grads: int) -> Kernel:
    """`query_grad_kernel` for winners `indices` [T, H, k]."""
    block_q, block_d = kernels.GRAD_QUERIES, kernels._columns(s.d, kernels.GRAD_COLUMNS)
    chunks = split(s.d, block_d)
    accesses: Accesses = [
        Stream("grad_scores", s.selections * grads, chunks),
        Stream("indices", s.selections * INDEX, chunks),
        Gather("keys1", Picks(indices // s.n2), s.d * s.keys),
        Gather("keys2", Picks(indices % s.n2), s.d * s.keys),
        Stream("grad_query", s.queries),
    ]
    products = 2 * up(s.T * s.H, block_q) * s.k * chunks * block_d
    return Kernel(accesses, {"float32": 2 * products}, block_q * s.k)


def key_parts(s: Retrieval, order: np.ndarray, counts: np.ndarray, grads: int) -> Kernel:
    """`key_parts_kernel` for selections in sorted `order`, `counts` of them of each sub-key."""
    part, block_p = kernels.PART, kernels.GRAD_SELECTIONS
    block_d = kernels._columns(s.d, kernels.GRAD_COLUMNS)
    chunks, used = split(s.d, block_d), int(np.sum(-(-counts // part)))
    most = kernels.most_parts(len(order), len(counts))
    scores = order // (2 * s.k) * s.k + order % s.k
    accesses: Accesses = [
        Numbers("grad_scores", Picks(scores * grads // SECTOR), SECTOR, s.selections * grads, 2 * chunks),
        Gather("query", Picks(order // s.k), s.d * s.query),
        Stream("order", len(order) * INDEX, chunks),
        Stream("starts", (len(counts) + 1) * INDEX, 2 * used * chunks / (len(counts) + 1)),
        Stream("part_starts", (len(counts) + 1) * INDEX, used * chunks / (len(counts) + 1)),
        Stream("owners", most * INDEX, chunks),
        Stream("parts", used * s.d * SUM),
    ]
    products = float(np.sum(-(-counts // block_p))) * block_p * chunks * block_d
    return Kernel(accesses, {"float32": 2 * products}, part)


def key_sum(s: Retrieval, counts: np.ndarray) -> Kernel:
    """`key_sum_kernel`."""
    block_d, M = kernels._columns(s.d, kernels.GRAD_COLUMNS), len(counts)
    chunks, used = split(s.d, block_d), int(np.sum(-(-counts // kernels.PART)))
    accesses: Accesses = [
        Stream("parts", used * s.d * SUM),
        Stream("part_starts", (M + 1) * INDEX, 2 * M * chunks / (M + 1)),
        Stream("grad_keys1", s.n1 * s.d * s.keys),
        Stream("grad_keys2", s.n2 * s.d * s.keys),
    ]
    return Kernel(accesses, {"float32": 2 * used * chunks * block_d})
