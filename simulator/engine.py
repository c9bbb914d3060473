"""The engine: pipeline ranks are simpy processes, their programs run in virtual time.

Each rank has two streams: ops run one after another on `compute`; gradient reduction and parameter gathering run on
`dp` beside it where the stack overlaps them. Messages travel between ranks on the link between their devices. Ranks
that differ only in their data-parallel and tensor-parallel coordinates do the same at the same time, so one of each
kind is simulated and counts for all.

On a machine without GPUs the ranks of a node share its processors (Processors): k ranks that compute at once run at
the measured speed of k, and communication over the loopback needs processors like everything else.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import simpy

from simulator.cluster import group_shape
from simulator.collectives import collective_seconds, message_seconds
from simulator.compute import optimizer_seconds
from simulator.expert_parallel import per_shard
from simulator.layout import Layout
from simulator.program import Program
from simulator.results import Breakdown, Span
from simulator.schedules import Op
from simulator.stage import Work

if TYPE_CHECKING:
    from simulator.job import Job

Process = Generator[simpy.Event, Any, None]


@dataclass(frozen=True)
class Run:
    """One simulated step: its length, where the critical rank spent it, and the spans if they were asked for."""

    step_seconds: float
    breakdown: Breakdown
    spans: tuple[Span, ...]


def run_program(job: Job, layout: Layout, program: Program, trace: bool = False) -> Run:
    """Run a program in virtual time.

    The critical rank is the one that waits least in bubbles: the pipeline goes at its pace.
    """
    return _Engine(job, layout, program, trace).run()


class Processors:
    """The processors of a node, shared by ranks that compute at the same time.

    With k ranks active each works at `speeds[k - 1]` of its speed alone; beyond the measured counts the total stays.
    """

    def __init__(self, env: simpy.Environment, speeds: tuple[float, ...]) -> None:
        self.env, self.speeds = env, speeds
        self.jobs: dict[simpy.Event, list[float]] = {}  # done event -> [seconds of work left, ranks]
        self.updated, self.version = 0.0, 0

    def speed(self) -> float:
        """Speed of each active rank now, relative to one alone."""
        active = sum(ranks for _, ranks in self.jobs.values())
        if active <= 0:
            return 1.0
        known = len(self.speeds)
        index = min(max(round(active), 1), known)
        return self.speeds[index - 1] * min(1.0, known / active)

    def work(self, seconds: float, ranks: int) -> simpy.Event:
        """An event that fires when `ranks` ranks have each done this much work."""
        self._advance()
        done = self.env.event()
        self.jobs[done] = [seconds, ranks]
        self._schedule()
        return done

    def _advance(self) -> None:
        elapsed, speed = self.env.now - self.updated, self.speed()
        for entry in self.jobs.values():
            entry[0] -= elapsed * speed
        self.updated = self.env.now

    def _schedule(self) -> None:
        """Wake up when the job with the least work is done; a later change makes this waking stale."""
        self.version += 1
        if self.jobs:
            left = min(entry[0] for entry in self.jobs.values())
            self.env.process(self._wake(max(0.0, left) / self.speed(), left, self.version))

    def _wake(self, delay: float, left: float, version: int) -> Process:
        """Finish the jobs that had the least work left, `left` seconds of it, when this waking was set.

        They are known by that, not by having nothing left now: late in a long step the clock is too coarse for it.
        """
        ending = [event for event, entry in self.jobs.items() if entry[0] <= left + 1e-12]
        yield self.env.timeout(delay)
        if version != self.version:
            return
        self._advance()
        for done in ending:
            del self.jobs[done]
            done.succeed()
        self._schedule()


@dataclass
class _Message:
    """A tensor on its way: `sent` is when it left its rank, `arrived` fires when it is there."""

    arrived: simpy.Event
    sent: float = 0.0


@dataclass
class _Rank:
    """The state of one pipeline rank; `spent` sums seconds by the fields of Breakdown."""

    index: int
    processors: Processors | None
    replicas: int
    dp_stream: simpy.Resource
    spent: dict[str, float] = field(default_factory=dict)
    reducing: list[simpy.Event] = field(default_factory=list)
    gathering: dict[int, list[simpy.Event]] = field(default_factory=dict)

    def spend(self, what: str, seconds: float) -> None:
        self.spent[what] = self.spent.get(what, 0.0) + seconds


class _Engine:
    def __init__(self, job: Job, layout: Layout, program: Program, trace: bool) -> None:
        self.job, self.layout, self.program, self.trace = job, layout, program, trace
        self.env = simpy.Environment()
        self.spans: list[Span] = []
        self.pools: dict[int, Processors] = {}
        self.ranks = [self._make_rank(index) for index in range(layout.pp)]
        self.messages: dict[tuple[str, int, int], _Message] = {}
        self.links: dict[tuple[int, int], simpy.Resource] = {}
        self.message_costs: dict[tuple[int, int], tuple[float, float]] = {}
        self.ready, self.all_ready = 0, self.env.event()
        self.final_backward = {
            op.stage: op.microbatch for order in program.orders for op in order if op.kind == "B"
        }  # fmt: skip
        self.handlers = {
            "F": self._compute, "B": self._compute, "RECV_F": self._receive, "RECV_B": self._receive,
            "SEND_F": self._send, "SEND_B": self._send, "UNSHARD": self._unshard, "REDUCE_GRAD": self._reduce,
            "OPTIMIZER": self._optimize,
        }  # fmt: skip

    def run(self) -> Run:
        for rank in self.ranks:
            self.env.process(self._run_rank(rank))
        self.env.run()
        critical = min(self.ranks, key=lambda rank: rank.spent.get("bubble", 0.0))
        # It may be done with its own update before the rank with the most parameters is.
        critical.spend("bubble", self.env.now - sum(critical.spent.values()))
        return Run(self.env.now, Breakdown(**critical.spent), tuple(self.spans))

    def _make_rank(self, index: int) -> _Rank:
        spec, layout = self.job.cluster, self.layout
        pool = None
        if spec.concurrency:
            node = layout.rank(pp=index) // max(1, int(spec.gpus_per_node * spec.oversubscribe))
            pool = self.pools.setdefault(node, Processors(self.env, spec.concurrency))
        return _Rank(index, pool, layout.world_size // layout.pp, simpy.Resource(self.env, 1))

    def _run_rank(self, rank: _Rank) -> Process:
        for op in self.program.orders[rank.index]:
            yield from self.handlers[op.kind](rank, op)

    def _busy(self, rank: _Rank, seconds: float) -> simpy.Event:
        """Occupy the rank's device, or its share of the node's processors."""
        if rank.processors is None:
            return self.env.timeout(seconds)
        return rank.processors.work(seconds, rank.replicas)

    def _span(self, rank: _Rank, stream: str, name: str, start: float) -> None:
        if self.trace:
            self.spans.append(Span(rank.index, stream, name, start, self.env.now - start))

    def _compute(self, rank: _Rank, op: Op) -> Process:
        """A forward or backward. The first forward of a stage may wait piece by piece for its parameters, the last
        backward may hand over its gradients bucket by bucket."""
        assert op.stage is not None
        cost = self.program.stages[op.stage]
        work = cost.forward if op.kind == "F" else cost.backward
        gathered = rank.gathering.pop(op.stage, []) if op.kind == "F" else []
        reduces = op.kind == "B" and cost.reduce > 0 and self.final_backward[op.stage] == op.microbatch
        # Under a pipeline FSDP reduces when a stage's backwards are done, not beside the last one.
        overlaps = reduces and self.job.stack.overlap_grad_reduce and self.layout.zero_stage < 2
        pieces = len(gathered) or (cost.units if overlaps else 1)
        if gathered or overlaps:
            beside = cost.gather if gathered else cost.reduce
            work += Work(dp=self.job.cluster.gpu.hiding_cost(min(beside, work.total)))
        began = self.env.now
        for piece in range(pieces):
            if gathered and not gathered[piece].processed:
                waited = self.env.now
                yield gathered[piece]
                rank.spend("dp", self.env.now - waited)
            start = self.env.now
            yield self._busy(rank, work.total / pieces)
            self._spend_work(rank, work, self.env.now - start)
            if overlaps:
                rank.reducing.append(self.env.process(self._on_dp_stream(rank, cost.reduce / pieces, op)))
        if reduces and not overlaps:
            rank.reducing.append(self.env.process(self._on_dp_stream(rank, cost.reduce, op)))
        self._span(rank, "compute", f"PP:{op}", began)

    def _spend_work(self, rank: _Rank, work: Work, elapsed: float) -> None:
        """Book elapsed seconds on what the work is made of; on shared processors they exceed the work's own."""
        for name, seconds in vars(work).items():
            if seconds and name != "total":
                rank.spend(name, elapsed * seconds / work.total)

    def _on_dp_stream(self, rank: _Rank, seconds: float, op: Op) -> Process:
        """A collective of the data-parallel group, after the ones already queued."""
        with rank.dp_stream.request() as turn:
            yield turn
            start = self.env.now
            yield self._busy(rank, seconds)
            self._span(rank, "dp", f"PP:{op}", start)

    def _unshard(self, rank: _Rank, op: Op) -> Process:
        """Gather a stage's parameters: ahead of its first forward, or beside it where the stack prefetches."""
        assert op.stage is not None
        cost = self.program.stages[op.stage]
        if self.job.stack.overlap_param_gather:
            rank.gathering[op.stage] = [
                self.env.process(self._on_dp_stream(rank, cost.gather / cost.units, op)) for _ in range(cost.units)
            ]
            return
        start = self.env.now
        yield self.env.process(self._on_dp_stream(rank, cost.gather, op))
        rank.spend("dp", self.env.now - start)

    def _reduce(self, rank: _Rank, op: Op) -> Process:
        """The reduction was queued with the last backward; a stack that does not overlap waits for it here."""
        if self.job.stack.overlap_grad_reduce:
            return
        start = self.env.now
        yield self.env.all_of(rank.reducing)
        rank.spend("dp", self.env.now - start)

    def _message(self, kind: str, stage: int, microbatch: int) -> _Message:
        return self.messages.setdefault((kind, stage, microbatch), _Message(self.env.event()))

    def _send(self, rank: _Rank, op: Op) -> Process:
        """Put a tensor on the link to the neighbour; the rank goes on where the stack overlaps messages."""
        assert op.stage is not None and op.microbatch is not None
        kind, target = op.kind[-1], op.stage + (1 if op.kind == "SEND_F" else -1)
        message = self._message(kind, target, op.microbatch)
        message.sent = self.env.now
        transfer = self.env.process(self._transfer(rank, target % self.layout.pp, message, op))
        if not self.job.stack.overlap_p2p:
            yield transfer
            rank.spend("pp", self.env.now - message.sent)

    def _transfer(self, rank: _Rank, target: int, message: _Message, op: Op) -> Process:
        latency, seconds = self._message_cost(rank.index, target)
        link = self.links.setdefault((rank.index, target), simpy.Resource(self.env, 1))
        with link.request() as turn:
            yield turn
            start = self.env.now
            yield self._busy(rank, seconds)
            self._span(rank, "pp", f"PP:{op}", start)
        yield self.env.timeout(latency)
        message.arrived.succeed()

    def _message_cost(self, source: int, target: int) -> tuple[float, float]:
        if (source, target) not in self.message_costs:
            layout, training = self.layout, self.job.training
            width = self.job.stack.recipes[training.precision].compute
            shards = layout.tp if layout.sequence_parallel or self.job.stack.scatters_messages else 1
            tokens = layout.micro_batch_size * training.seq_len / layout.cp
            size = tokens * self.job.model.hidden_size * width / shards
            ranks = (layout.rank(pp=source), layout.rank(pp=target))
            starts = layout.sibling_starts("pp", self.job.cluster.domain)
            shape = max((group_shape(self.job.graph, ranks, s) for s in starts), key=lambda shape: shape.domains)
            self.message_costs[source, target] = message_seconds(size, shape, self.job.cluster)
        return self.message_costs[source, target]

    def _receive(self, rank: _Rank, op: Op) -> Process:
        """Wait for a neighbour's tensor. Until it was sent the wait is bubble, from then on it is the link's."""
        assert op.stage is not None and op.microbatch is not None
        message = self._message(op.kind[-1], op.stage, op.microbatch)
        start = self.env.now
        if not message.arrived.processed:
            yield message.arrived
        link = min(self.env.now - start, self.env.now - message.sent)
        rank.spend("pp", link)
        rank.spend("bubble", self.env.now - start - link)

    def _optimize(self, rank: _Rank, op: Op) -> Process:
        """Wait for the reductions, agree on the gradient norm with all ranks, update the parameters."""
        start = self.env.now
        yield self.env.all_of(rank.reducing)
        rank.spend("dp", self.env.now - start)
        start = self.env.now
        self.ready += 1
        if self.ready == len(self.ranks):
            self.all_ready.succeed()
        yield self.all_ready
        rank.spend("bubble", self.env.now - start)
        start = self.env.now
        yield self._busy(rank, self._optimizer_seconds(rank))
        rank.spend("optimizer", self.env.now - start)
        self._span(rank, "compute", str(op), start)

    def _optimizer_seconds(self, rank: _Rank) -> float:
        """The update of this rank's share, and an all-reduce of the gradient norm over the world."""
        job, layout = self.job, self.layout
        held = [self.program.stages[s] for s in layout.stages_of(rank.index)]
        share = per_shard(layout, job.stack, sum(s.parameters for s in held), sum(s.experts for s in held))
        world = group_shape(job.graph, layout.group("tp", "cp", "dp_shard", "dp_replicate", "pp"))
        norm = collective_seconds("all_reduce", 4.0, world, job.cluster)
        return optimizer_seconds(job.cluster.gpu, job.stack, job.training.optimizer, share) + norm
