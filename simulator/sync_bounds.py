"""The least seconds in which replicas can exchange what they must, by way to synchronise: the textbook's closed forms.

n replicas exchange M bytes (gradients one way; parameters the other, of the same size) over links that carry B bytes
per second each way at the same time. Latency, the computing and what computing hides are left out. The simulation is
never faster, and comes near where nothing else binds (tests/simulator/test_sync_processes.py).
"""

from __future__ import annotations

import math


def ring_seconds(n: int, size: float, bandwidth: float) -> float:
    """A ring all-reduce: 2(n-1)/n · M/B, the least that any all-reduce takes (Patarasuk and Yuan 2009)."""
    return 2 * (n - 1) / n * size / bandwidth


def tree_seconds(n: int, size: float, bandwidth: float) -> float:
    """A double binary tree: 2 · M/B; inner nodes of one tree are leaves of the other, so each sends and receives M up
    and M down (Sanders, Speck and Träff 2009; NCCL 2.4)."""
    return 2 * size / bandwidth if n > 1 else 0.0


def gather_seconds(n: int, size: float, bandwidth: float) -> float:
    """ZeRO-3: two all-gathers and a reduce-scatter of M, 3(n-1)/n · M/B (arXiv 1910.02054, section 7.2)."""
    return 3 * (n - 1) / n * size / bandwidth


def centre_seconds(n: int, size: float, bandwidth: float) -> float:
    """A centre that is one of the replicas: (n-1) M/B in, then as much out."""
    return 2 * (n - 1) * size / bandwidth


def server_seconds(n: int, k: int, size: float, bandwidth: float) -> float:
    """k servers on machines of their own: max(M/B, n·M/(k·B)). A server receives its share M/k from n workers while it
    sends as much back (BytePS: Jiang et al., OSDI'20, section 2.2, "non-colocated mode")."""
    return max(size, n * size / k) / bandwidth


def hosted_seconds(n: int, servers: int, nodes: int, push: float, pull: float, bandwidth: float) -> float:
    """Servers beside replicas, one on every node in turn, where n/nodes replicas share the cards of a node, of which
    each has B.

    Rule: in every step the cards of a node with servers send what its replicas push to the servers of other nodes,
    (1 - 1/S) · push each with S such nodes, and its servers' share of pull to all replicas elsewhere; and they receive
    the same with the two exchanged. With a server on every node, and as much pulled as pushed, this is
    a ring; with one server it is n-1 answers. On one node: `server_seconds`.
    """
    if nodes == 1:
        return server_seconds(n, servers, max(push, pull), bandwidth)
    share, beside = math.ceil(servers / nodes) / servers, n / nodes
    own, others = beside * (1 - 1 / min(servers, nodes)), share * (n - beside)
    return max(own * push + others * pull, own * pull + others * push) / (beside * bandwidth)
