"""Seconds of collectives and messages on a group of ranks that lies on the cluster in a known shape."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

from simulator import nccl
from simulator.cluster import ClusterSpec, CollectiveFit, GroupShape

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]


class Transfer(NamedTuple):
    """`times` collectives or messages of `size` bytes each, one after another, in one of a rank's groups: tp, cp, ep,
    pp, world, shard and replicate (of the dense parameters), expert_shard and expert_replicate. Sizes are of the whole
    buffer, as `collective_seconds` takes them."""

    kind: Collective
    group: str
    size: float
    times: int = 1


_RING_SHARE = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0, "all_to_all": 1.0}


def bus_bytes(collective: str, ranks: int, size: float) -> float:
    """Bytes that pass the slowest link of a ring: 2(n-1)/n of an all-reduce's buffer, (n-1)/n of the gathered,
    scattered or exchanged whole, all of a message (NVIDIA/nccl-tests@a0b82b2, doc/PERFORMANCE.md).

    >>> bus_bytes("all_reduce", 8, 1e9)
    1750000000.0
    """
    share = _RING_SHARE.get(collective)
    return size if share is None else share * (ranks - 1) / ranks * size


def collective_seconds(collective: Collective, size: float, shape: GroupShape, spec: ClusterSpec) -> float:
    """Seconds of one collective alone on its links.

    Args:
        size: bytes of the whole buffer: what is reduced, or what an all-gather ends with; of an all-to-all what one
            rank sends, its own part included.
        shape: the group on the cluster (`cluster.group_shape`).

    Rule: latency + x / (efficiency · bandwidth) + ramp · √x with x = bus_bytes, never less than the least latency of
    NCCL's model. Between scale-up domains an all-reduce adds a latency for every doubling of their number (a tree),
    and between two domains its cards carry half of a ring's bytes; it is never faster than the one inside a domain.
    Gathers and scatters are rings, whose every step costs, under the faster of two protocols: Simple, and LL128 with
    cheaper steps and 92 % of the bandwidth. The bandwidth is that of the group's share of cards and uplinks. Where a
    fabric has no fit for a collective, NCCL's own estimate holds.
    Reference: three-constant fits to published nccl-tests tables, rms error 1-12 % by system, where latency and
    bandwidth alone have 10-27 %; steps, trees and floors from NVIDIA/nccl@5067397c, src/graph/tuning.cc.
    Ignored: the bends where algorithm or protocol change with the size, congestion inside the spine. NCCL's own
    estimate is 1.2 to 3 times too short from 1 MiB to 256 MiB, by how much on an unmeasured fabric is not known.
    """
    if shape.ranks == 1 or size <= 0:
        return 0.0
    if collective == "all_to_all":
        return _exchange_seconds(size, shape, spec)
    link = spec.scale_up if shape.domains == 1 else spec.scale_out
    assert link is not None
    chosen_by_nccl = bool(spec.nccl) and collective != "send_recv"
    if chosen_by_nccl and not link.collectives.get(collective):
        return _estimated_seconds(collective, size, shape, spec)
    seconds = _inside_seconds if shape.domains == 1 else _between_seconds
    floor = nccl.latency_floor(collective, shape, spec) if chosen_by_nccl else 0.0
    return max(floor, seconds(collective, bus_bytes(collective, shape.ranks, size), shape, spec))


def transfer_seconds(transfers: Iterable[Transfer], shapes: Mapping[str, GroupShape], spec: ClusterSpec) -> float:
    """Seconds of collectives one after another; `shapes` says how their groups lie on the cluster."""
    return sum(t.times * collective_seconds(t.kind, t.size, shapes[t.group], spec) for t in transfers)


def slowest_link(collective: Collective, size: float, shape: GroupShape, spec: ClusterSpec) -> str:
    """The links that a collective waits for, by the rule of `collective_seconds`: of a group over several domains those
    inside of them where its cards are faster; with the uplinks of a leaf, or the roots inside a domain, where its share
    of those is narrower."""
    up, out = spec.scale_up, spec.scale_out
    if shape.domains == 1 or out is None:
        return up.kind + (" across roots" if shape.spine < shape.bandwidth else "")
    if collective == "all_to_all":
        inside, cards = _exchange_times(size, shape, spec)
    elif collective == "send_recv":
        inside, cards = 0.0, 1.0
    elif spec.concurrency:
        x = bus_bytes(collective, shape.ranks, size)
        inside, cards = _machine_seconds(collective, x, shape, spec), _wire_seconds(collective, x, shape, spec)
    else:
        fits = out.collectives.get(collective)
        efficiency = fit_of(fits, shape.domains).efficiency if fits else 1.0
        cards = 1 / (_tree_gain(collective, shape, spec) * efficiency * shape.slowest)
        inside = 1 / _domain_bandwidth(collective, shape, spec)
    if inside > cards:
        return up.kind
    return out.kind + (" across leaves" if shape.spine < shape.bandwidth else "")


def collective_multiprocessors(collective: Collective, size: float, shape: GroupShape, spec: ClusterSpec) -> int:
    """Multiprocessors that a collective takes from compute while it runs: its channels, one CTA each, by NCCL's model
    (nccl.py); 0 where nobody else computes there or the library is not NCCL.

    >>> collective_multiprocessors("all_gather", 2**30, eight_gpus, dgx_h100)        # doctest: +SKIP
    24
    """
    if shape.ranks == 1 or size <= 0 or not spec.nccl:
        return 0
    if collective in ("all_to_all", "send_recv"):
        peers = shape.ranks - 1 if collective == "all_to_all" else 1
        return min(spec.gpu.multiprocessors, nccl.message_channels(shape, spec, peers))
    return min(spec.gpu.multiprocessors, nccl.choose(collective, size, shape, spec).channels)


def _estimated_seconds(collective: Collective, size: float, shape: GroupShape, spec: ClusterSpec) -> float:
    """NCCL's own estimate, which takes the group for the only one: siblings leave it its share of cards and uplinks."""
    alone = min(choice.seconds(size) for choice in nccl.choices(collective, shape, nccl.node_of(spec)))
    if shape.domains == 1 and not shape.ranks_per_leaf:
        return alone
    shared = bus_bytes(collective, shape.ranks, size) / (_tree_gain(collective, shape, spec) * shape.slowest)
    return max(alone, shared)


