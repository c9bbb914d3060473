"""Scaling: one job on several numbers of nodes, what each takes and costs, and which of them no other beats.

    efficiency = tokens/s/GPU over that of the smallest number of nodes that has a layout
    front      = the numbers for which no other is at most as slow, as dear and as large, and better in one of the
                 three; as fewer GPUs are worth something by themselves, a number may be on it that is slower and dearer
                 than a larger one: in time and cost alone it is not

Costs are those of price.py. Plans are made in other_nodes.py; here is what follows from them.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.plan import Plan
from simulator.checks import check_job
from simulator.errors import UserError
from simulator.files import STRICT, read_json, to_dataclass, write_json
from simulator.job import Job
from simulator.price import dollars, gpu_hours, training_seconds
from simulator.results import Breakdown, Prediction, Timeline

VERSION = 1
# Efficiency that falls by less than this from one number of nodes to the next is no bend.
LEAST_FALL = 0.01
# What costs are counted for where the job does not say how many tokens it trains.
DEFAULT_TOKENS = 1e9


@dataclass(frozen=True)
class Row:
    """The best layout on a number of nodes. seconds, gpu_hours and dollars are for the tokens of the scaling, goodput
    counted; dollars is None without a price. on_front is the front of time, cost and GPUs, on_time_cost_front that of
    time and cost alone. `plan` is the file of the whole plan, empty where none was written."""

    nodes: int
    gpus: int
    global_batch_size: int
    prediction: Prediction
    efficiency: float
    seconds: float
    gpu_hours: float
    dollars: float | None
    on_front: bool
    on_time_cost_front: bool
    plan: str = ""

    __pydantic_config__ = STRICT

    @property
    def cost(self) -> float:
        """What is compared: dollars, or GPU-hours without a price."""
        return self.gpu_hours if self.dollars is None else self.dollars


@dataclass(frozen=True)
class Missing:
    """A number of nodes without a layout, and why."""

    nodes: int
    reason: str

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Change:
    """From one number of nodes to the next with a layout: what the tokens take more, in GPU-hours per 1e9 tokens as
    each is predicted (without goodput). `items` are the differences of the breakdown and add up to
    gpu_hours[1] - gpu_hours[0]. `because` says in words where the largest of them comes from."""

    nodes: tuple[int, int]
    efficiency: tuple[float, float]
    gpu_hours: tuple[float, float]
    items: Breakdown
    because: str = ""

    __pydantic_config__ = STRICT

    @property
    def fall(self) -> float:
        """How much of its efficiency is lost for each doubling of the nodes, as a logarithm."""
        return math.log(self.efficiency[0] / self.efficiency[1]) / math.log(self.nodes[1] / self.nodes[0])


@dataclass(frozen=True)
class Scaling:
    """A job over numbers of nodes, the smallest first. job has the nodes and the batch of its file; with scale_batch
    each row's batch has as many tokens per GPU, else all have the job's. chosen is the number of nodes that the job's
    objective chooses and `reason` a sentence about it; None where none meets a deadline. bend says where efficiency
    falls most, and why."""

    job: Job
    scale_batch: bool
    tokens: float
    rows: tuple[Row, ...]
    missing: tuple[Missing, ...]
    changes: tuple[Change, ...]
    bend: str = ""
    chosen: int | None = None
    reason: str = ""
    version: int = VERSION

    __pydantic_config__ = STRICT

    def row(self, nodes: int | None) -> Row | None:
        """The row of a number of nodes, if it has one."""
        return next((row for row in self.rows if row.nodes == nodes), None)


def rows_of(plans: Sequence[Plan], tokens: float) -> tuple[Row, ...]:
    """What each plan takes for so many tokens, the fewest nodes first."""
    ordered = sorted(plans, key=lambda plan: plan.job.nodes)
    share = ordered[0].job.objective.share if ordered else 1.0
    rows = [_row(plan, tokens, share, ordered[0].best.tokens_per_second_per_gpu) for plan in ordered]
    front = pareto_front([(row.seconds, row.cost, row.gpus) for row in rows])
    without = pareto_front([(row.seconds, row.cost) for row in rows])
    return tuple(
        dataclasses.replace(row, on_front=on, on_time_cost_front=also)
        for row, on, also in zip(rows, front, without, strict=True)
    )


def _row(plan: Plan, tokens: float, share: float, smallest: float) -> Row:
    best, job = dataclasses.replace(plan.best, timeline=Timeline()), plan.job
    return Row(
        nodes=job.nodes,
        gpus=job.world_size,
        global_batch_size=job.training.global_batch_size,
        prediction=best,
        efficiency=best.tokens_per_second_per_gpu / smallest,
        seconds=training_seconds(best, tokens, share),
        gpu_hours=gpu_hours(best, job, tokens, share),
        dollars=dollars(best, job, tokens, share),
        on_front=False,
        on_time_cost_front=False,
    )


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which points no other beats: none is at most as large in everything and smaller in something."""
    return [
        not any(all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points)
        for point in points
    ]


def changes_of(rows: Sequence[Row]) -> tuple[Change, ...]:
    """From each row to the next, without words."""
    return tuple(
        Change(
            nodes=(before.nodes, after.nodes),
            efficiency=(before.efficiency, after.efficiency),
            gpu_hours=(_hours(before, before.prediction.step_seconds), _hours(after, after.prediction.step_seconds)),
            items=Breakdown(**{
                item.name: _hours(after, getattr(after.prediction.breakdown, item.name))
                - _hours(before, getattr(before.prediction.breakdown, item.name))
                for item in dataclasses.fields(Breakdown)
            }),
        )
        for before, after in itertools.pairwise(rows)
    )  # fmt: skip


def _hours(row: Row, seconds: float) -> float:
    """Seconds of a step on one GPU as hours of all of them for 1e9 tokens."""
    p = row.prediction
    return seconds * row.gpus / 3600 * 1e9 / (p.tokens_per_second * p.step_seconds)


def bend_of(changes: Sequence[Change]) -> Change | None:
    """From where to where efficiency falls most for each doubling of the nodes; None where it falls nowhere by more
    than LEAST_FALL."""
    bend = max(changes, key=lambda change: change.fall, default=None)
    return bend if bend and 1 - bend.efficiency[1] / bend.efficiency[0] > LEAST_FALL else None


def read_scaling(path: Path | str) -> Scaling:
    """The scaling in a file that `layoutwise plan --nodes` wrote. Raises UserError if it is not one."""
    data = read_json(path, "scaling")
    if data.get("version") != VERSION:
        raise UserError(f"scaling '{path}': version = {data.get('version')!r} is not {VERSION}; plan again")
    scaling = to_dataclass(Scaling, data, f"scaling '{path}'")
    check_job(scaling.job, f"scaling '{path}'")
    if not scaling.rows:
        raise UserError(f"scaling '{path}' has no rows")
    for row in scaling.rows:
        if min(row.prediction.step_seconds, row.prediction.tokens_per_second, row.seconds, row.gpu_hours) <= 0:
            raise UserError(f"scaling '{path}': times of {row.nodes} nodes must be above zero")
    return scaling


def write_scaling(scaling: Scaling, path: Path | str) -> Path:
    """Write a scaling atomically."""
    return write_json(path, scaling)
