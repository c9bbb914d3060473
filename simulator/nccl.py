"""What NCCL would do: algorithm, protocol and channels of a collective, by NCCL's own tuning model.

NCCL searches the topology for channels, gives every algorithm and protocol a latency L and a bandwidth B, and takes the
one with the least L + S / B (NVIDIA/nccl@5067397c, src/graph/tuning.cc, search.cc). Here it is that model, with its
constants in data/nccl.toml, on the regular nodes of a ClusterSpec. It serves to choose, to bound latencies from below
and to count the multiprocessors that a collective takes from compute; its own time is up to three times too short
between 1 MiB and 256 MiB (collectives.py has the measured form).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from simulator.cluster import ClusterSpec, GroupShape
from simulator.files import read_toml

Algorithm = Literal["ring", "tree", "nvls", "nvls_tree", "pat"]
Protocol = Literal["LL", "LL128", "Simple"]

PROTOCOLS: tuple[Protocol, ...] = ("LL", "LL128", "Simple")
# Limits of the search and of a communicator; threads of a channel and the bytes below which a thread is shed.
MOST_GRAPH_CHANNELS, MOST_CHANNELS, MOST_HEADS = 32, 64, 32
_THREADS: dict[str, tuple[int, int, int]] = {"ring": (512, 640, 512), "tree": (512, 640, 640)}
_THREAD_BYTES = (8.0, 8.0, 64.0)
# A channel this fast is split in two; LL128 reaches 92 % of what Simple does.
_SPLIT_FROM, _SPLIT_FROM_HOPPER, LL128_SHARE = 25e9, 50e9, 0.92
_P2P_CHANNELS, _P2P_NIC = 32, 14e9
# One NVLink of the data sheet.
_LINK = {"volta": 25e9, "ampere": 25e9, "hopper": 25e9, "blackwell": 50e9}


@dataclass(frozen=True)
class Node:
    """What NCCL's model asks of a node: bytes per second of a GPU's links inside and of a card, cards per GPU."""

    generation: str
    pcie: bool
    multicast: bool
    link: float
    card: float
    cards_per_gpu: float

    @property
    def row(self) -> dict[str, Any]:
        """The constants of the generation."""
        found: dict[str, Any] = _tables()[self.generation]
        return found


@dataclass(frozen=True)
class Graph:
    """Channels that the search finds for one algorithm: bytes per second of each inside and between nodes."""

    channels: int
    inside: float
    between: float


@dataclass(frozen=True)
class Choice:
    """One algorithm and protocol: seconds before the first byte, bytes of the buffer per second, channels (CTAs)."""

    algorithm: Algorithm
    protocol: Protocol
    latency: float
    bandwidth: float
    channels: int

    def seconds(self, size: float) -> float:
        """NCCL's own estimate without its corrections by size, which are for choosing."""
        return self.latency + size / self.bandwidth


def choose(collective: str, size: float, shape: GroupShape, spec: ClusterSpec) -> Choice:
    """The algorithm and protocol with the least time by NCCL's model.

    Args:
        size: bytes of the whole buffer.

    Rule: least latency · plateau + size / (bandwidth · correction); a small operation sheds channels.
    Reference: NVIDIA/nccl@5067397c, src/enqueue.cc (topoGetAlgoInfo), src/graph/tuning.cc (ncclTopoGetAlgoTime).
    Ignored: tuner plugins (AWS ships one), CollNet (SHARP on InfiniBand), registered buffers.
    """
    node = node_of(spec)
    found = choices(collective, shape, node)
    best = min(found, key=lambda choice: _tuned_seconds(choice, collective, size, shape, node))
    return dataclasses.replace(best, channels=_shed(best, size, shape))


def latency_floor(collective: str, shape: GroupShape, spec: ClusterSpec) -> float:
    """The least latency that NCCL's model knows for this collective: no launch is counted in it."""
    return min(choice.latency for choice in choices(collective, shape, node_of(spec)))


def message_channels(shape: GroupShape, spec: ClusterSpec, peers: int = 1) -> int:
    """Channels of sends and receives: two per link of NVLink, one per 14 GB/s of a card, powers of two, at most 32
    (NVIDIA/nccl@5067397c, src/graph/paths.cc)."""
    if shape.domains > 1:
        wanted = max(2.0, shape.bandwidth / shape.ranks_per_domain / _P2P_NIC)
    else:
        wanted = 2.0 if spec.scale_up.topology == "pcie" else 2.0 * round(spec.scale_up.bandwidth / _LINK[spec.nccl])
    return min(_P2P_CHANNELS, peers * 2 ** math.ceil(math.log2(wanted)))


def node_of(spec: ClusterSpec) -> Node:
    """A cluster's node as NCCL sees it, which counts less of a link than its data sheet does."""
    pcie = spec.scale_up.topology == "pcie"
    share = _tables()["links"]["pcie_share"] if pcie else _tables()[spec.nccl]["link_share"]
    return Node(
        generation=spec.nccl,
        pcie=pcie,
        multicast=spec.scale_up.topology == "multicast",
        link=min(spec.scale_up.bandwidth * share, spec.scale_up.root_bandwidth or math.inf),
        card=spec.scale_out.bandwidth if spec.scale_out else 0.0,
        cards_per_gpu=spec.nics_per_node / spec.gpus_per_node,
    )


