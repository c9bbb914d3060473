"""A layout of the user's to compare with, whatever is wrong with it: legal, beyond what the stack can do, or none."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from planner.space import space
from simulator.columns import Columns, legal
from simulator.job import Job
from simulator.layout import Layout
from simulator.results import Prediction
from simulator.screen import screen
from simulator.simulate import simulate

# Fields by how much a user will have meant them: what is nearest keeps the first of these as they are.
WEIGHTS = {
    "tp": 32, "pp": 32, "cp": 16, "ep": 16, "schedule": 4, "virtual_stages": 2, "zero_stage": 4, "recompute": 4,
    "micro_batch_size": 2, "sequence_parallel": 1, "dp_replicate": 0.5, "dp_shard": 0.5, "rank_order": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Comparable:
    """What can be predicted of a layout: `prediction` is its own, or where it is not legal that of the nearest layout
    that is (`nearest`), or None where nothing is; `problems` are why it cannot run."""

    layout: Layout
    prediction: Prediction | None
    problems: tuple[str, ...]
    nearest: bool


def comparable(job: Job, layout: Layout, trace: bool = False) -> Comparable:
    """Predict a layout; if it breaks only rules of the software, as if the software could run it; else the nearest
    legal one."""
    problems = tuple(layout.problems(job))
    if not problems:
        return Comparable(layout, simulate(job, layout, trace), (), False)
    able = dataclasses.replace(job, stack=job.stack.without_limits())
    if not layout.problems(able):
        found = simulate(able, layout, trace)
        told = dataclasses.replace(found, fits=False, problems=(*problems, *found.problems))
        return Comparable(layout, told, problems, False)
    near = nearest_legal(job, layout)
    return Comparable(layout, simulate(job, near, trace) if near else None, problems, near is not None)


def nearest_legal(job: Job, layout: Layout) -> Layout | None:
    """The legal layout of the whole space that differs least (WEIGHTS; sizes by how many doublings), of those the one
    with the least lower bound of its step; None where no layout of the job is legal."""
    columns = space(job, {})
    columns = columns.take(np.flatnonzero(legal(job, columns)))
    if not len(columns):
        return None
    far = sum(weight * _distance(columns, name, getattr(layout, name)) for name, weight in WEIGHTS.items())
    nearest = columns.take(np.flatnonzero(far <= np.min(far) + 1e-9))
    return nearest.layout(int(np.argmin(screen(job, nearest).seconds)))


def _distance(columns: Columns, name: str, value: object) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    if name in columns.names:
        return (~columns.is_named(name, value)).astype(np.float64)
    assert isinstance(value, int)
    sizes: np.ndarray[tuple[int], np.dtype[np.float64]] = columns[name].astype(np.float64)
    if name == "zero_stage":
        return np.abs(sizes - value)
    return np.abs(np.log2(sizes / max(1, value)))
