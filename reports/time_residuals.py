"""How far predicted steps are off, as quantiles: what the interval of a prediction and the ties of a plan rest on.

    e = ln(measured step / predicted step) = ln(predicted / measured tokens per second)

Runs of one source are alike (its authors, machines and settings), and so are the layouts of one job, so nothing here
counts rows: every source has the same weight, its jobs share it, and the layouts of a job share theirs. For the same
reason all that is learnt is judged on sources that are left out, one after the other, and intervals are stretched until
they hold there. Constants of the simulator were fitted to some of these rows, the left-out sources' own among them,
which no such split undoes: on software and devices of which nothing is published errors may be larger.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reports.published import source_name
from reports.validation import Result
from simulator.error_bars import (
    LEVEL,
    Best,
    Difference,
    HeldOut,
    Spread,
    TimeResiduals,
    model_family,
)
from simulator.layout import Layout

FILE = Path(__file__).parents[1] / "simulator" / "data" / "time_residuals.toml"
SHARES = (0.1, 0.25, 0.75, 0.9)
# As how many jobs the quantiles of all runs count beside those of a group.
PRIOR_JOBS = 20
# Jobs that a group must have for numbers of its own.
LEAST_JOBS = 3
GROUPS = ("gpu", "family", "stack")
# The middle half of a normal distribution is within so many standard deviations.
MIDDLE_HALF = 0.6745

Quantiles = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True)
class Run:
    """One layout of one published job: ln(measured / predicted step), the median where several rows are the same to the
    simulator."""

    source: str
    job: str
    gpu: str
    family: str
    stack: str
    layout: Layout
    step_seconds: float
    residual: float


@dataclass(frozen=True)
class Judged:
    """A run of a source that was left out, and the quantiles that the others give it."""

    run: Run
    weight: float
    quantiles: tuple[float, ...]

    def inside(self, level: float) -> bool:
        low, high = _ends(self.quantiles, level)
        return low <= self.run.residual <= high


def runs(results: Iterable[Result]) -> list[Run]:
    """The layouts of the rows that count and have a throughput."""
    found: dict[tuple[str, int], list[tuple[Result, float]]] = {}
    for r in results:
        if r.counts and r.error is not None and r.prediction is not None:
            found.setdefault((r.row.text("job") or r.row.text("id"), id(r.prediction)), []).append((r, r.error))
    layouts = []
    for (job, _), same in found.items():
        first = same[0][0]
        assert first.case is not None and first.prediction is not None
        residual = statistics.median(math.log1p(error) for _, error in same)
        task = first.case.job
        layouts.append(
            Run(
                source_name(first.row), job, task.cluster.gpu.name, model_family(task.model.family), task.stack.name,
                first.prediction.layout, first.prediction.step_seconds, residual,
            )
        )  # fmt: skip
    return layouts


def weights(found: Sequence[Run]) -> Quantiles:
    """Sources count the same, the jobs of a source too, and the layouts of a job too."""
    layouts: dict[tuple[str, str], int] = defaultdict(int)
    jobs: dict[str, set[str]] = defaultdict(set)
    for run in found:
        layouts[run.source, run.job] += 1
        jobs[run.source].add(run.job)
    return np.array([1 / layouts[run.source, run.job] / len(jobs[run.source]) for run in found])


def quantiles(found: Sequence[Run]) -> Quantiles:
    """The residuals that SHARES of the weight stay below; between two of them in proportion."""
    residuals, weight = np.array([run.residual for run in found]), weights(found)
    order = np.argsort(residuals, kind="stable")
    below = np.cumsum(weight[order]) - weight[order] / 2
    return np.asarray(np.interp(SHARES, below / weight.sum(), residuals[order]), dtype=np.float64)


@dataclass(frozen=True)
class Fit:
    """Quantiles of all runs, and what a group adds to them, by ("gpu", name)."""

    pooled: Quantiles
    added: dict[tuple[str, str], Quantiles]

    def of(self, run: Run) -> Quantiles:
        """The quantiles of a run: of its groups the widest."""
        own = [self.added[key] for kind in GROUPS if (key := (kind, getattr(run, kind))) in self.added]
        low = np.min([np.zeros(2), *(one[:2] for one in own)], axis=0)
        high = np.max([np.zeros(2), *(one[2:] for one in own)], axis=0)
        return np.asarray(self.pooled + np.concatenate([low, high]), dtype=np.float64)


def fit(found: Sequence[Run]) -> Fit:
    """Partial pooling: a group of n jobs adds n / (n + PRIOR_JOBS) of how its quantiles differ from those of all,
    where that widens."""
    pooled = quantiles(found)
    added: dict[tuple[str, str], Quantiles] = {}
    for kind in GROUPS:
        for name in sorted({getattr(run, kind) for run in found}):
            group = [run for run in found if getattr(run, kind) == name]
            if _jobs(group) >= LEAST_JOBS:
                more = _share(group) * (quantiles(group) - pooled)
                added[kind, name] = np.concatenate([np.minimum(more[:2], 0.0), np.maximum(more[2:], 0.0)])
    return Fit(pooled, added)


def held_out(found: Sequence[Run]) -> list[Judged]:
    """Every source judged by what is fitted to all the others."""
    judged = []
    weight = dict(zip(found, weights(found), strict=True))
    for source in sorted({run.source for run in found}):
        known = fit([run for run in found if run.source != source])
        judged += [Judged(run, weight[run], tuple(known.of(run))) for run in found if run.source == source]
    return judged


def coverage(judged: Sequence[Judged], level: float, by_source: bool, stretch: float = 1.0) -> float:
    """The part of what was left out that lay inside: sources, or jobs, counting the same."""
    weight = _weights_of(judged, by_source)
    inside = [_stretched(one, stretch).inside(level) for one in judged]
    return float(np.average(inside, weights=weight))


def width(judged: Sequence[Judged], level: float, stretch: float = 1.0) -> float:
    """The mean width of the intervals in ln, jobs counting the same."""
    ends = [_ends(_stretched(one, stretch).quantiles, level) for one in judged]
    return float(np.average([high - low for low, high in ends], weights=_weights_of(judged, by_source=False)))


def stretch(judged: Sequence[Judged], level: float) -> float:
    """What both ends are multiplied by, so that of sources left out `level` lies inside, counted by job and by source:
    1 where they hold as they are."""
    factors = np.arange(1.0, 3.0, 0.01)
    held = (min(coverage(judged, level, by, factor) for by in (True, False)) >= level for factor in factors)
    return round(float(next((f for f, holds in zip(factors, held, strict=True) if holds), factors[-1])), 2)


def differences(found: Sequence[Run]) -> Difference:
    """How far differences of layouts of one job are off. Sources count the same, their jobs too, and pairs of a job."""
    pairs = _pairs(found)
    half, four_fifths = (_weighted(pairs, share) for share in (0.5, LEVEL))
    held = {
        share: float(
            np.mean([_inside(pairs, source, _weighted([p for p in pairs if p[1] != source], share))
                     for source in sorted({source for _, source, _ in pairs})])
        )
        for share in (0.5, LEVEL)
    }  # fmt: skip
    # A difference has the variance of two layouts.
    sigma_layout = half / MIDDLE_HALF / math.sqrt(2)
    q25, q75 = quantiles(found)[1:3]
    variance = ((q75 - q25) / 2 / MIDDLE_HALF) ** 2
    jobs = {(source, job) for _, source, job in pairs}
    return Difference(
        half=round(half, 4), four_fifths=round(four_fifths, 4), sigma_layout=round(sigma_layout, 4),
        sigma_job=round(math.sqrt(max(0.0, variance - sigma_layout**2)), 4), pairs=len(pairs), jobs=len(jobs),
        sources=len({source for source, _ in jobs}), held_out_half=round(held[0.5], 3),
        held_out_four_fifths=round(held[LEVEL], 3),
    )  # fmt: skip


def best_mfu(results: Iterable[Result]) -> dict[str, dict[str, Best]]:
    """The highest MFU measured of each GPU and precision, FLOPs counted as the simulator counts them. Adapters beside
    frozen weights (LoRA) do not count: their FLOPs are counted in more ways than one."""
    found: dict[str, dict[str, Best]] = {}
    for r in results:
        if not r.counts or r.error is None or r.prediction is None or r.case is None:
            continue
        job = r.case.job
        if job.training.peft != "none":
            continue
        gpu, precision = job.cluster.gpu, job.cluster.gpu.arithmetic(job.training.precision)
        best = Best(round(r.prediction.mfu / (1 + r.error), 4), r.row.text("id"))
        known = found.setdefault(gpu.name, {}).get(precision)
        if known is None or best.mfu > known.mfu:
            found[gpu.name][precision] = best
    return {gpu: dict(sorted(found[gpu].items())) for gpu in sorted(found)}


def time_residuals_of(results: Sequence[Result]) -> TimeResiduals:
    """All that simulator/data/time_residuals.toml holds."""
    found = runs(results)
    known, judged = fit(found), held_out(found)
    factors = {level: stretch(judged, level) for level in (0.5, LEVEL)}
    stretched = np.array([factors[LEVEL], factors[0.5], factors[0.5], factors[LEVEL]])

    def spread(values: Quantiles, group: Sequence[Run]) -> Spread:
        q10, q25, q75, q90 = (round(float(value), 4) + 0.0 for value in values * stretched)
        return Spread(q10, q25, q75, q90, len(group), _jobs(group), len({run.source for run in group}))

    groups: dict[str, dict[str, Spread]] = {kind: {} for kind in GROUPS}
    for (kind, name), values in known.added.items():
        if kind in groups:
            groups[kind][name] = spread(values, [run for run in found if getattr(run, kind) == name])
    return TimeResiduals(
        pooled=spread(known.pooled, found),
        difference=differences(found),
        held_out=tuple(
            HeldOut(
                level=level,
                by_job=round(coverage(judged, level, False, factors[level]), 3),
                by_source=round(coverage(judged, level, True, factors[level]), 3),
                width=round(width(judged, level, factors[level]), 3),
                stretched=factors[level],
            )
            for level in (0.5, LEVEL)
        ),
        gpu=groups["gpu"], family=groups["family"], stack=groups["stack"], mfu=best_mfu(results),
    )  # fmt: skip


def residuals_toml(known: TimeResiduals) -> str:
    """simulator/data/time_residuals.toml."""
    rule = "published runs (reports/data/published); sources, their jobs and the layouts of a job count the same"
    lines = [
        "# ln(measured / predicted step): quantiles of 10, 25, 75 and 90 % of layouts of published jobs, and what",
        "# GPUs, model families and stacks add to them. Written by `make residuals` from",
        f"# {rule}.",
        "", "[pooled]", *_fields(known.pooled),
        "", "# Two layouts of one job: how far ln(step / step) is off.", "[difference]", *_fields(known.difference),
        "", "# Of sources that nothing was fitted to; `stretched`: what both ends were multiplied by to hold there.",
    ]  # fmt: skip
    for held in known.held_out:
        lines += ["[[held_out]]", *_fields(held)]
    for kind in GROUPS:
        for name, group in getattr(known, kind).items():
            lines += ["", f'[{kind}."{name}"]', *_fields(group)]
    lines += ["", "# The highest published MFU, FLOPs counted as the simulator does."]
    for gpu, precisions in known.mfu.items():
        lines += ["", *(f'[mfu."{gpu}".{p}]\nmfu = {best.mfu}\nrow = "{best.row}"' for p, best in precisions.items())]
    return "\n".join(lines) + "\n"


def _pairs(found: Sequence[Run]) -> list[tuple[float, str, str]]:
    """|error of the difference|, source and job of every two layouts of a job."""
    by_job: dict[tuple[str, str], list[Run]] = {}
    for run in found:
        by_job.setdefault((run.source, run.job), []).append(run)
    return [
        (abs(one.residual - other.residual), *key)
        for key, group in by_job.items()
        for at, one in enumerate(group)
        for other in group[:at]
    ]


def _pair_weights(pairs: Sequence[tuple[float, str, str]]) -> Quantiles:
    of_job: dict[tuple[str, str], int] = defaultdict(int)
    for _, source, job in pairs:
        of_job[source, job] += 1
    jobs: dict[str, int] = defaultdict(int)
    for source, _ in of_job:
        jobs[source] += 1
    return np.array([1 / of_job[source, job] / jobs[source] for _, source, job in pairs])


def _weighted(pairs: Sequence[tuple[float, str, str]], share: float) -> float:
    values, weight = np.array([pair[0] for pair in pairs]), _pair_weights(pairs)
    order = np.argsort(values, kind="stable")
    below = (np.cumsum(weight[order]) - weight[order] / 2) / weight.sum()
    return float(np.interp(share, below, values[order]))


def _inside(pairs: Sequence[tuple[float, str, str]], source: str, limit: float) -> float:
    """The part of a source's pairs that is off by no more, its jobs counting the same."""
    own = [pair for pair in pairs if pair[1] == source]
    return float(np.average([pair[0] <= limit for pair in own], weights=_pair_weights(own)))


