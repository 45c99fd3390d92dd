"""PEER: a feed-forward layer that retrieves its neurons from a pool of a million."""

import copy
import math
from collections import OrderedDict
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from million_experts._arguments import check_choice, is_integer
from million_experts._typing import Bool, Float
from million_experts.layers.dense import DenseFeedForward
from million_experts.layers.norm import MaskedBatchNorm, WideLayerNorm, several_ranks
from million_experts.layers.retrieval import ProductKeyRetrieval, Routing
from million_experts.layers.submodules import call, is_plain
from million_experts.layers.tokens import blank_masked, flatten_tokens, has_readable_values
from million_experts.ops import ACTIVATIONS, advise_huge_pages, expert_mlp, resolve_backend
from million_experts.ops.library_layer import layer_inference

# (token, expert) pairs over which `reset_parameters` averages. The worst case, ReLU with GLU and one expert a
# token, has a relative variance of about 20 a pair: the standard deviation is then known to under 1 %.
# The pairs of one token vary together, with its norm, so narrow tokens take more of them: with GLU and 128
# experts a token the 1024 tokens that leave an error of 1 % at D = 256 would leave 4 % at D = 8.
INIT_PAIRS = 2**17
INIT_BATCH = 4096  # tokens at a time

# Up to this many tokens one fused operation computes the layer where no gradient is wanted: it cuts the
# work of a single token for all threads, and spares the overhead of a dozen operations. With 32 tokens both
# take the same time, then the general path's matrix products win.
FUSED_TOKENS = 16

# The modules that this operation computes itself, while nobody has changed them.
_NORMS: dict[str, type[nn.Module]] = {"batch": MaskedBatchNorm, "layer": WideLayerNorm, "none": nn.Identity}


