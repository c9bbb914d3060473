"""Seconds of a step whose messages and collectives meet nobody: the longest path through its forwards, backwards and
messages, and what data parallelism adds at its ends.

The simulator runs the same program with links that are shared, and sharing never makes anything earlier: ranks take
their ops, and channels their messages, in a fixed order. So no step is shorter than this.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, NamedTuple

from simulator.expert_parallel import per_shard
from simulator.layout import MULTI_STAGE, SPLIT_BACKWARD, Layout
from simulator.messages import message_cost
from simulator.schedules import Op, compute_order
from simulator.stage import StageCost, Work
from simulator.step_end import norm_seconds, update_seconds

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
        overlaps = stack.overlap_grad_reduce and layout.zero_stage < 2
        seconds += first.reduce / (first.units if overlaps else 1)
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
    return seconds


def message_ways(job: Job, layout: Layout) -> dict[tuple[int, int], tuple[float, float]]:
    """(latency, seconds on the link) of a message by the stages that it goes from and to, where they have two ranks."""
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
        self.job, self.layout, self.stages = job, layout, stages
        self.count = layout.microbatches(job.training.global_batch_size)
        shape = (layout.pp, layout.virtual_stages, self.count)
        self.orders = [compute_order(layout.schedule, rank, *shape) for rank in range(layout.pp)]
        self.total = {kind: [getattr(cost, name).total for cost in stages] for kind, name in WORK.items()}
        # Of each stage: where a forward's (a backward's) message goes: stage, rank, channel, latency, seconds.
        ranks, ways = [layout.rank_of_stage(stage) for stage in range(layout.stages)], message_ways(job, layout)
        sends: dict[int, list[tuple[int, int, int, float, float] | None]] = {}
        for step in (1, -1):
            sends[step] = [
                (s + step, ranks[s + step], ranks[s] * layout.pp + ranks[s + step], *ways[s, s + step])
                if (s, s + step) in ways
                else None
                for s in range(layout.stages)
            ]
        self.sends = {"F": sends[1], "B": sends[-1], "I": sends[-1]}
        self.receives = {
            "F": [(s - 1, s) in ways for s in range(layout.stages)],
            "B": [(s + 1, s) in ways for s in range(layout.stages)],
        }
        self.receives["I"] = self.receives["B"]
        self.pairs: dict[tuple[int, int], float] = {}
        # The places of ops that wait for their parameters, and that hand over their gradients; when the collectives of
        # a rank are done; when the pieces of a stage's parameters are there.
        self.first: list[dict[int, list[int]]] = [{} for _ in self.orders]
        self.final: list[dict[int, list[int]]] = [{} for _ in self.orders]
        if edges:
            self.final = [self._places(order, "BW", [cost.reduce for cost in stages]) for order in self.orders]
        if edges and (layout.zero_stage < 2 or layout.schedule not in MULTI_STAGE):
            self.first = [self._places(order, "F", [cost.gather for cost in stages]) for order in self.orders]
        self.stream = [0.0] * layout.pp
        self.gathered: dict[int, list[float]] = {}

    @staticmethod
    def _places(order: tuple[Op, ...], kinds: str, seconds: list[float]) -> dict[int, list[int]]:
        """Where a rank's first forward or last gradient of its stages is, for those that take any of these seconds."""
        found: dict[int, int] = {}
        for place, op in enumerate(order):
            for leaf in op.leaves:
                if leaf.kind in kinds and leaf.stage is not None and (kinds != "F" or leaf.stage not in found):
                    found[leaf.stage] = place
        places: dict[int, list[int]] = {}
        for stage, place in found.items():
            if seconds[stage]:
                places.setdefault(place, []).append(stage)
        return places

    def _gather(self, rank: int, stages: list[int], now: float) -> float:
        """Queue the gathers of these stages, once; without overlap the rank waits for them."""
        for stage in stages:
            if stage in self.gathered:
                continue
            cost = self.stages[stage]
            pieces = cost.units if self.job.stack.overlap_param_gather else 1
            start = max(now, self.stream[rank])
            self.gathered[stage] = [start + cost.gather * (piece + 1) / pieces for piece in range(pieces)]
            self.stream[rank] = self.gathered[stage][-1]
            if pieces == 1:
                now = self.stream[rank]
        return now

    def _edge(self, rank: int, op: Op, now: float, first: list[int], final: list[int]) -> float:
        """The end of an op that waits for its parameters piece by piece, or hands over its gradients."""
        job = self.job
        if op.parts:
            now = max([now, *(self.gathered[stage][-1] for stage in first)]) + self._pair(op.parts)
            for stage in final:
                self.stream[rank] = max(now, self.stream[rank]) + self.stages[stage].reduce
            return now
        assert op.stage is not None
        cost, work = self.stages[op.stage], self.total[op.kind][op.stage]
        gathered = self.gathered[op.stage] if first and job.stack.overlap_param_gather else []
        overlaps = bool(final) and job.stack.overlap_grad_reduce and self.layout.zero_stage < 2
        pieces = len(gathered) or (cost.units if overlaps else 1)
        if gathered or overlaps:
            work += job.cluster.gpu.hiding_cost(min(cost.gather if gathered else cost.reduce, work))
        for piece in range(pieces):
            now = max(now, gathered[piece]) + work / pieces if gathered else now + work / pieces
            if overlaps:
                self.stream[rank] = max(now, self.stream[rank]) + cost.reduce / pieces
        if final and not overlaps:
            self.stream[rank] = max(now, self.stream[rank]) + cost.reduce
        return now

    def times(self) -> PipelineTimes:
        """Run all ranks, each until it needs a message that nobody has sent yet."""
        pp, count, overlap_p2p = self.layout.pp, self.count, self.job.stack.overlap_p2p
        arrived = {kind: [-1.0] * (self.layout.stages * count) for kind in "FB"}
        arrived["I"] = arrived["B"]
        free, now, places = [0.0] * (pp * pp), [0.0] * pp, [0] * pp
        waits: list[tuple[str, int] | None] = [None] * pp
        total, receives, sends, firsts, finals = self.total, self.receives, self.sends, self.first, self.final
        ready = list(range(pp))
        while ready:
            rank = ready.pop()
            order, place, time = self.orders[rank], places[rank], now[rank]
            for op in itertools.islice(order, place, None):
                kind, stage, _, parts = op
                first, final = firsts[rank].get(place), finals[rank].get(place)
                if first:
                    time = self._gather(rank, first, time)
                for part, at, number, _ in parts or (op,):
                    if part != "W" and receives[part][at]:  # type: ignore[index]
                        key = at * count + number  # type: ignore[operator]
                        arrival = arrived[part][key]
                        if arrival < 0:
                            waits[rank] = ("F" if part == "F" else "B", key)
                            break
                        if arrival > time:
                            time = arrival
                else:
                    if first or final:
                        time = self._edge(rank, op, time, first or [], final or [])
                    else:
                        time += total[kind][stage] if not parts else self._pair(parts)  # type: ignore[index]
                    for part, at, number, _ in parts or (op,):
                        way = sends[part][at] if part != "W" else None  # type: ignore[index]
                        if way is None:
                            continue
                        target, peer, channel, latency, seconds = way
                        left = free[channel]
                        left = (left if left > time else time) + seconds
                        free[channel] = left
                        key = target * count + number  # type: ignore[operator]
                        arrived[part][key] = left + latency
                        if not overlap_p2p:
                            time = left + latency
                        if waits[peer] == ("F" if part == "F" else "B", key):
                            waits[peer] = None
                            ready.append(peer)
                    if final and not self.job.stack.overlap_grad_reduce:
                        time = max(time, self.stream[rank])
                    place += 1
                    continue
                break
            places[rank], now[rank] = place, time
        assert places == [len(order) for order in self.orders], "ranks wait for each other"
        return PipelineTimes(max(*now, *self.stream))

    def _pair(self, parts: tuple[Op, ...]) -> float:
        key = parts[0].stage or 0, parts[1].stage or 0
        if key not in self.pairs:
            works = (getattr(self.stages[leaf.stage or 0], WORK[leaf.kind]) for leaf in parts)
            self.pairs[key] = pair_work(self.job, *works).total
        return self.pairs[key]
