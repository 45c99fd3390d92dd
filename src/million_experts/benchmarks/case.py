"""A case: competitors that are measured against each other, and what that should come to."""

from dataclasses import dataclass, replace

from million_experts.benchmarks.targets import Target
from million_experts.benchmarks.workload import PHASES, Competitor

OURS, REFERENCE, COMPILED = "million-experts", "reference", "torch.compile"
PEER_PYTORCH, PKM, DENSE = "PEER-pytorch", "PKM, nn.EmbeddingBag", "dense"
MIXTRAL = ("Mixtral, eager", "Mixtral, grouped_mm")
PROBES = ("row read: kernel", "row read: embedding_bag", "row read: index_select")
MILLION = 1024**2


@dataclass(frozen=True)
class Case:
    """Competitors that are measured against each other.

    Attributes:
        competitors: those that come first stay when memory does not suffice for all.
        targets: bounds on ratios within the case.
        group: name of a set of cases that are asked for together; of targets, the case's own.
        memory: measure peaks too; where only parts of layers meet, they would mean little.
        repetitions: how many times as often as other cases; for those that take no time.
        cold: each iteration begins with empty caches. A few tokens touch little memory, and in a model the
            other layers have used the caches meanwhile; here it would depend on who was measured before.
    """

    name: str
    title: str
    competitors: tuple[Competitor, ...]
    phases: tuple[str, ...] = PHASES
    targets: tuple[Target, ...] = ()
    group: str = ""
    memory: bool = True
    repetitions: int = 1
    cold: bool = False

    def quick(self) -> "Case":
        """What the targets need, and nothing else."""
        names = {name for target in self.targets for name in (target.ours, *target.over)}
        phases = {target.phase for target in self.targets}
        return replace(
            self,
            competitors=tuple(c for c in self.competitors if c.name in names),
            phases=tuple(phase for phase in self.phases if phase in phases),
            memory=any(target.of_memory for target in self.targets),
        )
