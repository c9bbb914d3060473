"""Replicas that keep together over servers, in rounds, or hardly: every replica is a simpy process.

A step of a replica is computing, then communicating. With servers it pushes its gradients piece by piece and pulls
the parameters piece by piece: a piece comes back when it was pushed and when no replica is more than `staleness` steps
behind (stale-synchronous parallel, Ho et al. 2013; 0 waits for all, None for nobody). So the way out of one piece
overlaps the way back of another, as in BytePS (OSDI'20). In rounds (all-reduce, local SGD) all replicas wait for each
other every few steps.

Over servers a step of the training is done whenever as many updates have come in as there are replicas, in rounds when
every replica has done it.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import simpy

from simulator.incast import Incast, Kind
from simulator.ranks import Process
from simulator.results import Synchronisation


@dataclass(frozen=True)
class Replica:
    """Seconds that a step of a replica computes before its jitter, the factors of its steps one by one, and the kinds
    of transfer that its pushes and pulls are (numbers; None where they stay in its own memory)."""

    seconds: float
    jitters: Iterator[float]
    push: int | None = None
    pull: int | None = None


@dataclass(frozen=True)
class Servers:
    """What replicas push to, all servers taken together: parameters are cut evenly over them, so all do the same.

    push_bytes and pull_bytes are a replica's of one step; each goes in `pieces`. latency is seconds of one way;
    receive_seconds is the servers' work on the push of one replica, finish_seconds what follows when those of all
    have come and staleness is 0.
    """

    capacities: dict[str, float]
    kinds: list[Kind]
    push_bytes: float
    pull_bytes: float
    pieces: int = 1
    latency: float = 0.0
    receive_seconds: float = 0.0
    finish_seconds: float = 0.0


@dataclass(eq=False, slots=True)
class _State:
    """A replica on its way: steps begun, pieces pushed and pulled in this one, pieces that may be pulled."""

    number: int
    replica: Replica
    clock: int = 0
    pushed: int = 0
    pulled: int = 0
    ready: collections.deque[int] = field(default_factory=collections.deque)
    pulling: bool = False
    done: simpy.Event | None = None
    sent: float = math.inf  # when the last piece of this step was pushed
    idle: float = 0.0  # since when nothing is pulled
    waited: float = 0.0
    version: int = 0


class Ledger:
    """What a simulation counts: when steps end, and how replicas spend their time."""

    def __init__(self, replicas: int, steps: int) -> None:
        self.replicas, self.total = replicas, replicas * steps
        self.ends: list[float] = []
        self.count = 0
        self.computing = 0.0
        self.communicating = 0.0
        self.waits: list[float] = []
        self.staleness: collections.Counter[int] = collections.Counter()
        self.lead = 0
        self.missing: dict[int, int] = {}  # of a step, the replicas that have not done it yet

    def finish(self, now: float) -> bool:
        """Note the end of a replica's step; True if it was the last."""
        self.count += 1
        if self.count % self.replicas == 0:
            self.ends.append(now)
        return self.count >= self.total

    def finish_together(self, step: int, now: float) -> bool:
        """The same where a step is done when every replica has done it; steps count from 1. True if it was the last."""
        self.count += 1
        self.missing[step] = self.missing.get(step, self.replicas) - 1
        self.lead = max(self.lead, step - len(self.ends) - 1)
        if not self.missing[step]:
            del self.missing[step]
            self.ends.append(now)
        return step * self.replicas >= self.total

    def synchronisation(self, events: int) -> Synchronisation:
        """The result; steps are told apart by when they end."""
        begins = [0.0, *self.ends[:-1]]
        steps = sorted(end - begin for begin, end in zip(begins, self.ends, strict=True))
        waits = sorted(self.waits)
        count = max(1, len(waits))
        updates = sum(self.staleness.values())
        return Synchronisation(
            steps=len(steps),
            mean=self.ends[-1] / len(steps),
            p95=quantile(steps, 0.95),
            computing=self.computing / count,
            communicating=self.communicating / count,
            waiting=sum(waits) / count,
            waiting_p95=quantile(waits, 0.95),
            staleness=tuple(sorted(self.staleness.items())),
            mean_staleness=sum(k * v for k, v in self.staleness.items()) / updates if updates else 0.0,
            lead=self.lead,
            events=events,
        )


