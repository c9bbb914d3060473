"""Ways to keep replicas together, as laws: published bounds, who may be ahead of whom, and what waiting costs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.incast import Kind
from simulator.network import Network, Route
from simulator.sync import Replica, Servers, in_rounds, quantile, with_servers
from simulator.sync_bounds import (
    centre_seconds,
    hosted_seconds,
    ring_seconds,
    server_seconds,
    tree_seconds,
)

M, B = 1e9, 1e9  # bytes that a replica pushes, and pulls; bytes per second of a link each way


def colocated_seconds(n: int, size: float, bandwidth: float) -> float:
    """A server on every worker's machine, each with 1/n of the parameters: 2(n-1)/n · M/B, as a ring. Each machine
    sends (n-1)/n · M as a worker and as much as a server (the same, "colocated mode")."""
    return ring_seconds(n, size, bandwidth)


def byteps_split(n: int, k: int) -> tuple[float, float]:
    """(share of the parameters on each of n GPU machines, on each of k ≤ n CPU machines) that is fastest:
    (n-k) / (n² + kn - 2k) and 2(n-1) / (n² + kn - 2k) (the same, section 4.1)."""
    whole = n * n + k * n - 2 * k
    return (n - k) / whole, 2 * (n - 1) / whole


def byteps_seconds(n: int, k: int, size: float, bandwidth: float) -> float:
    """With that split: 2n(n-1) M / ((n² + kn - 2k) B). Without CPU machines that is a ring, with n of them 2(n-1)
    n / (2n² - 2n) = M/B."""
    return 2 * n * (n - 1) * size / ((n * n + k * n - 2 * k) * bandwidth)


def alike(count: int, seconds: float = 1.0) -> list[Replica]:
    return [Replica(seconds, itertools.repeat(1.0), 0, 1) for _ in range(count)]


def drawn(draws: list[list[float]]) -> list[Replica]:
    """Replicas whose steps take these seconds, over and over."""

    def forever(times: list[float]) -> Iterator[float]:
        return itertools.cycle(times)

    return [Replica(1.0, forever(times), 0, 1) for times in draws]


def apart(servers: int, pieces: int = 1, link: float = B, capacity: float | None = None) -> Servers:
    """Servers on machines of their own, with links of B each."""
    total = servers * B if capacity is None else capacity
    kinds = [Kind((("in", 1.0),), link), Kind((("out", 1.0),), link)]
    return Servers({"in": total, "out": total}, kinds, M, M, pieces)


FREE = apart(1, capacity=1e15)  # nobody meets anybody: a push takes M/B, a pull too


@pytest.mark.parametrize(("n", "k"), [(8, 2), (16, 4), (5, 1), (3, 6)])
def test_synchronous_servers_reach_the_published_bound(n: int, k: int) -> None:
    """BytePS (OSDI'20, section 2.2): max(M/B, n·M/(k·B)) where pushing and pulling overlap. In p pieces the last one
    comes back when all have been pushed: a p-th more. Whole, the two ways follow each other: twice."""
    bound = server_seconds(n, k, M, B)
    assert bound == max(1.0, n / k)
    for pieces in (1, 4, 64):
        found = with_servers(alike(n), apart(k, pieces), 0, steps=5)
        assert found.mean - 1.0 == pytest.approx(bound * (1 + 1 / pieces))
        assert found.waiting == pytest.approx(0.0, abs=1e-9)


def spread(n: int, k: int, gpu_share: float, pieces: int) -> Servers:
    """n GPU machines that each hold gpu_share of the parameters, and k CPU machines with the rest; cards of B."""
    cpu, gpu = 1 - n * gpu_share, (n - 1) * gpu_share
    push = Kind((("gpu out", 1 - gpu_share), ("gpu in", gpu), ("cpu in", cpu)), B / (1 - gpu_share))
    pull = Kind((("gpu in", 1 - gpu_share), ("gpu out", gpu), ("cpu out", cpu)), B / (1 - gpu_share))
    capacities = {"gpu in": n * B, "gpu out": n * B, "cpu in": k * B, "cpu out": k * B}
    return Servers(capacities, [push, pull], M, M, pieces)


@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 2), (8, 4), (6, 6), (8, 0)])
def test_the_optimum_of_byteps_is_reproduced(n: int, k: int) -> None:
    """OSDI'20, section 4.1: t = 2n(n-1)M / ((n² + kn - 2k)B) with the best split; k = 0 is a ring, k = n reaches M/B.
    n = 4, k = 2: 2·4·3 / (16 + 8 - 4) = 1.2 s."""
    pieces = 128
    gpu_share, cpu_share = byteps_split(n, k)
    assert n * gpu_share + k * cpu_share == pytest.approx(1)
    best = byteps_seconds(n, k, M, B)
    assert {(4, 2): 1.2, (6, 6): 1.0, (8, 0): 1.75}.get((n, k), best) == pytest.approx(best)
    found = with_servers(alike(n), spread(n, k, gpu_share, pieces), 0, steps=3).mean - 1.0
    # The first piece out and the last one back have the links for themselves: at most a p-th of a transfer each.
    assert best <= found * (1 + 1e-9) and found <= best * (1 + 2 / pieces)
    for other in (0.5 * gpu_share, 1.3 * gpu_share, gpu_share + 0.02):
        if k and 0 <= other <= 1 / n and abs(other - gpu_share) > 1e-9:
            worse = with_servers(alike(n), spread(n, k, other, pieces), 0, steps=3).mean - 1.0
            assert worse > found * (1 - 1e-9)


def test_closed_forms_meet_where_they_should() -> None:
    assert ring_seconds(4, M, B) == pytest.approx(1.5)  # 2 · 3/4
    assert tree_seconds(4, M, B) == 2.0 and centre_seconds(4, M, B) == 6.0
    assert byteps_seconds(8, 0, M, B) == pytest.approx(ring_seconds(8, M, B))
    assert byteps_seconds(8, 8, M, B) == pytest.approx(server_seconds(8, 8, M, B)) == 1.0
    assert byteps_split(4, 4) == (0.0, 0.25)
    assert hosted_seconds(8, 8, 8, M, M, B) == pytest.approx(colocated_seconds(8, M, B))
    assert hosted_seconds(8, 1, 8, M, M, B) == pytest.approx(7.0)  # seven answers leave the one node with a server


@pytest.mark.parametrize("n", [2, 3, 8])
def test_a_ring_of_processes_takes_what_the_closed_form_says(n: int) -> None:
    """2(n-1) rounds, in each of which every rank sends M/n to the next."""
    env = simpy.Environment()
    network = Network(env)

    def rounds():  # type: ignore[no-untyped-def]
        for _ in range(2 * (n - 1)):
            routes = [Route(((network.link(("up", r), B), 1.0),), math.inf) for r in range(n)]
            yield env.all_of([network.transfer(route, M / n) for route in routes])

    env.run(env.process(rounds()))
    assert env.now == pytest.approx(ring_seconds(n, M, B))


times = st.lists(st.floats(0.1, 10.0), min_size=3, max_size=6)
fleets = st.lists(times, min_size=2, max_size=5)


@given(fleets)
@settings(deadline=None, max_examples=60)
def test_nobody_who_waits_less_is_slower(draws: list[list[float]]) -> None:
    """Asynchronous ≥ bounded ≥ synchronous in throughput, for any draw, where links are not shared."""
    steps = [with_servers(drawn(draws), FREE, staleness, 12).mean for staleness in (None, 8, 3, 1, 0)]
    for looser, tighter in itertools.pairwise(steps):
        assert looser <= tighter * (1 + 1e-9)


@given(fleets)
@settings(deadline=None, max_examples=40)
def test_no_bound_is_a_very_large_one_and_none_at_all_is_a_barrier(draws: list[list[float]]) -> None:
    assert with_servers(drawn(draws), FREE, None, 10) == with_servers(drawn(draws), FREE, 10**9, 10)
    # Every round is as long as its slowest replica, a push and a pull.
    barrier = in_rounds(drawn(draws), 2 * M / B, 1, 10)
    synchronous = with_servers(drawn(draws), FREE, 0, 10)
    assert synchronous.mean == pytest.approx(barrier.mean)
    assert synchronous.p95 == pytest.approx(barrier.p95)
    by_hand = [max(draw[step % len(draw)] for draw in draws) + 2.0 for step in range(10)]
    assert synchronous.mean == pytest.approx(sum(by_hand) / 10)


@given(fleets, st.integers(0, 4), st.sampled_from([FREE, apart(1), apart(2, 4)]))
@settings(deadline=None, max_examples=60)
def test_nobody_is_further_ahead_than_the_bound(draws: list[list[float]], k: int, servers: Servers) -> None:
    """Ho et al. (2013): clocks differ by k at most. Between a pull and the push that follows every other replica can
    then add 2k + 1 updates at most: from k behind to k ahead, and the one that was on its way."""
    found = with_servers(drawn(draws), servers, k, 12)
    assert found.lead <= k
    assert max(value for value, _ in found.staleness) <= (len(draws) - 1) * (2 * k + 1)
    if k == 0:
        assert dict(found.staleness).keys() == {0}


@pytest.mark.parametrize("n", [2, 5, 9])
def test_staleness_without_jitter_is_arithmetic(n: int) -> None:
    """Alike replicas take turns: in the first round the i-th update finds i others, after that always n - 1."""
    found = with_servers(alike(n), FREE, None, steps=20)
    counts = dict.fromkeys(range(n), 1)
    counts[n - 1] += sum(count for _, count in found.staleness) - n
    assert dict(found.staleness) == counts
    assert found.mean_staleness == pytest.approx(n - 1, rel=0.05)


def test_a_slow_replica_holds_up_those_that_wait_for_it() -> None:
    """Three replicas of 1 s and one of 3 s, no links to share but 2 s of push and pull. Synchronous: 5 s a step.
    Asynchronous: 3/3 + 1/5 updates a second, so that four take 4 / 1.2 = 3.33 s. A bound only delays the waiting."""
    draws = [[1.0], [1.0], [1.0], [3.0]]
    assert with_servers(drawn(draws), FREE, 0, 300).mean == pytest.approx(5.0)
    assert with_servers(drawn(draws), FREE, None, 300).mean == pytest.approx(4 / 1.2, rel=0.01)
    assert with_servers(drawn(draws), FREE, 3, 300).mean == pytest.approx(5.0, rel=0.02)


@pytest.mark.parametrize("interval", [1, 2, 10, 100])
def test_local_sgd_pays_an_exchange_every_interval(interval: int) -> None:
    """1 s of computing, 4 s of averaging: 1 + 4/H, which tends to the computing."""
    found = in_rounds(alike(4), 4.0, interval, 200)
    assert found.mean == pytest.approx(1 + 4 / interval)
    assert found.communicating == pytest.approx(4 / interval) and found.waiting == pytest.approx(0.0)


@given(fleets)
@settings(deadline=None, max_examples=40)
def test_longer_rounds_wait_less(draws: list[list[float]]) -> None:
    """The slowest sum of a round is no more than the sum of the slowest steps."""
    steps = [in_rounds(drawn(draws), 1.0, interval, 24).mean for interval in (1, 2, 4, 8, 24)]
    for shorter, longer in itertools.pairwise(steps):
        assert longer <= shorter * (1 + 1e-9)


@pytest.mark.parametrize("staleness", [0, 2, None])
def test_servers_that_work_are_a_queue(staleness: int | None) -> None:
    """Five pushes of 1 s of work each keep the servers busy for 5 s a step, whatever replicas wait for."""
    servers = dataclasses.replace(FREE, receive_seconds=1.0)
    found = with_servers(alike(5, seconds=0.5), servers, staleness, 40)
    if staleness == 0:
        # 0.5 s, a push of 1 s, the queue of 5 s, a pull of 1 s.
        assert found.mean == pytest.approx(7.5)
    else:
        assert found.mean == pytest.approx(5.0, rel=0.03)


def test_synchronous_servers_update_once() -> None:
    servers = dataclasses.replace(FREE, finish_seconds=3.0)
    assert with_servers(alike(4), servers, 0, 10).mean == pytest.approx(1 + 1 + 3 + 1)


@given(fleets, st.sampled_from([0, 1, 3, None]), st.sampled_from([FREE, apart(1), apart(2, 3)]))
@settings(deadline=None, max_examples=40)
def test_time_is_accounted_for(draws: list[list[float]], staleness: int | None, servers: Servers) -> None:
    """Computing, transfers and waiting of the replicas are all the time there is, but for who is
    on the way at the end."""
    steps = 60
    found = with_servers(drawn(draws), servers, staleness, steps)
    own = found.computing + found.communicating + found.waiting
    longest = max(max(draw) for draw in draws) + 4 * len(draws)
    assert own == pytest.approx(found.mean, abs=2 * longest / steps)
    assert min(found.computing, found.communicating, found.waiting + 1e-9) >= 0


def test_quantiles() -> None:
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.0 and quantile([1.0], 0.95) == 1.0 and quantile([], 0.95) == 0.0
