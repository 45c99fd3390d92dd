"""Cases of training steps, with gradients of the touched experts alone and with dense ones."""

from dataclasses import replace
from typing import Any

from million_experts.benchmarks import steps
from million_experts.benchmarks.case import DENSE, MILLION, OURS, PEER_PYTORCH, REFERENCE, Case
from million_experts.benchmarks.targets import Target
from million_experts.benchmarks.workload import Competitor

SPARSE, SMALL = f"{OURS}, sparse", f"{OURS}, sparse, bfloat16"
IN_BACKWARD, DENSE_GRADIENTS = f"{OURS}, sparse, in backward", f"{OURS}, dense gradients"

# The layer's optimiser, and the dtype of its table and momentum, by the name of the competitor.
_SETTINGS = {
    SPARSE: {"optimizer": "RowwiseAdamW"},
    IN_BACKWARD: {"optimizer": "RowwiseAdamW, in backward"},
    SMALL: {"optimizer": "RowwiseAdamW, small state", "dtype": "bfloat16"},
    DENSE_GRADIENTS: {"optimizer": "AdamW, fused"},
}


def _shape(tokens: int, num_experts: int) -> dict[str, Any]:
    return {
        "tokens": tokens,
        "dim": 256,
        "num_experts": num_experts,
        "num_heads": 8,
        "experts_per_head": 16,
        "key_dim": 128,
    }


def trained_layer(setting: str, tokens: int, num_experts: int, picks: str = "retrieved") -> Competitor:
    arguments = {**_shape(tokens, num_experts), **_SETTINGS[setting], "picks": picks}
    dense = {**arguments, "optimizer": "AdamW, fused", "backend": "reference"}
    truth = Competitor(REFERENCE, steps.layer, dense, shares="PEER for steps")
    return Competitor(setting, steps.layer, arguments, truth, "PEER for steps")


def _peer_pytorch(tokens: int, num_experts: int) -> Competitor:
    arguments = {**_shape(tokens, num_experts), "optimizer": "AdamW, fused"}
    return Competitor(PEER_PYTORCH, steps.peer_pytorch, arguments, gathers=6)


def _s1() -> tuple[Case, ...]:
    title = "training step over PEER-pytorch"
    return (
        Case(
            "S1",
            "training step, N=1024^2, H=8, k=16, T=1024",
            (
                trained_layer(SPARSE, 1024, MILLION),
                _peer_pytorch(1024, MILLION),
                trained_layer(SMALL, 1024, MILLION),
            ),
            ("step",),
            (
                Target("S1", title, "S1", "step", SPARSE, (PEER_PYTORCH,), 1 / 12),
                Target("S1 best", f"{title}, bfloat16 table", "S1", "step", SMALL, (PEER_PYTORCH,), 1 / 18),
            ),
            "S1",
        ),
        # Beside PEER-pytorch its gradients and moments would not fit into 24 GiB.
        Case(
            "S1 dense",
            "the same with sparse and with dense gradients",
            (trained_layer(SPARSE, 1024, MILLION), trained_layer(DENSE_GRADIENTS, 1024, MILLION)),
            ("step",),
            group="S1",
        ),
    )


def _s2() -> Case:
    names = [f"uniform picks, N={side}^2" for side in (1024, 256)]
    title = "backward and optimiser per touched row, N=1024^2 over N=256^2"
    return Case(
        "S2",
        "backward pass and optimiser per touched row, uniform picks, H=8, k=16, T=2048",
        tuple(
            replace(trained_layer(SPARSE, 2048, side**2, "uniform"), name=name)
            for name, side in zip(names, (1024, 256), strict=True)
        ),
        ("update",),
        (Target("S2", title, "S2", "update", names[0], (names[1],), 1.5, "time per row"),),
        "S2",
        False,
    )


def _s3() -> Case:
    title = "peak memory above weights and optimiser state"
    bounds = {SPARSE: ("S3", 0.7e9), IN_BACKWARD: ("S3 in backward", 0.15e9)}
    return Case(
        "S3",
        "memory of a training step, N=1024^2, uniform picks, H=8, k=16, T=2048",
        tuple(trained_layer(setting, 2048, MILLION, "uniform") for setting in bounds),
        ("step",),
        tuple(
            Target(name, title, "S3", "step", setting, (), bound, "working memory")
            for setting, (name, bound) in bounds.items()
        ),
        "S3",
    )


def _s4() -> Case:
    names = [f"bfloat16, N={side}^2" for side in (2048, 1024)]
    return Case(
        "S4",
        "four million experts: bfloat16 table and momentum, second moment a row, H=8, k=16, T=2048",
        tuple(
            replace(trained_layer(SMALL, 2048, side**2), name=name)
            for name, side in zip(names, (2048, 1024), strict=True)
        ),
        ("step",),
        (
            Target(
                "S4 memory",
                "training at N=2048^2, memory of the whole process",
                "S4",
                "step",
                names[0],
                (),
                14e9,
                "process memory",
            ),
            Target(
                "S4 time", "training step, N=2048^2 over N=1024^2", "S4", "step", names[0], (names[1],), 1.5
            ),
        ),
        "S4",
    )


def _s5() -> Case:
    """The model of the preset `million` with two moments an element, and its twin with a dense layer."""
    shape = {
        "tokens": 4096,
        "context": 512,
        "vocab_size": 8192,
        "dim": 256,
        "blocks": 6,
        "attention_heads": 4,
    }
    experts = {"num_experts": MILLION, "num_heads": 8, "experts_per_head": 16, "key_dim": 128}
    arguments = {**shape, **experts, "optimizer": "RowwiseAdamW"}
    truth = Competitor(REFERENCE, steps.layer_of_language_model, arguments, shares="language model")
    name = "a million experts in one block"
    return Case(
        "S5",
        "training step of a language model: 6 blocks, dim 256, 8,192 words, 8 texts of 512 tokens",
        (
            Competitor(name, steps.language_model, arguments, truth, "language model"),
            Competitor(DENSE, steps.language_model, {**shape, "optimizer": "AdamW, fused"}),
        ),
        ("step",),
        (
            Target(
                "S5",
                "language model, tokens a second: a million experts over dense",
                "S5",
                "step",
                name,
                (DENSE,),
                0.75,
                "throughput",
            ),
        ),
        "S5",
    )


def _sweep(side: int) -> tuple[Case, ...]:
    N = side**2
    title = f"training step, N={side}^2, H=8, k=16, T=1024"
    first = (trained_layer(SPARSE, 1024, N), trained_layer(SMALL, 1024, N), _peer_pytorch(1024, N))
    return (
        Case(f"steps={side}^2", title, first, ("step",), group="steps"),
        # In a case of its own: all four together would not fit where three of them do.
        Case(
            f"steps={side}^2 dense",
            f"{title}, dense gradients",
            (trained_layer(DENSE_GRADIENTS, 1024, N),),
            ("step",),
            group="steps",
        ),
    )


STEP_TARGET_CASES = (*_s1(), _s2(), _s3(), _s4(), _s5())
STEP_SWEEP_CASES = tuple(case for side in (128, 256, 512, 1024, 2048) for case in _sweep(side))
