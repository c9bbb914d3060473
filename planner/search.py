"""plan(job): drop what is illegal, drop what does not fit, simulate the rest best-first until a bound says stop.

Bounds come in levels, each admissible and each dearer than the one before; a layout is looked at on the next level only
when no layout has a smaller bound:

    1  screen.py, all layouts at once: seconds and bytes at least
    2  `lower_bound` of its exact costs
    3  critical_path.step_at_least: its pipeline alone, which most layouts share with others, and what is around it
    4  critical_path.critical_path: its program without contention on the links
    5  the exact bytes of its ranks, which dismiss it, or simulate

So the answer is the simulator's optimum over all the layouts that space.py lists (tests/planner/test_search.py holds
every level against the next, and the answer against brute force).
"""

from __future__ import annotations

import dataclasses
import datetime
import heapq
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata

import numpy as np

from planner.plan import Certificate, Plan, shortest_first
from planner.space import Search, candidates, space, without_model_parallelism
from planner.ties import resolve
from simulator.axes import AXES
from simulator.columns import Columns, distinct, legal
from simulator.critical_path import PipelineTimes, critical_path, message_ways, pipeline_times, step_at_least
from simulator.errors import NothingFitsError
from simulator.garbage import uncollected
from simulator.job import Job
from simulator.layout import Layout
from simulator.memory import capacity, memory_per_rank
from simulator.program import stage_costs
from simulator.results import Prediction
from simulator.risk import HIGH_RISK, needed, out_of_memory_probability
from simulator.schedules import SPLIT_BACKWARD
from simulator.screen import Screened, screen
from simulator.simulate import simulate
from simulator.stage import StageCost
from simulator.sync_cost import is_simulated

Progress = Callable[[str, float], None]
# Bounds are sums of the same terms as what they bound, in another order.
ROUNDING = 1 - 1e-9


def plan(
    job: Job,
    top: int = 5,
    progress: Progress | None = None,
    gap: float = 0.0,
    ties: bool = True,
) -> Plan:
    """Choose the best layout that is unlikely to run out of memory; if there is none, the best that fits. Of layouts
    that nobody can tell from the best one it is the simplest.

    Args:
        top: how many layouts to rank, the best one included.
        progress: called with what is being done and the fraction that is done.
        gap: how much better than what is found a layout may be that is not looked at, as a fraction of its step.
        ties: prefer the simplest of what ties with the best; without, the best itself is recommended.

    Raises:
        NothingFitsError: no legal layout fits; the message names the nearest misses.
    """
    with uncollected():
        report = progress or (lambda what, fraction: None)
        return _plan(job, top, report, gap, ties)


def _plan(job: Job, top: int, report: Progress, gap: float, ties: bool) -> Plan:
    started = time.perf_counter()
    report("listing layouts", 0.0)
    search = _Search(job, job.search, report)
    # Where the fastest is too likely to run out of memory, those behind it are of no interest.
    best = search.run(1, gap)
    if best and not _is_risky(best[0]):
        best = search.run(top, gap)
    if not best:
        misses = search.misses(3)
        raise NothingFitsError(_nothing_fits(job, search, misses), misses)
    certificate = Certificate(
        space=len(search.columns),
        illegal=len(search.columns) - len(search.rows),
        out_of_memory=search.out_of_memory,
        bounded=len(search.rows) - search.out_of_memory - search.simulated,
        simulated=search.simulated,
        lower_bound_gap=_gap_left(best[0], search.least),
        seconds=time.perf_counter() - started,
    )
    riskier = None
    if _is_risky(best[0]):
        safe = search.run(top, gap, safe=True)
        riskier, best = (best[0], safe) if safe else (None, search.run(top, gap))
    baseline, choice = _baseline(job), None
    if ties:
        report("looking for simpler layouts that are as fast", 1.0)
        best, choice = resolve(job, best, baseline, search.fastest(best[0]))
    return Plan(job, best[0], tuple(best[1:]), baseline, certificate, _provenance(job), riskier, choice)


def _is_risky(prediction: Prediction) -> bool:
    """Whether a layout is too likely to run out of memory."""
    return prediction.out_of_memory_probability > HIGH_RISK


def _gap_left(best: Prediction, least: float) -> float:
    """How much shorter than the best's the step of a layout that was not simulated can be, as a fraction."""
    return max(0.0, 1 - least / best.step_seconds) if least < math.inf else 0.0


@dataclass(order=True)
class _Entry:
    """A layout with a lower bound of its step; `level` says which, see above."""

    bound: float
    row: int
    level: int = field(compare=False)
    layout: Layout = field(compare=False)
    stages: tuple[StageCost, ...] = field(compare=False)


