"""Many transfers of few kinds on shared links: what max-min fair sharing gives, without looking at every flow.

Transfers of one kind cross the same links with the same weights and have the same limit, so they always have the same
rate. Each kind therefore keeps a clock of bytes: how many a transfer that was there from the beginning would have sent.
A transfer ends when the clock has moved on by its size, so that a kind is a heap of readings (virtual time; Parekh and
Gallager 1993). What is shared is decided among kinds, weighted by how many transfers they have: a start or an end
costs as much as there are kinds, however many transfers there are. network.py gives the same rates flow by flow
(tests/simulator/test_incast.py).
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import simpy


@dataclass(frozen=True)
class Kind:
    """Transfers that are alike: the links that they cross with the share of their bytes that crosses each, and the
    bytes per second that one reaches alone."""

    links: tuple[tuple[str, float], ...]
    limit: float


# Rates are remembered by how many transfers of each kind there are; so many of them.
MOST_KNOWN = 2**17

Done = Callable[[object], None]


class Incast:
    """Transfers on links of `capacities` bytes per second. Those of a link are numbered as they come in `kinds`."""

    def __init__(self, env: simpy.Environment, capacities: dict[str, float], kinds: list[Kind]) -> None:
        self.env, self.sharing = env, Sharing(kinds, capacities)
        self.counts = [0] * len(kinds)
        self.rates = [0.0] * len(kinds)
        self.clocks = [0.0] * len(kinds)
        # (reading at which it ends, order of arrival, what to call, with what)
        self.heaps: list[list[tuple[float, int, Done, object]]] = [[] for _ in kinds]
        self.places = range(len(kinds))
        self.order = itertools.count()
        self.updated, self.alarm = 0.0, 0
        self._known: dict[tuple[int, ...], list[float]] = {}

    def start(self, kind: int, size: float, done: Done, what: object) -> None:
        """Send `size` bytes; `done(what)` is called when the last one has left."""
        self._advance()
        heapq.heappush(self.heaps[kind], (self.clocks[kind] + size, next(self.order), done, what))
        self.counts[kind] += 1
        self._share()

    def _advance(self) -> None:
        now = self.env.now
        elapsed = now - self.updated
        if elapsed:
            clocks, rates = self.clocks, self.rates
            for place in self.places:
                clocks[place] += elapsed * rates[place]
            self.updated = now

    def _share(self) -> None:
        """Set the rates that the transfers of now leave each other, and wake when the first of them ends."""
        counts = tuple(self.counts)
        rates = self._known.get(counts)
        if rates is None:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            rates = self._known[counts] = self.sharing.rates(counts)
        self.rates = rates
        self.alarm += 1
        soonest = math.inf
        for heap, rate, clock in zip(self.heaps, rates, self.clocks, strict=True):
            if heap:
                left = (heap[0][0] - clock) / rate
                if left < soonest:
                    soonest = left
        if soonest < math.inf:
            alarm = self.env.timeout(soonest if soonest > 0 else 0.0, self.alarm)
            alarm.callbacks.append(self._end)

    def _end(self, alarm: simpy.Event) -> None:
        """End what is due, unless a start has changed the rates since the alarm was set."""
        if alarm.value != self.alarm:
            return
        self._advance()
        ended = []
        now = self.env.now
        for place in self.places:
            heap, clock = self.heaps[place], self.clocks[place]
            # What is left takes less than the clock of the simulation can tell from now.
            due = clock + 1e-12 * (clock + now * self.rates[place])
            while heap and heap[0][0] <= due:
                ended.append(heapq.heappop(heap))
                self.counts[place] -= 1
            if not heap:
                self.clocks[place] = 0.0
        ended.sort(key=lambda one: one[1])
        self._share()
        for _, _, done, what in ended:
            done(what)


class Sharing:
    """Max-min fair rates of transfers by kind (progressive filling, as network.max_min_rates): all rates rise together
    until a link is full or a transfer is at its limit; those stay, the others rise on."""

    def __init__(self, kinds: list[Kind], capacities: dict[str, float]) -> None:
        names = list(capacities)
        self.capacities = list(capacities.values())
        self.limits = [kind.limit for kind in kinds]
        self.crossed = [[(names.index(link), weight) for link, weight in kind.links if weight] for kind in kinds]

    def rates(self, counts: tuple[int, ...]) -> list[float]:
        """Bytes per second of one transfer of each kind, where there are so many of each."""
        limits, crossed, free = self.limits, self.crossed, self.capacities[:]
        rates = [0.0] * len(counts)
        active = [place for place, count in enumerate(counts) if count]
        while active:
            load, level = [0.0] * len(free), math.inf
            for place in active:
                if limits[place] < level:
                    level = limits[place]
                for link, weight in crossed[place]:
                    load[link] += weight * counts[place]
            shares = [left / weight if weight else math.inf for left, weight in zip(free, load, strict=True)]
            level = max(0.0, min(level, *shares)) if shares else level
            bar, rising = level * (1 + 1e-12), []
            for place in active:
                if limits[place] > level and all(shares[link] > bar for link, _ in crossed[place]):
                    rising.append(place)
                    continue
                rates[place] = level
                for link, weight in crossed[place]:
                    free[link] -= weight * counts[place] * level
            active = rising
        return rates
