"""Seconds of a program whose messages and collectives meet nobody: the longest path through its ops.

The simulator runs the same program with links that are shared, and sharing never makes anything earlier: ranks take
their ops, and channels their messages, in a fixed order. So no step is shorter than this one, and where nothing meets
on a link the two are equal.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from simulator.expert_parallel import per_shard
from simulator.layout import SPLIT_BACKWARD, Layout
from simulator.messages import message_cost
from simulator.program import with_communication
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


def pipeline_seconds(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> float:
    """Seconds from the first forward to the last backward at least: forwards, backwards and messages alone, so that all
    layouts that differ in data parallelism only share them."""
    if layout.pp == 1:
        microbatches = layout.microbatches(job.training.global_batch_size)
        return microbatches * (stages[0].forward.total + stages[0].backward.total)
    return _Pipeline(job, layout, stages).seconds()


def edges_seconds(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> float:
    """Seconds that a step has at least besides its pipeline's: the first forward waits for its parameters, which
    everything else waits for; behind the last backward, which ends last unless it is split, its gradients are reduced;
    then comes the update. Where a stack runs these beside kernels, one piece of them stands alone."""
    stack, first = job.stack, stages[0]
    seconds = first.gather / (first.units if stack.overlap_param_gather else 1)
    if layout.schedule not in SPLIT_BACKWARD:
        pieces = first.units if stack.overlap_grad_reduce and layout.zero_stage < 2 else 1
        seconds += first.reduce / pieces
    update = max(rank_update(job, layout, stages, rank) for rank in range(layout.pp))
    return seconds + update + norm_seconds(job, layout)


def rank_update(job: Job, layout: Layout, stages: tuple[StageCost, ...], rank: int) -> float:
    """Seconds of the update of a pipeline rank's share of its parameters."""
    held = [stages[s] for s in layout.stages_of(rank)]
    share = per_shard(layout, job.stack, sum(s.parameters for s in held), sum(s.experts for s in held))
    seconds: float = update_seconds(job, share, min(job.cluster.gpus_per_node, layout.world_size))
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

    def __init__(self, job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> None:
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

    def seconds(self) -> float:
        pp, count, overlap_p2p = self.layout.pp, self.count, self.job.stack.overlap_p2p
        arrived = {kind: [-1.0] * (self.layout.stages * count) for kind in "FB"}
        arrived["I"] = arrived["B"]
        free, now, places = [0.0] * (pp * pp), [0.0] * pp, [0] * pp
        waits: list[tuple[str, int] | None] = [None] * pp
        total, receives, sends = self.total, self.receives, self.sends
        ready = list(range(pp))
        while ready:
            rank = ready.pop()
            order, place, time = self.orders[rank], places[rank], now[rank]
            for op in itertools.islice(order, place, None):
                kind, stage, _, parts = op
                if kind == "W":
                    time += total["W"][stage]  # type: ignore[index]
                    place += 1
                    continue
                for part, at, number, _ in parts or (op,):
                    if receives[part][at]:  # type: ignore[index]
                        key = at * count + number  # type: ignore[operator]
                        arrival = arrived[part][key]
                        if arrival < 0:
                            waits[rank] = ("F" if part == "F" else "B", key)
                            break
                        if arrival > time:
                            time = arrival
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
                    place += 1
                    continue
                break
            places[rank], now[rank] = place, time
        assert places == [len(order) for order in self.orders], "ranks wait for each other"
        return max(now)

    def _pair(self, parts: tuple[Op, ...]) -> float:
        key = parts[0].stage or 0, parts[1].stage or 0
        if key not in self.pairs:
            works = (getattr(self.stages[leaf.stage or 0], WORK[leaf.kind]) for leaf in parts)
            self.pairs[key] = pair_work(self.job, *works).total
        return self.pairs[key]


def critical_path(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> float:
    """Seconds of one step at least; 0 where ranks share processors, as there nothing is alone."""
    if job.cluster.concurrency:
        return 0.0
    return _Path(job, layout, stages).seconds()


class _Path:
    def __init__(self, job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> None:
        self.job, self.layout, self.stages = job, layout, stages
        shape = (layout.pp, layout.virtual_stages, layout.microbatches(job.training.global_batch_size))
        self.orders = [
            with_communication(compute_order(layout.schedule, rank, *shape), layout, stages)
            for rank in range(layout.pp)
        ]
        self.rank_of = [layout.rank_of_stage(stage) for stage in range(layout.stages)]
        self.work = {kind: [getattr(cost, name) for cost in stages] for kind, name in WORK.items()}
        self.total = {kind: [work.total for work in works] for kind, works in self.work.items()}
        self.links: dict[tuple[int, int], tuple[float, float]] = {}
        # When a message has come, when the last one had left its channel, and the time of every rank.
        self.arrived: dict[tuple[str, int, int], float] = {}
        self.free: dict[tuple[int, int], float] = {}
        self.now = [0.0] * layout.pp
        self.stream = [0.0] * layout.pp
        self.gathering: list[dict[int, list[float]]] = [{} for _ in range(layout.pp)]
        leaves = (
            (leaf.kind, leaf.stage, leaf.microbatch) for order in self.orders for op in order for leaf in op.leaves
        )
        final = {stage: (kind, microbatch) for kind, stage, microbatch in leaves if kind in ("B", "W")}
        self.final = {stage: last for stage, last in final.items() if stage is not None and stages[stage].reduce > 0}

    def seconds(self) -> float:
        places, waiting = [0] * self.layout.pp, list(range(self.layout.pp))
        while waiting:
            moved = False
            for rank in waiting:
                start = places[rank]
                places[rank] = self._advance(rank, start)
                moved = moved or places[rank] > start
            waiting = [rank for rank in waiting if places[rank] < len(self.orders[rank])]
            assert moved or not waiting, "ranks wait for each other"
        ends = [max(now, stream) for now, stream in zip(self.now, self.stream, strict=True)]
        update = max(rank_update(self.job, self.layout, self.stages, rank) for rank in range(self.layout.pp))
        return max(ends) + update + norm_seconds(self.job, self.layout)

    def _advance(self, rank: int, place: int) -> int:
        """Run a rank's ops until one waits for a message that nobody has sent yet; the place of that op."""
        order, arrived, now = self.orders[rank], self.arrived, self.now[rank]
        total, gathering, final = self.total, self.gathering[rank], self.final
        overlap_p2p = self.job.stack.overlap_p2p
        for op in itertools.islice(order, place, None):
            kind, stage, microbatch, _ = op
            if kind in total:
                assert stage is not None
                if stage in gathering or final.get(stage) == (kind, microbatch):
                    now = self._at_the_edge(rank, op, now)
                else:
                    now += total[kind][stage]
            elif kind in ("RECV_F", "RECV_B"):
                arrival = arrived.get((kind[-1], stage, microbatch))  # type: ignore[arg-type]
                if arrival is None:
                    break
                now = max(now, arrival)
            elif kind in ("SEND_F", "SEND_B"):
                arrival = self._send(rank, op, now)
                now = now if overlap_p2p else arrival
            elif kind == "OVERLAP_F_B":
                now = self._pair(rank, op, now)
            elif kind == "UNSHARD":
                now = self._unshard(rank, op, now)
            elif kind == "REDUCE_GRAD" and not self.job.stack.overlap_grad_reduce:
                now = max(now, self.stream[rank])
            place += 1
        self.now[rank] = now
        return place

    def _send(self, rank: int, op: Op, now: float) -> float:
        """When the message of a send arrives."""
        assert op.stage is not None and op.microbatch is not None
        stage = op.stage + (1 if op.kind == "SEND_F" else -1)
        target = self.rank_of[stage]
        way = rank, target
        if way not in self.links:
            source, goal = (self.layout.rank(pp=end) for end in way)
            self.links[way] = message_cost(self.job, self.layout, source, goal, None, fold=True)[:2]
        latency, seconds = self.links[way]
        left = max(now, self.free.get(way, 0.0)) + seconds
        self.free[way] = left
        self.arrived[op.kind[-1], stage, op.microbatch] = left + latency
        return left + latency

    def _unshard(self, rank: int, op: Op, now: float) -> float:
        assert op.stage is not None
        cost = self.stages[op.stage]
        if not self.job.stack.overlap_param_gather:
            self.stream[rank] = max(now, self.stream[rank]) + cost.gather
            return self.stream[rank]
        ends = []
        for _ in range(cost.units):
            self.stream[rank] = max(now, self.stream[rank]) + cost.gather / cost.units
            ends.append(self.stream[rank])
        self.gathering[rank][op.stage] = ends
        return now

    def _at_the_edge(self, rank: int, op: Op, now: float) -> float:
        """The end of an op that waits for its parameters piece by piece, or hands over its gradients."""
        assert op.stage is not None
        job, cost, work = self.job, self.stages[op.stage], self.work[op.kind][op.stage]
        gathered = self.gathering[rank].pop(op.stage, [])
        reduces = self.final.get(op.stage) == (op.kind, op.microbatch)
        overlaps = reduces and job.stack.overlap_grad_reduce and self.layout.zero_stage < 2
        pieces = len(gathered) or (cost.units if overlaps else 1)
        total = work.total
        if gathered or overlaps:
            total += job.cluster.gpu.hiding_cost(min(cost.gather if gathered else cost.reduce, total))
        for piece in range(pieces):
            if gathered:
                now = max(now, gathered[piece])
            now += total / pieces
            if overlaps:
                self._reduce(rank, now, cost.reduce / pieces)
        if reduces and not overlaps:
            self._reduce(rank, now, cost.reduce)
        return now

    def _pair(self, rank: int, op: Op, now: float) -> float:
        works = []
        for leaf in op.parts:
            assert leaf.stage is not None
            now = max([now, *self.gathering[rank].pop(leaf.stage, [])])
            works.append(self.work[leaf.kind][leaf.stage])
        now += pair_work(self.job, *works).total
        for leaf in op.parts:
            if self.final.get(leaf.stage or 0) == (leaf.kind, leaf.microbatch):
                self._reduce(rank, now, self.stages[leaf.stage or 0].reduce)
        return now

    def _reduce(self, rank: int, now: float, seconds: float) -> None:
        self.stream[rank] = max(now, self.stream[rank]) + seconds
