"""How far a predicted step may be off, and how far the difference of two layouts.

Published runs say so (data/time_residuals.toml, written by `make residuals`): of
e = ln(measured step / predicted step) the quantiles of all of them, each source of runs counting the same; what runs on
a GPU, of a model family or with a stack change about them; and of two layouts of one job how far
ln(step / step) was off, which is less, because what is wrong about the GPU, the model and the stack is wrong in both.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from simulator.files import STRICT, read_toml, to_dataclass
from simulator.results import Interval

if TYPE_CHECKING:
    from simulator.job import Job

RESIDUALS = Path(__file__).parent / "data" / "time_residuals.toml"
# What an interval is meant to contain.
LEVEL = 0.8


@dataclass(frozen=True)
class Spread:
    """Quantiles of e, or what a group adds to them: those of 10, 25, 75 and 90 %."""

    q10: float
    q25: float
    q75: float
    q90: float
    layouts: int
    jobs: int
    sources: int

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class HeldOut:
    """Of sources that the quantiles were not fitted to, which part the intervals contained: each job counting the
    same, and each source; and the interval's mean width in ln."""

    level: float
    by_job: float
    by_source: float
    width: float
    stretched: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Difference:
    """|ln(step a / step b) measured - predicted| of two layouts a, b of a job: half of them were off by less than
    `half`, four of five by less than `four_fifths`. sigma_layout and sigma_job are what is a layout's own and what all
    layouts of a job share, as standard deviations of normal distributions with the same middle half."""

    half: float
    four_fifths: float
    sigma_layout: float
    sigma_job: float
    pairs: int
    jobs: int
    sources: int
    held_out_half: float
    held_out_four_fifths: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Best:
    """The highest MFU that anybody published, counted as the simulator counts, with the row's id."""

    mfu: float
    row: str

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class TimeResiduals:
    """All of it. gpu, family and stack hold what their runs add to the quantiles of all: they only widen, because a
    group's own narrower ones did not hold for other sources."""

    pooled: Spread
    difference: Difference
    held_out: tuple[HeldOut, ...]
    gpu: dict[str, Spread] = field(default_factory=dict)
    family: dict[str, Spread] = field(default_factory=dict)
    stack: dict[str, Spread] = field(default_factory=dict)
    mfu: dict[str, dict[str, Best]] = field(default_factory=dict)

    __pydantic_config__ = STRICT


@functools.cache
def time_residuals() -> TimeResiduals:
    """The residuals that come with the simulator."""
    return to_dataclass(TimeResiduals, read_toml(RESIDUALS, "time residuals"), f"time residuals '{RESIDUALS}'")


def model_family(family: str) -> str:
    """The families that errors are told apart by: "moe", "hybrid" (Mamba and attention), all others "dense"."""
    return family if family in ("moe", "hybrid") else "dense"


def log_bounds(job: Job) -> tuple[float, float]:
    """ln(true / predicted step) at the low and at the high end of the interval of LEVEL.

    Rule: the quantile of all runs, plus the widest of what GPU, model family and stack add. On a machine with a profile
    of its own GPU, family and stack are not those of any published run: only the first counts, and the spread of the
    machine's own timings is added in quadrature. No layout of a job has another interval than the next: classes of
    layouts were tried and told nothing (docs/cost-model.md).
    """
    known = time_residuals()
    low, high = known.pooled.q10, known.pooled.q90
    if spread := job.cluster.gpu.timing_spread:
        return -math.hypot(low, spread / 2), math.hypot(high, spread / 2)
    groups = [group for _, group in _groups(job) if group is not None]
    return low + min([0.0, *(group.q10 for group in groups)]), high + max([0.0, *(group.q90 for group in groups)])


def _groups(job: Job) -> list[tuple[str, Spread | None]]:
    """The job's GPU, model family and stack by name, with what is known of each."""
    known, gpu, stack = time_residuals(), job.cluster.gpu.name, job.stack.name
    family = model_family(job.model.family)
    return [(gpu, known.gpu.get(gpu)), (family, known.family.get(family)), (stack, known.stack.get(stack))]


def step_interval(job: Job, step_seconds: float) -> Interval:
    """Seconds between which the step is expected with a probability of LEVEL, and where that is known from."""
    low, high = log_bounds(job)
    return Interval(step_seconds * math.exp(low), step_seconds * math.exp(high), LEVEL, source_sentence(job))


def source_sentence(job: Job) -> str:
    """Which runs an interval rests on, and how often such intervals held."""
    known = time_residuals()
    held = next(one for one in known.held_out if one.level == LEVEL)
    rests = f"{known.pooled.layouts} layouts of {known.pooled.jobs} published jobs from {known.pooled.sources} sources"
    if job.cluster.gpu.timing_spread:
        rests += (
            f", none of them on this machine, and the spread of its own timings ({job.cluster.gpu.timing_spread:.0%})"
        )
    else:
        groups = _groups(job)
        there = [f"{name} ({group.jobs} jobs)" for name, group in groups if group is not None]
        missing = [name for name, group in groups if group is None]
        rests += f"; of them {', '.join(there)}" if there else ""
        rests += f"; none of {', '.join(missing)}" if missing else ""
    return f"{rests}; of sources left out {held.by_source:.0%} to {held.by_job:.0%} lay inside"


def tie_share() -> float:
    """How much slower a layout may be predicted than another to be called a tie with it: what differences of two
    layouts are off by in half of the cases."""
    return math.exp(time_residuals().difference.half) - 1


def unseen_mfu(job: Job, mfu: float) -> str:
    """A warning where a prediction claims a higher MFU than anybody published of this GPU and precision; else empty.
    Nothing is said of devices of which nothing is published."""
    gpu = job.cluster.gpu
    if gpu.kind != "gpu":
        return ""
    best = time_residuals().mfu.get(gpu.name, {}).get(gpu.arithmetic(job.training.precision))
    if best is None or mfu <= best.mfu:
        return ""
    return (
        f"the predicted MFU of {mfu:.1%} is above the best that was published of {gpu.name} in "
        f"{gpu.arithmetic(job.training.precision)}, {best.mfu:.1%} ({best.row}): nobody has shown that it can be had"
    )
