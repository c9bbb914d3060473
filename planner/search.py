"""plan(job): drop what is illegal, drop what does not fit, simulate the rest best-first until a bound says stop.

The bound is admissible: no layout runs faster than its slowest rank's own work plus the forwards that must come
before that rank's first one and the backwards that must follow its last one (tests/planner/test_search.py holds it
against the simulator). So the answer is the simulator's optimum over all the layouts that space.py lists.
"""

from __future__ import annotations

import dataclasses
import datetime
import heapq
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

from planner.plan import Certificate, Plan
from planner.space import candidates, without_model_parallelism
from simulator.errors import NothingFitsError
from simulator.job import Job
from simulator.layout import SPLIT_BACKWARD, V_PLACEMENT, Layout
from simulator.memory import capacity, memory_per_rank
from simulator.program import stage_costs
from simulator.results import Prediction
from simulator.risk import HIGH_RISK, needed, out_of_memory_probability
from simulator.simulate import simulate
from simulator.stage import StageCost

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class _Screened:
    """A legal layout that fits, with the least time it can take and its probability of running out of memory."""

    bound: float
    layout: Layout
    risk: float


@dataclass
class _Counts:
    space: int = 0
    illegal: int = 0
    out_of_memory: int = 0


def plan(job: Job, top: int = 5, progress: Progress | None = None) -> Plan:
    """Choose the fastest layout that fits.

    Args:
        top: how many layouts to rank, the best one included.
        progress: called with what is being done and the fraction that is done.

    Raises:
        NothingFitsError: no legal layout fits; the message names the nearest misses.
    """
    started = time.perf_counter()
    report = progress or (lambda what, fraction: None)
    counts = _Counts()
    screened, misses = _screen(job, counts, report)
    if not screened:
        raise NothingFitsError(_nothing_fits(job, counts, misses), misses)
    best, simulated = _best_first(job, screened, top, report)
    safer = _safer(job, screened, tuple(best), report)
    certificate = Certificate(
        space=counts.space,
        illegal=counts.illegal,
        out_of_memory=counts.out_of_memory,
        bounded=len(screened) - simulated,
        simulated=simulated,
        lower_bound_gap=0.0,
        seconds=time.perf_counter() - started,
    )
    return Plan(job, best[0], tuple(best[1:]), _baseline(job), certificate, _provenance(job), safer)


