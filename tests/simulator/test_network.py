"""Flows on links: max-min fair rates by hand and by definition, bytes, and the links that ranks meet on."""

from __future__ import annotations

import dataclasses
import math

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.cluster import ClusterSpec, build_cluster, group_shape
from simulator.collectives import message_seconds
from simulator.network import Flow, Link, Network, Route, Routes, max_min_rates
from simulator.presets import find_cluster


def flow(*links: Link, limit: float = math.inf, weight: float = 1.0) -> Flow:
    return Flow(Route(tuple((link, weight) for link in links), limit), 1.0, lambda: None, 0.0)


def test_two_flows_on_a_link_get_half() -> None:
    link = Link(10.0)
    assert list(max_min_rates([flow(link), flow(link)]).values()) == [5.0, 5.0]


def test_three_links_and_a_long_flow() -> None:
    """Bertsekas and Gallager's figure: one flow over three links of 1, 1 and 2; two others on the first, one on the
    second, one on the third. The first link gives 1/3 each; the second leaves 2/3, the third 5/3."""
    a, b, c = Link(1.0), Link(1.0), Link(2.0)
    long, first, also_first, second, third = flow(a, b, c), flow(a), flow(a), flow(b), flow(c)
    rates = max_min_rates([long, first, also_first, second, third])
    assert [rates[f] for f in (long, first, also_first)] == pytest.approx([1 / 3] * 3)
    assert (rates[second], rates[third]) == pytest.approx((2 / 3, 5 / 3))


def test_what_a_limit_leaves_goes_to_the_others() -> None:
    link = Link(10.0)
    slow, fast = flow(link, limit=2.0), flow(link)
    assert max_min_rates([slow, fast]) == {slow: 2.0, fast: 8.0}


def test_a_flow_weighs_as_many_as_it_stands_for() -> None:
    """Four of one kind and one of another on a card of 10: each gets 2, as five flows would."""
    link = Link(10.0)
    assert list(max_min_rates([flow(link, weight=4.0), flow(link)]).values()) == pytest.approx([2.0, 2.0])


networks = st.integers(1, 5).flatmap(
    lambda links: st.tuples(
        st.lists(st.floats(0.5, 100.0), min_size=links, max_size=links),
        st.lists(
            st.tuples(
                st.sets(st.integers(0, links - 1), min_size=1),
                st.one_of(st.just(math.inf), st.floats(0.1, 50.0)),
                st.integers(1, 4),
            ),
            min_size=1,
            max_size=8,
        ),
    )
)


@given(networks)
@settings(deadline=None)
def test_every_flow_has_a_bottleneck(network: tuple[list[float], list[tuple[set[int], float, int]]]) -> None:
    """Max-min by definition: no link carries more than it can, and every flow is at its limit or crosses a full link
    on which nobody is faster."""
    capacities, wanted = network
    links = [Link(capacity) for capacity in capacities]
    flows = [flow(*(links[i] for i in chosen), limit=limit, weight=weight) for chosen, limit, weight in wanted]
    rates = max_min_rates(flows)

    def load(link: Link) -> float:
        return sum(weight * rates[f] for f in flows for on, weight in f.route.links if on is link)

    def fastest(link: Link) -> float:
        return max(rates[f] for f in flows if any(on is link for on, _ in f.route.links))

    assert all(load(link) <= link.capacity * (1 + 1e-9) for link in links)
    for f in flows:
        full = [on for on, _ in f.route.links if load(on) >= on.capacity * (1 - 1e-9)]
        held_back = any(rates[f] >= fastest(link) * (1 - 1e-9) for link in full)
        assert held_back or rates[f] == pytest.approx(f.route.limit)


def finish_times(route_of: dict[str, Route], starts: dict[str, tuple[float, float]]) -> dict[str, float]:
    """When flows end that start at a time with a size."""
    env, ended = simpy.Environment(), {}
    network = Network(env)

    def send(name: str) -> simpy.events.ProcessGenerator:
        at, size = starts[name]
        yield env.timeout(at)
        yield network.transfer(route_of[name], size)
        ended[name] = env.now

    for name in starts:
        env.process(send(name))
    env.run()
    return ended