def _tree_gain(collective: Collective, shape: GroupShape, spec: ClusterSpec) -> float:
    """Bytes of a ring over those of a tree of two domains, whose root and only child send the buffer once."""
    tree = spec.scale_out is not None and spec.scale_out.tree_over_two and shape.domains == 2
    return 2 * (shape.ranks - 1) / shape.ranks if collective == "all_reduce" and tree else 1.0


def _inside_seconds(collective: Collective, x: float, shape: GroupShape, spec: ClusterSpec) -> float:
    fit = fit_of(spec.scale_up.collectives[collective], shape.ranks, shape.sharing)
    return fit.latency + x / (fit.efficiency * shape.slowest) + fit.ramp * math.sqrt(x)


def _between_seconds(collective: Collective, x: float, shape: GroupShape, spec: ClusterSpec) -> float:
    """Over several domains: a tree or rings on the cards, as fast as the slower of cards and domain. Hosts that are
    made of one machine have its processors to send with: there it is never faster than with all ranks on it."""
    assert spec.scale_out is not None
    if spec.concurrency:
        return max(_wire_seconds(collective, x, shape, spec), _machine_seconds(collective, x, shape, spec))
    outside = fit_of(spec.scale_out.collectives[collective], shape.domains)
    cards = outside.efficiency * shape.slowest
    rings = [
        steps + x / (share * min(cards, _domain_bandwidth("all_gather", shape, spec)))
        for steps, share in zip(_ring_steps(collective, shape, spec), (1.0, nccl.LL128_SHARE), strict=False)
    ]
    # NCCL's tree does not span more than two NVLink domains of several nodes each: 20 racks were measured with the
    # latency of a ring's steps, two with that of a tree.
    several_racks = shape.domains > 2 and spec.domain > spec.gpus_per_node
    if not rings or (collective == "all_reduce" and not several_racks):
        bandwidth = min(_tree_gain(collective, shape, spec) * cards, _domain_bandwidth(collective, shape, spec))
        rings = [spec.scale_out.latency_per_doubling * math.log2(shape.domains) + x / bandwidth]
    return outside.latency + min(rings) + outside.ramp * math.sqrt(x)


def _wire_seconds(collective: Collective, x: float, shape: GroupShape, spec: ClusterSpec) -> float:
    """Between hosts that are made of one machine, over what links them."""
    assert spec.scale_out is not None
    wire = fit_of(spec.scale_out.collectives[collective], shape.domains, shape.sharing)
    return wire.latency + x / (wire.efficiency * shape.slowest) + wire.ramp * math.sqrt(x)


def _machine_seconds(collective: Collective, x: float, shape: GroupShape, spec: ClusterSpec) -> float:
    """The same with all ranks on that machine."""
    return _inside_seconds(collective, x, on_one_host(shape, spec), spec)


def on_one_host(shape: GroupShape, spec: ClusterSpec) -> GroupShape:
    """The group with all its ranks in one scale-up domain."""
    return dataclasses.replace(
        shape, domains=1, ranks_per_domain=shape.ranks, bandwidth=spec.scale_up.bandwidth, spine=math.inf
    )


def _domain_bandwidth(collective: Collective, shape: GroupShape, spec: ClusterSpec) -> float:
    """Bytes per second of a collective inside one domain of the group, infinite where it has one rank there."""
    fits = spec.scale_up.collectives.get(collective)
    if shape.ranks_per_domain == 1 or not fits:
        return math.inf
    link = spec.scale_up
    bandwidth = link.bandwidth
    if 0 < link.devices_per_root < shape.ranks_per_domain:
        bandwidth = min(bandwidth, link.root_bandwidth * shape.ranks_per_domain / spec.domain)
    return fit_of(fits, shape.ranks_per_domain).efficiency * bandwidth


