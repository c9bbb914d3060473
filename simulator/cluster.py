"""Gpu and ClusterSpec: the hardware as data; and the cluster itself, an `nx.DiGraph` built from them.

    gpu (n, i) ──► switch (n)          scale-up: NVLink, xGMI, PCIe, or the memory of one machine
    gpu (n, i) ──► root (n, k) ──► switch (n)           where the host's PCIe roots or sockets lie between
    gpu (n, i) ──► nic (n, j) ──► fabric         scale-out: one edge per network card
                   nic (n, j) ──► leaf (k) ──► fabric          where several nodes share the uplinks of a leaf switch

Every edge has `bandwidth` (bytes per second, one direction) and `latency` (seconds). Queries are functions of the
graph, as in networkx; `graph.graph["spec"]` is the ClusterSpec it was built from.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from simulator.files import STRICT
from simulator.units import BANDWIDTH, BYTES, DOLLARS, FLOPS, SECONDS

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True)
class MatmulFit:
    """Constants of `compute.matmul_seconds`: rate reached on a large product, depth lost to filling the pipeline of
    a tile (k0, elements), the time below which no product goes, the share of that speed that a training load
    sustains (the Gpu's own if it is not given), and the rows and columns whose products take as long as reading the
    two operands (m0, n0; without tiles)."""

    rate: Annotated[float, FLOPS]
    k0: float = 0.0
    overhead: Annotated[float, SECONDS] = 0.0
    sustained: float | None = None
    m0: float = 0.0
    n0: float = 0.0

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class AttentionFit:
    """Rate of a fused attention kernel over the sequence length s: rate · s / (s + half_length); the causal pair is
    over the FLOPs that the mask leaves."""

    rate: Annotated[float, FLOPS]
    half_length: float
    causal_rate: Annotated[float, FLOPS]
    causal_half_length: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class AttentionKernel:
    """One attention kernel at one head dimension, forward and backward."""

    head_dim: int
    forward: AttentionFit
    backward: AttentionFit

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class CollectiveFit:
    """Constants of one collective from `ranks` ranks on: seconds = latency + x / (efficiency · link) + ramp · √x,
    where x is the bytes that pass the slowest link (collectives.py). They were measured while `active` ranks shared
    the node's processors: its own and those of siblings; 0 where every rank has a device."""

    ranks: int
    latency: Annotated[float, SECONDS]
    efficiency: float
    ramp: float = 0.0
    active: int = 0

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class HostFit:
    """Seconds of the host for one kernel: forward, in autograd's backward, and what DTensor adds to an op."""

    forward: Annotated[float, SECONDS]
    backward: Annotated[float, SECONDS]
    dtensor: Annotated[float, SECONDS] = 0.0

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Gpu:
    """One device: a GPU, or one processor of a machine without GPUs. Sizes in bytes, rates in SI.

    `peak` is the data sheet's (the denominator of MFU), `matmul` what large products reach. `host` is measured on
    the machine; without it the stack's own value holds. `sustained` is the clock under a training load relative
    to a single kernel's. `timing_spread` is ln(90th / 10th percentile) of the machine's own timings, 0 where nobody
    measured it.
    """

    name: str
    kind: Literal["gpu", "cpu"]
    memory: Annotated[float, BYTES]
    memory_bandwidth: Annotated[float, BANDWIDTH]
    peak: dict[str, Annotated[float, FLOPS]]
    matmul: dict[str, MatmulFit]
    source: str
    memory_efficiency: float = 0.87
    reduction_efficiency: float = 0.75
    memory_overhead: Annotated[float, SECONDS] = 0.0
    tiles: tuple[tuple[int, int], ...] = ()
    multiprocessors: int = 1
    sustained: float = 1.0
    attention: dict[str, tuple[AttentionKernel, ...]] = field(default_factory=dict)
    host: HostFit | None = None
    context_memory: Annotated[float, BYTES] = 0.0
    communicator_memory: Annotated[float, BYTES] = 0.0
    fragmentation: float = 0.0
    overlap_slowdown: float = 0.0
    timing_spread: float = 0.0
    optimizer_efficiency: float = 0.0

    __pydantic_config__ = STRICT

    def clock(self, precision: str) -> float:
        """Speed of matmuls of a precision under a training load, relative to one kernel alone."""
        found = self.matmul[self.arithmetic(precision)].sustained
        return self.sustained if found is None else found

    def hiding_cost(self, hidden: float) -> float:
        """Seconds by which compute that hides this much communication runs longer: both want the same memory
        bandwidth and multiprocessors, so that compute goes 1 + overlap_slowdown times slower while they share
        (18.9 % on average over A100, H100, MI250 and MI210: arXiv 2507.03114)."""
        return hidden * self.overlap_slowdown / (1 + self.overlap_slowdown)

    def exposed(self, communication: float, work: float) -> float:
        """Seconds that communication beside work adds to it: what is left over, and what hiding the rest costs."""
        hidden = min(communication, work)
        return communication - hidden + self.hiding_cost(hidden)

    def arithmetic(self, precision: str) -> str:
        """The precision whose rates hold: fp16 is as fast as bf16."""
        return "bf16" if precision == "fp16" else precision


@dataclass(frozen=True)
class Link:
    """A tier of the network: what one device (scale-up) or one card (scale-out) can send, and how collectives
    do on it. `latency_per_doubling` is added to a tree for every doubling of the number of domains; `ring_hops` is what
    each step of a ring over several domains costs on this tier, under NCCL's Simple and its LL128 protocol.

    `tree_over_two` says that two domains all-reduce with a tree, whose cards carry half of a ring's bytes.

    `topology` is how the devices of a domain meet: over links of their own (switched or not), over a switch that adds
    up ("multicast": NVLink SHARP), or in the host ("pcie"). `devices_per_root` of them share a root (a PCIe switch, a
    socket) whose way to the other roots has `root_bandwidth`; 0 where all meet in one place that blocks nobody.
    """

    kind: str
    bandwidth: Annotated[float, BANDWIDTH]
    latency: Annotated[float, SECONDS]
    collectives: dict[str, tuple[CollectiveFit, ...]]
    latency_per_doubling: Annotated[float, SECONDS] = 0.0
    tree_over_two: bool = True
    ring_hops: tuple[Annotated[float, SECONDS], ...] = ()
    topology: Literal["links", "multicast", "pcie"] = "links"
    devices_per_root: int = 0
    root_bandwidth: Annotated[float, BANDWIDTH] = 0.0

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class CollectiveSample:
    """One measured collective, alone on its links: `ranks` spread evenly over `domains`, bytes of the whole buffer."""

    collective: str
    ranks: int
    domains: int
    bytes: float
    seconds: float
    source: str = ""

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class ClusterSpec:
    """Everything a cluster file says. One kind of node, repeated.

    nccl is the generation in NCCL's tables (data/nccl.toml) whose rules choose algorithms; empty for other libraries.
    nodes_per_leaf nodes hang on one leaf switch, whose uplinks carry 1 / spine_oversubscription of what their cards
    send; with 0 the network is flat. oversubscribe is how many ranks a device may carry (1 on GPUs). concurrency[k -
    1] is the speed of each of k ranks that compute at the same time on a node, relative to one alone: empty where
    every rank has its own device; streaming[k - 1] is the same of ranks that stream through memory, as an optimizer
    does: empty where nobody measured it. price_per_gpu_hour is in US dollars, of one GPU with its share of the node.
    samples are what constants of this file were fitted to (fabric_fit.py): kept to be read and fitted again, not used
    otherwise.
    """

    name: str
    gpu: Gpu
    gpus_per_node: int
    scale_up: Link
    source: str
    scale_up_domain: int = 0
    scale_out: Link | None = None
    nics_per_node: int = 0
    nccl: Literal["", "volta", "ampere", "hopper", "blackwell"] = ""
    nodes_per_leaf: int = 0
    spine_oversubscription: float = 1.0
    oversubscribe: float = 1.0
    concurrency: tuple[float, ...] = ()
    streaming: tuple[float, ...] = ()
    price_per_gpu_hour: Annotated[float | None, DOLLARS] = None
    samples: tuple[CollectiveSample, ...] = ()

    __pydantic_config__ = STRICT

    @property
    def domain(self) -> int:
        """Devices that the scale-up network joins; larger than a node on NVL72 racks."""
        return self.scale_up_domain or self.gpus_per_node

    @property
    def wired(self) -> bool:
        """Whether ranks compute on processors that they share, and a wire joins their hosts."""
        return bool(self.concurrency) and self.scale_out is not None

    def sharing(self, world_size: int) -> int:
        """Ranks of a layout that share the processors of a node; 0 where each has a device of its own."""
        return min(world_size, max(1, int(self.gpus_per_node * self.oversubscribe))) if self.concurrency else 0

    def streaming_cost(self, world_size: int) -> float:
        """How many times longer ranks of a node that all stream through its memory take, beyond what they take longer
        for sharing its processors: 1 where every rank has a device of its own.

        Ignored: that ranks which compute meanwhile leave more of the memory to those that stream."""
        known = min(self.sharing(world_size), len(self.streaming), len(self.concurrency))
        return max(1.0, self.concurrency[known - 1] / self.streaming[known - 1]) if known else 1.0

    @property
    def tiers(self) -> tuple[int, ...]:
        """Devices in each part of the cluster that a group may straddle: a root, a domain, a leaf."""
        parts = (self.scale_up.devices_per_root, self.domain, self.nodes_per_leaf * self.gpus_per_node)
        return tuple(size for size in parts if size)


def build_cluster(spec: ClusterSpec, nodes: int) -> nx.DiGraph:
    """The cluster as a graph. Vertices are `("gpu", node, i)`, `("switch", domain)`, `("nic", node, j)`,
    `("root", node, k)` and `("leaf", k)` where there are some, and `"fabric"`.

    >>> graph = build_cluster(spec, nodes=2)                                          # doctest: +SKIP
    >>> bottleneck(graph, ("gpu", 0, 0), ("gpu", 1, 0))                               # doctest: +SKIP
    (5e+10, 5e-06)
    """
    import networkx as nx

    graph = nx.DiGraph(spec=spec, nodes=nodes)
    per_domain = max(1, spec.domain // spec.gpus_per_node)
    up = spec.scale_up
    for node in range(nodes):
        for i in range(spec.gpus_per_node):
            meeting: Any = ("switch", node // per_domain)
            if up.devices_per_root:
                root = ("root", node, i // up.devices_per_root)
                _join(graph, root, meeting, up.root_bandwidth, 0.0, shared=True)
                meeting = root
            _join(graph, ("gpu", node, i), meeting, up.bandwidth, up.latency / 2)
            if spec.scale_out and spec.nics_per_node:
                nic = ("nic", node, i * spec.nics_per_node // spec.gpus_per_node)
                _join(graph, ("gpu", node, i), nic, spec.scale_out.bandwidth, spec.scale_out.latency / 4)
        for j in range(spec.nics_per_node if spec.scale_out else 0):
            assert spec.scale_out is not None
            above = ("leaf", node // spec.nodes_per_leaf) if spec.nodes_per_leaf else "fabric"
            _join(graph, ("nic", node, j), above, spec.scale_out.bandwidth, spec.scale_out.latency / 4)
    if spec.scale_out and spec.nodes_per_leaf:
        cards = spec.nodes_per_leaf * spec.nics_per_node * spec.scale_out.bandwidth
        for k in range(-(-nodes // spec.nodes_per_leaf)):
            _join(graph, ("leaf", k), "fabric", cards / spec.spine_oversubscription, 0.0, shared=True)
    return graph


def _join(graph: nx.DiGraph, a: Any, b: Any, bandwidth: float, latency: float, shared: bool = False) -> None:
    """An edge each way; the latencies of a path's edges sum to the link's. What is shared belongs to many devices."""
    graph.add_edge(a, b, bandwidth=bandwidth, latency=latency, shared=shared)
    graph.add_edge(b, a, bandwidth=bandwidth, latency=latency, shared=shared)


def gpu_of(graph: nx.DiGraph, rank: int) -> tuple[str, int, int]:
    """The vertex that carries a global rank: ranks fill a node before the next begins.

    On an oversubscribed machine the ranks go round the devices again.
    """
    spec = graph.graph["spec"]
    node, i = divmod(rank % (graph.graph["nodes"] * spec.gpus_per_node), spec.gpus_per_node)
    return ("gpu", node, i)


def path(graph: nx.DiGraph, a: Any, b: Any) -> list[Any]:
    """The vertices between two GPUs, over the scale-up network where it joins them."""
    import networkx as nx

    found: list[Any] = nx.shortest_path(graph, a, b)
    return found


def bottleneck(graph: nx.DiGraph, a: Any, b: Any) -> tuple[float, float]:
    """Bandwidth of the slowest edge and sum of the latencies on the path from a to b."""
    hops = path(graph, a, b)
    edges = [graph.edges[u, v] for u, v in itertools.pairwise(hops)]
    if not edges:
        return float("inf"), 0.0
    return min(e["bandwidth"] for e in edges), sum(e["latency"] for e in edges)


@dataclass(frozen=True)
class GroupShape:
    """How a group of ranks lies on the cluster: all that a collective's cost depends on.

    `bandwidth` is bytes per second into and out of one rank's share of a device's link where `domains` is 1, and of
    the group's share of a domain's cards where it is more. `spine` is its share of the uplinks of a leaf (of a root
    inside a domain), on which it has `ranks_per_leaf` ranks; infinite for a group under one of them. `sharing` is
    ClusterSpec.sharing of its layout.
    """

    ranks: int
    domains: int
    ranks_per_domain: int
    bandwidth: float
    spine: float = math.inf
    ranks_per_leaf: int = 0
    sharing: int = 0

    @property
    def slowest(self) -> float:
        """Bytes per second of a ring or a tree: over a leaf's uplinks it goes once, however many nodes hang on it."""
        return min(self.bandwidth, self.spine)


def group_shape(graph: nx.DiGraph, ranks: tuple[int, ...], start: int = 0, sharing: int = 0) -> GroupShape:
    """Place a group on the cluster, among `sharing` ranks that share a node's processors (ClusterSpec.sharing).

    Rule: the sibling groups of a layout communicate at the same time, so a group that holds g of the G devices of a
    domain gets g / G of its network cards, each rank its own device's share of them; and of the uplinks of a leaf in
    the same way.
    Ignored: congestion inside the spine (hash collisions of flows), and siblings that are idle.
    """
    spec: ClusterSpec = graph.graph["spec"]
    # As gpu_of says, of thousands of ranks.
    per_node, devices = spec.gpus_per_node, graph.graph["nodes"] * spec.gpus_per_node
    places = [divmod((rank + start) % devices, per_node) for rank in ranks]
    per_domain = max(1, spec.domain // per_node)
    domains = {node // per_domain for node, _ in places}
    first = places[0]
    if len(domains) == 1:
        other = next((p for p in places if p != first), first)
        if other == first:
            return GroupShape(len(ranks), 1, len(ranks), spec.scale_up.bandwidth, sharing=sharing)
        inside = GroupShape(len(ranks), 1, len(ranks), _tier(graph, ("gpu", *first), ("gpu", *other)), sharing=sharing)
        per_root = spec.scale_up.devices_per_root
        if not per_root:
            return inside
        return _cross(inside, {(node, i // per_root) for node, i in places}, spec.scale_up.root_bandwidth, per_root)
    other = next(p for p in places if p[0] // per_domain != first[0] // per_domain)
    card = _tier(graph, ("gpu", *first), ("gpu", *other))
    share = card * spec.nics_per_node / per_node
    per_group = -(-len(ranks) // len(domains))
    shape = GroupShape(len(ranks), len(domains), per_group, share * per_group, sharing=sharing)
    if not spec.nodes_per_leaf:
        return shape
    leaves = {node // spec.nodes_per_leaf for node, _ in places}
    uplinks: float = graph.edges["fabric", ("leaf", min(leaves))]["bandwidth"]
    return _cross(shape, leaves, uplinks, spec.nodes_per_leaf * per_node)


def _cross(shape: GroupShape, parts: set[Any], uplinks: float, devices: int) -> GroupShape:
    """A group that lies in several parts of so many devices each has its ranks' share of their uplinks."""
    if len(parts) == 1:
        return shape
    per_part = -(-shape.ranks // len(parts))
    return dataclasses.replace(shape, spine=uplinks * per_part / devices, ranks_per_leaf=per_part)


def _tier(graph: nx.DiGraph, a: Any, b: Any) -> float:
    """Bandwidth of the `bottleneck` that is a device's own, searched once per tier: all nodes are alike."""
    spec: ClusterSpec = graph.graph["spec"]
    per_domain = max(1, spec.domain // spec.gpus_per_node)
    known: dict[bool, float] = graph.graph.setdefault("tiers", {})
    same_domain = a[1] // per_domain == b[1] // per_domain
    if same_domain not in known:
        edges = [graph.edges[u, v] for u, v in itertools.pairwise(path(graph, a, b))]
        known[same_domain] = min(edge["bandwidth"] for edge in edges if not edge["shared"])
    return known[same_domain]
