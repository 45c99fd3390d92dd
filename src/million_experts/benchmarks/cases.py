"""What is measured, and what it should come to. Sizes are those of float32 on two cores."""

from dataclasses import replace
from typing import Any

from million_experts.benchmarks import parts, peers
from million_experts.benchmarks.case import (
    COMPILED,
    DENSE,
    MILLION,
    MIXTRAL,
    OURS,
    PEER_PYTORCH,
    PKM,
    PROBES,
    REFERENCE,
    Case,
)
from million_experts.benchmarks.cases_steps import STEP_SWEEP_CASES, STEP_TARGET_CASES
from million_experts.benchmarks.targets import Target
from million_experts.benchmarks.workload import Competitor


def layers(
    tokens: int,
    dim: int,
    num_experts: int,
    experts_per_head: int,
    key_dim: int,
    dense_width: int,
    num_heads: int = 8,
    glu: bool = False,
    moe_width: int | None = None,
) -> tuple[Competitor, ...]:
    """The layer and all that it is compared with, at one shape."""
    shape: dict[str, Any] = {
        "tokens": tokens,
        "dim": dim,
        "num_experts": num_experts,
        "num_heads": num_heads,
        "experts_per_head": experts_per_head,
        "key_dim": key_dim,
    }
    own = {**shape, "glu": glu}
    truth = Competitor(REFERENCE, peers.peer, {**own, "backend": "reference"}, shares="PEER")
    competitors = [Competitor(OURS, peers.peer, {**own, "backend": "auto"}, truth, "PEER")]
    if not glu:  # PEER-pytorch has no gated experts
        competitors.append(Competitor(PEER_PYTORCH, peers.peer_pytorch, shape, gathers=6))
    if moe_width is not None:
        for name, implementation in zip(MIXTRAL, ("eager", "grouped_mm"), strict=True):
            block = {"tokens": tokens, "dim": dim, "width": moe_width, "experts": 4, "active": 2}
            competitors.append(Competitor(name, peers.mixtral, {**block, "implementation": implementation}))
    feed_forward = {"tokens": tokens, "dim": dim, "width": dense_width}
    return (
        *competitors,
        Competitor(DENSE, peers.dense, feed_forward),
        truth,
        Competitor(PKM, peers.product_key_memory, shape),
        Competitor(COMPILED, peers.compiled_plain_peer, own, truth, "PEER", gathers=6, warm_up_in_full=True),
    )


def experts(name: str, num_experts: int, picks: str = "uniform", dtype: str = "float32") -> Competitor:
    """The expert MLP alone at dim 256, for 2048 tokens of 128 picks."""
    shape = {"tokens": 2048, "dim": 256, "num_experts": num_experts, "K": 128, "picks": picks, "dtype": dtype}
    truth = Competitor(f"{name}, reference", parts.experts, {**shape, "backend": "reference"})
    return Competitor(name, parts.experts, {**shape, "backend": "auto"}, truth, "experts")


def _probe(name: str, how: str) -> Competitor:
    shape = {"tokens": 2048, "dim": 256, "num_experts": MILLION, "K": 128, "picks": "uniform"}
    return Competitor(name, parts.row_probe, {**shape, "dtype": "float32", "how": how}, shares="experts")


def _over_mixtral(case: str, time: float, memory: float) -> tuple[Target, ...]:
    title = "training step over the Mixtral block"
    return (
        Target(f"{case} time", f"{title}: time", case, "step", OURS, MIXTRAL, time),
        Target(f"{case} memory", f"{title}: peak memory", case, "step", OURS, MIXTRAL, memory, "memory"),
    )


def _over_peer_pytorch(case: str, bound: float) -> tuple[Target, ...]:
    title = "forward + backward over PEER-pytorch"
    return (Target(case, title, case, "backward", OURS, (PEER_PYTORCH,), bound),)


def _p3() -> Case:
    competitors: list[Competitor] = []
    targets: list[Target] = []
    for what in ("layer", "uniform picks", "Zipf picks"):
        names = []
        for side in (1024, 128):
            name = f"{what}, N={side}^2"
            if what == "layer":
                layer = layers(2048, 256, side**2, 16, 128, 128)[0]
                competitors.append(replace(layer, name=name))
            else:
                competitors.append(experts(name, side**2, what.partition(" ")[0].lower()))
            names.append(name)
        title = f"forward, N=1024^2 over N=128^2: {what}"
        targets.append(Target(f"P3 {what}", title, "P3", "forward", names[0], (names[1],), 3.0))
    return Case("P3", "growth with the pool", tuple(competitors), ("forward",), tuple(targets), "P3", False)


