"""What would make a layout fit: real alternatives, each one simulated, the cheapest in step time first."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from planner.changes import changes, more_nodes
from planner.search import lower_bound
from simulator.job import Job
from simulator.layout import Layout
from simulator.layout_text import change_text
from simulator.memory import capacity, memory_per_rank
from simulator.program import stage_costs
from simulator.results import Prediction
from simulator.risk import HIGH_RISK, memory_residuals, needed, out_of_memory_probability
from simulator.schedules import V_PLACEMENT
from simulator.simulate import simulate
from simulator.stage import StageCost

# Remedies that are shown, those with more nodes besides.
MOST_REMEDIES = 6
# Forwards and backwards that are simulated in all, about a second of them; the first remedies are simulated always.
MOST_OPS, LEAST_SIMULATED = 30_000, 3
# Above it a cluster that is larger still takes a second to build: more nodes are tried where nothing else fits.
MOST_DEVICES_GROWN = 4096


@dataclass(frozen=True)
class Remedy:
    """A layout that differs from a refused one in what `change` says, in words that `--layout` takes; `nodes` is a key
    of the job. peak is in bytes and held against the memory there is; slowdown is the step over that of the refused
    layout, minus 1."""

    change: str
    layout: Layout
    nodes: int
    peak: float
    step_seconds: float
    slowdown: float
    out_of_memory_probability: float
    fits: bool


@dataclass(frozen=True)
class Remedies:
    """What was found: what fits, or where nothing does, the `nearest` layout and the bytes it is short of."""

    found: tuple[Remedy, ...]
    nearest: Remedy | None
    short_by: float


@dataclass(frozen=True)
class _Tried:
    """A changed layout with the bytes it needs and the least time it can take; name is the field that changed."""

    name: str
    job: Job
    layout: Layout
    need: float
    bound: float

    @property
    def risk(self) -> float:
        return out_of_memory_probability(self.need, capacity(self.job, self.layout), self.job.stack.name)

    @property
    def over(self) -> float:
        return self.need - capacity(self.job, self.layout)


class _Costs:
    """Asks the simulator for bytes and bounds, for layouts with the same stages once."""

    def __init__(self) -> None:
        self.stages: dict[tuple[int, Layout], tuple[StageCost, ...]] = {}

    def tried(self, name: str, job: Job, layout: Layout) -> _Tried:
        # Of the schedule only the placement matters to what a stage costs.
        placed = dataclasses.replace(layout, schedule="DualPipeV" if layout.schedule in V_PLACEMENT else "1F1B")
        key = (job.nodes, placed)
        stages = self.stages.get(key) or self.stages.setdefault(key, stage_costs(job, placed))
        need = needed(job, layout, memory_per_rank(job, layout, stages))
        return _Tried(name, job, layout, need, lower_bound(job, layout, stages))


def remedies(job: Job, refused: Prediction) -> Remedies:
    """What would make a layout fit that does not: single changes, pairs where no single one does, and more nodes last.

    Of every field the cheapest change, simulated; the cheapest in step time first.
    """
    return _find(job, refused, lambda tried: tried.over <= 0)


def advice(job: Job, prediction: Prediction) -> Remedies:
    """What a user should know of a prediction: remedies where it does not fit, the safer change where it fits barely,
    nothing where it is safe."""
    if not prediction.fits:
        return remedies(job, prediction)
    found = safer(job, prediction) if prediction.out_of_memory_probability > HIGH_RISK else None
    return Remedies((found,) if found else (), None, 0.0)


def safer(job: Job, risky: Prediction) -> Remedy | None:
    """The cheapest single change that brings the probability of running out of memory below HIGH_RISK; the safest
    if none does; None where nothing lowers it."""
    costs = _Costs()
    less = [t for t in _single(costs, job, risky.layout) if t.over <= 0 and t.risk < risky.out_of_memory_probability]
    if not less:
        return None
    enough = [t for t in less if t.risk <= HIGH_RISK] or [min(less, key=lambda t: t.need)]
    found = _cheapest(job, enough, risky)
    return found[0]


def _find(job: Job, refused: Prediction, accepts: Callable[[_Tried], bool]) -> Remedies:
    costs = _Costs()
    single = list(_single(costs, job, refused.layout))
    tried, fitting = single, [t for t in single if accepts(t)]
    if not fitting:
        pairs = list(_pairs(costs, job, refused.layout, single))
        tried, fitting = [*single, *pairs], [t for t in pairs if accepts(t)]
    found = _cheapest(job, fitting, refused)[:MOST_REMEDIES]
    grows = not found or job.world_size <= MOST_DEVICES_GROWN
    larger = next(_on_more_nodes(costs, job, refused, tried, accepts), None) if grows else None
    nearest = min(tried, key=lambda t: t.over, default=None)
    every = (*found, *([larger] if larger else []))
    over = needed(job, refused.layout, refused.memory_per_stage) - capacity(job, refused.layout)
    if found or nearest is None or nearest.over >= over:
        return Remedies(every, None, 0.0)
    return Remedies(every, _simulated(job, nearest, refused), nearest.over)


def _single(costs: _Costs, job: Job, layout: Layout) -> Iterator[_Tried]:
    for name, changed in changes(job, layout):
        yield costs.tried(name, job, changed)


def _pairs(costs: _Costs, job: Job, layout: Layout, single: Iterable[_Tried]) -> Iterator[_Tried]:
    """Two changes of different fields: after those of each field that need least or cost least, any other."""
    seen = {layout, *(t.layout for t in single)}
    firsts: list[_Tried] = []
    for name in dict.fromkeys(t.name for t in single):
        same = [t for t in single if t.name == name]
        firsts += {t.layout: t for t in (min(same, key=lambda t: t.need), min(same, key=lambda t: t.bound))}.values()
    for first in firsts:
        for name, changed in changes(job, first.layout):
            if name != first.name and changed not in seen:
                seen.add(changed)
                yield costs.tried(f"{first.name} {name}", job, changed)


def _on_more_nodes(
    costs: _Costs, job: Job, refused: Prediction, tried: list[_Tried], accepts: Callable[[_Tried], bool]
) -> Iterator[Remedy]:
    """The cheapest layout on the fewest nodes that suffice: the refused one grown, or the nearest of those tried."""
    starts = [refused.layout]
    if tried:
        starts.append(min(tried, key=lambda t: t.over).layout)
    for layout in starts:
        by_nodes: dict[int, list[_Tried]] = {}
        for larger, grown in more_nodes(job, layout):
            if by_nodes and larger.nodes not in by_nodes:
                break
            found = costs.tried("nodes", larger, grown)
            if accepts(found):
                by_nodes.setdefault(larger.nodes, []).append(found)
        for same in by_nodes.values():
            yield _cheapest(job, same, refused)[0]
            return


def _cheapest(job: Job, fitting: list[_Tried], refused: Prediction) -> list[Remedy]:
    """Of every field the cheapest change, in the order of the step time. Of a field only those are simulated that a
    bound does not rule out."""
    best: dict[str, Remedy] = {}
    spent = 0
    for t in sorted(fitting, key=lambda t: (t.bound, t.layout.short())):
        known = best.get(t.name)
        if known is not None and t.bound >= known.step_seconds:
            continue
        ops = 2 * t.layout.stages * t.layout.microbatches(t.job.training.global_batch_size)
        if len(best) >= LEAST_SIMULATED and spent + ops > MOST_OPS:
            continue
        spent += ops
        found = _simulated(job, t, refused)
        if known is None or found.step_seconds < known.step_seconds:
            best[t.name] = found
    return sorted(best.values(), key=lambda r: (r.step_seconds, r.change))


def _simulated(job: Job, tried: _Tried, refused: Prediction) -> Remedy:
    predicted = simulate(tried.job, tried.layout)
    words = change_text(refused.layout, tried.layout, job, tried.job)
    if tried.job.nodes * tried.job.cluster.gpus_per_node != refused.layout.world_size and tried.name == "nodes":
        words = f"nodes={tried.job.nodes} {words}"
    return Remedy(
        change=words,
        layout=tried.layout,
        nodes=tried.job.nodes,
        peak=tried.need,
        step_seconds=predicted.step_seconds,
        slowdown=predicted.step_seconds / refused.step_seconds - 1,
        out_of_memory_probability=predicted.out_of_memory_probability,
        fits=predicted.fits,
    )


def when_nothing_fits(job: Job, misses: Sequence[tuple[float, Layout]]) -> Remedies:
    """What would make the nearest miss of a search fit; only what the search did not try can, so mostly more nodes."""
    if not misses:
        return Remedies((), None, 0.0)
    return remedies(job, simulate(job, misses[0][1]))


def show_risk(probability: float) -> str:
    """A probability as a reader needs it.

    >>> [show_risk(p) for p in (0.0, 0.004, 0.126, 0.997)]
    ['<1%', '<1%', '13%', '>99%']
    """
    if probability < 0.01:
        return "<1%"
    return ">99%" if probability > 0.99 else f"{probability:.0%}"


def remedy_lines(found: Remedies, name: str = "") -> list[str]:
    """What was found, a line each, after a line that says what it is."""
    of = f" {name}" if name else ""
    lines = [f"what would make{of or ' it'} fit, cheapest first:"] if found.found else []
    lines += [f"  {remedy_line(remedy)}" for remedy in found.found]
    if found.nearest is not None:
        lines.append(
            f"on these devices no single change and no two make{of or ' it'} fit; nearest to it comes "
            f"{found.nearest.change}, "
            f"{found.nearest.peak / 2**30:.1f} GiB, {found.short_by / 2**30:.1f} GiB too much"
        )
    return lines


def remedy_line(remedy: Remedy) -> str:
    """`recompute=selective: 71.2 GiB, +4.0% step time, risk 12%`."""
    change = re.sub(r"^nodes=(\d+) ?", r"--set nodes=\1 ", remedy.change).strip()
    return (
        f"{change}: {remedy.peak / 2**30:.1f} GiB, {remedy.slowdown:+.1%} step time, "
        f"risk {show_risk(remedy.out_of_memory_probability)}"
    )


def risk_sentence(prediction: Prediction, job: Job, other: Prediction | Remedy | None) -> str:
    """How likely it is to run out of memory; where that is likely, a warning that names what is safer."""
    risk = prediction.out_of_memory_probability
    if risk <= HIGH_RISK:
        return f"risk of running out of memory: {show_risk(risk)}"
    spread = memory_residuals().of(job.stack.name).log_sigma
    said = f"warning: it may run out of memory (risk {show_risk(risk)}: predicted peaks err by {spread:.0%})"
    if other is None:
        return f"{said}; no change that was tried lowers it"
    slower = other.step_seconds / prediction.step_seconds - 1
    change = other.change if isinstance(other, Remedy) else other.layout.short()
    return f"{said}; {change} lowers it to {show_risk(other.out_of_memory_probability)} for {slower:+.1%} step time"
