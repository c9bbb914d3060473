"""Messages between pipeline ranks: one after another on the way from one rank to another."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import simpy

from simulator.cluster import GroupShape, group_shape
from simulator.collectives import message_seconds
from simulator.layout import Layout
from simulator.network import Flow, Route, Routes
from simulator.placement import cluster_period, known_to

if TYPE_CHECKING:
    from simulator.job import Job


class Arrival(simpy.Event):
    """An event that is due a while after it is decided."""

    def succeed_after(self, delay: float) -> None:
        self._ok, self._value = True, None
        self.env.schedule(self, delay=delay)


@dataclass(eq=False, slots=True)
class Message:
    """A tensor on its way: `sent` is when its rank handed it over, `arrival` when it is there: infinite while that is
    not known, and a guess while its `flow` is on its way alone. `arrived` exists if somebody waits for it."""

    sent: float = math.inf
    arrival: float = math.inf
    arrived: Arrival | None = None
    flow: Flow | None = None
    channel: Channel | None = None

    def announced(self) -> Callable[[], None]:
        """From now on somebody is told when it has left; the function to call then."""
        assert self.channel is not None
        self.flow, self.arrival = None, math.inf
        return self.channel.put_back(self)

    def wait(self, env: simpy.Environment) -> Generator[simpy.Event, Any, None]:
        """Wait until it is there."""
        if self.flow is not None and self.flow.ends > env.now:
            self.flow.announce()
        if self.arrival == math.inf:
            self.arrived = self.arrived or Arrival(env)
            yield self.arrived
        elif self.arrival > env.now:
            yield env.timeout(self.arrival - env.now)


@dataclass(eq=False, slots=True)
class Channel:
    """The stream of messages from one rank to another, in the order in which they are sent. `occupy` makes the link
    busy with one and calls back when it is done; `latency` seconds later the message is there. `begin` does so without
    an event, if the link is free and as long as nobody meets it there: most messages arrive before anybody asks."""

    env: simpy.Environment
    latency: float
    occupy: Callable[[Callable[[], None]], None]
    begin: Callable[[], Flow | None] | None = None
    queue: deque[tuple[Message, Callable[[float], None] | None]] = field(default_factory=deque)
    flow: Flow | None = None

    def send(self, message: Message, moved: Callable[[float], None] | None = None) -> None:
        """Queue a message; `moved` is called with the time when its transfer began, when that has ended."""
        now = message.sent = self.env.now
        if self.flow is not None and self.flow.ends > now:
            self.flow.announce()
        if not self.queue and self.begin is not None and moved is None and message.arrived is None:
            flow = self.flow = message.flow = self.begin()
            if flow is not None:
                message.arrival = flow.ends + self.latency
                message.channel = self
                flow.announced = message.announced
                return
        self.queue.append((message, moved))
        if len(self.queue) == 1:
            self._transfer()

    def put_back(self, message: Message) -> Callable[[], None]:
        """The message that is on its way quietly becomes one whose end is an event."""
        self.flow = None
        self.queue.append((message, None))
        return functools.partial(self._end, self.env.now)

    def _transfer(self) -> None:
        self.occupy(functools.partial(self._end, self.env.now))

    def _end(self, start: float) -> None:
        message, moved = self.queue.popleft()
        message.arrival = self.env.now + self.latency
        if message.arrived is not None:
            message.arrived.succeed_after(self.latency)
        if moved is not None:
            moved(start)
        if self.queue:
            self._transfer()


def message_cost(
    job: Job, layout: Layout, source: int, target: int, routes: Routes | None, fold: bool
) -> tuple[float, float, Route | None]:
    """(latency, seconds on the link, route) of an activation or its gradient from one global rank to another.

    The messages that a folded run stands for may lie in more than one way; the step waits for those that lie worst.
    """
    start, shape = _worst_way(job, layout, source, target, fold)
    latency, seconds = message_seconds(message_bytes(job, layout), shape, job.cluster)
    return latency, seconds, routes.message(source + start, target + start) if routes else None


def message_bytes(job: Job, layout: Layout) -> float:
    """Bytes that one rank sends of an activation between two stages."""
    shards = layout.tp if layout.sequence_parallel or job.stack.scatters_messages else 1
    tokens = layout.micro_batch_size * job.training.seq_len / layout.cp
    return tokens * job.model.hidden_size * job.stack.recipes[job.training.precision].compute / shards


def message_shapes(job: Job, layout: Layout) -> tuple[GroupShape, ...]:
    """The different ways in which the pipeline ranks of a folded run and the ranks behind them lie."""
    known, stride = known_to(job, "message shapes"), layout.rank(pp=1)
    key = stride, layout.pp, layout.world_size, layout.axes[-1] == "pp"
    if key not in known:
        first, period = dict[int, int](), cluster_period(job, layout)
        for source in range(0, (layout.pp - 1) * stride, stride):
            first.setdefault(source % period, source)
        ways = (_worst_way(job, layout, source, source + stride, True)[1] for source in first.values())
        known[key] = tuple(dict.fromkeys(ways))
    found: tuple[GroupShape, ...] = known[key]
    return found


def _worst_way(job: Job, layout: Layout, source: int, target: int, fold: bool) -> tuple[int, GroupShape]:
    """How far the pair that lies worst is from this one, and how it lies."""
    known, graph = known_to(job, "messages"), job.graph
    stride = layout.rank(pp=1)
    behind = layout.world_size // layout.pp if layout.axes[-1] == "pp" else layout.world_size
    sharing = job.cluster.sharing(layout.world_size)
    key = (source % cluster_period(job, layout), target - source, stride, layout.pp, behind, fold, sharing)
    if key not in known:
        tiers = job.cluster.tiers if fold else ()
        starts = sorted({start for tier in tiers for start in layout.sibling_starts("pp", tier)}) or [0]
        shapes = {start: group_shape(graph, (source, target), start, sharing) for start in starts}
        worst = max(starts, key=lambda start: (shapes[start].domains, -shapes[start].slowest))
        known[key] = worst, shapes[worst]
    found: tuple[int, GroupShape] = known[key]
    return found
