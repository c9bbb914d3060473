"""The layouts that `validate here` runs beside the recommendation: every kind of parallelism, alone and together.

A rival pins the axes of the layout and what it is named after; the planner chooses the rest (micro-batch, sequence
parallelism, order), so that each is the best of its kind.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from planner.plan import Plan
from planner.search import plan
from simulator.errors import NothingFitsError
from simulator.job import Job

Search = dict[str, list[Any]]
_AXES = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep")
# Pipelines, by what their name says behind the number of ranks.
_SCHEDULES: dict[str, Search] = {
    "GPipe": {"schedule": ["GPipe"], "virtual_stages": [1]},
    "1F1B": {"schedule": ["1F1B"], "virtual_stages": [1]},
    "interleaved": {"schedule": ["Interleaved1F1B"], "virtual_stages": [2]},
    "zero bubble": {"schedule": ["ZBVZeroBubble"], "virtual_stages": [2]},
}
# Fewer ranks than this make no hybrid, so that many run also where there are fewer processors: they share them.
LEAST_RANKS = 4


def pinned(**fields: Any) -> Search:
    """A search with these values alone; axes that are not named have one rank."""
    return {axis: [1] for axis in _AXES} | {name: [value] for name, value in fields.items()}


def rivals(devices: int) -> dict[str, Search]:
    """Rivals on 1, 2, 4 ... ranks of a machine with so many devices, the reference, one process, first.

    >>> list(rivals(2))[:4], len(rivals(2)), len(rivals(8))
    (['1 process', '1 process, recompute', 'data 2', 'tensor 2'], 16, 23)
    """
    found = {"1 process": pinned(recompute="none"), "1 process, recompute": pinned(recompute="full")}
    most, count = max(LEAST_RANKS, devices), 2
    while count <= most:
        found |= _of_one_kind(count)
        count *= 2
    half = LEAST_RANKS // 2
    while 2 * half <= most:
        found[f"data {half} x tensor 2"] = pinned(dp_replicate=half, tp=2)
        found[f"data {half} x pipeline 2"] = pinned(dp_replicate=half, pp=2)
        found[f"tensor {half} x pipeline 2"] = pinned(tp=half, pp=2)
        half *= 2
    return found


def _of_one_kind(count: int) -> dict[str, Search]:
    """On so many ranks; all schedules and ZeRO stages on two, where they are told apart best, one of them on more."""
    found = {f"data {count}": pinned(dp_replicate=count), f"tensor {count}": pinned(tp=count)}
    for name, fields in _SCHEDULES.items():
        if count == 2 or name == "1F1B":
            found[f"pipeline {count}, {name}"] = pinned(pp=count) | fields
    for stage in (3, 2) if count == 2 else (3,):
        found[f"FSDP {count}, ZeRO {stage}"] = pinned(dp_shard=count, zero_stage=stage)
    return found


def rivals_of_hosts(per_host: int) -> dict[str, Search]:
    """Rivals on two hosts with so many ranks each: every kind across the link between them, and inside of each.

    Tensor ranks are neighbours and pipeline ranks farthest apart (Layout), so that what has as many ranks as a host,
    or fewer, stays inside of it; more go across.
    """
    both = 2 * per_host
    return {
        "data across and inside": pinned(dp_replicate=both),
        "tensor across and inside": pinned(tp=both),
        "tensor inside, data across": pinned(tp=per_host, dp_replicate=2),
        "data inside, pipeline across": pinned(dp_replicate=per_host, pp=2),
        "tensor inside, pipeline across": pinned(tp=per_host, pp=2),
        "pipeline across and inside": pinned(pp=both) | _SCHEDULES["1F1B"],
        "FSDP across and inside": pinned(dp_shard=both, zero_stage=3),
        "FSDP inside, data across": pinned(dp_shard=per_host, dp_replicate=2, zero_stage=3),
        "FSDP inside, pipeline across": pinned(dp_shard=per_host, pp=2, zero_stage=1),
    }


def planned(job: Job, chosen: Mapping[str, Search]) -> tuple[dict[str, Plan], dict[str, str]]:
    """The best plan of each rival, by name, and why others have none. A layout that two have is the first one's."""
    found, missing = dict[str, Plan](), dict[str, str]()
    for name, limits in chosen.items():
        own = with_ranks(job, limits)
        if own is None:
            missing[name] = "more ranks than this machine takes"
            continue
        try:
            best = plan(dataclasses.replace(own, search=limits), top=1)
        except NothingFitsError as error:
            missing[name] = str(error)
            continue
        if best.layout not in [other.layout for other in found.values()]:
            found[name] = best
    return found, missing


def with_ranks(job: Job, limits: Search) -> Job | None:
    """The job on as many devices as a rival has ranks: a GPU carries one rank, and a layout uses all of them. None
    where there are not as many."""
    ranks = 1
    for axis in _AXES[:-1]:
        ranks *= limits[axis][0]
    spec = job.cluster
    if spec.gpu.kind == "cpu":
        return job if ranks <= job.world_size * spec.oversubscribe else None
    if job.nodes > 1 or ranks > spec.gpus_per_node:
        return job if ranks == job.world_size else None
    return dataclasses.replace(job, cluster=dataclasses.replace(spec, gpus_per_node=ranks))


def with_recommended(plans: Mapping[str, Plan], best: Plan) -> tuple[dict[str, Plan], str]:
    """The plans and the recommendation, which gets a name of its own where it is none of them; and its name."""
    for name, one in plans.items():
        if one.layout == best.layout:
            return dict(plans), name
    return dict(plans) | {"recommended": best}, "recommended"
