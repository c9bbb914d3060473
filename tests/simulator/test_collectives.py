"""Collective times: bytes by arithmetic, bounds as laws, and published nccl-tests results."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.cluster import ClusterSpec, CollectiveFit, GroupShape, build_cluster, group_shape
from simulator.collectives import (
    Collective,
    active_ranks,
    bus_bytes,
    collective_seconds,
    fit_of,
    message_seconds,
    slowest_link,
)
from simulator.layout import Layout
from simulator.presets import THIS_MACHINE, find_cluster, names

PRESETS = [name for name in names("clusters") if name != THIS_MACHINE]
KINDS: list[Collective] = ["all_reduce", "all_gather", "reduce_scatter"]


def shape(spec: ClusterSpec, nodes: int, ranks: int) -> GroupShape:
    return group_shape(build_cluster(spec, nodes), tuple(range(ranks)))


def test_bus_bytes() -> None:
    """Eight ranks, 1 GB: an all-reduce sends 2·7/8 GB over each link, a gather 7/8, a message all of it."""
    assert bus_bytes("all_reduce", 8, 1e9) == 1.75e9
    assert bus_bytes("all_gather", 8, 1e9) == bus_bytes("reduce_scatter", 8, 1e9) == 0.875e9
    assert bus_bytes("send_recv", 2, 1e9) == 1e9


def test_one_rank_is_free() -> None:
    spec = find_cluster("dgx-h100")
    assert collective_seconds("all_reduce", 1e9, shape(spec, 1, 1), spec) == 0.0


@pytest.mark.parametrize(
    ("cluster", "nodes", "size", "published", "source"),
    [
        ("dgx-h100", 1, 16 * 2**30, 62239e-6, "aws-samples/awsome-distributed-training@7217859f, p5, 8 ranks"),
        ("dgx-h100", 1, 256 * 2**20, 1121e-6, "aws-samples/awsome-distributed-training@7217859f, p5, 8 ranks"),
        ("dgx-h100", 1, 16 * 2**20, 124e-6, "aws-samples/awsome-distributed-training@7217859f, p5, 8 ranks"),
        ("dgx-a100", 1, 2**30, 2**30 * 1.75 / 228e9, "Azure/AI-benchmarking-guide@8fd0c6e, ND A100 v4: 228 GB/s"),
        ("mi300x", 1, 2**30, 5970e-6, "ROCm blog mi300x-rccl-xgmi, RCCL 2.22.3"),
    ],
)
def test_published_all_reduce(cluster: str, nodes: int, size: float, published: float, source: str) -> None:
    """Within 15 % of single points that the constants were fitted near (their fits err by 3-10 % rms)."""
    spec = find_cluster(cluster)
    ranks = nodes * spec.gpus_per_node
    assert collective_seconds("all_reduce", size, shape(spec, nodes, ranks), spec) == pytest.approx(published, rel=0.15)


@given(size=st.floats(1e3, 1e11), ranks=st.integers(2, 32), kind=st.sampled_from(KINDS))
def test_never_below_the_wire(size: float, ranks: int, kind: Collective) -> None:
    """No collective beats its bytes over what a device sends at most: an in-switch reduction halves them."""
    spec = find_cluster("dgx-h100")
    group = shape(spec, 4, ranks)
    assert collective_seconds(kind, size, group, spec) >= 0.5 * bus_bytes(kind, ranks, size) / group.bandwidth


@given(size=st.floats(1e3, 1e10), more=st.floats(1.0, 10.0), kind=st.sampled_from(KINDS))
def test_more_bytes_take_longer(size: float, more: float, kind: Collective) -> None:
    spec = find_cluster("dgx-a100")
    group = shape(spec, 2, 16)
    assert collective_seconds(kind, size * more, group, spec) >= collective_seconds(kind, size, group, spec)


@pytest.mark.parametrize(
    ("ranks", "sharing", "latency"),
    [
        (2, 4, 3.0),  # measured so
        (3, 4, 3.0),  # the pairs among four, which three ranks reach
        (4, 4, 5.0),
        (2, 2, 1.0),
        (2, 3, 1.0),  # nobody measured three that share: a pair alone
        (4, 8, 5.0),
    ],
)
def test_constants_among_ranks_that_share_processors(ranks: int, sharing: int, latency: float) -> None:
    fits = (
        CollectiveFit(2, 1.0, 1.0, active=2), CollectiveFit(2, 3.0, 1.0, active=4), CollectiveFit(4, 5.0, 1.0, active=4)
    )  # fmt: skip
    assert fit_of(fits, ranks, sharing).latency == latency
    # So many were active then, and their seconds hold where no more are.
    assert active_ranks({"all_reduce": fits}, ranks, sharing) == (sharing if sharing in (2, 4) else ranks)


def test_constants_of_ranks_that_share_nothing_know_no_others() -> None:
    fits = (CollectiveFit(2, 1.0, 1.0), CollectiveFit(4, 5.0, 1.0))
    assert [fit_of(fits, ranks, 4).latency for ranks in (2, 3, 4, 8)] == [1.0, 1.0, 5.0, 5.0]
    assert active_ranks({"all_reduce": fits}, 2, 4) == 2


@pytest.mark.parametrize("network", [1, 30])
@pytest.mark.parametrize("kind", [*KINDS, "all_to_all"])
def test_the_slowest_link_is_the_one_that_would_help(kind: Collective, network: int) -> None:
    """16 ranks of two nodes, 10 GB: twice the bandwidth of the link that is named is faster, of the other one not.
    Where the network is thirty times as fast, NVLink is what is waited for."""
    spec = faster(find_cluster("dgx-a100"), scale_out=network)
    name = slowest_link(kind, 1e10, shape(spec, 2, 16), spec)
    assert name == {1: "InfiniBand HDR", 30: "NVLink 3, NVSwitch"}[network]
    seconds = {
        link.kind: collective_seconds(kind, 1e10, shape(better, 2, 16), better)
        for tier, link in (("scale_up", spec.scale_up), ("scale_out", spec.scale_out))
        if link is not None
        for better in [faster(spec, **{tier: 2})]
    }
    now = collective_seconds(kind, 1e10, shape(spec, 2, 16), spec)
    assert seconds.pop(name) < 0.9 * now
    assert list(seconds.values()) == pytest.approx([now])


def faster(spec: ClusterSpec, **times: float) -> ClusterSpec:
    links = {
        tier: dataclasses.replace(getattr(spec, tier), bandwidth=factor * getattr(spec, tier).bandwidth)
        for tier, factor in times.items()
    }
    return dataclasses.replace(spec, **links)


def test_uplinks_are_named_where_they_are_what_is_waited_for() -> None:
    """Two nodes behind a leaf each, whose uplinks carry a quarter of the cards."""
    spec = dataclasses.replace(find_cluster("dgx-a100"), nodes_per_leaf=1, spine_oversubscription=4.0)
    assert slowest_link("all_gather", 1e9, shape(spec, 2, 16), spec) == "InfiniBand HDR across leaves"
    assert slowest_link("all_gather", 1e9, shape(spec, 2, 8), spec) == "NVLink 3, NVSwitch"


def test_rings_pay_for_every_step() -> None:
    """256 GPUs of 32 nodes, 1 MiB: 224 steps inside and 31 between nodes, LL128: 224·1.9 + 31·4 = 549.6 us; an
    all-reduce climbs a tree of five levels instead."""
    spec = find_cluster("dgx-h100")
    group = shape(spec, 32, 256)
    gather, reduce = (collective_seconds(kind, 2**20, group, spec) for kind in ("all_gather", "all_reduce"))
    assert 549.6e-6 < gather < 620e-6
    assert reduce < gather


def even(spec: ClusterSpec, domains: int, each: int) -> GroupShape:
    """So many ranks in each domain."""
    graph = build_cluster(spec, domains * spec.domain // spec.gpus_per_node)
    return group_shape(graph, tuple(d * spec.domain + i for d in range(domains) for i in range(each)))


@given(
    name=st.sampled_from(PRESETS), size=st.floats(1, 1e11), up=st.floats(1, 8), out=st.floats(1, 8),
    domains=st.integers(1, 4), each=st.integers(1, 4), kind=st.sampled_from([*KINDS, "all_to_all"]),
)  # fmt: skip
def test_more_bandwidth_never_takes_longer(
    name: str, size: float, up: float, out: float, domains: int, each: int, kind: Collective
) -> None:
    spec = find_cluster(name)
    assert spec.scale_out is not None
    faster = dataclasses.replace(
        spec,
        scale_up=dataclasses.replace(spec.scale_up, bandwidth=spec.scale_up.bandwidth * up),
        scale_out=dataclasses.replace(spec.scale_out, bandwidth=spec.scale_out.bandwidth * out),
    )
    before = collective_seconds(kind, size, even(spec, domains, each), spec)
    assert collective_seconds(kind, size, even(faster, domains, each), faster) <= before * (1 + 1e-9)


@given(
    name=st.sampled_from(PRESETS), size=st.floats(1, 1e11), more=st.floats(1, 100), domains=st.integers(1, 4),
    each=st.integers(1, 4), kind=st.sampled_from([*KINDS, "all_to_all"]),
)  # fmt: skip
def test_more_bytes_never_take_less_on_any_preset(
    name: str, size: float, more: float, domains: int, each: int, kind: Collective
) -> None:
    spec = find_cluster(name)
    shape = even(spec, domains, each)
    assert collective_seconds(kind, more * size, shape, spec) >= collective_seconds(kind, size, shape, spec)


@given(
    name=st.sampled_from(PRESETS), size=st.floats(1, 1e11), domains=st.integers(1, 4), each=st.integers(1, 4),
    kind=st.sampled_from(["all_gather", "reduce_scatter"]),
)  # fmt: skip
def test_a_ring_is_never_below_its_bound(name: str, size: float, domains: int, each: int, kind: Collective) -> None:
    """(n-1)/n of the buffer over the slowest link of the ring."""
    spec = find_cluster(name)
    group = even(spec, domains, each)
    assert collective_seconds(kind, size, group, spec) >= bus_bytes(kind, group.ranks, size) / group.slowest


def test_two_domains_halve_what_the_cards_carry() -> None:
    """Two p4de, 16 ranks, 1 GiB: a ring would send 2·15/16 GiB over 4 cards of 12.5 GB/s, 40.3 ms; the root of a tree
    and its child send 1 GiB each, 21.5 ms. Published: 26.2 ms."""
    spec = find_cluster("aws-p4de")
    seconds = collective_seconds("all_reduce", 2**30, shape(spec, 2, 16), spec)
    assert 21.5e-3 < seconds < 1.15 * 26.2e-3
    three = collective_seconds("all_reduce", 2**30, shape(spec, 3, 24), spec)
    assert three > 40.3e-3


def test_more_than_two_racks_are_a_ring() -> None:
    """1,440 GPUs in 20 racks: 2,878 steps, 38 of them between racks, under LL128 at least 2840·1.9 + 38·4 = 5.55 ms;
    published are 7.11 ms for 512 MiB. Two racks of 72 are a tree."""
    spec = find_cluster("gb200-nvl72")
    twenty = collective_seconds("all_reduce", 512 * 2**20, even(spec, 20, 72), spec)
    assert 5.55e-3 < twenty == pytest.approx(7.11e-3, rel=0.15)
    assert collective_seconds("all_reduce", 512 * 2**20, even(spec, 2, 72), spec) < 2.5e-3


def test_an_exchange_is_as_slow_as_its_slower_tier() -> None:
    """32 H100 on four nodes, 1 GiB: 24/32 leave over a card of 50 GB/s of which 74.3 % are reached, 21.68 ms; 7/32 stay
    on NVLink, 0.73 ms, beside it. 24 posts of a microsecond, 20 us of latency. With 16 ranks per node half as much."""
    spec = find_cluster("dgx-h100")
    seconds = collective_seconds("all_to_all", 2**30, even(spec, 4, 8), spec)
    assert seconds == pytest.approx(0.75 * 2**30 / (0.743 * 50e9) + 24e-6 + 20e-6)
    thin = collective_seconds("all_to_all", 2**30, even(spec, 32, 1), spec)
    assert thin == pytest.approx(31 / 32 * 2**30 / (0.743 * 50e9) + 31e-6 + 20e-6)


def oversubscribed(ratio: float) -> ClusterSpec:
    return dataclasses.replace(find_cluster("dgx-h100"), nodes_per_leaf=4, spine_oversubscription=ratio)


def test_groups_that_cross_leaves_share_the_spine() -> None:
    """Four nodes of 400 GB/s on a leaf with a 7th of that above it (Llama 3's pods: arXiv 2407.21783). One rank in
    each of 8 nodes is an 8th of the devices of two leaves: of 1,600 / 7 GB/s of uplinks it has 4 / 32, 28.6 GB/s
    where its cards have 50."""
    spec = oversubscribed(7)
    graph = build_cluster(spec, 8)
    group = group_shape(graph, tuple(range(0, 64, 8)))
    assert (group.domains, group.bandwidth, group.ranks_per_leaf) == (8, 50e9, 4)
    assert group.spine == group.slowest == pytest.approx(1600e9 / 7 * 4 / 32)
    flat = find_cluster("dgx-h100")
    slow, fast = (collective_seconds("all_gather", 2**33, group, s) for s in (spec, flat))
    assert slow == fast  # the shape carries the spine
    level = group_shape(build_cluster(flat, 8), tuple(range(0, 64, 8)))
    assert slow == pytest.approx(50 * 7 / 200 * collective_seconds("all_gather", 2**33, level, flat), rel=0.05)
    # Under one leaf nothing changes.
    under = tuple(range(0, 32, 8))
    assert group_shape(graph, under) == group_shape(build_cluster(flat, 8), under)


def test_an_exchange_and_a_message_suffer_more_from_the_spine_than_a_ring() -> None:
    """A ring crosses the uplinks once, whatever hangs below; half of an exchange's bytes and all of a message's do."""
    two, eight = build_cluster(oversubscribed(2), 8), build_cluster(oversubscribed(8), 8)
    spec = oversubscribed(8)
    everyone = tuple(range(64))

    def slowdown(kind: Collective) -> float:
        times = [collective_seconds(kind, 2**33, group_shape(graph, everyone), spec) for graph in (two, eight)]
        return times[1] / times[0]

    # 1,600 GB/s of a leaf's cards over 2 are more than the 400 of each node, over 8 half of them.
    assert slowdown("all_gather") == pytest.approx(2, rel=0.1)
    # 32/64 cross the uplinks, of which a rank has 50/2 and 50/8 GB/s.
    assert slowdown("all_to_all") == pytest.approx(4, rel=0.01)
    far = [sum(message_seconds(1e9, group_shape(graph, (0, 63)), spec)) for graph in (two, eight)]
    assert far[1] == pytest.approx(4 * far[0], rel=0.01)


def test_siblings_share_the_way_between_roots() -> None:
    """Eight GPUs on two roots of four, 31.5 GB/s between them. A ring of all eight crosses it once and has all of it;
    each of four pairs that cross side by side has a quarter, and pairs under one root have their links."""
    spec = find_cluster("pcie-8xa100")
    graph = build_cluster(spec, 1)
    everyone, pair, near = (group_shape(graph, ranks) for ranks in (tuple(range(8)), (0, 4), (0, 1)))
    assert (everyone.spine, pair.spine, near.slowest) == (31.5e9, 31.5e9 / 4, 31.5e9)
    # The layout's own groups: tp 2 inside a root, four replicas over both roots at two ranks each.
    replicas = group_shape(graph, Layout(tp=2, dp_replicate=4).group("dp_replicate"))
    assert replicas.spine == 31.5e9 / 2
    seconds = [collective_seconds("all_reduce", 2**30, group, spec) for group in (near, replicas)]
    assert seconds[1] > 1.5 * seconds[0]


def test_the_rank_order_decides_who_is_near() -> None:
    """tp = dp = 8 on eight nodes: with tp innermost its groups are inside a node and the replicas across; with dp
    innermost it is the other way round, and so are the times."""
    spec = find_cluster("dgx-h100")
    graph = build_cluster(spec, 8)

    def times(layout: Layout) -> list[float]:
        shapes = [group_shape(graph, layout.group(axis)) for axis in ("tp", "dp_replicate")]
        return [collective_seconds("all_reduce", 2**28, group, spec) for group in shapes]

    near, far = times(Layout(tp=8, dp_replicate=8))
    assert times(Layout(tp=8, dp_replicate=8, rank_order="ep-dp-tp-cp-pp")) == [far, near]
    assert far > 5 * near


def test_a_group_that_straddles_nodes_is_priced_as_such() -> None:
    """Groups of six on nodes of eight: ranks 0..5 share a node, ranks 6..11 do not, and the step waits for those."""
    layout = Layout(dp_replicate=4, tp=6)
    assert layout.sibling_starts("tp", 8) == [0, 6, 12, 18]
    assert layout.sibling_starts("dp_replicate", 24) == [0]
    graph = build_cluster(find_cluster("dgx-h100"), 3)
    assert [group_shape(graph, tuple(range(6)), start).domains for start in (0, 6, 12, 18)] == [1, 2, 2, 1]
    assert Layout(dp_shard=4, tp=8, pp=4, zero_stage=1).sibling_starts("dp_shard", 8) == [0]


def test_groups_of_a_node_share_its_cards() -> None:
    """Eight data-parallel groups with one rank per node get one card each; a group that owns the nodes gets all."""
    graph = build_cluster(find_cluster("dgx-h100"), 4)
    spec = graph.graph["spec"]
    thin, thick = group_shape(graph, (0, 8, 16, 24)), group_shape(graph, tuple(range(32)))
    assert thick.bandwidth == pytest.approx(8 * thin.bandwidth)
    large = 8 * 2**30
    # Both move about twice their buffer through their cards: the thin group takes about eight times as long.
    ratio = collective_seconds("all_reduce", large, thin, spec) / collective_seconds("all_reduce", large, thick, spec)
    assert 5 < ratio < 8.5


def test_a_message_inside_a_node_is_faster() -> None:
    spec = find_cluster("dgx-h100")
    graph = build_cluster(spec, 2)
    near = message_seconds(1e8, group_shape(graph, (0, 1)), spec)
    far = message_seconds(1e8, group_shape(graph, (0, 8)), spec)
    assert sum(near) < sum(far)
    # 100 MB over a 50 GB/s card is 2 ms at best.
    assert far[1] >= 2e-3
