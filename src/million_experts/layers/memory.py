"""Product-key memories, which PEER is compared with: a token retrieves values instead of neurons."""

from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from million_experts._typing import Bool, Float
from million_experts.layers.retrieval import ProductKeyRetrieval, Routing
from million_experts.layers.submodules import call
from million_experts.layers.tokens import blank_masked, flatten_tokens
from million_experts.ops import advise_huge_pages
from million_experts.ops.checks import autocast_is_on
from million_experts.ops.row_gradients import expect_row_gradient


class _Memory(ProductKeyRetrieval):
    """Retrieval of rows of a table of values [N, D]: what both memories share."""

    def __init__(self, *arguments, sparse_grad: bool, **named) -> None:
        super().__init__(*arguments, **named)
        self.sparse_grad = sparse_grad
        self.values = nn.Parameter(torch.empty(self.num_experts, self.dim))
        if not self.values.is_meta:
            advise_huge_pages(self.values)  # before the first write, which decides on the pages

    @property
    def table(self) -> nn.Parameter:
        return self.values

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        self.reset_retrieval()
        for keys in (self.keys1, self.keys2):
            bound = keys.shape[-1] ** -0.5
            nn.init.uniform_(keys, -bound, bound)
        nn.init.normal_(self.values, std=self.dim**-0.5)

    @overload
    def forward(
        self, x: Tensor, mask: Tensor | None = None, return_routing: Literal[False] = False
    ) -> Tensor: ...
    @overload
    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, return_routing: Literal[True]
    ) -> tuple[Tensor, Routing]: ...
    def forward(
        self,
        x: Float[Tensor, "*batch D"],
        mask: Bool[Tensor, "*batch"] | None = None,
        return_routing: bool = False,
    ) -> Float[Tensor, "*batch D"] | tuple[Float[Tensor, "*batch D"], Routing]:
        """Applies the layer to tokens x [..., D].

        Args:
            x: [..., D].
            mask: [...] bool, True for a real token. Masked tokens give zeros, have zero gates, enter no
                statistic and receive zero gradient, whatever they hold.
            return_routing: also return the `Routing`, each tensor [..., H, k].

        Returns:
            y [..., D] in x's dtype (under autocast in autocast's).

        Raises:
            ValueError: a last dimension other than `dim`; a mask of another shape or dtype; BatchNorm in
                training with fewer than two real tokens.
        """
        tokens, mask = flatten_tokens(x, mask, self.dim)
        routing = self.retrieve(tokens, mask)
        y = blank_masked(self._output(tokens, self._read(routing, mask)), mask)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast_is_on(x) else x.dtype
        y = y.to(dtype).view(x.shape)
        if not return_routing:
            return y
        shape = (*x.shape[:-1], self.num_heads, self.experts_per_head)
        return y, Routing(*(t.view(shape) for t in routing))

    def _read(self, routing: Routing, mask: Tensor | None) -> Tensor:
        """[T, D] in the values' dtype: the sum of gates times values, over the heads together."""
        indices, gates = routing.indices.flatten(1), routing.gates.flatten(1).to(self.values.dtype)
        if mask is None or not self.sparse_grad:
            return self._bag(indices, gates)
        # A sparse gradient names the rows that were read: those of masked tokens must not be among them.
        (real,) = mask.nonzero(as_tuple=True)
        return self.values.new_zeros(len(mask), self.dim).index_copy(
            0, real, self._bag(indices[real], gates[real])
        )

    def _bag(self, indices: Tensor, gates: Tensor) -> Tensor:
        if self.sparse_grad and self.values.requires_grad and torch.is_grad_enabled():
            expect_row_gradient(self.values)
        return F.embedding_bag(
            indices, self.values, per_sample_weights=gates, mode="sum", sparse=self.sparse_grad
        )

    def _output(self, x: Tensor, y: Tensor) -> Tensor:
        """What the layer makes of the sum of values y [T, D] of tokens x [T, D]."""
        return y