def lower_bound(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> float:
    """Seconds that no schedule of this layout can beat.

    Rule: max over ranks of (forwards of the stages before) + m · (work of its own stages) + (backwards of the stages
    before), as every microbatch's first forward climbs to the rank and its last backward comes back from it. Where
    the backward is split a rank may end with weight gradients, which nobody waits for: no backwards follow. Of
    overlapped pairs what the stack hides in them does not count. Where ranks and steps differ, some replica takes as
    many steps as there are on average, so none is faster than the fastest replica on its own.
    """
    microbatches = layout.microbatches(job.training.global_batch_size)
    best, before = 0.0, 0.0
    for rank in range(layout.pp):
        passes = [work for s in layout.stages_of(rank) for work in (stages[s].forward, stages[s].backward)]
        own = sum(work.total for work in passes)
        if layout.schedule == "DualPipeV":
            own -= sum(work.spent_on(job.stack.overlaps_in_pair) for work in passes)
        best = max(best, before + microbatches * own)
        before += stages[rank].forward.total
        if layout.schedule not in SPLIT_BACKWARD:
            before += stages[rank].backward.total
    return best * job.stragglers.least_factor(layout)


def _screen(job: Job, counts: _Counts, report: Progress) -> tuple[list[_Screened], list[tuple[float, Layout]]]:
    """Split the space into layouts that fit, with their bounds, and the nearest misses."""
    fitting: list[_Screened] = []
    misses: list[tuple[float, Layout]] = []
    costs: dict[Layout, tuple[StageCost, ...]] = {}
    for layout in candidates(job):
        counts.space += 1
        if counts.space % 200 == 0:
            report(f"screening layout {counts.space}", 0.0)
        if layout.problems(job):
            counts.illegal += 1
            continue
        # Of the schedule only the placement matters to what a stage costs.
        placed = dataclasses.replace(layout, schedule="DualPipeV" if layout.schedule in V_PLACEMENT else "1F1B")
        stages = costs.get(placed) or costs.setdefault(placed, stage_costs(job, placed))
        need, room = needed(job, layout, memory_per_rank(job, layout, stages)), capacity(job, layout)
        if need > room:
            counts.out_of_memory += 1
            misses.append((need - room, layout))
            continue
        risk = out_of_memory_probability(need, room, job.stack.name)
        fitting.append(_Screened(lower_bound(job, layout, stages), layout, risk))
    return fitting, heapq.nsmallest(3, misses, key=lambda miss: miss[0])


def _best_first(
    job: Job, screened: list[_Screened], top: int, report: Progress, known: tuple[Prediction, ...] = ()
) -> tuple[list[Prediction], int]:
    """Simulate in the order of the bounds until no bound left can enter the best `top`; what is known is not simulated
    again."""
    predictions = {prediction.layout: prediction for prediction in known}
    found: list[Prediction] = []
    simulated = 0
    for entry in sorted(screened, key=lambda e: (e.bound, e.layout.short())):
        if len(found) >= top and entry.bound >= found[top - 1].step_seconds:
            break
        found.append(predictions.get(entry.layout) or simulate(job, entry.layout))
        simulated += 1
        found.sort(key=lambda p: (p.step_seconds, p.layout.short()))
        del found[top:]
        report(f"simulating: best step {found[0].step_seconds:.3g} s", simulated / len(screened))
    return found, simulated


def _safer(job: Job, screened: list[_Screened], best: tuple[Prediction, ...], report: Progress) -> Prediction | None:
    """Where the fastest of the best layouts is likely to run out of memory: the fastest of all that is not."""
    safe = [entry for entry in screened if entry.risk <= HIGH_RISK]
    if best[0].out_of_memory_probability <= HIGH_RISK or not safe:
        return None
    found, _ = _best_first(job, safe, 1, report, best)
    return found[0]


def _baseline(job: Job) -> Prediction:
    """The fastest plain data-parallel layout that fits; if none does, the one that comes nearest."""
    plain = without_model_parallelism(job)
    fitting, misses = _screen(plain, _Counts(), lambda what, fraction: None)
    if not fitting:
        return simulate(job, misses[0][1]) if misses else _impossible_baseline(job)
    best, _ = _best_first(job, fitting, 1, lambda what, fraction: None)
    return best[0]


def _impossible_baseline(job: Job) -> Prediction:
    """Where the batch cannot be divided over all ranks: data parallelism over as many as it can, the others idle."""
    batch = job.training.global_batch_size
    ranks = math.gcd(batch, job.world_size)
    used = simulate(job, Layout(dp_replicate=ranks))
    idle = ranks / job.world_size
    reason = f"global_batch_size = {batch} cannot be divided over {job.world_size} ranks; {ranks} would work"
    return dataclasses.replace(
        used,
        fits=False,
        problems=(reason, *used.problems),
        tokens_per_second_per_gpu=used.tokens_per_second_per_gpu * idle,
        mfu=used.mfu * idle,
        hfu=used.hfu * idle,
    )


def _nothing_fits(job: Job, counts: _Counts, misses: list[tuple[float, Layout]]) -> str:
    """One sentence: the nearest misses and by how much."""
    where = f"{job.model.name} on {job.nodes} x {job.cluster.name}"
    if not counts.space:
        return f"no layout of {where}: no sizes that [search] allows multiply to its {job.world_size} ranks"
    if not misses:
        example = next(iter(candidates(job)), None)
        reason = f"; for example {example.short()}: {example.problems(job)[0]}" if example else ""
        return f"no layout of {where} is legal: {counts.illegal} of {counts.space} candidates break a rule{reason}"
    shown = "; ".join(f"{layout.short()} by {over / 2**30:.1f} GiB" for over, layout in misses)
    limit = capacity(job, misses[0][1]) / 2**30
    return f"no layout of {where} fits into {limit:.1f} GiB per rank; the nearest miss it: {shown}"


def _provenance(job: Job) -> dict[str, str]:
    """Where the numbers come from."""
    return {
        "layoutwise": _version(),
        "python": platform.python_version(),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "gpu": job.cluster.gpu.source,
        "cluster": job.cluster.source,
        "stack": job.stack.source,
    }


def _version() -> str:
    try:
        return metadata.version("layoutwise")
    except metadata.PackageNotFoundError:
        return "source tree"
