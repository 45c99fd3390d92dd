"""Product-key retrieval as a module: queries, two codebooks, the gates of the experts that are found."""

import math
import operator
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from million_experts._arguments import check_choice, check_positive, is_integer
from million_experts._typing import Bool, Float
from million_experts.layers.norm import MaskedBatchNorm, WideLayerNorm
from million_experts.layers.submodules import call, is_plain
from million_experts.ops import product_key_topk, resolve_backend
from million_experts.ops.checks import autocast_is_on

SCORES = ("softmax", "sigmoid", "relu")
QUERY_NORMS = ("batch", "layer", "none")
# A table of so many experts takes a petabyte where each has 512 numbers of two bytes.
MAX_EXPERTS = 2**40


class Routing(NamedTuple):
    """What a layer retrieved for each token; each of shape [..., H, k].

    Attributes:
        indices: int64, the experts, best first. Those of a masked token are valid and mean nothing.
        gates: what each expert's output is multiplied by; zero for masked tokens.
        scores: raw scores, descending.
    """

    indices: Tensor
    gates: Tensor
    scores: Tensor


RoutingHook = Callable[["ProductKeyRetrieval", Routing], None]


def factorise(num_experts: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """The sizes (n1, n2) of the two codebooks that address `num_experts` experts.

    A pair is taken as it is. An int takes its most square factorisation, n1 >= n2.

    Raises:
        ValueError: not positive, or more than any table can hold; or an int with no factorisation with
            n1 <= 4 * n2; the nearest sizes that work are named.
    """
    if is_integer(num_experts):
        num_experts = operator.index(num_experts)  # type: ignore[arg-type]
        if num_experts < 1:
            raise ValueError(f"num_experts must be positive, got {num_experts}")
        _check_table_can_exist(num_experts)
        (n1, n2), above = _nearest_usable(num_experts)
        if n1 * n2 == num_experts:
            return n1, n2
        raise ValueError(
            f"num_experts={num_experts} has no factorisation n1 * n2 with n2 <= n1 <= 4 * n2; the nearest "
            f"sizes that work are {n1 * n2} or {math.prod(above)}, or give a pair (n1, n2)"
        )
    if (
        not isinstance(num_experts, tuple | list)
        or len(num_experts) != 2
        or not all(map(is_integer, num_experts))
    ):
        raise ValueError(f"num_experts must be an int or a pair of ints (n1, n2), got {num_experts!r}")
    if min(num_experts) < 1:
        raise ValueError(f"num_experts must be a pair of positive sizes, got {tuple(num_experts)}")
    n1, n2 = map(operator.index, num_experts)
    _check_table_can_exist(n1 * n2)
    return n1, n2


def _check_table_can_exist(num_experts: int) -> None:
    if num_experts > MAX_EXPERTS:
        raise ValueError(f"num_experts must be at most {MAX_EXPERTS} (2**40) in all, got {num_experts}")


def _nearest_usable(number: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The largest usable n1 * n2 that is not above a number, and the smallest above it.

    Usable are n2 <= n1 <= 4 * n2; of factorisations of one size the most square. Each n2 near the number's
    root has one candidate on either side, so one pass over them is enough, however far the nearest size is.
    """
    root = math.isqrt(number)
    below, above = (1, 1), (root + 1, root + 1)
    for n2 in range(max(1, root // 2), root + 1):
        n1 = min(number // n2, 4 * n2)
        if n1 * n2 >= below[0] * below[1]:
            below = n1, n2
        n1 = number // n2 + 1
        if n1 <= 4 * n2 and n1 * n2 < above[0] * above[1]:
            above = n1, n2
    return below, above


class ProductKeyRetrieval(nn.Module):
    """Finds k of N = n1 * n2 items for each token and head (PEER, arXiv 2407.04153, section 2.2).

    Its subclasses hold what is retrieved. The query of a token is a linear projection, normalised
    (`query_norm`); each half is scored against a codebook of sub-keys, which the heads share unless
    `share_keys` is False; `score` turns the k best sums into gates.

    At initialisation queries have unit variance, and sub-keys are N(0, 1/key_dim), so that the score of an
    item taken at random has unit variance too, whatever key_dim.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, int],
        num_heads: int,
        experts_per_head: int,
        key_dim: int,
        query_norm: str,
        share_keys: bool,
        score: str,
        backend: str,
    ):
        super().__init__()
        check_positive(dim=dim, num_heads=num_heads, experts_per_head=experts_per_head, key_dim=key_dim)
        if key_dim % 2:
            raise ValueError(f"key_dim counts both halves of a query and must be even, got {key_dim}")
        check_choice("query_norm", query_norm, QUERY_NORMS)
        check_choice("score", score, SCORES)
        resolve_backend(backend, "meta")  # whether it runs here; on which device the layer will be is open
        self.codebook_sizes = factorise(num_experts)
        if experts_per_head > min(self.codebook_sizes):
            raise ValueError(
                f"experts_per_head must be at most {min(self.codebook_sizes)}, the smaller of the codebooks "
                f"{self.codebook_sizes}, got {experts_per_head}"
            )
        self.dim, self.num_heads, self.experts_per_head, self.key_dim = (
            dim,
            num_heads,
            experts_per_head,
            key_dim,
        )
        self.share_keys, self.score, self.backend = share_keys, score, backend

        self.query_proj = nn.Linear(dim, num_heads * key_dim, bias=False)
        # What the norm is called with is decided here: whoever wraps it later gives it another class.
        self.norm_kind = query_norm
        self.query_norm: nn.Module
        if query_norm == "batch":
            self.query_norm = MaskedBatchNorm(num_heads * key_dim)
        elif query_norm == "layer":
            self.query_norm = WideLayerNorm(key_dim)
        else:
            self.query_norm = nn.Identity()
        heads = () if share_keys else (num_heads,)
        self.keys1, self.keys2 = (
            nn.Parameter(torch.empty(*heads, n, key_dim // 2)) for n in self.codebook_sizes
        )
        self._routing_hooks: OrderedDict[int, RoutingHook] = OrderedDict()

    @property
    def num_experts(self) -> int:
        """N, the number of items in the pool."""
        return self.codebook_sizes[0] * self.codebook_sizes[1]

    sparse_grad = False  # whether the table's gradient comes as the rows that were retrieved

    @property
    def table(self) -> nn.Parameter:
        """The parameter whose N rows are retrieved; layers may share it."""
        raise NotImplementedError

    def __delattr__(self, name: str) -> None:
        """As any module's, but that a table stays: PyTorch takes a parameter out before it parametrises it.

        Raises:
            ValueError: `torch.nn.utils.parametrize`, or PEFT by its means, would compute the table anew.
        """
        parametrises = sys._getframe(1).f_globals.get("__name__") == parametrize.__name__
        if parametrises and name in self._parameters and self._parameters[name] is self.table:
            raise ValueError(
                f"{name} must not be parametrised, as PEFT's target_parameters do: every forward pass would "
                f"compute a second table of {self.num_experts} rows. Train its rows (sparse_grad=True and "
                "RowwiseAdamW of million_experts.optim), train and keep the whole layer by PEFT's "
                "modules_to_save, or adapt query_proj by target_modules"
            )
        super().__delattr__(name)

    def reset_retrieval(self) -> None:
        """Draws the query projection and the sub-keys anew, and resets the query norm."""
        nn.init.normal_(self.query_proj.weight, std=self.dim**-0.5)
        for keys in (self.keys1, self.keys2):
            nn.init.normal_(keys, std=self.key_dim**-0.5)
        self._reset_query_norm()

    def _reset_query_norm(self) -> None:
        for module in self.query_norm.modules():  # a wrapper's own are left alone
            if isinstance(module, MaskedBatchNorm | nn.LayerNorm):
                module.reset_parameters()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        # How `SyncBatchNorm.convert_sync_batchnorm` would put a norm without a mask in place of ours.
        own = self._modules.get(name)
        if isinstance(module, nn.SyncBatchNorm) and isinstance(own, MaskedBatchNorm):
            own.synchronise(module.process_group)
        else:
            super().add_module(name, module)

    def register_routing_hook(self, hook: RoutingHook) -> RemovableHandle:
        """Calls `hook(layer, routing)` after each retrieval, routing [T, H, k]; returns a handle.

        Meant for measurement: hooks see the routing of eager forward passes and must not change it.
        """
        handle = RemovableHandle(self._routing_hooks)
        self._routing_hooks[handle.id] = hook
        return handle

    def retrieve(self, x: Float[Tensor, "T D"], mask: Bool[Tensor, " T"] | None = None) -> Routing:
        """The experts [T, H, k] for tokens x [T, D]; masked tokens must already hold zeros."""
        n1, n2 = self.codebook_sizes
        rows = [t.shape[-2] if t.dim() > 1 else 0 for t in (self.keys1, self.keys2)] + [len(self.table)]
        if rows != [n1, n2, n1 * n2]:
            raise ValueError(
                f"keys1, keys2 and the table must have {n1}, {n2} and {n1 * n2} rows, got {rows[0]}, "
                f"{rows[1]} and {rows[2]}"
            )
        scores, indices = product_key_topk(
            self._queries(x, mask), *self._codebooks(), self.experts_per_head, self.backend
        )
        # A token that holds NaN or infinity must not pass for a valid one: its scores become NaN.
        scores = scores + (x.detach() * 0).sum(-1).to(scores.dtype)[:, None, None]
        if self.score == "softmax":
            gates = scores.softmax(-1)
        elif self.score == "sigmoid":
            gates = scores.sigmoid()
        else:
            gates = scores.relu()
        if mask is not None:
            gates = torch.where(mask[:, None, None], gates, 0)
        routing = Routing(indices, gates, scores)
        for hook in self._routing_hooks.values():
            hook(self, routing)
        return routing

    def _codebooks(self) -> tuple[Tensor, Tensor]:
        """The sub-keys that queries are compared with."""
        return self.keys1, self.keys2

    def _queries(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """[T, H, 2, d]: projected, then normalised, by BatchNorm all heads together, else head by head."""
        query = self._project(x)
        if self.norm_kind == "batch":
            # What is the default is left out, so that a wrapper need not know of it.
            given: dict[str, Any] = {} if mask is None else {"mask": mask}
            if self.backend != "auto":
                given["backend"] = self.backend
            query = self.query_norm(query, **given)
        query = query.unflatten(-1, (self.num_heads, self.key_dim))
        if self.norm_kind != "batch":
            query = self.query_norm(query)
        return query.unflatten(-1, (2, -1))

    def _project(self, x: Tensor) -> Tensor:
        proj = self.query_proj
        plain = is_plain(proj, nn.Linear) and type(proj.weight) is nn.Parameter
        if not plain or x.dtype == proj.weight.dtype or autocast_is_on(x):
            return call(proj, x)
        # Neither side is rounded: a layer in bfloat16 takes a float32 token as it is.
        wide = torch.promote_types(x.dtype, proj.weight.dtype)
        bias = None if proj.bias is None else proj.bias.to(wide)
        return F.linear(x.to(wide), proj.weight.to(wide), bias)

    def extra_repr(self) -> str:
        n1, n2 = self.codebook_sizes
        return (
            f"dim={self.dim}, num_experts={n1 * n2} ({n1} x {n2}), num_heads={self.num_heads}, "
            f"experts_per_head={self.experts_per_head}, key_dim={self.key_dim}, "
            f"share_keys={self.share_keys}, score={self.score!r}, backend={self.backend!r}"
        )