class _Search:
    """A space, screened, and walks through it. After one `least` is the bound of the best layout that it left."""

    def __init__(self, job: Job, limits: Search, report: Progress) -> None:
        self.job, self.report = job, report
        self.columns = space(job, limits)
        report(f"screening {len(self.columns):,} layouts", 0.0)
        self.rows = np.flatnonzero(legal(job, self.columns))
        self.legal = self.columns.take(self.rows)
        screened = screen(job, self.legal)
        self.seconds, self.memory = _with_stragglers(job, self.legal, screened) * ROUNDING, screened.memory * ROUNDING
        if job.cluster.gpu.kind != "gpu":
            # Ranks that share a machine's memory run out together: one of them says nothing.
            self.memory[:] = 0.0
        self.rooms = _capacities(job, self.legal)
        self.fits = self.memory <= self.rooms
        self.least = math.inf
        self.entries: dict[int, _Entry] = {}
        self.predictions: dict[Layout, Prediction] = {}
        self.found: list[Prediction] = []
        self.missed: list[tuple[float, Layout]] = []
        self.out_of_memory = self.simulated = 0
        self.pipelines: dict[tuple[object, ...], PipelineTimes] = {}

    def run(self, top: int, gap: float = 0.0, safe: bool = False) -> list[Prediction]:
        """The best layouts, best first; empty if nothing fits. `safe` are those unlikely to run out of memory."""
        self.top, self.gap, self.safe, self.found = top, gap, safe, []
        self.out_of_memory, self.simulated, self.missed = int(np.count_nonzero(~self.fits)), 0, []
        fitting = np.flatnonzero(self.fits)
        order = fitting[np.argsort(self.seconds[fitting], kind="stable")]
        queue: list[_Entry] = []
        at = 0
        while at < len(order) or queue:
            screened = float(self.seconds[order[at]]) if at < len(order) else math.inf
            bound = min(screened, queue[0].bound if queue else math.inf)
            if bound >= self._enough():
                self.least = bound
                break
            if screened <= bound:
                if safe and self._risk(self.memory[order[at]], self.rooms[order[at]]) > HIGH_RISK:
                    at += 1
                    continue
                heapq.heappush(queue, self._costed(int(order[at])))
                at += 1
                continue
            entry = heapq.heappop(queue)
            # Where ranks share processors nothing is alone, and where replicas differ one step is not the mean.
            if entry.level < 4 and not self.job.cluster.concurrency and not is_simulated(self.job, entry.layout):
                entry.level += 1
                bound_of = self._alone if entry.level == 3 else self._critical
                entry.bound = max(entry.bound, bound_of(entry) * ROUNDING)
                heapq.heappush(queue, entry)
            elif self._holds(entry):
                self._simulate(entry.layout)
                self.report(f"simulating: best step {self.found[0].step_seconds:.3g} s", at / len(order))
        return self.found

    def _enough(self) -> float:
        """The bound from which on no layout can enter the best."""
        if len(self.found) < self.top:
            return math.inf
        return self.found[-1].step_seconds * (1 - self.gap)

    def _costed(self, row: int) -> _Entry:
        """The second level, or what an earlier walk has found."""
        if row not in self.entries:
            layout = self.legal.layout(row)
            stages = stage_costs(self.job, layout)
            bound = max(float(self.seconds[row]), lower_bound(self.job, layout, stages) * ROUNDING)
            self.entries[row] = _Entry(bound, row, 2, layout, stages)
        return self.entries[row]

    def _holds(self, entry: _Entry) -> bool:
        """Whether a layout fits, to the byte."""
        ranks = memory_per_rank(self.job, entry.layout, entry.stages)
        need, room = needed(self.job, entry.layout, ranks), capacity(self.job, entry.layout)
        if need > room:
            self.out_of_memory += 1
            self.missed.append((need - room, entry.layout))
            return False
        return not self.safe or self._risk(need, room) <= HIGH_RISK

    def _risk(self, need: float, room: float) -> float:
        return out_of_memory_probability(need, room, self.job.stack.name)

    def _alone(self, entry: _Entry) -> float:
        """The third level."""
        layout, stages = entry.layout, entry.stages
        works = tuple((s.forward.total, s.backward.total, s.backward_weight.total) for s in stages)
        ways = tuple(message_ways(self.job, layout).items())
        count = layout.microbatches(self.job.training.global_batch_size)
        key = (layout.schedule, layout.pp, layout.virtual_stages, count, works, ways)
        if key not in self.pipelines:
            self.pipelines[key] = pipeline_times(self.job, layout, stages)
        return step_at_least(self.job, layout, stages, self.pipelines[key])

    def _critical(self, entry: _Entry) -> float:
        """The fourth level."""
        return critical_path(self.job, entry.layout, entry.stages)

    def _simulate(self, layout: Layout) -> None:
        if layout not in self.predictions:
            self.predictions[layout] = simulate(self.job, layout)
        self.found.append(self.predictions[layout])
        self.simulated += 1
        self.found.sort(key=shortest_first)
        del self.found[self.top :]

    def fastest(self, best: Prediction) -> Prediction:
        """The shortest step of all that were simulated; if the best is unlikely to run out of memory, of those that
        are."""
        most = HIGH_RISK if best.out_of_memory_probability <= HIGH_RISK else 1.0
        known = (p for p in self.predictions.values() if p.fits and p.out_of_memory_probability <= most)
        return min(known, key=shortest_first)

    def misses(self, count: int) -> list[tuple[float, Layout]]:
        """The layouts that need least more than there is, with how many bytes that is."""
        found = heapq.nsmallest(count, self.missed, key=lambda miss: miss[0])
        left = np.flatnonzero(~self.fits)
        for row in left[np.argsort((self.memory - self.rooms)[left], kind="stable")].tolist():
            if len(found) == count and self.memory[row] - self.rooms[row] >= found[-1][0]:
                break
            layout = self.legal.layout(row)
            need = needed(self.job, layout, memory_per_rank(self.job, layout, stage_costs(self.job, layout)))
            found.append((need - capacity(self.job, layout), layout))
            found = heapq.nsmallest(count, found, key=lambda miss: miss[0])
        return found


