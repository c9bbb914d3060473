"""Program: for every pipeline rank the ordered list of ops, communication included, in PyTorch's notation.

    0F0        forward of stage 0, microbatch 0          0SEND_F0   its output leaves for stage 1
    1RECV_F0   stage 1 waits for that output             1B0        full backward
    1SEND_B0   the gradient of its input leaves          0RECV_B0   stage 0 waits for it
    0UNSHARD   parameters of stage 0 are gathered        0REDUCE_GRAD   its gradients are reduced
    OPTIMIZER  gradient norm over all ranks, then the step

The simulator runs a program in virtual time; memory.py counts from the same ops what is alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.layout import Layout
from simulator.schedules import Op, compute_order
from simulator.stage import StageCost, StageCosts

if TYPE_CHECKING:
    from simulator.job import Job

OPTIMIZER = Op("OPTIMIZER")


@dataclass(frozen=True)
class Program:
    """The ops of each pipeline rank, and what the ops of each stage cost."""

    orders: tuple[tuple[Op, ...], ...]
    stages: tuple[StageCost, ...]


def build_program(job: Job, layout: Layout) -> Program:
    """Compile a legal layout. Raises nothing: legality is `Layout.problems`, asked before."""
    stages = stage_costs(job, layout)
    microbatches = layout.microbatches(job.training.global_batch_size)
    shape = (layout.pp, layout.virtual_stages, microbatches)
    orders = tuple(
        tuple(with_communication(compute_order(layout.schedule, rank, *shape), layout, stages))
        for rank in range(layout.pp)
    )
    return Program(orders, stages)


def stage_costs(job: Job, layout: Layout) -> tuple[StageCost, ...]:
    """The cost of every stage of a layout, in torch's global stage order."""
    costs = StageCosts(job, layout)
    return tuple(costs.stage(index) for index in range(layout.stages))


def with_communication(order: tuple[Op, ...], layout: Layout, stages: tuple[StageCost, ...]) -> list[Op]:
    """Add to the forwards and backwards of a rank what must move before and after them."""
    last = layout.stages - 1
    final_backward = {op.stage: i for i, op in enumerate(order) if op.kind == "B"}
    seen: set[int] = set()
    ops: list[Op] = []
    for i, op in enumerate(order):
        stage, microbatch = op.stage, op.microbatch
        assert stage is not None
        if stage not in seen:
            seen.add(stage)
            if stages[stage].gather:
                ops.append(Op("UNSHARD", stage))
        if op.kind == "F" and stage > 0:
            ops.append(Op("RECV_F", stage, microbatch))
        if op.kind == "B" and stage < last:
            ops.append(Op("RECV_B", stage, microbatch))
        ops.append(op)
        if op.kind == "F" and stage < last:
            ops.append(Op("SEND_F", stage, microbatch))
        if op.kind == "B" and stage > 0:
            ops.append(Op("SEND_B", stage, microbatch))
        if final_backward.get(stage) == i and stages[stage].reduce:
            ops.append(Op("REDUCE_GRAD", stage))
    return [*ops, OPTIMIZER]