@functools.lru_cache(maxsize=4096)
def choices(collective: str, shape: GroupShape, node: Node) -> tuple[Choice, ...]:
    """Every algorithm and protocol that is enabled for the group (NVIDIA/nccl@5067397c, src/graph/tuning.cc)."""
    found = [_ring(collective, protocol, shape, node) for protocol in PROTOCOLS]
    if collective == "all_reduce":
        found += [_tree(protocol, shape, node) for protocol in PROTOCOLS]
    nvls = _nvls(collective, shape, node)
    if nvls is not None:
        found.append(nvls)
    if collective != "all_reduce" and shape.domains > 1 and shape.ranks_per_domain == 1:
        found.append(_pat(shape, node))
    return tuple(found)


@functools.cache
def _tables() -> dict[str, Any]:
    return read_toml(Path(__file__).parent / "data" / "nccl.toml", "NCCL's constants")


def _latencies(table: str, algorithm: str, protocol: str) -> float:
    return float(_tables()[table][algorithm][PROTOCOLS.index(protocol)]) * 1e-6


def _steps(algorithm: str, protocol: str, node: Node) -> tuple[float, float, float]:
    """(base, step inside, step between nodes) in seconds."""
    inside = _latencies("pcie" if node.pcie else "nvlink", algorithm, protocol)
    return _latencies("base", algorithm, protocol), inside, _latencies("network", algorithm, protocol)


def post_seconds(protocol: str = "LL") -> float:
    """What handing one message to the network costs the sender; Simple needs three."""
    return float(_tables()["overhead"]["post"]) * 1e-6 * (3 if protocol == "Simple" else 1)


def _scale(shape: GroupShape) -> int:
    """The column of tables that differ on one node, two, and more."""
    return min(shape.domains, 3) - 1


def _cards(shape: GroupShape, node: Node) -> tuple[int, float]:
    """(cards of the group in a domain, bytes per second of each): the nearest card of each rank."""
    return max(1, math.ceil(shape.ranks_per_domain * node.cards_per_gpu)), node.card


def ring_graph(shape: GroupShape, node: Node) -> Graph:
    """Channels of the rings and trees: the speed is taken with which most bandwidth comes together.

    >>> ring_graph(group_shape(build_cluster(dgx_a100, 1), range(8)), node_of(dgx_a100))      # doctest: +SKIP
    Graph(channels=12, inside=2e+10, between=2e+10)
    """
    row, link = node.row, node.link
    best, speed = 0, 0.0
    for candidate in row["speeds"] if shape.domains == 1 else row["speeds_between"]:
        each = candidate * 1e9
        count = int(link / each * (1 + 1e-9)) if shape.ranks_per_domain > 1 else MOST_GRAPH_CHANNELS
        if shape.domains > 1:
            cards, card = _cards(shape, node)
            count = min(count, cards * int(card / each * (1 + 1e-9)))
        count = min(count, MOST_GRAPH_CHANNELS)
        if count * each > best * speed * (1 + 1e-9):
            best, speed = count, each
    if not best:
        # Slower than the slowest speed of the search: one channel has what there is.
        return Graph(1, link, shape.bandwidth if shape.domains > 1 else link)
    keep = node.generation in ("hopper", "blackwell") and speed < _SPLIT_FROM_HOPPER and best > 4
    if speed >= _SPLIT_FROM and not keep and 2 * best <= MOST_GRAPH_CHANNELS:
        best, speed = 2 * best, speed / 2
    return Graph(best, speed, speed)


def _communicator_channels(shape: GroupShape, node: Node) -> int:
    """Channels that rings and trees run on: those of the search doubled (src/graph/connect.cc)."""
    graph = ring_graph(shape, node)
    channels = 2 * graph.channels
    if node.generation in ("hopper", "blackwell") and shape.domains > 1 and graph.inside > 45e9 and channels < 16:
        channels *= 2
    return min(MOST_CHANNELS, channels)


def _bus_factor(collective: str, ranks: int) -> float:
    """Bytes of the buffer per byte on a ring's link."""
    return ranks / ((2 if collective == "all_reduce" else 1) * (ranks - 1))


def _most_by_ll(shape: GroupShape, node: Node) -> float:
    """Bytes per second that the LL protocol reaches: inside a node the device's, between nodes the processor's."""
    between = _tables()["ll_between"]
    cap = node.row["ll"] if shape.domains == 1 else between["two"] if shape.domains == 2 else between["more"]
    return float(cap) * 1e9


