"""Flows on the links of a cluster: messages and collectives that meet on a link share it max-min fairly.

A flow has a route, a size in bytes and a limit: the rate that it reaches alone. Rates change only when a flow starts
or ends, and only those of flows that it meets, directly or over others. A flow that meets nobody takes size / limit.

A flow may stand for several of its kind: its weight on a link is how many of them cross that link, so that eight
tensor ranks on eight network cards do not meet, and four on one card do.

Source: progressive filling (Bertsekas and Gallager, Data Networks, section 6.5.2). Ignored: what happens within a
round trip, incast losses, unfairness of real switches.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import simpy

from simulator.cluster import gpu_of, path

if TYPE_CHECKING:
    import networkx as nx


@dataclass(eq=False, slots=True)
class Link:
    """One direction of a cable: bytes per second, and the flows that are on it now."""

    capacity: float
    flows: dict[Flow, float] = field(default_factory=dict)  # flow -> how many of its kind cross here


@dataclass(frozen=True)
class Route:
    """The links of a flow with its weight on each, and the bytes per second that it reaches alone."""

    links: tuple[tuple[Link, float], ...]
    limit: float

    @functools.cached_property
    def alone(self) -> float:
        """Bytes per second when nobody else is on the way."""
        return min([self.limit, *(link.capacity / weight for link, weight in self.links)])


@dataclass(eq=False, slots=True)
class Flow:
    """A transfer on its way: `left` bytes at time `updated`, leaving at `rate` since then.

    One that has met nobody yet may be quiet: it `ends` at a known time, no event says so, and it stays on its links
    until somebody looks there. Whoever needs to know, or meets it, has it announced: then `announced` gives the
    function that is called at its end.
    """

    route: Route
    left: float
    done: Callable[[], object]
    updated: float
    rate: float = 0.0
    alarms: int = 0
    ends: float = -math.inf
    network: Network | None = None
    announced: Callable[[], Callable[[], object]] | None = None

    def announce(self) -> None:
        """From now on an event marks its end."""
        assert self.announced is not None and self.network is not None
        self.done, ends = self.announced(), self.ends
        self.ends = -math.inf
        self.network.alarm(self, ends - self.network.env.now)


def max_min_rates(flows: Collection[Flow]) -> dict[Flow, float]:
    """Max-min fair rates in bytes per second of flows that share links with nobody else.

    All rates rise together until a link is full or a flow is at its limit; those flows stay there, the others rise on.
    """
    active = dict.fromkeys(flows)
    free: dict[Link, float] = {}
    for flow in flows:
        free.update((link, link.capacity) for link, _ in flow.route.links)
    rates: dict[Flow, float] = {}
    while active:
        weights: dict[Link, float] = {}
        for flow in active:
            for link, weight in flow.route.links:
                weights[link] = weights.get(link, 0.0) + weight
        shares = {link: max(0.0, free[link]) / weight for link, weight in weights.items()}
        level = min(min(shares.values(), default=math.inf), min(flow.route.limit for flow in active))
        # A hair above the level is the level: sums of shares are not exact.
        full = {link for link, share in shares.items() if share <= level * (1 + 1e-12)}
        for flow in [f for f in active if f.route.limit <= level or any(link in full for link, _ in f.route.links)]:
            rates[flow] = level
            del active[flow]
            for link, weight in flow.route.links:
                free[link] -= weight * level
    return rates


class Network:
    """The links of a simulation that are in use, and the flows on them."""

    def __init__(self, env: simpy.Environment) -> None:
        self.env = env
        self.links: dict[Hashable, Link] = {}

    def link(self, key: Hashable, capacity: float) -> Link:
        """The link of this name, made when it is first asked for."""
        if key not in self.links:
            self.links[key] = Link(capacity)
        return self.links[key]

    def transfer(self, route: Route, size: float) -> simpy.Event:
        """Send `size` bytes; the event fires when the last one has left."""
        done = self.env.event()
        self.start(route, size, done.succeed)
        return done

    def start(self, route: Route, size: float, done: Callable[[], object]) -> None:
        """Send `size` bytes; `done` is called when the last one has left."""
        meets = self._meets(route)
        flow = Flow(route, size, done, self.env.now)
        for link, weight in route.links:
            link.flows[flow] = weight
        if meets:
            self._share(_met(flow))
        else:
            self._set_rate(flow, route.alone)

    def begin(self, route: Route, size: float) -> Flow | None:
        """Send `size` bytes quietly, if nobody is on the way; None if somebody is."""
        if self._meets(route):
            return None
        now, alone = self.env.now, route.alone
        flow = Flow(route, size, _nothing, now, alone, 0, now + size / alone, self)
        for link, weight in route.links:
            link.flows[flow] = weight
        return flow

    def _meets(self, route: Route) -> bool:
        """Whether anybody is on these links. Quiet flows that have ended leave them, others are announced."""
        meets, now = False, self.env.now
        for link, _ in route.links:
            if not link.flows:
                continue
            # A quiet flow is alone on its links.
            flow = next(iter(link.flows))
            if flow.ends > now:
                flow.announce()
                meets = True
            elif flow.ends > -math.inf:
                for left, _ in flow.route.links:
                    del left.flows[flow]
            else:
                meets = True
        return meets

    def _share(self, flows: Collection[Flow]) -> None:
        for flow, rate in max_min_rates(flows).items():
            if rate != flow.rate:
                self._set_rate(flow, rate)

    def _set_rate(self, flow: Flow, rate: float) -> None:
        now = self.env.now
        flow.left = max(0.0, flow.left - flow.rate * (now - flow.updated))
        flow.rate, flow.updated = rate, now
        self.alarm(flow, flow.left / flow.rate)

    def alarm(self, flow: Flow, seconds: float) -> None:
        """Mark the end of a flow, unless its rate changes."""
        flow.alarms += 1
        alarm = self.env.timeout(seconds, (flow, flow.alarms))
        assert alarm.callbacks is not None
        alarm.callbacks.append(self._end)

    def _end(self, alarm: simpy.Event) -> None:
        """End the flow that an alarm was set for, unless its rate has changed since."""
        assert alarm.value is not None
        flow, number = alarm.value
        if number != flow.alarms:
            return
        met: dict[Flow, float] = {}
        for link, _ in flow.route.links:
            del link.flows[flow]
            if link.flows:
                met.update(link.flows)
        while met:
            together = _met(next(iter(met)))
            self._share(together)
            for other in together:
                met.pop(other, None)
        flow.done()


def _nothing() -> None:
    """Nobody waits for the end of a quiet flow."""


def _met(flow: Flow) -> dict[Flow, None]:
    """The flow and all that it meets, directly or over others, in the order in which they are found."""
    found, new = {flow: None}, [flow]
    for one in new:
        for link, _ in one.route.links:
            for other in link.flows:
                if other not in found:
                    found[other] = None
                    new.append(other)
    return found


class Routes:
    """Routes between the ranks of a job on its cluster.

    Ranks n·alike to (n+1)·alike do the same at the same time, and so do those of n + kinds, n + 2·kinds ... if `kinds`
    is not 0: in a folded run one of them stands for all, and its weight on a link counts those that share the link.
    """

    def __init__(self, network: Network, graph: nx.DiGraph, alike: int = 1, kinds: int = 0) -> None:
        self.network, self.graph, self.alike, self.kinds = network, graph, alike, kinds
        self._devices: dict[Any, frozenset[Any]] = {}

    def message(self, source: int, target: int) -> Route:
        """From one rank to another."""
        edges = self._edges(source, target)
        half = len(edges) // 2
        return self._route([(edge, source) for edge in edges[:half]] + [(edge, target) for edge in edges[half:]])

    def ring(self, rank: int, first: int, last: int) -> Route:
        """A rank's part of a collective of a group from `first` to `last`: its way, out and in, to the switch or the
        fabric that joins the group. The tiers below carry more than they are asked for."""
        domain = self.graph.graph["spec"].domain
        farthest = (one for one in (last, first) if one // domain != rank // domain)
        edges = self._edges(rank, next(farthest, first if rank == last else last))
        out = edges[: len(edges) // 2]
        return self._route([(edge, rank) for edge in [*out, *((b, a) for a, b in out)]])

    def _edges(self, source: int, target: int) -> list[tuple[Any, Any]]:
        ends = gpu_of(self.graph, source), gpu_of(self.graph, target)
        known: dict[Any, list[Any]] = self.graph.graph.setdefault("paths", {})
        if ends not in known:
            known[ends] = path(self.graph, *ends)
        return list(itertools.pairwise(known[ends]))

    def _route(self, edges: list[tuple[tuple[Any, Any], int]]) -> Route:
        """A route over these edges, each on the side of a rank. Alone, a flow gets its device's share of every link:
        all devices at a card may be sending."""
        links, limit = [], math.inf
        capacities = [self.graph.edges[edge]["bandwidth"] for edge, _ in edges]
        for (edge, rank), capacity in zip(edges, capacities, strict=True):
            devices = self._sharing(edge)
            limit = min(limit, capacity / max(1, len(devices)))
            weight = max(1, len(devices & self._alike_on_node(rank))) if devices else 1
            # What goes from a device to its card goes on from there, where others may join it.
            if {end[0] for end in edge} != {"gpu", "nic"} or capacity < max(capacities):
                links.append((self.network.link(edge, capacity), float(weight)))
        return Route(tuple(links), limit)

    def _sharing(self, edge: tuple[Any, Any]) -> frozenset[Any]:
        """The devices that reach the rest of the cluster over this edge: those at its network card."""
        card = next((end for end in edge if end[0] == "nic"), None)
        if card is None or any(end[0] == "gpu" for end in edge):
            return frozenset()
        if card not in self._devices:
            self._devices[card] = frozenset(v for v in self.graph.predecessors(card) if v[0] == "gpu")
        return self._devices[card]

    def _alike_on_node(self, rank: int) -> set[Any]:
        """Devices of the ranks that do as this one and share its node."""
        per_node = self.graph.graph["spec"].gpus_per_node
        first, kind = rank // per_node * per_node, self._kind(rank)
        ranks = (one for one in range(first, first + per_node) if self._kind(one) == kind)
        return {gpu_of(self.graph, one) for one in ranks}

    def _kind(self, rank: int) -> int:
        kind = rank // self.alike
        return kind % self.kinds if self.kinds else kind
