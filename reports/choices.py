"""How the layout that a rule picks among measured ones fares beside the others: who picks the best of many predictions
picks errors in its favour."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from reports.time_residuals import Run
from reports.validation import LEAST_LAYOUTS
from simulator.error_bars import TimeResiduals
from simulator.simplicity import recommended


@dataclass(frozen=True)
class Choice:
    """The layout that a rule picks among those measured of a job: its residual, the mean of the others', and the part
    of the best measured speed that is lost."""

    job: str
    layouts: int
    chosen: float
    others: float
    regret: float


def choices(found: Sequence[Run], known: TimeResiduals, careful: bool, least: int = LEAST_LAYOUTS) -> list[Choice]:
    """What the planner's rule picks among the measured layouts of every job with at least so many.

    Args:
        careful: of what ties with the layout that is predicted fastest the simplest; otherwise that layout.
    """
    by_job: dict[str, list[Run]] = {}
    for run in found:
        by_job.setdefault(run.job, []).append(run)
    picked = []
    share = math.exp(known.difference.half) - 1
    for job, group in by_job.items():
        if len(group) < least:
            continue
        steps = [run.step_seconds for run in group]
        place = recommended(steps, [run.layout for run in group], share if careful else 0.0)
        others = [run.residual for at, run in enumerate(group) if at != place]
        measured = [run.step_seconds * math.exp(run.residual) for run in group]
        chosen = group[place].residual
        picked.append(
            Choice(job, len(group), chosen, statistics.mean(others), round(1 - min(measured) / measured[place], 12))
        )
    return picked


@dataclass(frozen=True)
class Fare:
    """Of all jobs together, e = ln(measured / predicted step): the mean of the chosen layouts and of the others, how
    much larger the former is with its standard error, and the mean of the speed that is lost."""

    jobs: int
    chosen: float
    others: float
    more: float
    error: float
    regret: float


def fare(picked: Sequence[Choice]) -> Fare:
    """The figures of what a rule picked."""
    more = [choice.chosen - choice.others for choice in picked]
    return Fare(
        len(picked),
        statistics.mean(choice.chosen for choice in picked),
        statistics.mean(choice.others for choice in picked),
        statistics.mean(more),
        statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else 0.0,
        statistics.mean(choice.regret for choice in picked),
    )
