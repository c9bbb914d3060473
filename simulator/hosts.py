"""Two hosts made of one machine: half of its processors each, and a wire between them that is as slow as one likes.

The runtime makes them with network namespaces (runtime/hosts.py); here they are a cluster of two nodes, so that a plan
for them is like any other.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

from simulator.cluster import ClusterSpec, CollectiveFit, Link
from simulator.errors import UserError
from simulator.units import BANDWIDTH, SECONDS

HOSTS = 2
# Of an Ethernet frame of 1514 bytes on a link with an MTU of 1500 TCP carries 1448: 20 bytes of IP, 20 of TCP and 12 of
# timestamps are its own (RFC 9293, RFC 7323), and the link's limit counts the frame.
PAYLOAD = 1448 / 1514
# How often the wire is crossed one way until a small collective over two hosts is done, from what torch 2.13's gloo
# took over a link with 1 ms each way: an all-reduce 4.7 to 5.3 ms, a gather or an all-to-all 2.4 to 2.8 ms, a
# message of 1 KB 1.3 ms. gloo's reduce-scatter moved an all-reduce's bytes, counted at the interface: it is
# taken for one.
_CROSSINGS = {"all_reduce": 4, "reduce_scatter": 4, "all_gather": 2, "all_to_all": 2, "send_recv": 1}
# Bytes on the wire over those that a ring of the collective would need.
_EXCESS = {"reduce_scatter": 2.0}
_WIRE = re.compile(r"\s*(?P<rate>[^\s]+\s*[A-Za-z]+/s)(?:\s+(?P<delay>\S.*?))?\s*")
_EXAMPLE = '"100 MB/s", "100 MB/s 1 ms" or "none"'
# Slower than this nothing but waiting would be measured, and what is faster than this no kernel shapes.
_SLOWEST, _FASTEST, _LONGEST = 1e6, 1e11, 1.0


@dataclass(frozen=True)
class Wire:
    """A link between two hosts: bytes per second each way, infinite where nothing limits it, and seconds of delay one
    way."""

    bandwidth: float = math.inf
    delay: float = 0.0

    def __str__(self) -> str:
        if math.isinf(self.bandwidth):
            return "none"
        return f"{self.bandwidth / 1e6:g} MB/s" + (f" {self.delay * 1e3:g} ms" if self.delay else "")


def parse_wire(text: str) -> Wire:
    """What follows --link: a rate, or a rate and a delay, or "none" for a wire that nothing limits.

    >>> parse_wire("1 Gb/s 0.5 ms")
    Wire(bandwidth=125000000.0, delay=0.0005)

    Raises:
        UserError: it is none of these, or no link that can be made.
    """
    if text.strip() == "none":
        return Wire()
    match = _WIRE.fullmatch(text)
    if match is None:
        raise UserError(f"--link '{text}' must be a rate, or a rate and a delay, like {_EXAMPLE}")
    try:
        rate, delay = float(BANDWIDTH.parse(match["rate"])), float(SECONDS.parse(match["delay"] or "0 s"))
    except UserError as error:
        raise UserError(f"--link '{text}': {error}") from None
    if not _SLOWEST <= rate <= _FASTEST:
        raise UserError(f"--link '{text}': the rate must be from 1 MB/s to 100 GB/s")
    if not 0 <= delay <= _LONGEST:
        raise UserError(f"--link '{text}': the delay must be from 0 to 1 s")
    return Wire(rate, delay)


def ranks_per_host(processors: int) -> int:
    """Ranks on each of two hosts: one for every processor of its half, and two at least, or there were no inside."""
    return max(2, processors // HOSTS)


def two_hosts(spec: ClusterSpec, wire: Wire) -> ClusterSpec:
    """The cluster of two nodes that a machine without GPUs becomes. Every node has `ranks_per_host` devices.

    Rule: k ranks that compute at once on each host are 2k on the machine, and as fast as those; a message over the
    wire takes its payload's share of the rate, but is no faster than the loopback, and every crossing costs the delay.
    Ignored: that one host is faster while the other waits, and retransmissions where the limit drops packets.

    Raises:
        UserError: this is no machine without GPUs, or it has one processor.
    """
    if spec.gpu.kind != "cpu" or not spec.concurrency:
        raise UserError("--link makes two hosts of a machine whose ranks run on processors; this one has GPUs")
    if spec.gpus_per_node < HOSTS:
        raise UserError("--link makes two hosts with processors of their own; this process may use one processor")
    per_host = ranks_per_host(spec.gpus_per_node)
    together = [min(HOSTS * k, len(spec.concurrency)) for k in range(1, per_host + 1)]
    # Beyond the counts that were measured the whole stays as fast as it is.
    speeds = tuple(spec.concurrency[n - 1] * n / (HOSTS * k) for k, n in enumerate(together, start=1))
    # As many times longer than computing as on the whole machine.
    streaming = tuple(
        speed / spec.streaming_cost(HOSTS * k) for k, speed in enumerate(speeds, start=1) if spec.streaming
    )
    loopback = _halved(spec.scale_up)
    memory = spec.gpu.memory * spec.gpus_per_node / (HOSTS * per_host)
    return dataclasses.replace(
        spec,
        name=f"two-hosts ({wire})",
        gpu=dataclasses.replace(spec.gpu, memory=memory),
        gpus_per_node=per_host,
        oversubscribe=1.0,
        concurrency=speeds,
        streaming=streaming,
        nics_per_node=1,
        scale_up=loopback,
        scale_out=_wired(loopback, wire),
        source=f"{spec.source}; the link between its halves as given: {wire}",
    )


def _halved(loopback: Link) -> Link:
    """The loopback inside of a host: of the ranks that shared the machine while it was measured a host has its part."""
    fits = {
        kind: tuple(dataclasses.replace(fit, active=fit.active // HOSTS) for fit in found)
        for kind, found in loopback.collectives.items()
    }
    return dataclasses.replace(loopback, collectives=fits)


def _wired(loopback: Link, wire: Wire) -> Link:
    """The loopback with a wire in it: what the collectives of two ranks, one on each host, cost. That they are no
    faster than with all ranks on one host is told by the loopback itself (collectives.py)."""
    rate = min(wire.bandwidth * PAYLOAD, loopback.bandwidth)
    fits: dict[str, tuple[CollectiveFit, ...]] = {}
    for kind, found in loopback.collectives.items():
        few = {fit.active: fit for fit in sorted(found, key=lambda fit: -fit.ranks)}
        fits[kind] = tuple(
            CollectiveFit(
                HOSTS,
                two.latency + _CROSSINGS.get(kind, 2) * wire.delay,
                1 / _EXCESS.get(kind, 1.0),
                two.ramp,
                two.active,
            )
            for two in few.values()
        )
    return Link("wire", rate, loopback.latency + wire.delay, fits, tree_over_two=False)
