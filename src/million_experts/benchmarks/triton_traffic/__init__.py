"""How many bytes the Triton kernels move, and how many must move: a model, as long as no GPU measures.

    python -m million_experts.benchmarks.triton_traffic

prints the table of `docs/kernels.md`. What a kernel loads and stores is written down here tensor by tensor;
`tests/ops/triton/test_triton_traffic.py` compares it with what the kernels do in Triton's interpreter. Sizes
of blocks are the kernels' own; of configurations that are tried out, the first.

`accesses` says what a cache lets through; `by_token`, `by_tiles`, `retrieval` and `others` have a function
for each kernel; `shapes` puts them together at standard shapes.

Shapes: T tokens, K experts a token, P = T*K pairs, N experts of R rows of D numbers; retrieval as in
`ops.reference`. All sizes in bytes.
"""

from million_experts.benchmarks.triton_traffic.accesses import CACHE, Gather, Kernel, Picks, Stream
from million_experts.benchmarks.triton_traffic.by_tiles import spread, tile_dots, tile_mix, tile_table
from million_experts.benchmarks.triton_traffic.by_token import (
    RowSums,
    dots,
    gradient_weights,
    mix,
    output_weights,
    table_parts,
    table_rows,
)
from million_experts.benchmarks.triton_traffic.others import adamw
from million_experts.benchmarks.triton_traffic.retrieval import (
    Retrieval,
    key_parts,
    key_sum,
    query_grad,
    topk,
)
from million_experts.benchmarks.triton_traffic.shapes import (
    experts_backward,
    experts_forward,
    standard,
    table,
)

__all__ = [
    "CACHE",
    "Gather",
    "Kernel",
    "Picks",
    "Retrieval",
    "RowSums",
    "Stream",
    "adamw",
    "dots",
    "experts_backward",
    "experts_forward",
    "gradient_weights",
    "key_parts",
    "key_sum",
    "mix",
    "output_weights",
    "query_grad",
    "spread",
    "standard",
    "table",
    "table_parts",
    "table_rows",
    "tile_dots",
    "tile_mix",
    "tile_table",
    "topk",
]