def _ring(collective: str, protocol: Protocol, shape: GroupShape, node: Node) -> Choice:
    row, graph = node.row, ring_graph(shape, node)
    bus = graph.channels * (graph.inside if shape.domains <= 2 else graph.between)
    if protocol == "LL":
        bus = min(_most_by_ll(shape, node), 0.5 * bus)
    elif protocol == "LL128":
        bus = min(LL128_SHARE * bus, graph.channels * row["ring_ll128"][_scale(shape)] * 1e9)
    base, inside, between_nodes = _steps("ring", protocol, node)
    if shape.ranks_per_domain == 1:
        between_nodes = _latencies("network", "tree", protocol)
    rounds = 2 if collective == "all_reduce" else 1
    network = rounds * (shape.domains - 1)
    post = post_seconds(protocol) if shape.domains > 1 else 0.0
    latency = base + (rounds * (shape.ranks - 1) - network) * max(inside, post) + network * between_nodes
    bandwidth = bus * _bus_factor(collective, shape.ranks)
    return Choice("ring", protocol, latency, bandwidth, _communicator_channels(shape, node))


def _tree(protocol: Protocol, shape: GroupShape, node: Node) -> Choice:
    row, graph = node.row, ring_graph(shape, node)
    bus = graph.channels * (graph.inside if shape.domains <= 2 else graph.between)
    if protocol == "LL":
        bus = min(bus / 3.8, _most_by_ll(shape, node))
    elif protocol == "LL128":
        share = 7 / 9 if shape.domains == 1 else 120 / 128
        bus = min(share * bus, graph.channels * row["tree_ll128"][_scale(shape)] * 1e9)
    else:
        bus = min(0.92 * bus, graph.channels * row["tree"][_scale(shape)] * 1e9)
    base, inside, between = _steps("tree", protocol, node)
    levels = int(math.log2(shape.domains))
    latency = base + 2 * ((shape.ranks_per_domain - 1) * inside + levels * between)
    return Choice("tree", protocol, latency, 0.5 * bus, _communicator_channels(shape, node))


def _nvls(collective: str, shape: GroupShape, node: Node) -> Choice | None:
    """NVLink SHARP: the switch adds up. Between nodes only all-reduces, over a tree."""
    row, heads = node.row, min(shape.ranks_per_domain, MOST_HEADS)
    if not (node.multicast and row["nvls_efficiency"] and heads > 1):
        return None
    if shape.domains > 1 and collective != "all_reduce":
        return None
    speeds = [speed * 1e9 for speed in (row["speeds"] if shape.domains == 1 else row["speeds_between"])]
    inside = next((s for s in speeds if (heads + 1) * s <= node.link * (1 + 1e-9)), speeds[-1])
    inside *= row["nvls_efficiency"] * (heads - 1) / heads
    inside *= 2 if collective == "all_reduce" else (shape.ranks_per_domain - 1) / shape.ranks_per_domain
    factor, ctas = heads * _bus_factor(collective, shape.ranks), row["nvls_ctas"][min(shape.domains, 2) - 1]
    if shape.domains == 1:
        return Choice("nvls", "Simple", _latencies("nvlink", "nvls", "Simple"), inside * factor, ctas)
    cards, card = _cards(shape, node)
    between = next((s for s in speeds if s <= card * cards / heads * (1 + 1e-9)), speeds[-1])
    rate = min(inside, between * (2 if shape.domains == 2 else 1), row["nvls_tree"][_scale(shape)] * 1e9)
    hop = _latencies("network", "nvls_tree", "Simple")
    latency = _latencies("nvlink", "nvls_tree", "Simple") + 2 * int(math.log2(shape.domains)) * hop
    return Choice("nvls_tree", "Simple", latency, rate * factor, ctas)


def _pat(shape: GroupShape, node: Node) -> Choice:
    graph = ring_graph(shape, node)
    base, _, between = _steps("pat", "Simple", node)
    latency = base + int(math.log2(shape.domains)) * between / 3.5 + 2.8e-6 * shape.ranks
    bandwidth = 0.75 * graph.channels * graph.between
    return Choice("pat", "Simple", latency, bandwidth, _communicator_channels(shape, node))


def _tuned_seconds(choice: Choice, collective: str, size: float, shape: GroupShape, node: Node) -> float:
    """NCCL's estimate with its corrections by size."""
    latency, bandwidth = choice.latency, choice.bandwidth
    if choice.algorithm == "tree" or (choice.algorithm == "nvls_tree" and node.generation == "blackwell"):
        factors = _tables()["correction"][choice.protocol]
        index = int(math.log2(max(1.0, size / 64)))
        bandwidth *= factors[index] if index < len(factors) else 1.0
    if (
        choice.algorithm == "ring"
        and choice.protocol == "Simple"
        and collective == "all_reduce"
        and shape.domains > 1
        and size / (choice.channels * shape.ranks) >= 64
    ):
        latency *= node.row["plateau"]
    return latency + size / bandwidth


def _shed(choice: Choice, size: float, shape: GroupShape) -> int:
    """Channels of an operation of this size: fewer while a thread would have less than its bytes."""
    if choice.algorithm not in _THREADS:
        return choice.channels
    index = PROTOCOLS.index(choice.protocol)
    per_thread = _THREAD_BYTES[index] * (shape.ranks if choice.algorithm == "ring" and choice.protocol == "LL" else 1)
    wanted = size / (_THREADS[choice.algorithm][index] * per_thread)
    return max(1, min(choice.channels, math.ceil(wanted)))
