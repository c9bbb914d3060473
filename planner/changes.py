"""One change to a layout at a time: what a user would try to need less memory. Every layout here is legal.

Data-parallel ranks give way to an axis that grows, then those of another axis. What follows from a change is part of
it: sharding that has nobody left to shard over, sequence parallelism where the stack has no tp without it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from simulator.checks import check_job
from simulator.errors import UserError
from simulator.job import Job
from simulator.layout import Layout
from simulator.schedules import MULTI_STAGE, V_PLACEMENT

# How many times more nodes are tried.
MORE_NODES = (2, 4, 8, 16)
AXES = ("tp", "cp", "pp", "ep")
RECOMPUTE = ("none", "selective", "full")
# Whose ranks an axis takes, in this order.
DONORS = ("dp_replicate", "dp_shard", "pp", "cp", "tp")


def changes(job: Job, layout: Layout) -> Iterator[tuple[str, Layout]]:
    """Every legal layout of the job that is one change away, with the field that the change is about."""
    seen = {layout}
    for name, changed in _all_changes(job, layout):
        if changed not in seen and not changed.problems(job):
            seen.add(changed)
            yield name, changed


def more_nodes(job: Job, layout: Layout) -> Iterator[tuple[Job, Layout]]:
    """The job on more nodes, fewest first, with each axis that could take the ranks; none where ranks share a device,
    because such a machine is the one that was measured."""
    if job.cluster.gpu.kind != "gpu" or layout.world_size != job.world_size:
        return
    for factor in MORE_NODES:
        larger = dataclasses.replace(job, nodes=job.nodes * factor)
        try:
            check_job(larger, "more nodes")
        except UserError:
            return
        data = "dp_shard" if layout.zero_stage else "dp_replicate"
        for axis in (data, "pp", "tp", "cp"):
            grown = dataclasses.replace(layout, **{axis: getattr(layout, axis) * factor})
            for settled in _settled(larger, grown):
                if settled.tp <= max(layout.tp, job.cluster.domain) and not settled.problems(larger):
                    yield larger, settled


def _all_changes(job: Job, layout: Layout) -> Iterator[tuple[str, Layout]]:
    replace = dataclasses.replace
    for kind in RECOMPUTE[RECOMPUTE.index(layout.recompute) + 1 :]:
        yield "recompute", replace(layout, recompute=kind)
    yield "offload", replace(layout, offload="optimizer")
    for size in _divisors(layout.micro_batch_size)[:-1]:
        yield "micro_batch_size", replace(layout, micro_batch_size=size)
    for changed in _sharded(job, layout):
        yield "zero_stage", changed
    if layout.tp > 1 and not layout.sequence_parallel:
        yield "sequence_parallel", replace(layout, sequence_parallel=True)
    for axis in AXES:
        for changed in _grown(job, layout, axis):
            yield axis, changed
    for changed in _scheduled(job, layout):
        yield "schedule", changed
    if job.cluster.oversubscribe > 1:
        # Every rank is a process with its own copy of something.
        for axis in ("dp_replicate", "dp_shard"):
            for size in _divisors(getattr(layout, axis))[:-1]:
                yield axis, _unsharded(replace(layout, **{axis: size}))


def _sharded(job: Job, layout: Layout) -> Iterator[Layout]:
    """More of the state sharded, or over more of the replicas."""
    stages = job.stack.zero_stages if layout.pp == 1 else job.stack.pipeline_zero_stages
    for zero in sorted(stages):
        if zero >= max(1, layout.zero_stage):
            yield _with(layout, zero_stage=zero, dp_shard=layout.dp, dp_replicate=1)
            if layout.zero_stage and zero > layout.zero_stage:
                yield _with(layout, zero_stage=zero)


def _grown(job: Job, layout: Layout, axis: str) -> Iterator[Layout]:
    """An axis of more ranks, which another axis gives. ep regroups ranks that are there."""
    if axis == "ep":
        if job.model.num_experts:
            larger = [size for size in _divisors(job.model.num_experts) if size > layout.ep and size % layout.ep == 0]
            for size in larger:
                yield dataclasses.replace(layout, ep=size, sequence_parallel=layout.tp > 1)
        return
    for donor in DONORS:
        for factor in _divisors(getattr(layout, donor))[1:] if donor != axis else []:
            size = getattr(layout, axis) * factor
            if axis == "tp" and size > job.cluster.domain:
                break
            sizes = {axis: size, donor: getattr(layout, donor) // factor}
            yield from _settled(job, dataclasses.replace(layout, **sizes))


def _settled(job: Job, layout: Layout) -> Iterator[Layout]:
    """What follows from other axis sizes: a stack's rule for sequence parallelism, what shards are allowed, the stages
    of a pipeline that is gone."""
    stack, found = job.stack, layout
    found = dataclasses.replace(
        found, stage_layers=None, sequence_parallel=layout.tp > 1 and bool(stack.sequence_parallel)
    )
    if layout.pp == 1 and layout.schedule != "1F1B":
        found = dataclasses.replace(found, schedule="1F1B", virtual_stages=1)
    allowed = stack.zero_stages if layout.pp == 1 else stack.pipeline_zero_stages
    if found.zero_stage and found.zero_stage not in allowed:
        lower = [zero for zero in allowed if zero < found.zero_stage]
        zero = max(lower, default=0)
        found = _with(found, zero_stage=zero)
        if not zero:
            found = dataclasses.replace(found, dp_replicate=found.dp, dp_shard=1)
    yield _unsharded(found)


def _unsharded(layout: Layout) -> Layout:
    """Where there is nobody to shard over nothing is sharded."""
    alone = layout.zero_stage and layout.dp_shard * layout.cp == 1
    return dataclasses.replace(layout, zero_stage=0) if alone else layout


def _scheduled(job: Job, layout: Layout) -> Iterator[Layout]:
    """Another order of the same pipeline; which of them keeps less alive the memory model says."""
    if layout.pp == 1:
        return
    for schedule in job.stack.schedules:
        chunks = [2] if schedule in V_PLACEMENT else [1]
        if schedule in MULTI_STAGE and schedule not in V_PLACEMENT:
            chunks = sorted({2, *_divisors(layout.virtual_stages)} - {1})
        for count in chunks:
            # Layers named by stage stay where the stages stay.
            kept = layout.stage_layers if count == layout.virtual_stages else None
            yield _with(layout, schedule=schedule, virtual_stages=count, stage_layers=kept)


def _with(layout: Layout, **fields: Any) -> Layout:
    """The layout with values of fields that a stack names."""
    return dataclasses.replace(layout, **fields)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
