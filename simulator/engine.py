"""The engine: ranks are simpy processes, their programs run in virtual time.

Each rank has streams: ops run one after another on `compute`; gradient reduction and parameter gathering run on `dp`
beside it where the stack overlaps them; messages leave one after another on a stream per receiver. What meets on a
link of the cluster shares it (network.py).

Folding: ranks that differ only in their data-, context- and tensor-parallel coordinates do the same at the same time,
so one of each pipeline rank is simulated and counts for all. An unfolded run simulates every rank: its collectives
wait for the ranks of their group, its messages go to the very peer. Both give the same step
(tests/simulator/test_unfolded.py); ranks of different speed need the unfolded one.

On a machine without GPUs the ranks of a node share its processors (processors.py): k ranks that compute at once run
at the measured speed of k, and communication over the loopback needs processors like everything else. The seconds of a
collective were measured while all ranks of the node shared the processors (CollectiveFit.active), or where no such
measurement is known while its own did, so that they hold as they are where no more than those are active.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import simpy
from simpy.core import EmptySchedule

from simulator.collectives import active_ranks
from simulator.critical_path import pair_work, rank_update
from simulator.data_parallel import reduces_beside
from simulator.errors import UserError
from simulator.garbage import uncollected
from simulator.layout import Layout
from simulator.messages import Channel, Message, message_cost
from simulator.network import Network, Route, Routes
from simulator.processors import Processors
from simulator.program import Program
from simulator.ranks import Process, Rank
from simulator.rendezvous import Axes, Rendezvous
from simulator.results import Breakdown, Span, Timeline
from simulator.schedules import Op
from simulator.step_end import norm_seconds
from simulator.work import Work

if TYPE_CHECKING:
    from simulator.job import Job

# What a handler leaves its rank to do: nothing, one event to wait for, or more.
Waiting = Process | simpy.Event | None
Step = tuple[Callable[[Any], Waiting], Any]
# By their microbatch.
Messages = collections.defaultdict[int | None, Message]


# Ops that compute, by the field of StageCost that is their work.
COMPUTE = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}
# Ops that finish a stage's gradients: behind the last of them they are reduced.
GRADIENT = ("B", "W")
MESSAGES = ("RECV_F", "RECV_B", "SEND_F", "SEND_B")
# Collectives within an op by the field of Work that they are spent on, with the axes of their ranks.
COLLECTIVES = {"tp": ("tp",), "cp": ("cp",), "ep": ("dp_shard", "cp", "tp"), "dp": ("dp_shard", "cp")}
WORLD = ("dp_replicate", "dp_shard", "cp", "tp", "pp")
# Axes whose ranks communicate within every op; that gather parameters together.
LOCKSTEP, GATHERING = ("tp", "cp"), ("cp", "dp_shard")


@dataclass(frozen=True)
class Run:
    """One simulated step: its length, where the critical rank spent it, what it took to simulate, and the timeline
    if it was asked for."""

    step_seconds: float
    breakdown: Breakdown
    events: int
    timeline: Timeline


def run_program(
    job: Job,
    layout: Layout,
    program: Program,
    trace: bool = False,
    unfold: bool = False,
    slowdown: Mapping[int, float] | None = None,
) -> Run:
    """Run a program in virtual time.

    The critical rank is the one that waits least in bubbles: the pipeline goes at its pace.

    Args:
        trace: keep every span.
        unfold: simulate every rank, not one of each kind.
        slowdown: how many times longer these ranks (global numbers) compute; it unfolds the run.

    Raises:
        UserError: `slowdown` names a rank that the layout does not have, or a factor that is not above zero.
    """
    slowdown = slowdown or {}
    for rank, factor in slowdown.items():
        if not 0 <= rank < layout.world_size:
            raise UserError(f"slowdown names rank {rank}, but the layout has ranks 0 to {layout.world_size - 1}")
        if not 0 < factor < math.inf:
            raise UserError(f"slowdown of rank {rank} = {factor:g} must be above zero and finite")
    with uncollected():
        return _Engine(job, layout, program, trace, unfold or bool(slowdown), slowdown).run()


def _last_gradients(order: tuple[Op, ...], stages: tuple[int, ...]) -> dict[int | None, Op]:
    """Of each of these stages of a rank the op that finishes its gradients: found from the end, where they are."""
    found: dict[int | None, Op] = {}
    for op in reversed(order):
        for leaf in reversed(op.parts or (op,)):
            if leaf.kind in GRADIENT:
                found.setdefault(leaf.stage, leaf)
        if len(found) == len(stages):
            break
    return found


class _Engine:
    def __init__(
        self, job: Job, layout: Layout, program: Program, trace: bool, unfold: bool, slowdown: Mapping[int, float]
    ) -> None:
        self.job, self.layout, self.program, self.trace, self.unfold = job, layout, program, trace, unfold
        self.slowdown = slowdown
        self.env = simpy.Environment()
        self.block = layout.world_size // layout.pp
        # How far apart the first ranks of two pipeline ranks are.
        self.stride = layout.rank(pp=1)
        self.groups = Rendezvous(self.env, layout, unfold)
        self.network = Network(self.env)
        # Only messages meet anything: without a pipeline no link needs to be looked at.
        self.routes = (
            Routes(self.network, job.graph, *((1, 0) if unfold else (self.stride, layout.pp)))
            if layout.pp > 1 and not job.cluster.concurrency
            else None
        )
        # Under FSDP the ranks that share parameters communicate in every op too.
        self.lockstep = LOCKSTEP + (("dp_shard",) if layout.shards_gradients or layout.ep > 1 else ())
        self.reducing = (*GATHERING, *layout.reducing_replicas)
        self.lockstep_name = "tp" if layout.tp * layout.cp > 1 else "dp"
        self.spans: list[Span] = []
        self.pools: dict[int, Processors] = {}
        self.per_node = max(1, int(job.cluster.gpus_per_node * job.cluster.oversubscribe))
        self.sharing = job.cluster.sharing(layout.world_size)
        numbers = range(layout.world_size) if unfold else [layout.rank(pp=index) for index in range(layout.pp)]
        self.ranks = [self._make_rank(number) for number in numbers]
        # By what they carry, and the stage and the global rank that receive them.
        self.messages: dict[tuple[str, int, int], Messages] = {}
        self.stages_of = [layout.stages_of(rank) for rank in range(layout.pp)]
        self.rank_of = {stage: rank for rank, stages in enumerate(self.stages_of) for stage in stages}
        self.final: dict[int | None, Op] = {}
        for order, stages in zip(program.orders, self.stages_of, strict=True):
            self.final |= _last_gradients(order, stages)
        self.work = {kind: [getattr(cost, work) for cost in program.stages] for kind, work in COMPUTE.items()}
        self.ready, self.all_ready = 0, self.env.event()
        self.handlers: dict[str, Callable[[Rank, Op], Waiting]] = {
            **dict.fromkeys(COMPUTE, self._compute), "OVERLAP_F_B": self._compute_pair,
            **dict.fromkeys(MESSAGES, self._pass), "UNSHARD": self._unshard, "RESHARD": self._reshard,
            "REDUCE_GRAD": self._reduce, "OPTIMIZER": self._optimize,
        }  # fmt: skip

    def run(self) -> Run:
        for rank in self.ranks:
            self.env.process(self._run_rank(rank))
        events = 0
        with contextlib.suppress(EmptySchedule):
            while True:
                self.env.step()
                events += 1
        now = self.env.now
        # Of ranks that wait equally long, but for rounding, the first.
        least = min(rank.spent.get("bubble", 0.0) for rank in self.ranks)
        critical = next(rank for rank in self.ranks if rank.spent.get("bubble", 0.0) <= least + 1e-9 * now)
        # It may be done with its own update before the rank with the most parameters is.
        waited = critical.spent.get("bubble", 0.0) + now - sum(critical.spent.values())
        # Rounding is no bubble, and none is negative.
        critical.spent["bubble"] = waited if waited > 1e-9 * now else 0.0
        return Run(now, Breakdown(**critical.spent), events, Timeline(tuple(self.spans)))

    def _make_rank(self, number: int) -> Rank:
        spec, pool, replicas = self.job.cluster, None, 1
        if spec.concurrency:
            pool = self.pools.setdefault(number // self.per_node, Processors(self.env, spec.concurrency))
            replicas = 1 if self.unfold else min(self.block, self.per_node)
        rank = Rank(number // self.stride % self.layout.pp, number, pool, replicas, simpy.Resource(self.env, 1))
        rank.factor = self.slowdown.get(number, 1.0)
        if self.slowdown:
            rank.slowest = max(self.slowdown.get(one, 1.0) for one in self.groups.members(number, self.lockstep))
        return rank

    def _run_rank(self, rank: Rank) -> Process:
        for act, argument in self._steps(rank):
            waiting = act(argument)
            if waiting is None:
                continue
            if isinstance(waiting, simpy.Event):
                yield waiting
            else:
                yield from waiting

    def _steps(self, rank: Rank) -> list[Step]:
        """What a rank does: functions with what they are called with. Forwards and backwards between which nothing can
        happen become one step, and as nothing can change how long they take, they are booked here."""
        ops = self.program.orders[rank.index]
        handlers = {kind: functools.partial(handler, rank) for kind, handler in self.handlers.items()}
        together = self.unfold and self.groups.group(rank.number, self.lockstep).size > 1
        if self.trace or rank.processors or together or rank.factor != 1:
            return [(handlers[op.kind], op) for op in ops]
        steps: list[Step] = []
        booked: dict[tuple[str, int], int] = {}
        passing: dict[tuple[str, int | None], tuple[Callable[[Message], Waiting], Messages]] = {}
        receive = functools.partial(self._receive, rank)
        seconds, gathered = 0.0, set[int | None]()
        stages = self.stages_of[rank.index]
        total = {(kind, stage): work[stage].total for kind, work in self.work.items() for stage in stages}
        final, reducing = self.final, {stage for stage in stages if self.program.stages[stage].reduce > 0}
        for op in ops:
            kind, stage, microbatch, parts = op
            key = kind, stage
            if key in total and stage not in gathered and (stage not in reducing or final[stage] != op):
                seconds += total[key]
                booked[key] = booked.get(key, 0) + 1
                continue
            if seconds:
                steps.append((self.env.timeout, seconds))
                seconds = 0.0
            if kind in MESSAGES:
                if key not in passing:
                    channel, messages = self._passing(rank, op)
                    passing[key] = self._sender(rank, channel) if channel else receive, messages
                act, messages = passing[key]
                steps.append((act, messages[microbatch]))
                continue
            steps.append((handlers[kind], op))
            if kind == "UNSHARD":
                gathered.add(stage)
            elif gathered:
                gathered -= {leaf.stage for leaf in parts or (op,) if leaf.kind in COMPUTE}
        steps += [(self.env.timeout, seconds)] if seconds else []
        for (kind, stage), count in booked.items():
            rank.spend_work(vars(self.work[kind][stage]), count)
        return steps

    def _busy(self, rank: Rank, seconds: float) -> simpy.Event:
        """Occupy the rank's device, or its share of the node's processors."""
        if rank.processors is None:
            return self.env.timeout(seconds)
        return rank.processors.work(seconds, rank.replicas)

    def _move(self, rank: Rank, seconds: float, axes: Axes | None, copying: float) -> simpy.Event:
        """Occupy what a collective along these axes, or a message, uses besides the links of a route, for what takes
        `seconds` alone: a wire between hosts for all of them, processors for the share in which they copy."""
        moved = self._busy(rank, self._unshared(rank, seconds * copying, axes))
        return moved if copying == 1 else self.env.all_of([self.env.timeout(seconds), moved])

    def _shown(self, rank: Rank) -> int:
        """The number of a rank in a timeline: of a folded run's that of the pipeline rank."""
        return rank.number if self.unfold else rank.index

    def _span(self, rank: Rank, stream: str, op: Op, start: float) -> None:
        if self.trace:
            name = str(op) if op.kind == "OPTIMIZER" else f"PP:{op}"
            self.spans.append(Span(self._shown(rank), stream, name, start, self.env.now - start))

    def _reduces(self, op: Op) -> bool:
        """Whether gradients of the op's stage are reduced behind it."""
        return self.final.get(op.stage) == op and self.program.stages[op.stage or 0].reduce > 0

    def _compute(self, rank: Rank, op: Op) -> Process:
        """A forward or backward. The first op of a stage may wait piece by piece for its parameters, the last
        backward may hand over its gradients bucket by bucket."""
        assert op.stage is not None
        cost, work = self.program.stages[op.stage], self.work[op.kind][op.stage]
        gathered = rank.gathering.pop(op.stage, [])
        reduces = self._reduces(op)
        # Under a pipeline FSDP reduces when a stage's backwards are done, not beside the last one.
        overlaps = reduces and reduces_beside(self.job, self.layout)
        pieces = cost.pieces(len(gathered), overlaps)
        if gathered or overlaps:
            beside = cost.gather if gathered else cost.reduce
            work += Work(dp=self.job.cluster.gpu.hiding_cost(min(beside, work.total)))
        spent = self._spent(rank, work)
        yield from rank.wait(self.groups.meet(rank.number, self.lockstep, op), self.lockstep_name)
        began = self.env.now
        for piece, (share, reduced) in enumerate(pieces):
            if gathered and not gathered[piece].processed:
                yield from rank.wait(gathered[piece], "dp")
            start, rank.computing = self.env.now, True
            yield self._busy(rank, spent["total"] * share)
            rank.computing = piece + 1 < len(pieces)
            rank.spend_work(spent, (self.env.now - start) / spent["total"] if spent["total"] else 0.0)
            if overlaps:
                rank.reducing.append(self._collective(rank, cost.reduce * reduced, op, self.reducing, piece))
        if reduces and not overlaps:
            rank.reducing.append(self._collective(rank, cost.reduce, op, self.reducing))
        self._span(rank, "compute", op, began)

    def _compute_pair(self, rank: Rank, op: Op) -> Process:
        """A forward and a backward together (critical_path.pair_work)."""
        stages = self.program.stages
        for leaf in op.parts:
            for gathered in rank.gathering.pop(leaf.stage or 0, []):
                yield from rank.wait(gathered, "dp")
        work = pair_work(self.job, *(self.work[leaf.kind][leaf.stage or 0] for leaf in op.parts))
        spent = self._spent(rank, work)
        yield from rank.wait(self.groups.meet(rank.number, self.lockstep, op), self.lockstep_name)
        began = self.env.now
        yield self._busy(rank, spent["total"])
        rank.spend_work(spent, (self.env.now - began) / spent["total"] if spent["total"] else 0.0)
        for leaf in op.parts:
            if self._reduces(leaf):
                rank.reducing.append(self._collective(rank, stages[leaf.stage or 0].reduce, leaf, self.reducing))
        self._span(rank, "compute", op, began)

    def _spent(self, rank: Rank, work: Work) -> dict[str, float]:
        """What an op's seconds are spent on, as `_busy` takes them: on shared processors those of collectives are what
        they would be if their ranks did not share."""
        spent = rank.seconds_of(work, self.lockstep_name)
        if rank.processors is not None:
            for name, axes in COLLECTIVES.items():
                if spent[name]:
                    alone = self._unshared(rank, spent[name], axes)
                    spent["total"] -= spent[name] - alone
                    spent[name] = alone
        return spent

    def _unshared(self, rank: Rank, seconds: float, axes: Axes | None) -> float:
        """Seconds that a collective along these axes, or a message, would take if its ranks had a processor each, which
        `_busy` makes longer again."""
        if rank.processors is None:
            return seconds
        size = 2 if axes is None else self.groups.group(rank.number, axes).size
        known = active_ranks(self.job.cluster.scale_up.collectives, size, self.sharing)
        return seconds * rank.processors.speed_of(min(known, self.per_node))

    def _reshard(self, rank: Rank, op: Op) -> None:
        """Dropping gathered parameters takes no time."""

    def _collective(self, rank: Rank, seconds: float, op: Op, axes: Axes, piece: int = 0) -> simpy.Event:
        """Queue a collective of the data-parallel group: it runs after the ones queued before it."""
        return self.env.process(self._on_dp_stream(rank, seconds, op, axes, piece))

    def _on_dp_stream(self, rank: Rank, seconds: float, op: Op, axes: Axes, piece: int) -> Process:
        with rank.dp_stream.request() as turn:
            yield turn
            if begin := self.groups.meet(rank.number, axes, op, piece, "begin"):
                yield begin
            start = self.env.now
            if route := self._ring(rank, axes):
                yield self.network.transfer(route, seconds * route.alone)
            else:
                copying = self.program.stages[op.stage or 0].copying
                if rank.computing and copying < 1:
                    # The wire idles while what came over it waits for a processor.
                    yield self._move(rank, seconds * copying, axes, 1.0)
                    yield self.env.timeout(seconds * (1 - copying))
                else:
                    yield self._move(rank, seconds, axes, copying)
            if end := self.groups.meet(rank.number, axes, op, piece, "end"):
                yield end
            self._span(rank, "dp", op, start)

    def _ring(self, rank: Rank, axes: Axes) -> Route | None:
        """The links that a collective of the rank's group occupies, where anything could meet it."""
        if axes not in rank.rings:
            group = self.groups.group(rank.number, axes)
            found = self.routes.ring(rank.number, group.first, group.last) if self.routes and group.size > 1 else None
            rank.rings[axes] = found
        return rank.rings[axes]

    def _unshard(self, rank: Rank, op: Op) -> Process | None:
        """Gather a stage's parameters: ahead of its first forward, or beside it where the stack prefetches."""
        assert op.stage is not None
        cost = self.program.stages[op.stage]
        if not self.job.stack.overlap_param_gather:
            return rank.wait(self._collective(rank, cost.gather, op, GATHERING), "dp")
        share, pieces = cost.gather / cost.units, range(cost.units)
        rank.gathering[op.stage] = [self._collective(rank, share, op, GATHERING, piece) for piece in pieces]
        return None

    def _reduce(self, rank: Rank, op: Op) -> Process | None:
        """The reduction was queued with the last backward; a stack that does not overlap waits for it here."""
        if self.job.stack.overlap_grad_reduce:
            return None
        return rank.wait(self.env.all_of(rank.reducing), "dp")

    def _passing(self, rank: Rank, op: Op) -> tuple[Channel | None, Messages]:
        """The messages of a rank's ops of this kind and stage, by microbatch, and the channel that it sends them on,
        None where it receives them. Whoever asks first makes them for the other."""
        assert op.stage is not None
        stage, target, channel = op.stage, rank.number, None
        if op.kind in ("SEND_F", "SEND_B"):
            stage += 1 if op.kind == "SEND_F" else -1
            target += (self.rank_of[stage] - rank.index) * self.stride
            if target not in rank.channels:
                rank.channels[target] = self._channel(rank, target)
            channel = rank.channels[target]
        return channel, self.messages.setdefault((op.kind[-1], stage, target), collections.defaultdict(Message))

    def _pass(self, rank: Rank, op: Op) -> Process | None:
        """Send a message or receive it."""
        channel, messages = self._passing(rank, op)
        message = messages[op.microbatch]
        if channel is None:
            return self._receive(rank, message, op)
        return self._send(rank, channel, message, op)

    def _sender(self, rank: Rank, channel: Channel) -> Callable[[Message], Waiting]:
        return channel.send if self.job.stack.overlap_p2p else functools.partial(self._send, rank, channel)

    def _send(self, rank: Rank, channel: Channel, message: Message, op: Op | None = None) -> Process | None:
        """Put a tensor on the link to the neighbour; the rank goes on where the stack overlaps messages."""
        channel.send(message, functools.partial(self._span, rank, "send", op) if self.trace and op else None)
        return None if self.job.stack.overlap_p2p else self._sent(rank, message)

    def _sent(self, rank: Rank, message: Message) -> Process:
        """Wait with a tensor that is being sent until it is there."""
        yield from message.wait(self.env)
        rank.spend("pp", self.env.now - message.sent)

    def _channel(self, rank: Rank, target: int) -> Channel:
        fold = not self.unfold
        latency, seconds, route = message_cost(self.job, self.layout, rank.number, target, self.routes, fold)
        copying, spec = 1.0, self.job.cluster
        if spec.scale_out and spec.wired and rank.number // self.per_node != target // self.per_node:
            copying = min(1.0, spec.scale_out.bandwidth / spec.scale_up.bandwidth)

        def occupy(end: Callable[[], None]) -> None:
            if route is not None:
                self.network.start(route, seconds * route.alone, end)
                return
            moved = self._move(rank, seconds, None, copying)
            assert moved.callbacks is not None
            moved.callbacks.append(lambda _: end())

        begin = functools.partial(self.network.begin, route, seconds * route.alone) if route is not None else None
        return Channel(self.env, latency, occupy, begin)

    def _receive(self, rank: Rank, message: Message, op: Op | None = None) -> Process | None:
        """Wait for a neighbour's tensor, if it is not there yet."""
        if message.arrival <= self.env.now and not self.trace:
            # Nothing is left that could delay it.
            message.flow = None
            return None
        return self._await(rank, message, op)

    def _await(self, rank: Rank, message: Message, op: Op | None) -> Process:
        """Until a message was sent the wait for it is bubble, from then on it is the link's."""
        start = self.env.now
        yield from message.wait(self.env)
        link = min(self.env.now - start, self.env.now - message.sent)
        rank.spend("pp", link)
        rank.spend("bubble", self.env.now - start - link)
        if op is not None:
            self._span(rank, "recv", op, start)

    def _optimize(self, rank: Rank, op: Op) -> Process:
        """Wait for the reductions, agree on the gradient norm with all ranks, update the parameters."""
        yield from rank.wait(self.env.all_of(rank.reducing), "dp")
        self.ready += 1
        if self.ready == len(self.ranks):
            self.all_ready.succeed()
        yield from rank.wait(self.all_ready, "bubble")
        start = self.env.now
        norm = self._unshared(rank, norm_seconds(self.job, self.layout), WORLD)
        yield self._busy(rank, self._update_seconds(rank) * rank.factor + norm)
        rank.spend("optimizer", self.env.now - start)
        self._span(rank, "compute", op, start)

    def _update_seconds(self, rank: Rank) -> float:
        """The update of this rank's share of the parameters, which servers do for their workers."""
        if self.layout.sync == "parameter_server":
            return 0.0
        return rank_update(self.job, self.layout, self.program.stages, rank.index)
