"""Seconds of a step whose messages and collectives meet nobody: the longest path through its forwards, backwards and
messages, and what data parallelism adds at its ends.

The simulator runs the same program with links that are shared, and sharing never makes anything earlier: ranks take
their ops, and channels their messages, in a fixed order. So no step is shorter than this.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from simulator.data_parallel import reduces_beside
from simulator.expert_parallel import per_shard
from simulator.layout import Layout
from simulator.messages import message_bytes, message_cost
from simulator.placement import known_to
from simulator.schedules import MULTI_STAGE, SPLIT_BACKWARD, V_PLACEMENT
from simulator.stage import StageCost
from simulator.step_end import norm_seconds, update_seconds
from simulator.topological_order import KINDS, Edge, topological_order
from simulator.work import Work

if TYPE_CHECKING:
    from simulator.job import Job

# The work of an op, by fields of StageCost.
WORK = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}


def pair_work(job: Job, forward: Work, backward: Work) -> Work:
    """What a forward and a backward take together, where communication that the stack names runs beside the computation
    of the other.

    Rule: such communication of one adds what the computation of the other does not cover, and what hiding the rest
    costs; without any the pair takes both times (deepseek-ai/DualPipe: F&B).
    Ignored: that the kernels of the two must be cut finely enough to take turns.
    """
    names = job.stack.overlaps_in_pair
    under_backward = min(forward.spent_on(names), backward.computation)
    under_forward = min(backward.spent_on(names), forward.computation)
    work = forward.without(under_backward, names) + backward.without(under_forward, names)
    return work + Work(compute=job.cluster.gpu.hiding_cost(under_backward + under_forward))


class PipelineTimes(NamedTuple):
    """When a pipeline ends at the earliest."""

    end: float


def pipeline_times(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> PipelineTimes:
    """Forwards, backwards and messages alone: layouts that differ in data parallelism only share them."""
    if layout.pp == 1:
        microbatches = layout.microbatches(job.training.global_batch_size)
        end = microbatches * (stages[0].forward.total + stages[0].backward.total)
        return PipelineTimes(end)
    return _Pipeline(job, layout, stages).times()


def step_at_least(job: Job, layout: Layout, stages: tuple[StageCost, ...], times: PipelineTimes) -> float:
    """Seconds that a step of this pipeline takes at least.

    Rule: the first forward, which everything waits for, waits for its parameters; behind the last backward, which ends
    last unless it is split, its gradients are reduced; then come the update and the gradient norm. Where a stack runs
    these beside kernels one piece of them stands alone, and the kernels take longer.
    Ignored, so that it stays below: the same of other stages, messages and collectives that meet on a link.
    """
    stack, gpu, first = job.stack, job.cluster.gpu, stages[0]
    seconds = first.gather
    if stack.overlap_param_gather and first.gather:
        seconds = first.gather / first.units + gpu.hiding_cost(min(first.gather, first.forward.total))
    if layout.schedule not in SPLIT_BACKWARD and first.reduce:
        overlaps = reduces_beside(job, layout)
        seconds += first.reduce * (first.reductions[-1][1] if overlaps else 1)
        if overlaps and layout.pp > 1:
            seconds += gpu.hiding_cost(min(first.reduce, first.backward.total))
    return seconds + times.end + step_end(job, layout, stages)


def critical_path(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> float:
    """Seconds that a step takes at least, with what data parallelism adds to every stage's first forward and last
    backward. Ignored: what torch gathers ahead of time for several stages of a rank."""
    return _Pipeline(job, layout, stages, edges=True).times().end + step_end(job, layout, stages)


def step_end(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> float:
    """Seconds of the update on the rank that has most to update, and of the gradient norm."""
    update = max(rank_update(job, layout, stages, rank) for rank in range(layout.pp))
    return update + norm_seconds(job, layout)


def rank_update(job: Job, layout: Layout, stages: tuple[StageCost, ...], rank: int) -> float:
    """Seconds of the update of a pipeline rank's share of its parameters."""
    held = [stages[s] for s in layout.stages_of(rank)]
    share = per_shard(layout, job.stack, sum(s.parameters for s in held), sum(s.experts for s in held))
    seconds: float = update_seconds(
        job, share, min(job.cluster.gpus_per_node, layout.world_size), layout.offload == "optimizer"
    )
    return seconds * job.cluster.streaming_cost(layout.world_size)


def message_ways(job: Job, layout: Layout) -> dict[tuple[int, int], tuple[float, float]]:
    """(latency, seconds on the link) of a message by the stages that it goes from and to, where they have two ranks."""
    kept = known_to(job, "ways")
    # A message depends on its size and on where the two ranks lie; layouts that differ otherwise share the answer.
    lies = layout.rank(pp=1), layout.world_size if layout.pp > 1 else 1, layout.axes[-1] == "pp"
    key = (*lies, layout.pp, layout.virtual_stages, layout.schedule in V_PLACEMENT, message_bytes(job, layout))
    if key not in kept:
        kept[key] = _message_ways(job, layout)
    found: dict[tuple[int, int], tuple[float, float]] = kept[key]
    return found