def test_flows_slow_down_while_they_meet() -> None:
    """On 10 bytes/s: a (30 bytes) alone for 1 s, then half each with b (10 bytes) for 2 s, then a's last 10 bytes in
    1 s."""
    route = Route(((Link(10.0), 1.0),), 10.0)
    assert finish_times({"a": route, "b": route}, {"a": (0.0, 30.0), "b": (1.0, 10.0)}) == {"a": 4.0, "b": 3.0}


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.floats(0.1, 50.0)), min_size=1, max_size=6))
@settings(deadline=None)
def test_bytes_are_conserved(flows: list[tuple[float, float]]) -> None:
    """A link that is never idle while it has work ends when a queue on it would: sharing loses no byte."""
    route = Route(((Link(10.0), 1.0),), 10.0)
    names = [str(i) for i in range(len(flows))]
    ended = finish_times(dict.fromkeys(names, route), dict(zip(names, flows, strict=True)))
    busy_until = 0.0
    for at, size in sorted(flows):
        busy_until = max(busy_until, at) + size / 10.0
    assert max(ended.values()) == pytest.approx(busy_until, rel=1e-9)


def hgx(nics: int, per_node: int = 8) -> ClusterSpec:
    return dataclasses.replace(find_cluster("dgx-h100"), gpus_per_node=per_node, nics_per_node=nics)


@pytest.mark.parametrize(("nics", "weight"), [(8, 1.0), (4, 2.0), (2, 4.0), (1, 8.0)])
def test_ranks_of_a_node_share_its_cards(nics: int, weight: float) -> None:
    """Eight tensor ranks send to eight on the next node: on eight cards they do not meet, on two there are four each.
    Rank by rank (unfolded) nobody counts for others."""
    graph, network = build_cluster(hgx(nics), 2), Network(simpy.Environment())
    folded, single = (Routes(network, graph, alike).message(0, 8) for alike in (8, 1))
    card = 50e9
    assert max(w for _, w in folded.links) == weight and max(w for _, w in single.links) == 1.0
    assert folded.alone == single.alone == pytest.approx(card * nics / 8)


@pytest.mark.parametrize("target", [1, 8])
@pytest.mark.parametrize("nics", [1, 2, 4, 8, 16])
def test_a_message_that_meets_nobody_takes_what_it_takes_alone(nics: int, target: int) -> None:
    spec = hgx(nics)
    graph, env = build_cluster(spec, 2), simpy.Environment()
    network = Network(env)
    _, seconds = message_seconds(1e8, group_shape(graph, (0, target)), spec)
    route = Routes(network, graph, alike=8).message(0, target)
    network.transfer(route, seconds * route.alone)
    env.run()
    assert env.now == pytest.approx(seconds, rel=1e-15)


def test_a_rank_that_sends_both_ways_shares_its_card() -> None:
    """Rank 8 sends to nodes 0 and 2 at once: half the card each, so twice the time; what it receives is no matter."""
    env = simpy.Environment()
    network = Network(env)
    routes = Routes(network, build_cluster(hgx(8), 3))
    ended: list[float] = []
    for target in (0, 16):
        network.start(routes.message(8, target), 50e9, lambda: ended.append(env.now))
    network.start(routes.message(0, 8), 25e9, lambda: ended.append(env.now))
    env.run()
    assert ended == pytest.approx([0.5, 2.0, 2.0])


def test_a_collective_meets_messages_on_its_card_only() -> None:
    """A ring between nodes and a message to a neighbour on NVLink pass each other; a message between nodes does not."""
    env = simpy.Environment()
    network = Network(env)
    routes = Routes(network, build_cluster(hgx(8), 3))
    ended: dict[str, float] = {}
    for name, route in (("ring", routes.ring(0, 0, 16)), ("inside", routes.message(0, 1))):
        network.start(route, route.alone, lambda name=name: ended.setdefault(name, env.now))
    env.run()
    assert ended == {"ring": pytest.approx(1.0), "inside": pytest.approx(1.0)}
    for name, route in (("ring again", routes.ring(0, 0, 16)), ("outside", routes.message(0, 8))):
        network.start(route, route.alone, lambda name=name: ended.setdefault(name, env.now))
    env.run()
    assert (ended["ring again"], ended["outside"]) == pytest.approx((3.0, 3.0))
