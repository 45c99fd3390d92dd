"""What the minutes are spent on: each part's cases in order, with bytes, FLOPs and expected seconds.

The most valuable first: whatever ends the run, what was there before is known.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from million_experts.benchmarks.gpu import costs
from million_experts.benchmarks.gpu.costs import OPERATIONS, PHASES, PLANNED, Ceilings, Cost, Shape

PARTS = ("right", "fast", "why", "learns")

#: By when each part ends, as a share of the minutes; one that ends early leaves its time to the next.
ENDS = {"right": 0.25, "fast": 0.71, "why": 0.82, "learns": 0.97}

#: Kernels are expected to need so many times their roofline.
SLACK = 3.0
#: Runs of what is timed: warm-up, tuning, and repetitions.
RUNS = 40

#: Seconds that a case takes beside its kernels: launches, drawing inputs, reading what was compiled before.
CHECKED, PER_CONFIGURATION = 0.4, 0.1
OPERATION, TUNING = 0.5, 1.5
COMPETITOR, COMPILATION = 0.5, 40.0
#: Processes start: Python, PyTorch, CUDA.
START = 8.0
#: More than a case is expected to take, and this many seconds, and it hangs.
PATIENCE, GRACE = 5.0, 40.0

OURS = ("PEER, dense gradients, AdamW", "PEER, sparse gradients, RowwiseAdamW")
COMPILED = "gathers and einsum, compiled"
EAGER = "gathers and einsum"
OTHERS = ("dense, K neurons", "dense, 4 * D neurons", "grouped mixture, 2 of 8", "product-key memory")


NOTHING = Cost(0, 0)


@dataclass(frozen=True)
class Case:
    """A case of a part: what the worker calls, and what it is expected to cost.

    Attributes:
        name: as rows have it, unique within its part.
        function: what the part calls it by.
        cost: of all runs together.
        dtype: of the products among it.
        fixed: seconds beside the kernels.
    """

    part: str
    name: str
    function: str
    arguments: dict[str, Any] = field(default_factory=dict)
    cost: Cost = NOTHING
    dtype: str = "bfloat16"
    fixed: float = 0.0

    def roofline(self, ceilings: Ceilings = PLANNED) -> float:
        return ceilings.seconds(self.cost, self.dtype)

    def seconds(self, ceilings: Ceilings = PLANNED) -> float:
        """How long it is expected to take."""
        return self.fixed + SLACK * self.roofline(ceilings)

    def patience(self) -> float:
        """Seconds after which it hangs."""
        if self.function == "learn":  # which ends when its time is up
            return float("inf")
        return GRACE + PATIENCE * self.seconds()


def make_plan(rehearsal: bool = False, text: str | None = None) -> list[Case]:
    """All cases in order; at tiny shapes for the interpreter."""
    learning = [] if text is None else [_learns(rehearsal, text)]
    return [*_right(rehearsal), *_fast(rehearsal), *_why(), *learning]


def _right(tiny: bool) -> Iterator[Case]:
    for name, arguments in _experts(tiny):
        shape = {key: arguments[key] for key in ("T", "K", "N", "D")}
        rows = arguments.get("R", 2)
        configurations = 5 if arguments.get("bits") else 1
        # Kernels on their inputs, and the truth in float64, which is gathered in pieces.
        T, K, N, D = shape.values()
        kernels = 6.0 * T * K * rows * D * 4 + 6.0 * N * rows * D * 4
        truth = 10.0 * min(T, 2048) * K * rows * D * 8
        yield Case(
            "right", name, "experts", arguments,
            Cost(configurations * kernels + truth, 6.0 * rows * T * K * D * configurations), "float64",
            CHECKED + PER_CONFIGURATION * configurations,
        )  # fmt: skip
    for name, arguments in _retrieval(tiny):
        T, H, d, n = (arguments[key] for key in ("T", "H", "d", "n1"))
        yield Case(
            "right", name, "retrieval", arguments,
            Cost(20.0 * T * H * 2 * d * 8, 20.0 * T * H * 2 * n * d), "float64",
            CHECKED + PER_CONFIGURATION * 4,
        )  # fmt: skip
    for name, arguments in _layers(tiny):
        T, D, n = (arguments[key] for key in ("T", "D", "n"))
        gathered = T * arguments.get("H", 8) * arguments.get("k", 16) * 3 * D * 8
        yield Case(
            "right",
            name,
            "layer",
            arguments,
            Cost(20.0 * gathered + 30.0 * n * n * D, 0.0),
            "float64",
            CHECKED,
        )
    N, usual, odd = (5, 20, 33) if tiny else (2**14, 256, 1000)
    for D, R, dtype, by_row, momentum in (
        (usual, 2, "float32", False, "float32"),
        (usual, 3, "bfloat16", True, "bfloat16"),
        (odd, 2, "float16", False, "float32"),
        (usual, 2, "bfloat16", True, None),
    ):
        name = f"row-wise AdamW D={D} R={R} {dtype}{' by row' if by_row else ''} momentum={momentum}"
        arguments = {"N": N, "D": D, "R": R, "dtype": dtype, "by_row": by_row, "momentum": momentum}
        yield Case("right", name, "row-wise AdamW", arguments, Cost(40.0 * N * R * D * 4, 0), fixed=CHECKED)
    T, C = (7, 12) if tiny else (4096, 1024)
    for dtype in ("float32", "bfloat16"):
        arguments = {"T": T, "C": C, "dtype": dtype}
        yield Case(
            "right", f"BatchNorm {dtype}", "BatchNorm", arguments, Cost(60.0 * T * C * 8, 0), fixed=CHECKED
        )
    arguments = dict(zip("TKND", (5, 3, 6, 20) if tiny else (1024, 240, 36**2, 1024), strict=True))
    yield Case("right", "tf32x3", "precision", arguments, Cost(5e9, 1e10), "float64", CHECKED)
    if not tiny:
        yield from _beyond_31_bits()


def _experts(tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    # T, K, N, D: few tokens per expert; many, in tiles; a wide model; one token; odd sizes of both kinds.
    shapes = {
        "by token": ((1024, 128, 256**2, 256), (4, 5, 90, 40)),
        "tiles": ((1024, 240, 36**2, 256), (5, 6, 3, 40)),
        "wide": ((256, 64, 128**2, 8192), (2, 3, 20, 300)),
        "one token": ((1, 128, 1024**2, 1024), (1, 4, 50, 40)),
        "odd": ((333, 77, 5003, 1000), (3, 5, 41, 33)),
        "odd tiles": ((301, 77, 601, 1000), (5, 6, 3, 33)),
        "tiny": ((1, 1, 1, 1), (1, 1, 1, 1)),
    }

    def case(name: str, **more: Any) -> tuple[str, dict[str, Any]]:
        told = {k: v for k, v in more.items() if v is not False}
        text = " ".join(
            str(v) if isinstance(v, str) else k if v is True else f"{k}={v}" for k, v in told.items()
        )
        sizes = dict(zip("TKND", shapes[name][tiny], strict=True))
        return f"experts {name} {text}", sizes | {"dtype": "float32"} | more

    for name in ("by token", "tiles"):
        for dtype in ("float32", "bfloat16", "float16"):
            yield case(name, dtype=dtype, bits=dtype != "float16")
            yield case(name, dtype=dtype, R=3, activation="silu", sparse=True)
    yield case("by token", dtype="bfloat16", table="float32", activation="relu")
    yield case("by token", dtype="float32", table="bfloat16", sparse=True)
    yield case("by token", dtype="float32", hot=True, bits=True)
    for name in ("odd", "odd tiles"):
        yield case(name, dtype="float32", R=3, bits=True)
        yield case(name, dtype="bfloat16", activation="relu")
    yield case("one token", dtype="bfloat16", sparse=True)
    yield case("wide", dtype="bfloat16")
    yield case("tiny", dtype="float32", R=3)


def _retrieval(tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    # T, H, k, n1, n2, d
    usual = [(1024, 8, 16, 1024, 1024, 64), (1024, 8, 32, 256, 300, 64), (333, 3, 5, 77, 100, 200)]
    few = [(3, 2, 3, 9, 9, 4), (2, 1, 2, 5, 7, 200)]
    for values in [*(few if tiny else usual), (1, 1, 1, 1, 1, 3)]:
        named = dict(zip(("T", "H", "k", "n1", "n2", "d"), values, strict=True))
        for dtype in ("float32", "bfloat16") if values[0] > 1 else ("float16",):
            shared = values[3] == values[4]
            text = " ".join(f"{key}={value}" for key, value in named.items())
            more = {"dtype": dtype, "shared": shared, "bits": dtype == "bfloat16"}
            yield f"retrieval {text} {dtype}{'' if shared else ' keys per head'}", named | more


def _layers(tiny: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    shape = {"T": 6, "D": 8, "n": 5, "H": 2, "k": 3, "key_dim": 4} if tiny else {"T": 512, "D": 256, "n": 256}
    for name, more in (
        ("float32", {}),
        ("bfloat16", {"autocast": "bfloat16"}),
        ("float32 GLU, sparse, mask", {"glu": True, "sparse": True, "mask": True}),
        ("bfloat16 GLU, sparse", {"glu": True, "sparse": True, "autocast": "bfloat16"}),
        ("float16", {"autocast": "float16"}),
    ):
        yield f"layer {name}", shape | more
    small = (
        {"T": 7, "D": 12, "n": 4, "H": 1, "k": 4, "key_dim": 6} if tiny else {"T": 2000, "D": 260, "n": 20}
    )
    yield "layer of few experts, float32", small


def _beyond_31_bits() -> Iterator[Case]:
    D, N = 1024, 2**20 + 2**17
    for name, arguments, moved in (
        ("a table", {"T": 1024, "K": 16, "N": N, "D": D, "dtype": "bfloat16"}, 12.0 * 2 * N * D * 2),
        (
            "a table, sparse",
            {"T": 1024, "K": 16, "N": N, "D": D, "dtype": "float16", "sparse": True},
            5.0 * N * D * 4,
        ),
        ("tokens", {"T": 2**21 + 77, "K": 2, "N": 4096, "D": D, "dtype": "bfloat16"}, 40.0 * 2**21 * D * 2),
    ):
        yield Case(
            "right", f"experts, {name} beyond 2^31 numbers", "experts", arguments, Cost(moved, 0), fixed=1.5
        )
    arguments = {"T": 2**17 + 5, "H": 8, "k": 4, "n1": 64, "n2": 64, "d": 1024, "dtype": "bfloat16"}
    yield Case(
        "right", "retrieval, queries beyond 2^31 numbers", "retrieval", arguments,
        Cost(40.0 * 2**31 * 2, 4.0 * 2**17 * 8 * 128 * 1024), fixed=1.5,
    )  # fmt: skip


def _fast(tiny: bool) -> Iterator[Case]:
    sizes = (
        {"copy": 2**10, "product": 16, "rows": 64}
        if tiny
        else {"copy": 2**31, "product": 8192, "rows": 2**21}
    )
    moved = 22.0 * sizes["copy"] + 20.0 * sizes["rows"] * 1024
    products = 12 * 2.0 * sizes["product"] ** 3 + 0.25 * 12 * 2.0 * sizes["product"] ** 3 * 20
    yield Case("fast", "ceilings", "ceilings", sizes, Cost(moved, products), fixed=1.0)
    centre = Shape(6, 5, 20, "float32", 2, 3, 2, 4) if tiny else Shape(8192, 1024, 256)
    usual = (*OURS, EAGER, *OTHERS)
    if tiny:
        yield _layer_case(centre, (*OURS, EAGER, *OTHERS), PHASES)
        yield from _operation_cases(replace(centre, T=3), OPERATIONS, 0.0)
        return
    forward = ("forward",)
    yield _layer_case(centre, usual, PHASES)
    yield from _operation_cases(centre, OPERATIONS)
    yield _layer_case(replace(centre, T=1), (*OURS[:1], EAGER, *OTHERS), forward)
    for n in (128, 256, 512, 2048):
        yield _layer_case(replace(centre, n=n), usual if n in (128, 2048) else (*OURS, EAGER), PHASES)
    for T in (1024, 32768):
        yield _layer_case(replace(centre, T=T), usual, PHASES)
    yield _layer_case(centre, (*OURS, COMPILED), PHASES)
    wide, float32 = replace(centre, D=1024), replace(centre, dtype="float32")
    yield from _operation_cases(wide, OPERATIONS)
    yield _layer_case(wide, usual, PHASES)
    yield from _operation_cases(replace(centre, n=32), [o for o in OPERATIONS if o.startswith("experts")])
    yield from _operation_cases(replace(centre, T=32768), OPERATIONS, 0.0)
    yield from _operation_cases(float32, OPERATIONS)
    yield _layer_case(float32, [name for name in usual if "mixture" not in name], PHASES)
    yield _layer_case(replace(centre, T=1, D=1024, d=128), (*OURS[:1], EAGER, *OTHERS), forward)
    for D in (512, 2048):
        yield _layer_case(replace(centre, D=D), (*OURS, EAGER, OTHERS[1]), PHASES)
    yield from _operation_cases(replace(centre, n=2048), OPERATIONS[2:], 0.0)


def _operation_cases(shape: Shape, names: Any, tuning: float = TUNING) -> Iterator[Case]:
    for name in names:
        cost = costs.operation(name, shape).times(RUNS)
        # Its inputs, and the reference once, which widens and gathers what it reads.
        reference = Cost(
            12.0 * shape.pairs * shape.R * shape.D * 4 + 8.0 * shape.N * shape.R * shape.D * 4, 0
        )
        yield Case(
            "fast", f"{name}: {shape}", "operation", {"name": name, "shape": asdict(shape)}, cost + reference,
            shape.dtype, OPERATION + tuning,
        )  # fmt: skip


def _layer_case(shape: Shape, competitors: Any, phases: Any) -> Case:
    from million_experts.benchmarks.gpu.rivals import RIVALS

    total = Cost(0, 0)
    for name in competitors:
        rival = RIVALS[name]
        for phase in phases:
            once = rival.moved(shape, phase) if rival.moved else rival.cost(shape, phase, None)
            total = total + once.times(RUNS)
    fixed = COMPETITOR * len(competitors) + TUNING + (COMPILATION if COMPILED in competitors else 0.0)
    compiled = ", compiled" if COMPILED in competitors else ""
    arguments = {"shape": asdict(shape), "competitors": list(competitors), "phases": list(phases)}
    return Case("fast", f"layer{compiled}: {shape}", "layers", arguments, total, shape.dtype, fixed)


def _why() -> Iterator[Case]:
    """Which three is known when they have been timed."""
    for place in range(3):
        yield Case("why", f"furthest from the roofline, {place + 1}", "explain", {"place": place}, fixed=5.0)
    yield Case("why", "counters of the three", "counters", fixed=25.0)


def _learns(tiny: bool, text: str) -> Case:
    size = (
        {"D": 16, "blocks": 2, "heads": 2, "S": 16, "batch": 2, "n": 5, "H": 2, "k": 3, "evaluated": 1}
        if tiny
        else {}
    )
    seconds = 8.0 if tiny else None  # else what is left of the minutes
    arguments = {"text": text, "size": size, "seconds": seconds}
    return Case("learns", "three arms", "learn", arguments, fixed=seconds or 40.0)


def budget(minutes: float, parts: tuple[str, ...] = PARTS) -> dict[str, float]:
    """By when each part has to end, in seconds from the start of the run."""
    shares, before, ends = {}, 0.0, 0.0
    for part in PARTS:
        if part in parts:
            shares[part] = ENDS[part] - before
        before = ENDS[part]
    whole = sum(shares.values())
    limits = {}
    for part, share in shares.items():
        ends += share / whole * ENDS["learns"]
        limits[part] = ends * 60 * minutes
    return limits


def expected(cases: list[Case]) -> dict[str, float]:
    """Seconds that each part is expected to take, the start of its process included."""
    taken: dict[str, float] = {}
    for case in cases:
        taken[case.part] = taken.get(case.part, START) + case.seconds()
    return taken


def describe(cases: list[Case], minutes: float) -> str:
    """The plan as a table: for `--dry-run`."""
    lines = [f"{'case':86}{'bytes':>10}{'FLOPs':>10}{'roofline':>10}{'expected':>10}"]
    limits, before = budget(minutes, tuple(dict.fromkeys(case.part for case in cases))), 0.0
    for part, seconds in expected(cases).items():
        lines.append(
            f"\n{part}: until {limits[part]:.0f} s; {seconds:.0f} s expected of {limits[part] - before:.0f}"
        )
        before = limits[part]
        for case in (case for case in cases if case.part == part):
            least = case.roofline()
            lines.append(
                f"  {case.name[:84]:84}{case.cost.bytes:10.1e}{case.cost.flops:10.1e}{least:8.3f} s"
                f"{case.seconds():8.1f} s"
            )
    total = sum(expected(cases).values())
    lines.append(
        f"\n{len(cases)} cases, {total:.0f} s of {60 * minutes:.0f} expected: {SLACK:g} times the roofline "
        f"at {PLANNED.copy / 1e12:.1f} TB/s and {PLANNED.products['bfloat16'] / 1e12:.0f} TFLOP/s, "
        "and fixed times"
    )
    return "\n".join(lines)
