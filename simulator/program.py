"""Program: for every pipeline rank the ordered list of ops, communication included, in PyTorch's notation.

    0F0        forward of stage 0, microbatch 0          0SEND_F0   its output leaves for stage 1
    1RECV_F0   stage 1 waits for that output             1B0        full backward
    1I0        gradient of its input alone               1W0        gradients of its weights
    1SEND_B0   the gradient of its input leaves          0RECV_B0   stage 0 waits for it
    0UNSHARD   parameters of stage 0 are gathered        0RESHARD   they are dropped again
    0REDUCE_GRAD   its gradients, summed over the microbatches, are reduced
    OPTIMIZER  gradient norm over all ranks, clipping, then the step

Recomputation and the adding up of gradients are part of the backward that needs them. The simulator runs a program in
virtual time; memory.py counts from the same ops what is alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.layout import MULTI_STAGE, Layout
from simulator.schedules import Op, compute_order
from simulator.stage import StageCost, StageCosts

if TYPE_CHECKING:
    from simulator.job import Job

OPTIMIZER = Op("OPTIMIZER")
# Stages of a rank that torch's schedules of several stages keep unsharded at once (torch 2.13, max_active_stages).
MOST_UNSHARDED = 3


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
    """Add to the forwards and backwards of a rank what must move before and after them.

    Two stages on one rank, as at the turn of a V, hand over without a message. A receive stands right before the op
    that needs it: torch posts it earlier, but waits for it here.
    """
    final_gradient = {leaf.stage: i for i, op in enumerate(order) for leaf in op.leaves if leaf.kind in ("B", "W")}
    unsharding = _unsharding(order, layout)
    ops: list[Op] = []
    for i, op in enumerate(order):
        ops += [move for move in unsharding[i] if move.stage is not None and stages[move.stage].gather]
        ops += [message for leaf in op.leaves for message in _messages("RECV", leaf, layout)]
        ops.append(op)
        ops += [message for leaf in op.leaves for message in _messages("SEND", leaf, layout)]
        for stage in dict.fromkeys(leaf.stage for leaf in op.leaves):
            if stage is not None and final_gradient.get(stage) == i and stages[stage].reduce:
                ops.append(Op("REDUCE_GRAD", stage))
    ops += [move for move in unsharding[-1] if move.stage is not None and stages[move.stage].gather]
    return [*ops, OPTIMIZER]


def _messages(way: str, op: Op, layout: Layout) -> list[Op]:
    """The message that a forward or an input gradient receives first or sends afterwards, if there is one."""
    if op.kind == "W" or op.stage is None:
        return []
    forward = op.kind == "F"
    neighbour = op.stage + (1 if forward == (way == "SEND") else -1)
    if not 0 <= neighbour < layout.stages or layout.rank_of_stage(neighbour) == layout.rank_of_stage(op.stage):
        return []
    return [Op(f"{way}_{'F' if forward else 'B'}", op.stage, op.microbatch)]


def _unsharding(order: tuple[Op, ...], layout: Layout) -> list[list[Op]]:
    """What is gathered and dropped ahead of each op of a rank, and after the last: a stage's parameters at first use.

    Torch's schedules of several stages gather those that the next ops need ahead of time and keep at most three, so a
    rank with more stages gathers them again and again (_add_unshard_reshard in torch.distributed.pipelining; FSDP
    alone follows these ops).
    """
    used = [[leaf.stage for leaf in op.leaves if leaf.stage is not None] for op in order]
    if layout.zero_stage < 2 or layout.schedule not in MULTI_STAGE:
        first = {stage: i for i, stages in reversed(list(enumerate(used))) for stage in stages}
        moves = [[Op("UNSHARD", stage) for stage in stages if first[stage] == i] for i, stages in enumerate(used)]
        return [*moves, []]
    moves = []
    active: list[int] = []
    # Which stages come next changes slowly: walking backwards, each op's own stages move to the front.
    coming: list[list[int]] = []
    ahead: list[int] = []
    for stages in reversed(used):
        ahead = list(dict.fromkeys([*stages, *ahead]))
        coming.append(ahead[: max(MOST_UNSHARDED, len(stages))])
    for upcoming in reversed(coming):
        dropped = [stage for stage in active if stage not in upcoming]
        fetched = [stage for stage in upcoming if stage not in active]
        moves.append([*(Op("RESHARD", stage) for stage in dropped), *(Op("UNSHARD", stage) for stage in fetched)])
        active = [stage for stage in active if stage in upcoming] + fetched
    return [*moves, [Op("RESHARD", stage) for stage in active]]