def _ends(values: Sequence[float], level: float) -> tuple[float, float]:
    return (values[1], values[2]) if level == 0.5 else (values[0], values[3])


def _stretched(one: Judged, factor: float) -> Judged:
    return Judged(one.run, one.weight, tuple(value * factor for value in one.quantiles))


def _weights_of(judged: Sequence[Judged], by_source: bool) -> Quantiles:
    if by_source:
        return np.array([one.weight for one in judged])
    count: dict[tuple[str, str], int] = defaultdict(int)
    for one in judged:
        count[one.run.source, one.run.job] += 1
    return np.array([1 / count[one.run.source, one.run.job] for one in judged])


def _jobs(group: Sequence[Run]) -> int:
    return len({(run.source, run.job) for run in group})


def _share(group: Sequence[Run]) -> float:
    return _jobs(group) / (_jobs(group) + PRIOR_JOBS)


def _fields(found: Spread | Difference | HeldOut) -> list[str]:
    return [f"{name} = {value}" for name, value in vars(found).items()]


def by_gpu(judged: Sequence[Judged], factor: float) -> list[tuple[str, int, int, float, float]]:
    """(GPU, layouts, jobs, part inside the interval of LEVEL, mean width), jobs counting the same; most jobs first."""
    groups: dict[str, list[Judged]] = {}
    for one in judged:
        groups.setdefault(one.run.gpu, []).append(one)
    rows = [
        (name, len(g), _jobs([one.run for one in g]), coverage(g, LEVEL, False, factor), width(g, LEVEL, factor))
        for name, g in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row[2], row[0]))
