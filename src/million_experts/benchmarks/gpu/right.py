"""Part 1: is each kernel right? Each case compares results with float64's on the same inputs.

Inputs are random and fresh in each run (their seed is in the row). What is allocated is poisoned first. The
first configuration of a tuned kernel is compared with the truth. Where a case asks for `bits`, the others,
and the first once more, have to give the same bits.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from million_experts.benchmarks.gpu.compare import Error, compare, poisoned, same_bits
from million_experts.benchmarks.gpu.kernels import forced
from million_experts.benchmarks.gpu.operations import scores_at
from million_experts.ops import expert_mlp, product_key_topk
from million_experts.ops.backends import implementation

Row = dict[str, Any]
Named = dict[str, Tensor]

#: More tokens than this: the reference computes the first and the last so many.
TOKENS_COMPARED = 2048

#: Relative error that sums of float32 products have anyhow; with factors of 11 bits it would be 3e-4.
FLOAT32 = 2e-6


def fresh_seed() -> int:
    return int.from_bytes(os.urandom(4), "little")


class Drawing:
    """Draws random numbers of a dtype on a device."""

    def __init__(self, device: torch.device, seed: int, dtype: str):
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, dtype

    def __call__(self, *sizes: int, dtype: str | None = None) -> Tensor:
        kind = getattr(torch, dtype or self.dtype)
        return torch.randn(sizes, generator=self.generator, device=self.device, dtype=kind)


def judge(errors: list[Error], faults: list[str | None], **more: Any) -> Row:
    """The row of a case: right, or wrong and why."""
    found = [e.fault for e in errors if e.fault] + [f for f in faults if f]
    worst = max((e.norm for e in errors), default=0.0)
    largest = max((e.largest for e in errors), default=0.0)
    row = {"status": "wrong" if found else "right", "error": worst, "largest_error": largest} | more
    return row | ({"fault": "; ".join(found)} if found else {})


def in_each_configuration(run: Callable[[], Named], bits: bool) -> tuple[Named, list[str | None], int]:
    """Results with first configurations, what differs with others and in a second run, how many ran."""
    with poisoned(), forced(0) as counts:
        first = run()
    faults: list[str | None] = []
    if not bits:
        return first, faults, 1
    most = max(counts.values(), default=1)
    for number in [*range(1, most), 0]:
        with poisoned(), forced(number):
            again = run()
        which = f"with configuration {number}" if number else "in a second run"
        faults += [same_bits(f"{name}, {which},", again[name], right) for name, right in first.items()]
    return first, faults, most


def experts(
    device: torch.device,
    *,
    T: int,
    K: int,
    N: int,
    D: int,
    R: int = 2,
    dtype: str = "float32",
    table: str | None = None,
    activation: str = "gelu",
    sparse: bool = False,
    hot: bool = False,
    bits: bool = False,
) -> Row:
    """The experts forward and backward. `hot`: every token uses one expert for half of its picks."""
    seed = fresh_seed()
    draw = Drawing(device, seed, dtype)
    x, grad_y, gates = draw(T, D), draw(T, D), draw(T, K) / K**0.5
    pool = draw(N, R, D, dtype=table).div_(D**0.5)
    indices = torch.randint(0, N, (T, K), generator=draw.generator, device=device)
    indices[-1, -1] = N - 1
    if hot:
        indices[:, ::2] = N // 2
    many = T > TOKENS_COMPARED

    def run(backend: str, x: Tensor, indices: Tensor, gates: Tensor, pool: Tensor, grad: Tensor) -> Named:
        x, gates = (t.detach().requires_grad_() for t in (x, gates))
        pool = pool.detach().requires_grad_(not many)
        sparsely = sparse and backend == "triton"
        y = expert_mlp(x, indices, gates, pool, activation, backend, sparse_grad=sparsely)
        y.backward(grad)
        results = {"y": y.detach(), "grad_x": x.grad, "grad_gates": gates.grad, "grad_experts": pool.grad}
        return {name: t for name, t in results.items() if t is not None}

    actual, faults, configurations = in_each_configuration(
        lambda: _dense_parts(run("triton", x, indices, gates, pool, grad_y)), bits
    )
    some = _compared_tokens(T, device)
    # Only the rows that are used go to float64: a pool of a million is 24 GiB there.
    rows, places = indices[some].unique(return_inverse=True)
    wide = [t[some].double() for t in (x, gates, grad_y)]
    truth = run("reference", wide[0], places, wide[1], pool[rows].double(), wide[2])
    errors = [compare(name, actual[name][some], truth[name]) for name in ("y", "grad_x", "grad_gates")]
    if not many:
        grad = actual["grad_experts"]
        if sparse:
            faults.append(same_bits("rows of grad_experts", actual["rows"], rows))
        elif int(grad.count_nonzero()) != int(grad[rows].count_nonzero()):
            faults.append("grad_experts is not zero where no token was")
        grad = grad if sparse else grad[rows]
        if len(grad) == len(rows):
            errors.append(compare("grad_experts", grad, truth["grad_experts"]))
    return judge(errors, faults, seed=seed, configurations=configurations)


def _dense_parts(results: Named) -> Named:
    """A sparse gradient as its rows and values."""
    grad = results.get("grad_experts")
    if grad is None or not grad.is_sparse:
        return results
    return results | {"grad_experts": grad._values(), "rows": grad._indices()[0]}


def _compared_tokens(tokens: int, device: torch.device) -> Tensor:
    at = torch.arange(tokens, device=device)
    half = TOKENS_COMPARED // 2
    return at if tokens <= TOKENS_COMPARED else torch.cat([at[:half], at[-half:]])


def retrieval(
    device: torch.device,
    *,
    T: int,
    H: int,
    k: int,
    n1: int,
    n2: int,
    d: int,
    dtype: str = "float32",
    shared: bool = True,
    bits: bool = False,
) -> Row:
    """Retrieval and the gradient of its scores, the latter at what the kernels retrieved."""
    seed = fresh_seed()
    draw = Drawing(device, seed, dtype)
    heads = () if shared else (H,)
    query, keys1, keys2 = draw(T, H, 2, d), draw(*heads, n1, d), draw(*heads, n2, d)
    grad = draw(T, H, k, dtype="float32")

    def run() -> Named:
        tensors = [t.detach().requires_grad_() for t in (query, keys1, keys2)]
        scores, indices = product_key_topk(tensors[0], tensors[1], tensors[2], k, backend="triton")
        scores.backward(grad)
        grads = [t.grad for t in tensors if t.grad is not None]
        names = ("grad_query", "grad_keys1", "grad_keys2")
        return {"scores": scores.detach(), "indices": indices, **dict(zip(names, grads, strict=True))}

    actual, faults, configurations = in_each_configuration(run, bits)
    some = _compared_tokens(T, device)
    wide = query[some].double(), keys1.double(), keys2.double()
    best, _ = product_key_topk(*wide, k, backend="reference")
    allowed = (1e-5, 2e-5)  # scores are float32 whatever they are of; 2e-5 of the largest is rounding
    errors = [
        compare("scores", actual["scores"][some], best, allowed),
        # Of experts that score the same but for rounding either will do: their scores tell, in their order.
        compare("scores of the indices", scores_at(actual["indices"][some], *wide), best, allowed),
    ]
    # Sub-keys learn from all tokens: of many, the gradients of those compared say nothing of theirs.
    names = ("grad_query", "grad_keys1", "grad_keys2")[: 3 if T <= TOKENS_COMPARED else 1]
    picks = actual["indices"][some].clamp(0, n1 * n2 - 1)
    truth = implementation("reference").product_key_topk_backward(grad[some].double(), picks, *wide)
    own = [actual[name][some] if name == "grad_query" else actual[name] for name in names]
    errors += [compare(*each) for each in zip(names, own, truth, strict=False)]
    return judge(errors, faults, seed=seed, configurations=configurations)


def rowwise_adamw(
    device: torch.device, *, N: int, D: int, R: int, dtype: str, by_row: bool, momentum: str | None
) -> Row:
    """A step for half of the rows, and one that brings all rows up to date, against the plain one."""
    seed = fresh_seed()
    draw = Drawing(device, seed, dtype)
    table = draw(N, R, D) * 0.01  # small beside the step, which is what rounding must not hide
    first = None if momentum is None else draw(N, R, D, dtype=momentum) * 0.1
    second = draw(N, R, dtype="float32").square() if by_row else draw(N, R, D, dtype="float32").square()
    last = torch.randint(0, 3, (N,), generator=draw.generator, device=device, dtype=torch.int32)
    beta = 0.0 if momentum is None else 0.9
    logs = torch.tensor([0.0 if momentum is None else beta, 0.99, 1 - 1e-3]).double()
    history = torch.zeros(5, 3, dtype=torch.float64, device=device)
    history[1:] = logs.clamp(min=1e-300).log().to(device) * torch.arange(1, 5, device=device)[:, None]
    rows = torch.randperm(N, generator=draw.generator, device=device)[: max(1, N // 2)].sort().values
    values = draw(len(rows), R, D)
    results: list[Named] = []
    for backend in ("triton", "reference"):
        state = {"table": table, "exp_avg": first, "exp_avg_sq": second, "last_step": last}
        state = {name: None if t is None else t.clone() for name, t in state.items()}
        options: dict[str, Any] = dict(lr=0.3, betas=(beta, 0.99), eps=1e-8, weight_decay=0.1, key=None)
        for step, some, gradient in ((3, rows, values), (4, None, None)):
            implementation(backend).rowwise_adamw(
                **state, history=history, step=step, rows=some, values=gradient, places=None, starts=None,
                **options,
            )  # fmt: skip
        results.append({name: t for name, t in state.items() if t is not None})
    moved = results[1]["table"][rows].double() - table[rows].double()
    errors = [compare(name, results[0][name], right) for name, right in results[1].items()]
    faults = None if bool((moved != 0).any()) else "the step moved nothing: nothing was compared"
    return judge(errors, [faults], seed=seed)


def batch_norm(device: torch.device, *, T: int, C: int, dtype: str) -> Row:
    """The queries' BatchNorm with a mask, forward and backward, as the backend "triton" has it."""
    seed = fresh_seed()
    draw = Drawing(device, seed, dtype)
    x, grad_y = draw(T, C), draw(T, C, dtype="float32")
    weight, bias = draw(C, dtype="float32"), draw(C, dtype="float32")
    mask = torch.arange(T, device=device) % 5 != 2
    results = []
    for backend, tensors in (("triton", (x, weight, bias, grad_y)), ("reference", None)):
        x_, weight_, bias_, grad_ = tensors or (t.double() for t in (x, weight, bias, grad_y))
        run = implementation(backend)
        y, mean, variance = run.masked_batch_norm(x_, mask, weight_, bias_, 1e-5)
        grads = run.masked_batch_norm_backward(grad_, x_, mask, weight_, mean, variance, 1e-5)
        results.append((y, mean, variance, *grads))
    names = ("y", "mean", "variance", "grad_x", "grad_weight", "grad_bias")
    return judge([compare(*triple) for triple in zip(names, *results, strict=True)], [], seed=seed)