def _exchange_seconds(size: float, shape: GroupShape, spec: ClusterSpec) -> float:
    """An all-to-all: of a rank's bytes (g - 1)/n stay in its domain of g ranks, (n - g)/n leave over its share of the
    cards and (n - l)/n of the uplinks of its leaf of l ranks; the slowest of the three counts, because they go at the
    same time. Every peer outside costs a posted message (NVIDIA/nccl@5067397c, src/graph/tuning.cc)."""
    n, g = shape.ranks, shape.ranks_per_domain
    up = spec.scale_up.collectives
    inside = fit_of(up.get("all_to_all") or up["all_gather"], g, shape.sharing)
    if shape.domains == 1:
        x = bus_bytes("all_to_all", n, size)
        times = [x / shape.bandwidth, _crossing_seconds(size, shape)]
        return inside.latency + max(times) / inside.efficiency + inside.ramp * math.sqrt(x)
    outside = _exchange_fit(shape, spec)
    posts = (n - g) * nccl.post_seconds() if spec.nccl else 0.0
    ramp = outside.ramp * math.sqrt(size * (n - g) / n)
    seconds = outside.latency + posts + max(_exchange_times(size, shape, spec)) + ramp
    return max(seconds, _exchange_seconds(size, on_one_host(shape, spec), spec)) if spec.concurrency else seconds


def _exchange_fit(shape: GroupShape, spec: ClusterSpec) -> CollectiveFit:
    assert spec.scale_out is not None
    out = spec.scale_out.collectives
    return fit_of(out.get("all_to_all") or out["all_gather"], shape.ranks, shape.sharing)


def _exchange_times(size: float, shape: GroupShape, spec: ClusterSpec) -> tuple[float, float]:
    """Seconds of what stays in the domains of an all-to-all over several, and of what leaves them."""
    n, g = shape.ranks, shape.ranks_per_domain
    up = spec.scale_up.collectives
    inside = fit_of(up.get("all_to_all") or up["all_gather"], g, shape.sharing)
    leaving = size * (n - g) / n
    cards = max(leaving / (shape.bandwidth / g), _crossing_seconds(size, shape)) / _exchange_fit(shape, spec).efficiency
    return size * (g - 1) / n / (inside.efficiency * spec.scale_up.bandwidth), cards


def _crossing_seconds(size: float, shape: GroupShape) -> float:
    """Seconds of the part of an all-to-all that goes over the uplinks of leaves or roots."""
    if not shape.ranks_per_leaf:
        return 0.0
    return size * (shape.ranks - shape.ranks_per_leaf) / shape.ranks / (shape.spine / shape.ranks_per_leaf)


def _ring_steps(collective: Collective, shape: GroupShape, spec: ClusterSpec) -> list[float]:
    """Seconds of the steps of a ring over several domains by protocol: of n - 1 steps N - 1 go between domains; an
    all-reduce goes round twice."""
    assert spec.scale_out is not None
    rounds = 2 if collective == "all_reduce" else 1
    between = shape.domains - 1
    inside = shape.ranks - 1 - between
    hops = zip(spec.scale_up.ring_hops, spec.scale_out.ring_hops, strict=False)
    return [rounds * (inside * up + between * out) for up, out in hops]


def message_seconds(size: float, shape: GroupShape, spec: ClusterSpec) -> tuple[float, float]:
    """(latency, transfer) of one point-to-point message: the link is busy for the transfer alone. Between hosts made
    of one machine it is no shorter than inside of one."""
    link = spec.scale_up if shape.domains == 1 else spec.scale_out
    assert link is not None
    fit = fit_of(link.collectives["send_recv"], 2, shape.sharing)
    seconds = size / (fit.efficiency * shape.slowest) + fit.ramp * math.sqrt(size)
    if spec.concurrency and shape.domains > 1:
        seconds = max(seconds, message_seconds(size, on_one_host(shape, spec), spec)[1])
    return fit.latency, seconds


def active_ranks(collectives: Mapping[str, tuple[CollectiveFit, ...]], ranks: int, sharing: int) -> int:
    """How many ranks shared a node's processors while the collectives of a group were measured (`fit_of`)."""
    return sharing if any(f.active == sharing for fits in collectives.values() for f in fits) else ranks


def fit_of(fits: tuple[CollectiveFit, ...], ranks: int, sharing: int = 0) -> CollectiveFit:
    """The constants that hold from the largest known number of ranks that is not more than this one. Among ranks that
    share processors those that were measured while as many did, or else while the group's own did."""
    if any(f.active for f in fits):
        fits = tuple(f for f in fits if f.active == sharing) or tuple(f for f in fits if f.active == f.ranks) or fits
    return max((f for f in fits if f.ranks <= ranks), key=lambda f: f.ranks, default=fits[0])
