"""Constants of a cluster's links, fitted to measured collectives by the simulator's own formula.

Seconds of a collective are piecewise linear in what one fits: its latency, 1 / efficiency and ramp (collectives.py),
and for an all-reduce over several domains the fabric's latency for every doubling. So a few rounds of least squares of
relative errors, each on the formula's slopes at the round before, give the best constants; whatever else is in the
formula (floors, trees, rings, the domain's own links) is as it is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from dataclasses import dataclass

import numpy as np

from simulator.cluster import ClusterSpec, CollectiveFit, CollectiveSample, GroupShape, Link, build_cluster, group_shape
from simulator.collectives import collective_seconds, message_seconds
from simulator.errors import UserError

# The form holds from here on; below it NCCL's other protocols have other latencies (collectives.py).
LEAST_BYTES = 2**20
# Sizes of one collective on one group that can tell constants apart, and the range that they must span.
LEAST_SIZES, LEAST_RANGE = 4, 8.0
# A constant is fitted where it makes at least this much of some sample's seconds.
LEAST_SHARE = 0.2
_ROUNDS = 12
# Where the search begins: the efficiency of the file, and slower fabrics, whose cards decide where faster ones' do not.
_STARTS = (1.0, 0.6, 0.3, 0.1)
# Shapes follow from bandwidths, which are not fitted.
Shapes = dict[CollectiveSample, GroupShape]


@dataclass(frozen=True)
class Fitted:
    """One collective on one tier: constants before and after, which of them the samples determined, and the relative
    errors |predicted / measured - 1| (median, largest) on every other size by constants fitted without it. Where those
    are larger than before, the constants of before are kept."""

    collective: str
    tier: str
    ranks: int
    domains: tuple[int, ...]
    samples: int
    determined: tuple[str, ...]
    kept: bool
    before: dict[str, float]
    after: dict[str, float]
    error_before: tuple[float, float]
    error_after: tuple[float, float]


@dataclass(frozen=True)
class _Free:
    """Where the constants of one collective lie: the tier, and the entry from `entry` ranks (domains) on."""

    collective: str
    tier: str
    entry: int


def fit_cluster(spec: ClusterSpec, samples: list[CollectiveSample]) -> tuple[ClusterSpec, list[Fitted]]:
    """The cluster with constants fitted to these samples, and what was fitted.

    Samples of one collective on several numbers of domains are fitted together. Those below LEAST_BYTES are left out.

    Raises:
        UserError: samples that determine nothing, by name.
    """
    groups: dict[_Free, list[CollectiveSample]] = {}
    for sample in samples:
        if sample.bytes >= LEAST_BYTES:
            groups.setdefault(_free(spec, sample), []).append(sample)
    if not groups:
        raise UserError(f"the tables have no size of {LEAST_BYTES} bytes and more: run them with -b 1M -e 8G -f 2")
    fitted = []
    # What happens inside of a domain bounds what happens between them.
    for free in sorted(groups, key=lambda one: one.tier == "scale_out"):
        spec, found = _fit_one(spec, free, sorted(groups[free], key=lambda one: (one.domains, one.bytes)))
        fitted.append(found)
    return dataclasses.replace(spec, samples=(*spec.samples, *samples)), fitted


def predicted_seconds(spec: ClusterSpec, sample: CollectiveSample) -> float:
    """What the simulator says the sample takes."""
    return _seconds(spec, sample, _shape(spec, sample))


def _seconds(spec: ClusterSpec, sample: CollectiveSample, shape: GroupShape) -> float:
    if sample.collective == "send_recv":
        return sum(message_seconds(sample.bytes, shape, spec))
    return collective_seconds(sample.collective, sample.bytes, shape, spec)  # type: ignore[arg-type]


def _shape(spec: ClusterSpec, sample: CollectiveSample) -> GroupShape:
    per_domain = max(1, spec.domain // spec.gpus_per_node)
    graph = build_cluster(spec, sample.domains * per_domain)
    group = tuple(d * spec.domain + i for d in range(sample.domains) for i in range(sample.ranks // sample.domains))
    return group_shape(graph, group)


def _free(spec: ClusterSpec, sample: CollectiveSample) -> _Free:
    if sample.ranks % sample.domains or sample.ranks // sample.domains > spec.domain:
        raise UserError(
            f"{sample.ranks} ranks on {sample.domains} domains do not lie evenly on {spec.name}'s of {spec.domain} GPUs"
        )
    if sample.domains == 1:
        return _Free(sample.collective, "scale_up", 2 if sample.collective == "send_recv" else sample.ranks)
    if spec.scale_out is None:
        raise UserError(f"a table spans {sample.domains} domains, but cluster {spec.name} has no scale_out")
    return _Free(sample.collective, "scale_out", 2)


def _fit_one(spec: ClusterSpec, free: _Free, samples: list[CollectiveSample]) -> tuple[ClusterSpec, Fitted]:
    where = f"{free.collective} of {samples[0].ranks} ranks on {spec.name}"
    sizes = sorted({sample.bytes for sample in samples})
    if len(sizes) < LEAST_SIZES or sizes[-1] / sizes[0] < LEAST_RANGE:
        raise UserError(
            f"{where}: {len(sizes)} sizes from {sizes[0]:.0f} to {sizes[-1]:.0f} bytes determine no latency and no "
            f"bandwidth; at least {LEAST_SIZES} of 1 MiB and more over a factor of {LEAST_RANGE:.0f} do"
        )
    spec = _with_entry(spec, free)
    start = _constants(spec, free)
    even, odd = samples[::2], samples[1::2]
    shapes = {sample: _shape(spec, sample) for sample in samples}
    names = _determined(spec, free, samples, shapes, len(even))
    if not names:
        raise UserError(
            f"{where}: the samples determine no constant of {free.tier}: its own links do not decide these seconds"
        )
    half = _with(spec, free, _solve(spec, free, even, names, shapes))
    before, unseen = _errors(spec, odd, shapes), _errors(half, odd, shapes)
    kept = sum(unseen) >= sum(before)
    after = start if kept else _solve(spec, free, samples, names, shapes)
    found = Fitted(
        free.collective, free.tier, samples[0].ranks, tuple(sorted({sample.domains for sample in samples})),
        len(samples), names, kept, _shown(start), _shown(after), before, unseen,
    )  # fmt: skip
    return _with(spec, free, after), found


def _shown(constants: dict[str, float]) -> dict[str, float]:
    """As a cluster file has them: the efficiency, not its inverse."""
    return {name: 1 / value if name == "efficiency" else value for name, value in constants.items()}


def _errors(spec: ClusterSpec, samples: list[CollectiveSample], shapes: Shapes) -> tuple[float, float]:
    """(median, largest) relative error."""
    found = [abs(_seconds(spec, sample, shapes[sample]) / sample.seconds - 1) for sample in samples]
    return statistics.median(found), max(found)


def _link(spec: ClusterSpec, free: _Free) -> Link:
    link = spec.scale_up if free.tier == "scale_up" else spec.scale_out
    assert link is not None
    return link


def _with_entry(spec: ClusterSpec, free: _Free) -> ClusterSpec:
    """An entry that begins with this number of ranks, made of the one that holds there."""
    link = _link(spec, free)
    fits = link.collectives.get(free.collective) or link.collectives.get("all_gather") or ()
    if not fits:
        fits = (CollectiveFit(2, link.latency, 0.8),)
    holds = max((fit for fit in fits if fit.ranks <= free.entry), key=lambda fit: fit.ranks, default=fits[0])
    if holds.ranks == free.entry and free.collective in link.collectives:
        return spec
    entries = sorted(
        [*(fit for fit in fits if fit.ranks != free.entry), dataclasses.replace(holds, ranks=free.entry)],
        key=lambda fit: fit.ranks,
    )
    return _replaced(
        spec, free, dataclasses.replace(link, collectives=link.collectives | {free.collective: tuple(entries)})
    )


def _replaced(spec: ClusterSpec, free: _Free, link: Link) -> ClusterSpec:
    return (
        dataclasses.replace(spec, scale_up=link)
        if free.tier == "scale_up"
        else dataclasses.replace(spec, scale_out=link)
    )


def _constants(spec: ClusterSpec, free: _Free) -> dict[str, float]:
    link = _link(spec, free)
    fit = next(fit for fit in link.collectives[free.collective] if fit.ranks == free.entry)
    found = {"latency": fit.latency, "efficiency": 1 / fit.efficiency, "ramp": fit.ramp}
    if free.tier == "scale_out" and free.collective == "all_reduce":
        found["latency_per_doubling"] = link.latency_per_doubling
    return found


def _with(spec: ClusterSpec, free: _Free, constants: dict[str, float]) -> ClusterSpec:
    link = _link(spec, free)
    fits = tuple(
        CollectiveFit(free.entry, constants["latency"], 1 / constants["efficiency"], constants["ramp"])
        if fit.ranks == free.entry else fit
        for fit in link.collectives[free.collective]
    )  # fmt: skip
    changed = dataclasses.replace(link, collectives=link.collectives | {free.collective: fits})
    if "latency_per_doubling" in constants:
        changed = dataclasses.replace(changed, latency_per_doubling=constants["latency_per_doubling"])
    return _replaced(spec, free, changed)


def _slopes(
    spec: ClusterSpec,
    free: _Free,
    samples: list[CollectiveSample],
    at: dict[str, float],
    names: tuple[str, ...],
    shapes: Shapes,
) -> tuple[np.ndarray, np.ndarray]:
    """(seconds, their slopes by each constant) at these constants."""
    base = _with(spec, free, at)
    seconds = np.array([_seconds(base, sample, shapes[sample]) for sample in samples])
    columns = []
    for name in names:
        step = max(abs(at[name]), {"latency": 1e-6, "latency_per_doubling": 1e-6, "ramp": 1e-9}.get(name, 1.0)) * 1e-4
        moved = _with(spec, free, at | {name: at[name] + step})
        times = (_seconds(moved, sample, shapes[sample]) for sample in samples)
        columns.append([(time - t) / step for time, t in zip(times, seconds, strict=True)])
    return seconds, np.array(columns).T


def _determined(
    spec: ClusterSpec, free: _Free, samples: list[CollectiveSample], shapes: Shapes, half: int
) -> tuple[str, ...]:
    """The constants that the samples determine: each is at least LEAST_SHARE of some sample once all are fitted, and
    half of the samples are more than the constants. One number of domains cannot tell a latency from one per doubling:
    the latter is fitted, the former kept."""
    names: tuple[str, ...] = tuple(_constants(spec, free))
    if "latency_per_doubling" in names and len({sample.domains for sample in samples}) == 1:
        names = tuple(name for name in names if name != "latency")
    if half <= len(names):
        names = tuple(name for name in names if name != "ramp")
    fitted = _solve(spec, free, samples, names, shapes)
    seconds, slopes = _slopes(spec, free, samples, fitted, names, shapes)
    shares = {name: float(np.max(slopes[:, k] * fitted[name] / seconds)) for k, name in enumerate(names)}
    found = tuple(name for name in names if shares[name] >= LEAST_SHARE or (name == "ramp" and shares[name] > 0))
    # A ramp alone bends nothing that a bandwidth would not explain.
    return found if set(found) - {"ramp"} else ()


def _solve(
    spec: ClusterSpec, free: _Free, samples: list[CollectiveSample], names: tuple[str, ...], shapes: Shapes
) -> dict[str, float]:
    """Constants with the least squares of relative errors, none negative; the others stay."""
    start = _constants(spec, free)
    starts = [start | {"efficiency": start["efficiency"] / slower} for slower in _STARTS if "efficiency" in names]
    found = [_descend(spec, free, samples, names, shapes, one) for one in starts or [start]]
    # The first of equals: what the samples do not decide stays as it was.
    return min(found, key=lambda one: round(one[0], 9))[1]


def _descend(
    spec: ClusterSpec, free: _Free, samples: list[CollectiveSample], names: tuple[str, ...], shapes: Shapes,
    at: dict[str, float],
) -> tuple[float, dict[str, float]]:  # fmt: skip
    """(sum of squares, constants) from one start."""
    measured = np.array([sample.seconds for sample in samples])
    best, best_error = at, math.inf
    for _ in range(_ROUNDS):
        seconds, slopes = _slopes(spec, free, samples, at, names, shapes)
        error = float(np.sum((seconds / measured - 1) ** 2))
        if error >= best_error * (1 - 1e-9):
            break
        best, best_error = at, error
        values = np.array([at[name] for name in names])
        rest = seconds - slopes @ values
        solved = _least_squares(slopes / measured[:, None], (measured - rest) / measured, names, at)
        at = at | dict(zip(names, map(float, solved), strict=True))
    return best_error, best


def _least_squares(
    features: np.ndarray, target: np.ndarray, names: tuple[str, ...], at: dict[str, float]
) -> np.ndarray:
    """Non-negative least squares over at most four unknowns, by trying every subset; a bandwidth is never left out."""
    best, best_error = np.array([at[name] for name in names]), math.inf
    for size in range(1, len(names) + 1):
        for subset in itertools.combinations(range(len(names)), size):
            if "efficiency" in names and names.index("efficiency") not in subset:
                continue
            found, *_ = np.linalg.lstsq(features[:, subset], target, rcond=None)
            error = float(np.sum((features[:, subset] @ found - target) ** 2))
            if (
                (found >= 0).all()
                and error < best_error
                and all(value > 0 for value, column in zip(found, subset, strict=True) if names[column] == "efficiency")
            ):
                best, best_error = np.zeros(len(names)), error
                best[list(subset)] = found
    return best