class ProductKeyMemory(_Memory):
    """Product-key memory, PKM (arXiv 1907.05242): y = sum of gates times values, K = H*k of N for each token.

    Follows section 3 of the paper: keys for each head, a BatchNorm on the queries, softmax over each head's k
    scores, summed heads. Initialised as there: sub-keys uniform within 1/sqrt(their width), values
    N(0, 1/D). The paper learns values at a constant rate of 1e-3 with Adam:
    `million_experts.optim.parameter_groups` gives them a rate of their own.

    Args:
        dim: D, the width of tokens and values.
        num_experts: N values, an int (its most square factorisation) or a pair (n1, n2).
        num_heads: H.
        experts_per_head: k values a head, at most min(n1, n2).
        key_dim: width of a query, both halves together; even.
        query_norm: "batch", "layer" or "none".
        share_keys: False for the paper's pair of codebooks a head, True for one pair.
        score: "softmax" over each head's k, "sigmoid" or "relu" of each score.
        sparse_grad: the values' gradient comes as a sparse COO tensor of the rows that were read, for
            `million_experts.optim.RowwiseAdamW` or `torch.optim.SparseAdam`.
        backend: "auto", "reference", "cpu" or "triton", for the retrieval.

    Raises:
        ValueError: an argument outside what is allowed; the message names it.
        RuntimeError: a backend asked for by name that cannot run here.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, int] = 1024**2,
        num_heads: int = 4,
        experts_per_head: int = 32,
        key_dim: int = 128,
        query_norm: str = "batch",
        share_keys: bool = False,
        score: str = "softmax",
        sparse_grad: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            dim, num_experts, num_heads, experts_per_head, key_dim, query_norm, share_keys, score, backend,
            sparse_grad=sparse_grad,
        )  # fmt: skip
        if not self.values.is_meta:
            self.reset_parameters()


class MemoryPlus(_Memory):
    """Memory+ (arXiv 2412.09764, section 3): a product-key memory with a gate that depends on the token.

    out = (y * silu(x W1)) W2, where y is the sum of gates times values of `ProductKeyMemory`. `gate_proj` is
    W1 and `out_proj` W2. The paper lets three layers share one table of values, each with its own keys: in
    `PeerForCausalLM` all layers of this kind do (`share_memory_values`); elsewhere assign one layer's
    `values` to another.

    `qk_norm`, which the paper uses where training is unstable, normalises queries (over `key_dim`) and
    sub-keys (over half of it) by LayerNorms with learned scales; these start such that a score has unit
    variance. Without it queries are not normalised.

    How weights start is our choice: keys and values as in PKM, W1 and W2 from N(0, 1/D).

    Args:
        dim: D, the width of tokens and values.
        num_experts: N values, an int (its most square factorisation) or a pair (n1, n2).
        num_heads: H.
        experts_per_head: k values a head, at most min(n1, n2).
        key_dim: width of a query, both halves together; even.
        qk_norm: normalise queries and sub-keys.
        share_keys: False for a pair of codebooks a head, True for one pair.
        score: "softmax" over each head's k, "sigmoid" or "relu" of each score.
        sparse_grad: as in `ProductKeyMemory`.
        backend: "auto", "reference", "cpu" or "triton", for the retrieval.

    Raises:
        ValueError: an argument outside what is allowed; the message names it.
        RuntimeError: a backend asked for by name that cannot run here.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, int] = 1024**2,
        num_heads: int = 4,
        experts_per_head: int = 32,
        key_dim: int = 128,
        qk_norm: bool = True,
        share_keys: bool = False,
        score: str = "softmax",
        sparse_grad: bool = False,
        backend: str = "auto",
    ):
        super().__init__(
            dim, num_experts, num_heads, experts_per_head, key_dim, "layer" if qk_norm else "none",
            share_keys, score, backend, sparse_grad=sparse_grad,
        )  # fmt: skip
        # No bias: one vector added to all keys adds the same to all scores of a head, which no softmax sees.
        self.key_norm = nn.LayerNorm(key_dim // 2, bias=False) if qk_norm else None
        self.gate_proj = nn.Linear(dim, dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        if not self.values.is_meta:
            self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew."""
        super().reset_parameters()
        for linear in (self.gate_proj, self.out_proj):
            nn.init.normal_(linear.weight, std=self.dim**-0.5)
        if self.key_norm is not None:
            nn.init.constant_(self.key_norm.weight, self.key_dim**-0.5)

    def _codebooks(self) -> tuple[Tensor, Tensor]:
        if self.key_norm is None:
            return self.keys1, self.keys2
        return self.key_norm(self.keys1), self.key_norm(self.keys2)

    def _output(self, x: Tensor, y: Tensor) -> Tensor:
        gate = F.silu(call(self.gate_proj, x))
        return call(self.out_proj, y.to(gate.dtype) * gate)
