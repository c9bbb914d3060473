"""NCCL's own model: the channels its search finds, the algorithm it takes, the multiprocessors that costs."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import nccl
from simulator.cluster import ClusterSpec, GroupShape, build_cluster, group_shape
from simulator.collectives import Collective, collective_multiprocessors, collective_seconds
from simulator.presets import find_cluster

GIB, MIB, KIB = 2**30, 2**20, 2**10
NCCL_CLUSTERS = ("dgx-a100", "dgx-h100", "dgx-b200", "aws-p5", "aws-p4de", "gb200-nvl72", "workstation-4x4090")


def place(name: str, domains: int, ranks: int) -> tuple[ClusterSpec, GroupShape]:
    """So many ranks, as many in each domain."""
    spec = find_cluster(name)
    each = ranks // domains
    graph = build_cluster(spec, domains * spec.domain // spec.gpus_per_node)
    return spec, group_shape(graph, tuple(d * spec.domain + i for d in range(domains) for i in range(each)))


@pytest.mark.parametrize(
    ("name", "domains", "ranks", "channels", "speed"),
    [
        # One node: NVLink counts 12 · 20 = 240, 18 · 20.6 = 371, 18 · 40.1 = 722 GB/s; 6 · 40, 6 · 60 and 8 · 90 fit,
        # and channels of 25 GB/s or more are split in two.
        ("dgx-a100", 1, 8, 12, 20e9),
        ("dgx-h100", 1, 8, 12, 30e9),
        ("dgx-b200", 1, 8, 16, 45e9),
        # Several: one channel per card of 50 GB/s; 8 · 48 = 384 would not fit into 371 GB/s of NVLink, 8 · 45 does.
        ("dgx-h100", 4, 32, 8, 45e9),
        ("dgx-b200", 4, 32, 8, 48e9),
        ("dgx-a100", 4, 32, 8, 24e9),
        # 4 cards of 12.5 GB/s.
        ("aws-p4de", 2, 16, 4, 12e9),
        # 32 cards of 12.5 GB/s: 30 channels of 12 are what NVLink takes.
        ("aws-p5", 2, 16, 30, 12e9),
    ],
)
def test_the_search_finds_nccls_channels(name: str, domains: int, ranks: int, channels: int, speed: float) -> None:
    spec, shape = place(name, domains, ranks)
    assert nccl.ring_graph(shape, nccl.node_of(spec)) == nccl.Graph(channels, speed, speed)


@pytest.mark.parametrize(
    ("name", "domains", "ranks", "collective", "size", "algorithm", "protocol"),
    [
        ("dgx-a100", 1, 8, "all_reduce", 64 * MIB, "ring", "Simple"),
        ("dgx-h100", 1, 8, "all_reduce", 64 * MIB, "nvls", "Simple"),
        ("dgx-h100", 1, 8, "all_reduce", 4 * KIB, "ring", "LL"),
        # NVLink SHARP on an H100 node from five GPUs on, as nccl-tests shows (stas00/ml-engineering@744d01e1).
        ("dgx-h100", 1, 5, "all_reduce", 8 * GIB, "nvls", "Simple"),
        ("dgx-h100", 1, 4, "all_reduce", 8 * GIB, "ring", "Simple"),
        # It adds nothing to gathers: 361-367 GB/s with it and without.
        ("dgx-h100", 1, 8, "all_gather", 8 * GIB, "ring", "Simple"),
        ("dgx-h100", 4, 32, "all_reduce", 4 * KIB, "tree", "LL"),
        ("dgx-h100", 4, 32, "all_reduce", 8 * GIB, "nvls_tree", "Simple"),
        ("dgx-a100", 4, 32, "all_reduce", 8 * GIB, "ring", "Simple"),
        ("dgx-h100", 4, 32, "all_gather", 8 * GIB, "ring", "Simple"),
        ("gb200-nvl72", 1, 72, "all_reduce", 8 * GIB, "nvls", "Simple"),
    ],
)
def test_the_choice_is_nccls(
    name: str, domains: int, ranks: int, collective: Collective, size: float, algorithm: str, protocol: str
) -> None:
    spec, shape = place(name, domains, ranks)
    choice = nccl.choose(collective, size, shape, spec)
    assert (choice.algorithm, choice.protocol) == (algorithm, protocol)


@pytest.mark.parametrize(
    ("name", "domains", "ranks", "published"),
    [
        # Bus bandwidths of large all-reduces in nccl-tests (tests/golden/collectives.csv), in GB/s.
        ("dgx-a100", 1, 8, 235),
        ("dgx-h100", 1, 8, 483),
        ("dgx-b200", 1, 8, 846),
        ("dgx-a100", 4, 32, 192),
        ("dgx-h100", 4, 32, 375),
        ("aws-p5", 2, 16, 487),
        ("aws-p6-b200", 4, 32, 382),
        ("gb200-nvl72", 1, 72, 835),
        ("gb200-nvl72", 2, 128, 810),
    ],
)
def test_asymptotic_bandwidths_are_the_published_ones(name: str, domains: int, ranks: int, published: float) -> None:
    """The model's bandwidth follows from links, cards and NCCL's tables alone: 13 % are the worst of nine."""
    spec, shape = place(name, domains, ranks)
    choice = nccl.choose("all_reduce", 16 * GIB, shape, spec)
    assert choice.bandwidth * 2 * (ranks - 1) / ranks == pytest.approx(published * 1e9, rel=0.14)


def test_latencies_by_hand() -> None:
    """Eight H100 in a ring under LL: 6.6 + 14 · 0.6 = 15 us. A tree over four nodes under LL: 6.8 + 2 · (7 · 0.6 +
    2 · 5) = 35.2 us. NVLink SHARP: 25 us, over four nodes 25 + 2 · 2 · 20.9 = 108.6 us."""
    spec, node = place("dgx-h100", 1, 8)
    _, nodes = place("dgx-h100", 4, 32)

    def latency(shape: GroupShape, algorithm: str, protocol: str) -> float:
        found = nccl.choices("all_reduce", shape, nccl.node_of(spec))
        return next(c.latency for c in found if (c.algorithm, c.protocol) == (algorithm, protocol))

    assert latency(node, "ring", "LL") == pytest.approx(15e-6)
    assert latency(nodes, "tree", "LL") == pytest.approx(35.2e-6)
    assert latency(node, "nvls", "Simple") == pytest.approx(25e-6)
    assert latency(nodes, "nvls_tree", "Simple") == pytest.approx(108.6e-6)
    assert nccl.latency_floor("all_reduce", node, spec) == pytest.approx(15e-6)


@pytest.mark.parametrize(
    ("name", "domains", "ranks", "collective", "size", "ctas"),
    [
        ("dgx-a100", 1, 8, "all_reduce", GIB, 24),
        ("dgx-h100", 1, 8, "all_gather", GIB, 24),
        ("dgx-h100", 1, 8, "all_reduce", GIB, 16),
        ("dgx-b200", 1, 8, "all_reduce", GIB, 24),
        ("dgx-b200", 1, 8, "all_gather", GIB, 32),
        ("dgx-b200", 4, 32, "all_reduce", GIB, 32),
        ("dgx-h100", 4, 32, "all_gather", GIB, 16),
        # 4 KiB are one thread's 64 bytes for 64 threads: one channel.
        ("dgx-a100", 1, 8, "all_gather", 4 * KIB, 1),
        # A message between nodes has 50 / 14 GB/s of a card, in powers of two.
        ("dgx-h100", 2, 2, "send_recv", GIB, 4),
        ("mi300x", 1, 8, "all_reduce", GIB, 0),
        ("dgx-h100", 1, 1, "all_reduce", GIB, 0),
    ],
)
def test_multiprocessors(name: str, domains: int, ranks: int, collective: Collective, size: float, ctas: int) -> None:
    spec, shape = place(name, domains, ranks)
    assert collective_multiprocessors(collective, size, shape, spec) == ctas


def unmeasured(spec: ClusterSpec) -> ClusterSpec:
    """The same hardware without a fit."""
    links = [
        link and dataclasses.replace(link, collectives={k: v for k, v in link.collectives.items() if k == "send_recv"})
        for link in (spec.scale_up, spec.scale_out)
    ]
    assert links[0] is not None
    return dataclasses.replace(spec, scale_up=links[0], scale_out=links[1])


def test_without_a_measurement_nccls_own_estimate_holds() -> None:
    """Eight H100, 1 GiB: NVLink SHARP with 8 · 40 · 0.85 · 7/8 · 2 = 476 GB/s on the bus, 272 of the buffer, after
    25 us: 3.973 ms. nccl-tests measures 4.253 ms on AWS p5."""
    spec, shape = place("dgx-h100", 1, 8)
    seconds = collective_seconds("all_reduce", GIB, shape, unmeasured(spec))
    assert seconds == pytest.approx(25e-6 + GIB / 272e9)
    assert seconds == pytest.approx(4.253e-3, rel=0.08)


def test_siblings_share_the_card_that_nccl_takes_for_its_own() -> None:
    """Two workstations with one card of 1.25 GB/s and four groups across: each has a quarter, 1 GiB takes 3.44 s."""
    spec, shape = place("workstation-4x4090", 2, 2)
    seconds = collective_seconds("all_reduce", GIB, shape, unmeasured(spec))
    assert seconds == pytest.approx(GIB / (1.25e9 / 4))


@given(
    name=st.sampled_from(NCCL_CLUSTERS), size=st.floats(1, 1e11), more=st.floats(1, 100),
    kind=st.sampled_from(["all_reduce", "all_gather", "reduce_scatter"]), domains=st.integers(1, 3),
)  # fmt: skip
def test_the_estimate_never_falls_with_the_size(
    name: str, size: float, more: float, kind: Collective, domains: int
) -> None:
    spec, shape = place(name, domains, 4 * domains)
    bare = unmeasured(spec)
    assert collective_seconds(kind, size * more, shape, bare) >= collective_seconds(kind, size, shape, bare)


@given(name=st.sampled_from(NCCL_CLUSTERS), more=st.floats(1, 4), domains=st.integers(1, 3))
def test_faster_links_never_make_a_ring_slower(name: str, more: float, domains: int) -> None:
    spec, shape = place(name, domains, 4 * domains)
    node = nccl.node_of(spec)
    faster = dataclasses.replace(node, link=node.link * more, card=node.card * more)
    graphs = [nccl.ring_graph(shape, one) for one in (node, faster)]
    slow, fast = (graph.channels * graph.inside for graph in graphs)
    assert fast >= slow * (1 - 1e-9)
