"""Measures cases: right results first, then time in turns, then memory."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from million_experts.benchmarks import memory
from million_experts.benchmarks.case import Case
from million_experts.benchmarks.correctness import check_sanity, compare, compare_steps
from million_experts.benchmarks.machine import OtherLoad
from million_experts.benchmarks.timing import Times, interleave, make_run, summarise, warm_up
from million_experts.benchmarks.workload import Competitor, Unavailable, Workload, draw_inputs
from million_experts.lm.memory import available_memory

# Of the memory that is available, what the estimate may claim: it is an estimate.
MEMORY_SHARE = 0.9

Row = dict[str, Any]


@dataclass(frozen=True)
class Effort:
    """How often and how long: repetitions of an iteration, and seconds after which three suffice."""

    repetitions: int = 11
    limit: float = 5.0


QUICK = Effort(repetitions=9, limit=4.0)
# A point of a sweep is one of many on a curve.
SWEEP = Effort(repetitions=7, limit=1.5)


@dataclass
class CaseRunner:
    """Measures one case. `run` gives a row for each phase and competitor, measured or not."""

    case: Case
    effort: Effort
    threads: int
    tell: Callable[[str], None] = lambda message: None
    workloads: dict[str, Workload] = field(default_factory=dict)
    shared: dict[tuple[Any, ...], nn.Module] = field(default_factory=dict)
    # Why a competitor is out for good: (status, reason), "absent", "failed" or "refused".
    out: dict[str, tuple[str, str]] = field(default_factory=dict)
    # Names with the mode, training or not, in which their results were found right.
    right: set[tuple[str, bool]] = field(default_factory=set)
    available: int | None = None

    def run(self) -> list[Row]:
        """A row for each phase and competitor of the case."""
        torch.set_num_threads(self.threads)
        torch.manual_seed(0)
        self._free()
        if memory.can_measure():
            self.available = available_memory() - memory.resident_bytes()
        rows: list[Row] = []
        try:
            for phase in self.case.phases:
                rows += self._run_phase(phase)
        except Exception as error:
            # Memory that ran out, or a competitor that breaks after having run: the other cases go on.
            reason = _describe(error)
            return [
                self._row(competitor, phase, "failed", reason, None)
                for phase in self.case.phases
                for competitor in self.case.competitors
            ]
        finally:
            self._free()
        if self._refused():
            return [self._without_time(row) for row in rows]
        if self.case.memory:
            self._measure_memory(rows)
        return rows

    def _run_phase(self, phase: str) -> list[Row]:
        fits, skipped = self._admit(phase)
        if self.workloads.keys() - {competitor.name for competitor in fits}:
            self._free()  # those that no longer fit make room
        self._build(fits)
        self._check(phase)
        runs: dict[str, Callable[[int], float]] = {}
        for competitor in fits:
            name = competitor.name
            if name in self.out or self._refused():
                continue
            self.tell(f"{phase}: warming up {name}")
            try:
                run = make_run(self.workloads[name], phase, self.case.cold)
                warm_up(run)
                runs[name] = run
            except Exception as error:
                self._fail(name, error)
        self.tell(f"{phase}: {len(runs)} competitors in turns")
        repetitions = self.effort.repetitions * self.case.repetitions
        with OtherLoad() as others:
            times = {name: summarise(s) for name, s in interleave(runs, repetitions, self.effort.limit)}
        rows = []
        for competitor in self.case.competitors:
            status, reason = self.out.get(competitor.name) or skipped.get(competitor.name) or ("measured", "")
            row = self._row(competitor, phase, status, reason, times.get(competitor.name))
            row["other_load"] = round(others.cores, 2)
            if status == "measured":
                row["touched"] = self._touched(competitor.name)
            rows.append(row)
        return rows

    def _touched(self, name: str) -> int | None:
        """Rows of expert tables that the first iteration that counts has touched."""
        workload = self.workloads[name]
        return workload.touched(draw_inputs(workload, 1, False)) if workload.touched is not None else None

    def _admit(self, phase: str) -> tuple[list[Competitor], dict[str, tuple[str, str]]]:
        """Those whose memory suffices beside that of those before them, and why the others are skipped."""
        available = self.available
        fits: list[Competitor] = []
        skipped: dict[str, tuple[str, str]] = {}
        alive: frozenset[tuple[Any, ...]] = frozenset()
        kept = most_working = 0
        for competitor in self.case.competitors:
            if competitor.name in self.out:
                continue
            try:
                own, working = memory.estimate_bytes(competitor, phase, alive)
                checked = working
                if competitor.truth is not None and phase != "forward":
                    # To compare gradients, its own and those of its truth have to be there together.
                    checked += max(working, memory.estimate_bytes(competitor.truth, phase)[1])
            except Unavailable as error:
                self.out[competitor.name] = ("absent", str(error))
                continue
            except Exception as error:
                self._fail(competitor.name, error)
                continue
            need = kept + own + max(most_working, checked)
            if available is not None and need > MEMORY_SHARE * available:
                beside = " beside those before it" if fits else ""
                skipped[competitor.name] = (
                    "skipped",
                    f"needs about {need / 2**30:.1f} GiB{beside}, {available / 2**30:.1f} GiB are available",
                )
                continue
            fits.append(competitor)
            kept, most_working = kept + own, max(most_working, checked)
            alive |= {competitor.share_key}
        return fits, skipped

    def _build(self, competitors: list[Competitor]) -> None:
        for competitor in competitors:
            if competitor.name in self.workloads or competitor.name in self.out:
                continue
            self.tell(f"building {competitor.name}")
            try:
                self.workloads[competitor.name] = competitor.build(self.shared, **competitor.arguments)
            except Unavailable as error:
                self.out[competitor.name] = ("absent", str(error))
            except Exception as error:
                self._fail(competitor.name, error)

    def _check(self, phase: str) -> None:
        """Compares what has a truth with it; the case is refused where one is wrong."""
        training = phase != "forward"
        for competitor in self.case.competitors:
            workload = self.workloads.get(competitor.name)
            if workload is None or competitor.name in self.out or (competitor.name, training) in self.right:
                continue
            self.tell(f"{phase}: checking {competitor.name}")
            try:
                if competitor.truth is None:
                    wrong = check_sanity(workload, training)
                else:
                    truth = competitor.truth.build(self.shared, **competitor.truth.arguments)
                    wrong = compare(workload, truth, training)
                    del truth
                if wrong is None and training:
                    wrong = compare_steps(workload)
            except Exception as error:
                self._fail(competitor.name, error)
                continue
            if wrong is None:
                self.right.add((competitor.name, training))
            else:
                self.out[competitor.name] = ("refused", wrong)
        memory.release()

    def _measure_memory(self, rows: list[Row]) -> None:
        for competitor in self.case.competitors:
            own = [r for r in rows if r["competitor"] == competitor.name and r["status"] == "measured"]
            if not own:
                continue
            if not memory.can_measure():
                reason = "this system does not show the peak memory of a process"
            else:
                self.tell(f"memory of {competitor.name}")
                reason = ""
                try:
                    peaks = memory.measure_peaks(competitor, [row["phase"] for row in own], self.threads)
                    for row in own:
                        peak = peaks[row["phase"]]
                        row["peak_bytes"], row["working_bytes"] = peak.added, peak.working
                        row["process_bytes"] = peak.process
                except Unavailable as error:
                    reason = str(error)
            for row in own:
                row["memory_reason"] = reason

    def _refused(self) -> bool:
        return any(status == "refused" for status, _ in self.out.values())

    def _without_time(self, row: Row) -> Row:
        """A row of a case in which a result was wrong: none of it counts."""
        status, reason = self.out.get(
            row["competitor"], ("refused", "another result in this case is wrong: nothing of it is timed")
        )
        empty = {"median_s": None, "q1_s": None, "q3_s": None, "repetitions": 0}
        return {**row, **empty, "status": status, "reason": reason}

    def _fail(self, name: str, error: Exception) -> None:
        self.out[name] = ("failed", _describe(error))

    def _free(self) -> None:
        self.workloads.clear()
        self.shared.clear()
        torch._dynamo.reset()  # compiled code holds on to the weights
        gc.collect()
        memory.release()

    def _row(self, competitor: Competitor, phase: str, status: str, reason: str, times: Times | None) -> Row:
        row: Row = {
            "case": self.case.name,
            "title": self.case.title,
            "group": self.case.group,
            "competitor": competitor.name,
            "phase": phase,
            "status": status,
            "reason": reason,
            "shape": dict(competitor.arguments),
            "dtype": competitor.arguments.get("dtype", "float32"),
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "median_s": None,
            "q1_s": None,
            "q3_s": None,
            "repetitions": 0,
            "touched": None,
            "peak_bytes": None,
            "working_bytes": None,
            "process_bytes": None,
            "memory_reason": "",
        }
        if times is not None:
            row |= {
                "median_s": times.median,
                "q1_s": times.q1,
                "q3_s": times.q3,
                "repetitions": times.repetitions,
            }
        return row


def _describe(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
