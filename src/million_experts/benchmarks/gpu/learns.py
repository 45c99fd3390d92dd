"""Part 4: does it learn more? Small decoders of bytes whose middle feed-forward differs, trained in turns.

Arms take turns of a few seconds, so that they have had equal time whenever the run ends. The learning rate
stays the same after a warm-up: then losses along the way are what a run of that length ends with, and one run
of each arm tells of equal time and of equal FLOPs. The speed that was measured first says of how many.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from million_experts.benchmarks.gpu import costs
from million_experts.benchmarks.gpu.costs import Shape
from million_experts.benchmarks.gpu.decoder import Decoder
from million_experts.benchmarks.gpu.rivals import GroupedMixture
from million_experts.layers import PEER, DenseFeedForward
from million_experts.optim import RowwiseAdamW, clip_grad_norm_, parameter_groups

Row = dict[str, Any]

RATE, WARM_UP, CLIP = 1e-3, 100, 1.0
TABLE_RATE, RETRIEVAL_RATE = 4, 0.25  # times RATE: what won in studies of this project
VALID = 0.05  # of the text, its end
TRIAL = 3  # steps that speed is measured on
TURNS = 12
TRAINING = 0.85  # of the time; the rest is for validation


@dataclass(frozen=True)
class Size:
    """D model width, batches of `batch` sequences of S bytes, n * n experts, H heads of k of them."""

    D: int = 512
    blocks: int = 6
    heads: int = 8
    S: int = 512
    batch: int = 64
    n: int = 1024
    H: int = 8
    k: int = 16
    evaluated: int = 8  # batches

    @property
    def tokens(self) -> int:
        return self.S * self.batch


@dataclass
class Arm:
    """A model in training, and what it has had so far."""

    name: str
    model: Decoder
    optimizer: torch.optim.Optimizer
    flops_per_token: float
    seconds: float = 0.0
    steps: int = 0
    losses: list[Tensor] = field(default_factory=list)


def flops_per_token(size: Size, middle: float) -> float:
    """Training FLOPs: three times the forward pass's, of which `middle` are the middle feed-forward's."""
    attention = 2 * 4 * size.D**2 + 2 * size.S * size.D
    others = (size.blocks - 1) * 2 * 2 * 4 * size.D**2
    return 3 * (size.blocks * attention + others + middle + 2 * 256 * size.D)


def arms(size: Size, device: torch.device) -> Iterator[Arm]:
    """Dense, mixture, PEER; the first two of the same FLOPs."""
    D, fused = size.D, device.type == "cuda" or None
    backend = "auto" if device.type == "cuda" else "reference"

    def peer() -> nn.Module:
        return PEER(D, (size.n, size.n), size.H, size.k, sparse_grad=True, backend=backend)

    of_peer = costs.layer(Shape(1, size.n, D, "bfloat16", size.H, size.k), "forward", True).flops
    makes: list[tuple[str, Callable[[], nn.Module], float]] = [
        ("dense", lambda: DenseFeedForward(D), 16.0 * D**2),
        ("mixture", lambda: GroupedMixture(D, 2 * D), 16.0 * D**2),
        ("PEER", peer, of_peer),
    ]
    for name, make, forward in makes:
        feed_forwards: list[Callable[[], nn.Module]] = [lambda: DenseFeedForward(D)] * size.blocks
        feed_forwards[size.blocks // 2] = make
        torch.manual_seed(0)
        with torch.device(device):
            model = Decoder(D, size.heads, size.S, feed_forwards)
        groups = parameter_groups(
            model, RATE, weight_decay=0.1, table_learning_rate=TABLE_RATE * RATE, table_betas=(0.0, 0.95),
            retrieval_learning_rate=RETRIEVAL_RATE * RATE,
        )  # fmt: skip
        optimizer: torch.optim.Optimizer
        if name == "PEER":
            optimizer = RowwiseAdamW(groups, lr=RATE, betas=(0.9, 0.95), second_moment="row")
        else:
            optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=fused)
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
        yield Arm(name, model, optimizer, flops_per_token(size, forward))


class Text:
    """Random sequences of a text's beginning, and of its end.

    Raises:
        ValueError: a text too short to be cut.
    """

    def __init__(self, path: Path, size: Size, device: torch.device):
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).to(device)
        last = int(len(data) * (1 - VALID))
        if len(data) - last < size.S + 2:
            least = math.ceil((size.S + 3) / VALID)
            raise ValueError(f"text must have at least {least} bytes, {path} has {len(data)}")
        self.size, self.train, self.valid, self.bytes = size, data[:last], data[last:], len(data)

    def batch(self, text: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(text.device).manual_seed(seed)
        span = torch.arange(self.size.S + 1, device=text.device)
        most, count = len(text) - len(span), (self.size.batch, 1)
        starts = torch.randint(0, most, count, generator=generator, device=text.device)
        return text[starts + span].long()


@dataclass
class Training:
    """Trains arms on a text, in bfloat16."""

    corpus: Text
    device: torch.device

    def loss(self, arm: Arm, ids: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return arm.model(ids)

    def steps(self, arm: Arm, enough: Callable[[], bool]) -> None:
        """Steps until it is enough, one at least; their time is counted."""
        arm.model.train()
        start = self.now()
        while True:
            arm.steps += 1
            for group in arm.optimizer.param_groups:
                group["lr"] = group["peak"] * min(1.0, arm.steps / WARM_UP)
            loss = self.loss(arm, self.corpus.batch(self.corpus.train, arm.steps))  # the same for all arms
            loss.backward()
            clip_grad_norm_(arm.model.parameters(), CLIP)
            arm.optimizer.step()
            arm.optimizer.zero_grad(set_to_none=True)
            arm.losses.append(loss.detach())
            self.now()  # else the processor would run ahead by thousands of steps
            if enough():
                break
        arm.seconds += self.now() - start

    @torch.no_grad()
    def validate(self, arm: Arm) -> float:
        arm.model.eval()
        batches = (self.corpus.batch(self.corpus.valid, -seed) for seed in range(self.corpus.size.evaluated))
        return float(torch.stack([self.loss(arm, ids) for ids in batches]).mean())

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.monotonic()

    def speed(self, arm: Arm) -> float:
        """Bytes per second."""
        self.steps(arm, lambda: True)  # compilation, tuning, an optimiser's state
        arm.seconds, last = 0.0, arm.steps + TRIAL
        self.steps(arm, lambda: arm.steps >= last)
        return self.corpus.size.tokens * TRIAL / arm.seconds


def learn(device: torch.device, text: Path, size: Size, until: float) -> Iterator[Row]:
    """Trains the arms until a time of `time.monotonic`."""
    training = Training(Text(text, size, device), device)
    trained, speeds = [], {}
    for arm in arms(size, device):
        try:
            speeds[arm.name] = training.speed(arm)
        except (RuntimeError, NotImplementedError) as error:
            if "CUDA error" in str(error) or arm.name == "PEER":
                raise
            yield {"status": "unavailable", "competitor": arm.name, "fault": f"{error}"[:300]}
            continue
        trained.append(arm)
    each = max(0.0, until - time.monotonic()) * TRAINING / len(trained)
    yield {
        "status": "done",
        "competitor": "plan",
        "seconds_each": each,
        "budget_flops": min(each * speeds[arm.name] * arm.flops_per_token for arm in trained),
        "tokens_per_second": speeds,
        "flops_per_token": {arm.name: arm.flops_per_token for arm in trained},
        "parameters": {arm.name: sum(p.numel() for p in arm.model.parameters()) for arm in trained},
        "text_bytes": training.corpus.bytes,
    }
    for turn, arm in itertools.product(range(1, TURNS + 1), trained):
        if time.monotonic() >= until:
            return
        end = min(until, time.monotonic() + each * turn / TURNS - arm.seconds)
        training.steps(arm, lambda end=end: time.monotonic() >= end)  # type: ignore[misc]
        tokens = arm.steps * size.tokens
        yield {
            "status": "done",
            "competitor": arm.name,
            "turn": turn,
            "seconds": arm.seconds,
            "steps": arm.steps,
            "tokens": tokens,
            "flops": tokens * arm.flops_per_token,
            "train_loss": float(torch.stack(arm.losses).mean()),
            "valid_loss": training.validate(arm),
        }
        arm.losses.clear()


def outcome(rows: list[Row]) -> list[Row]:
    """Of each arm the validation loss at equal FLOPs and at equal time, between turns; of the last run."""
    plan = next((r for r in reversed(rows) if r.get("competitor") == "plan"), None)
    turns: dict[str, list[Row]] = {}
    for row in rows:
        if plan is not None and row["run"] == plan["run"] and row.get("turn") is not None:
            turns.setdefault(row["competitor"], []).append(row)
    if plan is None or not turns:
        return []
    flops = min([plan["budget_flops"], *(own[-1]["flops"] for own in turns.values())])
    seconds = min(own[-1]["seconds"] for own in turns.values())
    return [
        {
            "competitor": name,
            "flops": flops,
            "at_equal_flops": _at(own, "flops", flops),
            "seconds": seconds,
            "at_equal_time": _at(own, "seconds", seconds),
            "tokens_per_second": plan["tokens_per_second"][name],
            "parameters": plan["parameters"][name],
        }
        for name, own in turns.items()
    ]


def _at(rows: list[Row], axis: str, where: float) -> float | None:
    """The validation loss at a place of an axis, between the turns around it on a logarithmic axis."""
    points = sorted((row[axis], row["valid_loss"]) for row in rows if row["valid_loss"] is not None)
    for (a, low), (b, high) in itertools.pairwise(points):
        if a <= where <= b:
            share = 0.0 if a == b else math.log(where / a) / math.log(b / a)
            return low + share * (high - low)
    return points[-1][1] if points and math.isclose(points[-1][0], where, rel_tol=0.02) else None
