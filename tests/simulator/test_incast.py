"""Transfers by kind: the same ends as flow by flow in simulator.network, whatever comes when."""

from __future__ import annotations

import itertools
import math

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.incast import Incast, Kind, Sharing
from simulator.network import Flow, Link, Network, Route, max_min_rates

KINDS = [
    Kind((("in", 1.0),), 10.0),
    Kind((("in", 0.75), ("out", 0.25)), 12.0),
    Kind((("out", 0.75), ("in", 0.25)), 12.0),
    Kind((("out", 1.0),), 7.0),
    Kind((), 3.0),
]
CAPACITIES = {"in": 25.0, "out": 20.0}
arrivals = st.lists(
    st.tuples(st.integers(0, len(KINDS) - 1), st.floats(0.0, 20.0), st.floats(0.5, 100.0)), min_size=1, max_size=25
)


def ends_by_kind(sent: list[tuple[int, float, float]]) -> list[float]:
    env = simpy.Environment()
    incast = Incast(env, CAPACITIES, KINDS)
    ends = [math.nan] * len(sent)

    def send(number: int, kind: int, when: float, size: float):  # type: ignore[no-untyped-def]
        yield env.timeout(when)
        incast.start(kind, size, lambda what: ends.__setitem__(what, env.now), number)

    for number, one in enumerate(sent):
        env.process(send(number, *one))
    env.run()
    return ends


def ends_by_flow(sent: list[tuple[int, float, float]]) -> list[float]:
    env = simpy.Environment()
    network = Network(env)
    links = {name: network.link(name, capacity) for name, capacity in CAPACITIES.items()}
    ends = [math.nan] * len(sent)

    def send(number: int, kind: int, when: float, size: float):  # type: ignore[no-untyped-def]
        yield env.timeout(when)
        route = Route(tuple((links[name], weight) for name, weight in KINDS[kind].links), KINDS[kind].limit)
        network.start(route, size, lambda: ends.__setitem__(number, env.now))

    for number, one in enumerate(sent):
        env.process(send(number, *one))
    env.run()
    return ends


@given(arrivals)
@settings(deadline=None, max_examples=60)
def test_every_transfer_ends_when_its_flow_does(sent: list[tuple[int, float, float]]) -> None:
    assert ends_by_kind(sent) == pytest.approx(ends_by_flow(sent), rel=1e-9, abs=1e-9)


@given(st.lists(st.integers(0, 6), min_size=len(KINDS), max_size=len(KINDS)).filter(any))
def test_rates_of_kinds_are_those_of_their_flows(counts: list[int]) -> None:
    links = {name: Link(capacity) for name, capacity in CAPACITIES.items()}
    routes = [Route(tuple((links[name], weight) for name, weight in kind.links), kind.limit) for kind in KINDS]
    flows = {(k, i): Flow(routes[k], 1.0, lambda: None, 0.0) for k, count in enumerate(counts) for i in range(count)}
    one_by_one = max_min_rates(list(flows.values()))
    rates = Sharing(KINDS, CAPACITIES).rates(tuple(counts))
    for (kind, _), flow in flows.items():
        assert rates[kind] == pytest.approx(one_by_one[flow])


@pytest.mark.parametrize(("workers", "servers"), [(2, 3), (7, 2), (5, 5)])
@given(starts=st.lists(st.floats(0.0, 10.0), min_size=7, max_size=7))
@settings(deadline=None, max_examples=20)
def test_all_servers_together_are_as_one(workers: int, servers: int, starts: list[float]) -> None:
    """Workers that push 1/k to each of k servers with links of 4 bytes/s, over links of 3 of their own: k flows of each
    worker on k + 1 links end when one transfer does on a link of 4k."""
    size, own, link = 24.0, 3.0, 4.0
    env = simpy.Environment()
    network = Network(env)
    ends = [0.0] * workers

    def push(worker: int, when: float):  # type: ignore[no-untyped-def]
        yield env.timeout(when)
        mine = network.link(("worker", worker), own)
        parts = [
            network.transfer(
                Route(((mine, 1.0), (network.link(("server", server), link), 1.0)), math.inf), size / servers
            )
            for server in range(servers)
        ]
        yield env.all_of(parts)
        ends[worker] = env.now

    for worker, when in zip(range(workers), starts, strict=False):
        env.process(push(worker, when))
    env.run()

    together = simpy.Environment()
    incast = Incast(together, {"in": servers * link}, [Kind((("in", 1.0),), own)])
    found = [0.0] * workers

    def push_together(worker: int, when: float):  # type: ignore[no-untyped-def]
        yield together.timeout(when)
        incast.start(0, size, lambda what: found.__setitem__(what, together.now), worker)

    for worker, when in zip(range(workers), starts, strict=False):
        together.process(push_together(worker, when))
    together.run()
    assert found == pytest.approx(ends, rel=1e-9)


@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_servers_on_every_node_keep_their_nodes_share_off_the_network(nodes: int) -> None:
    """A worker and a server on each of n nodes, cards of 5 bytes/s each way: every worker pushes (n-1)/n of 60 bytes to
    other nodes, each card sends and receives as much: 60 (n-1)/n / 5 seconds, flow by flow and as one kind."""
    env = simpy.Environment()
    network = Network(env)
    for worker, server in itertools.permutations(range(nodes), 2):
        route = Route(((network.link(("up", worker), 5.0), 1.0), (network.link(("down", server), 5.0), 1.0)), math.inf)
        network.transfer(route, 60 / nodes)
    env.run()
    expected = 60 * (nodes - 1) / nodes / 5
    assert env.now == pytest.approx(expected)

    together = simpy.Environment()
    away = 1 - 1 / nodes
    kind = Kind((("in", away), ("out", away)), 5.0 / away)
    incast = Incast(together, {"in": 5.0 * nodes, "out": 5.0 * nodes}, [kind])
    ends: list[float] = []
    for _ in range(nodes):
        incast.start(0, 60.0, lambda what: ends.append(together.now), None)
    together.run()
    assert ends == pytest.approx([expected] * nodes)