def _message_ways(job: Job, layout: Layout) -> dict[tuple[int, int], tuple[float, float]]:
    ranks = [layout.rank_of_stage(stage) for stage in range(layout.stages)]
    known: dict[tuple[int, int], tuple[float, float]] = {}
    found = {}
    for one, other in (
        (s, s + step) for step in (1, -1) for s in range(layout.stages) if 0 <= s + step < layout.stages
    ):
        way = ranks[one], ranks[other]
        if way[0] == way[1]:
            continue
        if way not in known:
            ends = layout.rank(pp=way[0]), layout.rank(pp=way[1])
            known[way] = message_cost(job, layout, ends[0], ends[1], None, fold=True)[:2]
        found[one, other] = known[way]
    return found


class _Pipeline:
    """Ranks that run their forwards and backwards in order, each as soon as its message is there."""

    def __init__(self, job: Job, layout: Layout, stages: tuple[StageCost, ...], edges: bool = False) -> None:
        self.job, self.layout, self.stages, self.edges = job, layout, stages, edges
        count = layout.microbatches(job.training.global_batch_size)
        self.order = topological_order(layout.schedule, layout.pp, layout.virtual_stages, count)
        total = [[getattr(cost, WORK[kind]).total for cost in stages] for kind in KINDS]
        pairs = [pair_work(job, stages[one].forward, stages[other].backward).total for one, other in self.order.pairs]
        self.total = [*itertools.chain(*total), 0.0, *pairs]
        # What torch gathers ahead of time for several stages of a rank is ignored.
        self.gathers = edges and (layout.zero_stage < 2 or layout.schedule not in MULTI_STAGE)
        # When the collectives of a rank are done; when the pieces of a stage's parameters are there.
        self.stream = [0.0] * layout.pp
        self.gathered: dict[int, list[float]] = {}

    def _ways(self) -> list[tuple[int, float, float]]:
        """Of the forwards and the backwards of each stage: the channel of their messages, latency and seconds."""
        layout, ways = self.layout, message_ways(self.job, self.layout)
        ranks = [layout.rank_of_stage(stage) for stage in range(layout.stages)]
        return [
            (ranks[s] * layout.pp + ranks[s + step], *ways[s, s + step]) if (s, s + step) in ways else (0, 0.0, 0.0)
            for step in (1, -1)
            for s in range(layout.stages)
        ]

    def _gather(self, rank: int, stages: list[int], now: float) -> float:
        """Queue the gathers of these stages; without overlap the rank waits for them."""
        for stage in stages:
            cost = self.stages[stage]
            pieces = cost.units if self.job.stack.overlap_param_gather else 1
            start = max(now, self.stream[rank])
            self.gathered[stage] = [start + cost.gather * (piece + 1) / pieces for piece in range(pieces)]
            self.stream[rank] = self.gathered[stage][-1]
            if pieces == 1:
                now = self.stream[rank]
        return now

    def _edge(self, rank: int, edge: Edge, now: float) -> float:
        """The end of an op that waits for its parameters piece by piece, or hands over its gradients; or of the begin
        of a gather."""
        job, op = self.job, edge.op
        first = [stage for stage in edge.first if self.gathers and self.stages[stage].gather]
        final = [stage for stage in edge.final if self.edges and self.stages[stage].reduce]
        if edge.work < 0:
            return self._gather(rank, first, now)
        work = self.total[edge.work]
        if op.parts:
            now = max([now, *(self.gathered[stage][-1] for stage in first)]) + work
            for stage in final:
                self.stream[rank] = max(now, self.stream[rank]) + self.stages[stage].reduce
            return now
        assert op.stage is not None
        cost = self.stages[op.stage]
        gathered = self.gathered[op.stage] if first and job.stack.overlap_param_gather else []
        overlaps = bool(final) and reduces_beside(job, self.layout)
        if gathered or overlaps:
            work += job.cluster.gpu.hiding_cost(min(cost.gather if gathered else cost.reduce, work))
        for piece, (share, reduced) in enumerate(cost.pieces(len(gathered), overlaps)):
            now = (max(now, gathered[piece]) if gathered else now) + work * share
            if overlaps:
                self.stream[rank] = max(now, self.stream[rank]) + cost.reduce * reduced
        if final and not overlaps:
            self.stream[rank] = max(now, self.stream[rank]) + cost.reduce
        return now

    def times(self) -> PipelineTimes:
        """Walk along the order in which everything comes after what it waits for."""
        order, total, ways, overlap_p2p = self.order, self.total, self._ways(), self.job.stack.overlap_p2p
        arrived, free, now = [0.0] * order.tensors, [0.0] * self.layout.pp**2, [0.0] * self.layout.pp
        edge: Edge | None = None
        for rank, work, received, sent, way in zip(
            order.ranks, order.works, order.received, order.sent, order.ways, strict=True
        ):
            time = now[rank]
            if received >= 0:
                arrival = arrived[received]
                if arrival > time:
                    time = arrival
            if work >= 0:
                time += total[work]
            else:
                edge = order.edges[-1 - work]
                time = self._edge(rank, edge, time)
            if sent >= 0:
                channel, latency, seconds = ways[way]
                left = free[channel]
                left = (left if left > time else time) + seconds
                free[channel] = left
                arrived[sent] = left + latency
                if not overlap_p2p:
                    time = left + latency
            if edge is not None:
                if self.edges and not self.job.stack.overlap_grad_reduce and edge.final:
                    time = max(time, self.stream[rank])
                edge = None
            now[rank] = time
        return PipelineTimes(max(*now, *self.stream))