def quantile(ordered: list[float], share: float) -> float:
    """The smallest value that at least this share of the values does not exceed; 0 where there are none."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


def with_servers(replicas: list[Replica], servers: Servers, staleness: int | None, steps: int) -> Synchronisation:
    """Train over servers until each replica has taken `steps` steps on average.

    Rule: pushes and pulls share the servers' links max-min fairly (incast.py); a server works on one piece after
    another, in the order in which they come.
    Ignored: losses of an incast within a round trip, and that servers may be unequally busy.
    """
    return _ServerRun(replicas, servers, staleness, steps).run()


class _ServerRun:
    def __init__(self, replicas: list[Replica], servers: Servers, staleness: int | None, steps: int) -> None:
        self.env = simpy.Environment()
        self.servers, self.staleness = servers, staleness
        self.network = Incast(self.env, servers.capacities, servers.kinds)
        self.states = [_State(number, replica) for number, replica in enumerate(replicas)]
        self.ledger = Ledger(len(replicas), steps)
        self.last = servers.pieces - 1
        # Of each piece: the steps that every replica has pushed, how many have pushed each number, who waits for which.
        self.low = [0] * servers.pieces
        self.at: list[collections.Counter[int]] = [
            collections.Counter({0: len(replicas)}) for _ in range(servers.pieces)
        ]
        self.waiting: list[dict[int, list[_State]]] = [{} for _ in range(servers.pieces)]
        self.receive = servers.receive_seconds / servers.pieces
        self.final = servers.finish_seconds / servers.pieces if staleness == 0 else 0.0
        self.free = 0.0  # when the servers are done with what has come so far
        self.updates = 0
        self.over = self.env.event()

    def run(self) -> Synchronisation:
        for state in self.states:
            self.env.process(self._train(state))
        events, step = 0, self.env.step
        while not self.over.triggered:
            step()
            events += 1
        return self.ledger.synchronisation(events)

    def _train(self, state: _State) -> Process:
        env, replica, ledger = self.env, state.replica, self.ledger
        while True:
            begin = env.now
            seconds = replica.seconds * next(replica.jitters)
            # The latencies of both ways lie one after another, wherever they are counted.
            yield env.timeout(seconds + 2 * self.servers.latency)
            state.clock += 1
            state.pushed = state.pulled = 0
            state.waited, state.sent, state.done = 0.0, math.inf, env.event()
            state.idle = env.now
            self._push(state)
            yield state.done
            ledger.computing += seconds
            ledger.communicating += env.now - begin - seconds - state.waited
            ledger.waits.append(state.waited)
            if ledger.finish(env.now):
                if not self.over.triggered:
                    self.over.succeed()
                return

    def _push(self, state: _State) -> None:
        if state.replica.push is None:
            self._received(state)
        else:
            size = self.servers.push_bytes / self.servers.pieces
            self.network.start(state.replica.push, size, self._received, state)

    def _received(self, state: Any) -> None:
        """A piece is with the servers; the next one leaves while they work on it."""
        piece = state.pushed
        state.pushed += 1
        if piece == self.last:
            state.sent = self.env.now
        if self.receive:
            self._serve(self.receive, lambda event: self._apply(state, piece))
        else:
            self._apply(state, piece)
        if piece != self.last:
            self._push(state)

    def _serve(self, seconds: float, then: Any) -> None:
        self.free = max(self.free, self.env.now) + seconds
        self.env.timeout(self.free - self.env.now).callbacks.append(then)

    def _apply(self, state: _State, piece: int) -> None:
        """A piece is applied: it may be pulled, at once or when enough others have come."""
        clock = state.clock
        if piece == self.last:
            # Gradients that are applied together are of the same parameters.
            self.ledger.staleness[0 if self.staleness == 0 else self.updates - state.version] += 1
            self.updates += 1
        at, low = self.at[piece], self.low[piece]
        at[clock] += 1
        at[clock - 1] -= 1
        if clock - 1 == low and not at[low]:
            del at[low]
            low += 1
            self.low[piece] = low
            if self.final:
                self._serve(self.final, lambda event: self._release(piece, low))
            else:
                self._release(piece, low)
        if self.staleness is None or (low >= clock - self.staleness and not self.final):
            self._permit(state, piece)
        elif low < clock - self.staleness or self.final:
            self._await(state, piece, clock - self.staleness)

    def _await(self, state: _State, piece: int, needed: int) -> None:
        self.waiting[piece].setdefault(needed, []).append(state)

    def _release(self, piece: int, low: int) -> None:
        for state in self.waiting[piece].pop(low, ()):
            self._permit(state, piece)

    def _permit(self, state: _State, piece: int) -> None:
        state.ready.append(piece)
        if not state.pulling:
            self._pull(state)

    def _pull(self, state: _State) -> None:
        piece = state.ready.popleft()
        state.pulling = True
        # Before its own last piece is sent a replica is busy anyway.
        if state.sent < math.inf:
            state.waited += self.env.now - max(state.idle, state.sent)
        if piece == self.last:
            state.version = self.updates
            self.ledger.lead = max(self.ledger.lead, state.clock - self.low[piece])
        if state.replica.pull is None:
            self._arrived(state)
        else:
            size = self.servers.pull_bytes / self.servers.pieces
            self.network.start(state.replica.pull, size, self._arrived, state)

    def _arrived(self, state: Any) -> None:
        state.pulled += 1
        state.pulling = False
        state.idle = self.env.now
        if state.pulled > self.last:
            state.done.succeed()
        elif state.ready:
            self._pull(state)


def in_rounds(replicas: list[Replica], exchange_seconds: float, interval: int, steps: int) -> Synchronisation:
    """Train in rounds of `interval` steps, after each of which all replicas meet and exchange what takes
    `exchange_seconds`: an all-reduce of gradients (every step) or of parameters. `steps` is rounded up to whole rounds.
    """
    env = simpy.Environment()
    ledger = Ledger(len(replicas), -(-steps // interval) * interval)
    meeting = _Meeting(env, len(replicas), exchange_seconds)
    over = env.event()

    def train(replica: Replica) -> Process:
        done = 0
        while True:
            round_seconds = 0.0
            for step in range(interval):
                seconds = replica.seconds * next(replica.jitters)
                round_seconds += seconds
                yield env.timeout(seconds)
                if step + 1 < interval:
                    done += 1
                    ledger.finish_together(done, env.now)
            met = env.now
            yield meeting.arrive()
            ledger.computing += round_seconds
            ledger.communicating += exchange_seconds
            waited = env.now - met - exchange_seconds
            ledger.waits += [max(0.0, waited) / interval] * interval
            ledger.staleness[0] += interval
            done += 1
            if ledger.finish_together(done, env.now):
                if not over.triggered:
                    over.succeed()
                return

    for replica in replicas:
        env.process(train(replica))
    events = 0
    while not over.triggered:
        env.step()
        events += 1
    return ledger.synchronisation(events)


class _Meeting:
    """Where all replicas wait for the last one, and then exchange."""

    def __init__(self, env: simpy.Environment, size: int, seconds: float) -> None:
        self.env, self.size, self.seconds = env, size, seconds
        self.missing, self.complete = size, env.event()

    def arrive(self) -> simpy.Event:
        complete = self.complete
        self.missing -= 1
        if not self.missing:
            self.missing, self.complete = self.size, self.env.event()
            self.env.timeout(self.seconds).callbacks.append(lambda event: self._part(complete))
        return complete

    @staticmethod
    def _part(complete: simpy.Event) -> None:
        complete.succeed()