class PEER(ProductKeyRetrieval):
    r"""Parameter-efficient expert retrieval: one neuron an expert, K = H*k of N experts for each token.

    **Training and evaluation differ under query BatchNorm, the paper's choice and the default.** In training
    a token's query is normalised by the statistics of the batch, so what it retrieves depends a little on
    the tokens beside it, later ones of the same text included; a batch needs at least two real tokens. In
    evaluation the running statistics stand in, and every token stands alone. Where the two must agree, or
    where micro-batches must add up to one large batch, choose `query_norm="layer"`.

    Follows Algorithm 1 of "Mixture of A Million Experts" (arXiv 2407.04153): keys shared by the heads,
    softmax over each head's k scores, summed heads. As in the paper an expert *down*-projects the token to
    one number and *up*-projects that number back; Llama's `up_proj` and `down_proj` are the other way round.

    **Initialisation.** With token :math:`x`, experts :math:`n` with rows :math:`u_n` (down), :math:`v_n`
    (up), :math:`w_n` (gate, with GLU), and :math:`G_n` the sum of the gates that the token's heads give to
    expert n, the layer computes

    .. math:: y = \sum_n G_n a_n v_n, \qquad a_n = \mathrm{act}(u_n \cdot x) \, [\, w_n \cdot x \,].

    1. For unit-variance x, rows :math:`u_n, w_n \sim N(0, 1/D)` give pre-activations of unit variance: the
       activation works where it is meant to, whatever D.
    2. The up rows are drawn from :math:`N(0, \sigma^2)`, independently of everything else, so all terms
       :math:`v_n v_m` of different experts vanish on average and
       :math:`\mathrm{Var}(y_d) = \sigma^2 S` with :math:`S = E_x[\sum_n G_n^2 a_n^2]`.
    3. The output has standard deviation `init_std` exactly when :math:`\sigma = \mathrm{init\_std}/\sqrt S`.

    If heads never met and gates were independent of the activations, S would be
    :math:`H \, E[\sum_k g_k^2] \, E[a^2]`, where :math:`E[a^2]` is 0.425 for GELU, 1/2 for ReLU and 0.356 for
    SiLU, and :math:`E[\sum_k g_k^2]` lies between 1/k and 1 for softmax gates. But S depends on the order
    statistics of sums of two codebooks, on how often heads pick the same expert (always, in a small pool)
    and on the norm of x in a narrow layer, so no closed form holds for every N, H, k, D and score. Hence
    `reset_parameters` takes the expectation as it is defined: it sends normal tokens through the layer's own
    retrieval and experts with :math:`\sigma = 1`, in training mode, and divides the up rows by what comes
    out. The pool's finite cross terms are thereby included.

    With a shared branch, experts and branch are first scaled to the same size, each by what it gives alone;
    then both by what they give together, so that the sum has standard deviation `init_std`. They are
    independent but for chance: each gives about :math:`\mathrm{init\_std}/\sqrt 2`.

    Args:
        dim: D, the width of tokens.
        num_experts: N, an int (its most square factorisation, n1 <= 4 * n2) or a pair (n1, n2). Expert
            i*n2 + j has sub-keys i and j.
        num_heads: H.
        experts_per_head: k, at most min(n1, n2).
        key_dim: width of a query, both halves together; even.
        glu: experts also have a gate row that multiplies the activation.
        activation: "gelu", "relu" or "silu".
        query_norm: "batch", "layer" or "none".
        share_keys: True for the paper's one pair of codebooks, False for a pair a head.
        score: "softmax" over each head's k, "sigmoid" or "relu" of each score.
        init_std: standard deviation of the output at step 0, for unit-variance input in training mode.
        sparse_grad: the table's gradient comes as a sparse COO tensor of the experts that were touched, for
            `million_experts.optim.RowwiseAdamW` or `torch.optim.SparseAdam`: then neither time nor memory of
            a step grows with the pool. PyTorch's other optimisers and its `clip_grad_norm_` refuse such
            gradients.
        backend: "auto", "reference", "cpu" or "triton".
        shared_width: neurons of a dense branch that works on every token beside the experts, with the same
            activation and `glu`; its output is added to theirs. 0 for none.

    Raises:
        ValueError: an argument outside what is allowed; the message names it.
        RuntimeError: a backend asked for by name that cannot run here.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int | tuple[int, int] = 1024**2,
        num_heads: int = 8,
        experts_per_head: int = 16,
        key_dim: int = 128,
        glu: bool = False,
        activation: str = "gelu",
        query_norm: str = "batch",
        share_keys: bool = True,
        score: str = "softmax",
        init_std: float = 0.01,
        sparse_grad: bool = False,
        backend: str = "auto",
        shared_width: int = 0,
    ):
        super().__init__(
            dim, num_experts, num_heads, experts_per_head, key_dim, query_norm, share_keys, score, backend
        )
        check_choice("activation", activation, ACTIVATIONS)
        if not init_std > 0:
            raise ValueError(f"init_std must be positive, got {init_std}")
        if not is_integer(shared_width) or shared_width < 0:
            raise ValueError(f"shared_width must be an int, 0 or more, got {shared_width!r}")
        self.glu, self.activation, self.init_std, self.sparse_grad = glu, activation, init_std, sparse_grad
        self.shared = DenseFeedForward(dim, shared_width, activation, glu) if shared_width else None
        self.experts = nn.Parameter(torch.empty(self.num_experts, 3 if glu else 2, dim))
        if not self.experts.is_meta:
            advise_huge_pages(self.experts)  # before the first write, which decides on the pages
            self.reset_parameters()

    @property
    def table(self) -> nn.Parameter:
        return self.experts

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws every parameter anew, as the class's docstring derives; on the meta device there are none."""
        if self.experts.is_meta:
            return
        self.reset_retrieval()
        # Row by row of the packed table, in place: no second table in memory.
        nn.init.normal_(self.experts, std=self.dim**-0.5)
        ups = [self.experts[:, 1]]
        if self.shared is not None:
            self.shared.reset_parameters()
            ups[0].div_(self._measure_output_std(self._probe(shared=None)))
            ups.append(self.shared.up.weight)
            ups[1].div_(self._measure_output_std(self.shared))
        scale = self.init_std / self._measure_output_std(self._probe(self.shared))
        for up in ups:
            up.mul_(scale)
        self._reset_query_norm()  # the statistics of the measurement are no data's

    def _probe(self, shared: DenseFeedForward | None) -> "PEER":
        """The layer in training mode, with a shared branch or without: its parameters, none of its hooks."""
        probe = _copy_without_hooks(self)
        probe._routing_hooks = OrderedDict()
        probe.shared = shared
        probe.training = True
        for module in probe.query_norm.modules():
            module.training = True
            if isinstance(module, MaskedBatchNorm):
                module.synchronised = False  # each rank measures alone
        if self.backend == "triton":  # a layer for a GPU is often made on the CPU, where that does not run
            probe.backend = "auto"
        return probe

    def _measure_output_std(self, branch: nn.Module) -> Tensor:
        """Standard deviation of a branch's output for normal tokens."""
        K = self.num_heads * self.experts_per_head
        narrow = min(INIT_PAIRS // 4, INIT_PAIRS // (self.dim if self.glu else 4 * self.dim))
        tokens = max(1024, math.ceil(INIT_PAIRS / K), narrow)
        batches = math.ceil(tokens / INIT_BATCH)
        tokens = math.ceil(tokens / batches)
        squares = []
        for _ in range(batches):
            x = torch.randn(tokens, self.dim, device=self.experts.device, dtype=self.keys1.dtype)
            squares.append(branch.forward(x).float().square().mean())
        return torch.stack(squares).mean().sqrt()

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
            mask: [...] bool, True for a real token. Masked tokens give zeros, have zero gates, touch no
                expert, enter no statistic and receive zero gradient, whatever they hold.
            return_routing: also return the `Routing`, each tensor [..., H, k].

        Returns:
            y [..., D] in x's dtype (under autocast in autocast's). A token with NaN or infinity gives a
            non-finite output, and in eval mode changes no other token.

        Raises:
            ValueError: a last dimension other than `dim`; a mask of another shape or dtype; BatchNorm in
                training with fewer than two real tokens; nothing but masked tokens in training, unless this
                is one of several ranks.
        """
        tokens, mask = flatten_tokens(x, mask, self.dim)
        lead = x.shape[:-1]
        # Of several ranks one may have nothing to learn from.
        if mask is not None and self.training and mask.shape[0] > 0 and not several_ranks():
            _require_a_real_token(mask)
        fused = None if return_routing else self._fused(tokens)
        if fused is not None:
            return blank_masked(self._add_shared(fused, tokens), mask).view(*lead, self.dim)
        routing = self.retrieve(tokens, mask)
        y = expert_mlp(
            tokens,
            routing.indices.flatten(1),
            routing.gates.flatten(1),
            self.experts,
            self.activation,
            self.backend,
            mask=mask,
            sparse_grad=self.sparse_grad,
        )
        if self.shared is not None:
            y = blank_masked(self._add_shared(y, tokens), mask)
        y = y.view(*lead, self.dim)
        if not return_routing:
            return y
        shape = (*lead, self.num_heads, self.experts_per_head)
        return y, Routing(*(t.view(shape) for t in routing))

    def _add_shared(self, y: Tensor, x: Tensor) -> Tensor:
        """y [T, D], the experts' output for x [T, D], and the shared branch's, in y's dtype."""
        if self.shared is None:
            return y
        return y + call(self.shared, x).to(y.dtype)

    def _fused(self, x: Tensor) -> Tensor | None:
        """The output [T, D] by one operation; None unless this is inference in float32 on few tokens."""
        # While a graph is traced the number of tokens may be a symbol, which must not be compared.
        if type(x.shape[0]) is not int or x.shape[0] > FUSED_TOKENS or x.device.type != "cpu":
            return None
        if (
            self.training
            or torch.is_grad_enabled()
            or self._routing_hooks
            or torch.is_autocast_enabled("cpu")
        ):
            return None
        if resolve_backend(self.backend) != "cpu":
            return None
        proj, norm = self.query_proj, self.query_norm
        if not is_plain(proj, nn.Linear) or proj.bias is not None:
            return None
        if not is_plain(norm, _NORMS[self.norm_kind]) or norm.training:
            return None
        eps, tensors = 0.0, []
        if isinstance(norm, MaskedBatchNorm):
            eps, tensors = norm.eps, [norm.weight, norm.bias, norm.running_mean, norm.running_var]
        elif isinstance(norm, WideLayerNorm):
            eps, tensors = norm.eps, [norm.weight, norm.bias]
        weight, keys1, keys2, experts = proj.weight, self.keys1, self.keys2, self.experts
        # What a traced graph holds must not be found unfit when it runs.
        for tensor in (x, weight, keys1, keys2, *tensors):
            if tensor is None or tensor.dtype != torch.float32 or not tensor.is_cpu:
                return None
        if experts.dtype == torch.float64 or not experts.is_cpu:
            return None
        try:
            return layer_inference(
                x, weight, self.norm_kind, tensors, eps, keys1, keys2, experts, self.num_heads,
                self.experts_per_head, self.score, self.activation,
            )  # fmt: skip
        except (TypeError, ValueError):
            # Not plain tensors, or they do not fit: the general path takes them or says why.
            return None

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, glu={self.glu}, activation={self.activation!r}"


def _require_a_real_token(mask: Tensor) -> None:
    message = "mask must leave at least one real token in training"
    if torch.compiler.is_compiling():
        torch._assert_async(mask.any(), message)  # a branch on data would break the graph
    elif has_readable_values(mask) and not mask.any():
        raise ValueError(f"{message}, got none of {mask.shape[0]}; eval mode gives zeros")


def _copy_without_hooks(module: nn.Module) -> Any:
    """A module with the same parameters and buffers, that nobody else knows."""
    twin = copy.copy(module)
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        twin.__dict__[hooks] = OrderedDict()
    twin._modules = {
        name: None if child is None else _copy_without_hooks(child) for name, child in module._modules.items()
    }
    return twin