def precision(device: torch.device, *, T: int, K: int, N: int, D: int) -> Row:
    """Whether the tiles' products keep float32's precision: their error beside that of sums by token.

    The same inputs, where every token uses distinct experts; `experts` has compared both with bounds.
    """
    import million_experts.ops.triton_experts as module

    seed = fresh_seed()
    draw = Drawing(device, seed, "float32")
    x, gates, pool = draw(T, D), draw(T, K), draw(N, 2, D).div_(D**0.5)
    indices = torch.rand(T, N, generator=draw.generator, device=device).argsort(1)[:, :K].contiguous()
    truth, pre = implementation("reference").expert_mlp(
        x.double(), indices, gates.double(), pool.double(), "gelu"
    )
    errors = {}
    schedule = module.schedule
    try:
        for name, walk in (("tiles", module.ByTiles), ("by token", module.ByToken)):
            module.schedule = lambda *_, walk=walk: walk
            with poisoned(), forced(0):
                y, own = module.expert_mlp(x, indices, gates, pool, "gelu")
            errors[name] = max(compare("y", y, truth).norm, compare("pre", own, pre).norm)
    finally:
        module.schedule = schedule
    keeps = errors["tiles"] <= max(FLOAT32, 4 * errors["by token"])
    fault = (
        None
        if keeps
        else f"tiles have a relative error of {errors['tiles']:.2g}, by token {errors['by token']:.2g}"
    )
    return judge([], [fault], seed=seed, norms=errors, keeps_float32=keeps)


CASES: dict[str, Callable[..., Row]] = {
    "experts": experts,
    "retrieval": retrieval,
    "row-wise AdamW": rowwise_adamw,
    "BatchNorm": batch_norm,
    "precision": precision,
}
