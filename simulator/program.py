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

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from simulator.layout import Layout
from simulator.schedules import MULTI_STAGE, Op, Schedule, compute_order
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
    shape = (layout.schedule, layout.pp, layout.virtual_stages, microbatches)
    moves = tuple((stage.gather > 0, stage.reduce > 0) for stage in stages)
    return Program(_orders(*shape, layout.zero_stage, moves), stages)


@functools.lru_cache(maxsize=8)
def _orders(
    schedule: Schedule,
    ranks: int,
    chunks: int,
    microbatches: int,
    zero_stage: int,
    moves: tuple[tuple[bool, bool], ...],
) -> tuple[tuple[Op, ...], ...]:
    """The ops of every rank where stages gather and reduce or not: layouts that differ in seconds only share them."""
    layout = Layout(pp=ranks, virtual_stages=chunks, schedule=schedule, zero_stage=zero_stage)  # type: ignore[arg-type]
    stages = [Moves(*some) for some in moves]
    shape = (ranks, chunks, microbatches)
    return tuple(
        tuple(with_communication(compute_order(schedule, rank, *shape), layout, stages)) for rank in range(ranks)
    )


def own_seconds(program: Program, rank: int) -> float:
    """What a pipeline rank computes in a step, recomputation and the host's work included: its forwards and backwards
    without any communication."""
    works = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}
    leaves = [leaf for op in program.orders[rank] for leaf in op.leaves if leaf.kind in works]
    return sum(getattr(program.stages[leaf.stage or 0], works[leaf.kind]).computation for leaf in leaves)


def stage_costs(job: Job, layout: Layout) -> tuple[StageCost, ...]:
    """The cost of every stage of a layout, in torch's global stage order."""
    return StageCosts(job, layout).stages()


class Moves(NamedTuple):
    """Whether a stage's parameters are gathered, and its gradients reduced, once a step."""

    gather: bool
    reduce: bool


def with_communication(order: tuple[Op, ...], layout: Layout, stages: Sequence[StageCost | Moves]) -> list[Op]:
    """Add to the forwards and backwards of a rank what must move before and after them.

    Two stages on one rank, as at the turn of a V, hand over without a message. A receive stands right before the op
    that needs it: torch posts it earlier, but waits for it here.
    """
    # A large step has millions of ops: what is the same for all of a kind and stage is looked up.
    final_gradient = {leaf.stage: i for i, op in enumerate(order) for leaf in op.leaves if leaf.kind in ("B", "W")}
    final, messages, unsharding = set(final_gradient.values()), stage_messages(layout), _unsharding(order, layout)
    ops: list[Op] = []
    for i, op in enumerate(order):
        if i in unsharding:
            ops += [move for move in unsharding[i] if move.stage is not None and stages[move.stage].gather]
        leaves = op.parts or (op,)
        for kind, stage, microbatch, _ in leaves:
            if received := messages[kind, stage][0]:
                ops.append(Op(received, stage, microbatch))
        ops.append(op)
        for kind, stage, microbatch, _ in leaves:
            if sent := messages[kind, stage][1]:
                ops.append(Op(sent, stage, microbatch))
        if i in final:
            for stage in dict.fromkeys(leaf.stage for leaf in leaves):
                if stage is not None and final_gradient.get(stage) == i and stages[stage].reduce:
                    ops.append(Op("REDUCE_GRAD", stage))
    dropped = unsharding.get(len(order), [])
    return [*ops, *(move for move in dropped if move.stage is not None and stages[move.stage].gather), OPTIMIZER]


def sharded_order(order: tuple[Op, ...], layout: Layout) -> list[Op]:
    """The forwards and backwards of a rank with what is gathered, dropped and reduced between them, for every stage:
    what the runtime hands to torch, which adds the messages itself and leaves out what a stage without shards does not
    need."""
    moves = _unsharding(order, layout)
    final_gradient = {leaf.stage: i for i, op in enumerate(order) for leaf in op.leaves if leaf.kind in ("B", "W")}
    ops: list[Op] = []
    for i, op in enumerate(order):
        ops += [*moves.get(i, []), op]
        ops += [Op("REDUCE_GRAD", stage) for stage, final in final_gradient.items() if final == i]
    # What was gathered once for the whole step is dropped after it.
    return ops + moves.get(len(order), [Op("RESHARD", stage) for stage in final_gradient])


def stage_messages(layout: Layout) -> dict[tuple[str, int | None], tuple[str, str]]:
    """The kinds of the messages that a forward or a backward receives first and sends afterwards, by its kind and
    stage; empty where there is none. The gradients of weights move nothing."""
    found: dict[tuple[str, int | None], tuple[str, str]] = {}
    ranks = [layout.rank_of_stage(stage) for stage in range(layout.stages)]
    for stage, rank in enumerate(ranks):
        before = stage > 0 and ranks[stage - 1] != rank
        after = stage + 1 < layout.stages and ranks[stage + 1] != rank
        found["F", stage] = "RECV_F" if before else "", "SEND_F" if after else ""
        found["B", stage] = found["I", stage] = "RECV_B" if after else "", "SEND_B" if before else ""
        found["W", stage] = "", ""
    return found


def _unsharding(order: tuple[Op, ...], layout: Layout) -> dict[int, list[Op]]:
    """What is gathered and dropped ahead of each op of a rank (by its place), and after the last: a stage's parameters
    at first use.

    Torch's schedules of several stages gather those that the next ops need ahead of time and keep at most three, so a
    rank with more stages gathers them again and again (_add_unshard_reshard in torch.distributed.pipelining; FSDP
    alone follows these ops).
    """
    moves: dict[int, list[Op]] = {}
    if layout.zero_stage < 2 or layout.schedule not in MULTI_STAGE:
        seen = set()
        for i, op in enumerate(order):
            for leaf in op.leaves:
                if leaf.stage is not None and leaf.stage not in seen:
                    seen.add(leaf.stage)
                    moves.setdefault(i, []).append(Op("UNSHARD", leaf.stage))
        return moves
    active: list[int] = []
    # Which stages come next changes slowly: walking backwards, each op's own stages move to the front.
    coming: list[tuple[int, ...]] = []
    ahead: tuple[int, ...] = ()
    for op in reversed(order):
        stages = tuple(part.stage for part in op.parts) if op.parts else (op.stage,)
        ahead = _to_the_front(stages, ahead)
        coming.append(ahead[: max(MOST_UNSHARDED, len(stages))])
    held: tuple[int, ...] = ()
    for i, upcoming in enumerate(reversed(coming)):
        if upcoming is held or upcoming == held:
            continue
        held = upcoming
        dropped = [stage for stage in active if stage not in upcoming]
        fetched = [stage for stage in upcoming if stage not in active]
        if dropped or fetched:
            moves[i] = [*(Op("RESHARD", stage) for stage in dropped), *(Op("UNSHARD", stage) for stage in fetched)]
        active = [stage for stage in active if stage in upcoming] + fetched
    return moves | {len(order): [Op("RESHARD", stage) for stage in active]}


@functools.lru_cache(maxsize=65536)
def _to_the_front(stages: tuple[int, ...], ahead: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(dict.fromkeys([*stages, *ahead]))
