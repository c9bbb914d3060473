"""Seconds of collectives and messages on a group of ranks that lies on the cluster in a known shape."""

from __future__ import annotations

import math
from typing import Literal

from simulator.cluster import ClusterSpec, CollectiveFit, GroupShape

Collective = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"]

# Of 128 bytes a line carries 120, and NCCL counts 92 % for what its rings reach.
LL128_SHARE = 0.92
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
        size: bytes of the whole buffer: what is reduced, or what an all-gather ends with.
        shape: the group on the cluster (`cluster.group_shape`).

    Rule: latency + x / (efficiency · bandwidth) + ramp · √x with x = bus_bytes. Between scale-up domains an all-reduce
    adds a latency for every doubling of their number (a tree); gathers and scatters are rings, whose every step
    costs, under the faster of two protocols: Simple, and LL128 with cheaper steps and 92 % of the bandwidth. Never
    faster than the ring inside a domain. The bandwidth is that of the group's share of the network cards.
    Reference: three-constant fits to published nccl-tests tables, rms error 1-12 % by system, where latency and
    bandwidth alone have 10-27 %; steps of rings from NVIDIA/nccl@5067397c, src/graph/tuning.cc.
    Ignored: the other choices of algorithm and protocol by size, congestion above the cards.
    """
    if shape.ranks == 1 or size <= 0:
        return 0.0
    x = bus_bytes(collective, shape.ranks, size)
    if shape.domains == 1:
        inside = _fit(spec.scale_up.collectives[collective], shape.ranks)
        return inside.latency + x / (inside.efficiency * shape.bandwidth) + inside.ramp * math.sqrt(x)
    assert spec.scale_out is not None
    outside = _fit(spec.scale_out.collectives[collective], shape.domains)
    bandwidth = outside.efficiency * shape.bandwidth
    if collective == "all_to_all":
        # Every rank's own bytes leave through its own share of the cards: there is no ring that others carry on.
        bandwidth /= shape.ranks_per_domain
    elif shape.ranks_per_domain > 1:
        ring = _fit(spec.scale_up.collectives["all_gather"], shape.ranks_per_domain)
        bandwidth = min(bandwidth, ring.efficiency * spec.scale_up.bandwidth)
    rings = [
        steps + x / (share * bandwidth)
        for steps, share in zip(_ring_steps(shape, spec), (1.0, LL128_SHARE), strict=False)
    ]
    if collective == "all_reduce" or not rings:
        rings = [spec.scale_out.latency_per_doubling * math.log2(shape.domains) + x / bandwidth]
    return outside.latency + min(rings) + outside.ramp * math.sqrt(x)


def _ring_steps(shape: GroupShape, spec: ClusterSpec) -> list[float]:
    """Seconds of the steps of a ring over several domains by protocol: n - N of them inside, N - 1 between domains."""
    assert spec.scale_out is not None
    between = shape.domains - 1
    inside = shape.ranks - 1 - between
    hops = zip(spec.scale_up.ring_hops, spec.scale_out.ring_hops, strict=False)
    return [inside * up + between * out for up, out in hops]


def message_seconds(size: float, shape: GroupShape, spec: ClusterSpec) -> tuple[float, float]:
    """(latency, transfer) of one point-to-point message: the link is busy for the transfer alone."""
    link = spec.scale_up if shape.domains == 1 else spec.scale_out
    assert link is not None
    fit = _fit(link.collectives["send_recv"], 2)
    return fit.latency, size / (fit.efficiency * shape.bandwidth) + fit.ramp * math.sqrt(size)


def _fit(fits: tuple[CollectiveFit, ...], ranks: int) -> CollectiveFit:
    """The constants that hold from the largest known number of ranks that is not more than this one."""
    return max((f for f in fits if f.ranks <= ranks), key=lambda f: f.ranks, default=fits[0])