TARGET_CASES = (
    Case(
        "P1",
        "N=36^2, H=8, k=30, no GLU, T=2048",
        layers(2048, 256, 36**2, 30, 64, dense_width=240, moe_width=256),
        targets=_over_mixtral("P1", 1.0, 1.0),
        group="P1",
    ),
    Case(
        "P1g",
        "N=30^2, H=8, k=26, GLU, T=2048",
        layers(2048, 256, 30**2, 26, 64, dense_width=208, glu=True, moe_width=256),
        targets=_over_mixtral("P1g", 1.2, 1.0),
        group="P1g",
    ),
    Case(
        "P2",
        "N=1024^2, H=8, k=16, T=1024",
        layers(1024, 256, MILLION, 16, 128, dense_width=128),
        targets=_over_peer_pytorch("P2", 1 / 5),
        group="P2",
    ),
    Case(
        "P2s",
        "N=128^2, H=8, k=16, T=2048",
        layers(2048, 256, 128**2, 16, 128, dense_width=128),
        targets=_over_peer_pytorch("P2s", 1 / 14),
        group="P2s",
    ),
    _p3(),
    Case(
        "P4",
        "bytes of expert rows read a second, N=1024^2, T=2048, K=128",
        (experts("expert_mlp", MILLION), *map(_probe, PROBES, ("kernel", "embedding_bag", "index_select"))),
        ("forward",),
        (
            Target(
                "P4",
                "expert rows read a second over the best random read of such rows",
                "P4",
                "forward",
                "expert_mlp",
                PROBES,
                0.9,
                "bandwidth",
            ),
        ),
        "P4",
        False,
    ),
    Case(
        "P5",
        "one token, N=1024^2, H=8, k=16, caches empty",
        layers(1, 256, MILLION, 16, 128, dense_width=1024, moe_width=256),
        ("forward",),
        (
            Target(
                "P5 PEER-pytorch",
                "one token over PEER-pytorch",
                "P5",
                "forward",
                OURS,
                (PEER_PYTORCH,),
                1 / 8,
            ),
            Target("P5 dense", "one token over dense, width 4*dim", "P5", "forward", OURS, (DENSE,), 1.0),
        ),
        "P5",
        False,
        repetitions=20,
        cold=True,
    ),
    Case(
        "P5 turns",
        "the same with caches as the competitor before has left them",
        layers(1, 256, MILLION, 16, 128, dense_width=1024, moe_width=256),
        ("forward",),
        group="P5",
        memory=False,
        repetitions=20,
    ),
    Case(
        "P6",
        "experts alone against dense of the same active width, N=128^2, T=2048, K=128",
        (
            experts("expert_mlp", 128**2),
            Competitor(DENSE, peers.dense, {"tokens": 2048, "dim": 256, "width": 128}),
        ),
        ("backward",),
        (
            Target(
                "P6",
                "expert_mlp, forward + backward over dense",
                "P6",
                "backward",
                "expert_mlp",
                (DENSE,),
                3.0,
            ),
        ),
        "P6",
        False,
    ),
    Case(
        "P7",
        "bfloat16 table against float32 table, N=1024^2, T=2048, K=128",
        (
            experts("bfloat16 table", MILLION, dtype="bfloat16"),
            experts("float32 table", MILLION),
        ),
        ("forward",),
        (
            Target(
                "P7",
                "expert_mlp, forward: bfloat16 table over float32 table",
                "P7",
                "forward",
                "bfloat16 table",
                ("float32 table",),
                0.65,
            ),
        ),
        "P7",
        False,
    ),
    *STEP_TARGET_CASES,
)

COLD_TOKENS = 16
CENTRE = {"dim": 256, "num_experts": 512**2, "tokens": 2048, "experts_per_head": 16}


def _sweep(group: str, label: str, **change: int) -> Case:
    shape = CENTRE | change
    dim, tokens, side = shape["dim"], shape["tokens"], round(shape["num_experts"] ** 0.5)
    return Case(
        f"{group}={label}",
        f"dim {dim}, N={side}^2, H=8, k={shape['experts_per_head']}, T={tokens}"
        + (", caches empty" if tokens <= COLD_TOKENS else ""),
        tuple(
            competitor
            for competitor in layers(
                tokens,
                dim,
                shape["num_experts"],
                shape["experts_per_head"],
                128,
                dense_width=4 * dim,
                moe_width=dim,
            )
            if competitor.name != COMPILED  # a minute of compilation for each point
        ),
        # BatchNorm has no statistics of one token, so that none trains on it.
        ("forward",) if tokens == 1 else ("forward", "step"),
        group=group,
        cold=tokens <= COLD_TOKENS,
    )


# The central case is a point of every sweep, and measured in the first one alone.
SWEEP_CASES = (
    *(_sweep("N", f"{side}^2", num_experts=side**2) for side in (128, 256, 512, 1024)),
    *(_sweep("T", str(tokens), tokens=tokens) for tokens in (1, 16, 128, 512, 8192)),
    *(_sweep("k", str(k), experts_per_head=k) for k in (4, 8, 32)),
    *(_sweep("D", f"1024 at N={side}^2", dim=1024, num_experts=side**2) for side in (512, 1024)),
    *STEP_SWEEP_CASES,
)
CASES = (*TARGET_CASES, *SWEEP_CASES)


def select_cases(names: str | None, quick: bool = False) -> tuple[Case, ...]:
    """The cases of a list of names of cases or groups, separated by commas; all of them for None.

    `quick` keeps those with targets, and of these what the targets need.

    Raises:
        ValueError: a name that there is not; those that there are, are listed.
    """
    cases = CASES
    if names is not None:
        asked = [name.strip() for name in names.split(",") if name.strip()]
        groups = {name for case in CASES for name in (case.name, case.group)}
        if unknown := [name for name in asked if name not in groups] or not asked:
            listed = ", ".join(dict.fromkeys(case.group for case in CASES))
            what = ", ".join(map(repr, unknown)) if isinstance(unknown, list) else "none"
            raise ValueError(f"cases must be names among {listed} (or a point such as T=16), got {what}")
        cases = tuple(case for case in CASES if case.name in asked or case.group in asked)
    if not quick:
        return cases
    cases = tuple(case.quick() for case in cases if case.targets)
    if not cases:
        raise ValueError("cases must have targets to be measured quickly: the sweeps have none")
    return cases