def _with_stragglers(job: Job, columns: Columns, screened: Screened) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """The bounds of screened layouts; where replicas differ only what `lower_bound` may count."""
    axes = [] if job.stragglers.none else [columns[axis] for axis in (*AXES, "rank_order")]
    firsts, code = distinct(columns["sync"], *axes)
    layouts = [columns.layout(row) for row in firsts.tolist()]
    differ = np.array([is_simulated(job, layout) for layout in layouts], dtype=bool)[code]
    factors = np.array([job.stragglers.least_factor(layout) for layout in layouts], dtype=np.float64)[code]
    return np.where(differ, screened.pipeline * factors, screened.seconds)


def _capacities(job: Job, columns: Columns) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Bytes that a rank of each row may use: it follows from their number and their servers."""
    world = columns["dp_replicate"] * columns["dp_shard"] * columns["cp"] * columns["tp"] * columns["pp"]
    firsts, code = distinct(world, columns["sync"])
    return np.array([capacity(job, columns.layout(row)) for row in firsts.tolist()], dtype=np.float64)[code]


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


def _baseline(job: Job) -> Prediction:
    """The best plain data-parallel layout that is unlikely to run out of memory, as the recommendation is; if there is
    none, the best that fits; if none does, the one that comes nearest."""
    search = _Search(job, without_model_parallelism(job), lambda what, fraction: None)
    found = search.run(1)
    if found and _is_risky(found[0]):
        found = search.run(1, safe=True) or found
    found = found or [simulate(job, layout) for _, layout in search.misses(1)]
    return found[0] if found else _impossible_baseline(job)


def _impossible_baseline(job: Job) -> Prediction:
    """Where the batch cannot be divided over all ranks: the best plain layout on as many nodes as it can be divided
    over, or on as many ranks of one, the others idle."""
    batch, per_node = job.training.global_batch_size, job.cluster.gpus_per_node
    nodes = max((n for n in range(1, job.nodes) if batch % (n * per_node) == 0), default=0)
    ranks = nodes * per_node or math.gcd(batch, job.world_size)
    fewer = dataclasses.replace(job, nodes=nodes)
    used = _baseline(fewer) if nodes else simulate(job, Layout(dp_replicate=ranks))
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


def _nothing_fits(job: Job, search: _Search, misses: list[tuple[float, Layout]]) -> str:
    """One sentence: the nearest misses and by how much."""
    where = f"{job.model.name} on {job.nodes} x {job.cluster.name}"
    if not len(search.columns):
        return f"no layout of {where}: no sizes that [search] allows multiply to its {job.world_size} ranks"
    if not misses:
        example = next(candidates(job), None)
        reason = f"; for example {example.short()}: {example.problems(job)[0]}" if example else ""
        count = len(search.columns)
        return f"no layout of {where} is legal: {count} of {count} candidates break a rule{reason}"
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
