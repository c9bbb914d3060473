"""Context parallelism: seconds of bringing the keys and values of other ranks to a rank's queries.

    ring         blocks of keys and values go round, each step beside the attention on the block before
    all_gather   all keys and values are gathered ahead of the attention
    ulysses      all-to-alls turn a part of the sequence into a part of the heads, and back

Causal attention is balanced: of 2c chunks of the sequence rank i holds the i-th from the front and from the back.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from simulator.cluster import GroupShape
from simulator.collectives import collective_seconds, message_seconds
from simulator.kernels import Attention

if TYPE_CHECKING:
    from simulator.job import Job


def key_value_bytes(core: Attention, width: float) -> float:
    """Bytes of one rank's keys and values: e·b·(s/c)·(k/t)·(d_qk + d_v)."""
    return width * core.batch * core.keys * core.key_value_heads * (core.qk_dim + core.v_dim)


def context_seconds(job: Job, core: Attention, cp: GroupShape, forward: float, backward: float) -> tuple[float, float]:
    """Exposed seconds of one attention core's communication, forward and backward.

    Args:
        forward, backward: seconds of the core itself, behind which a ring hides.

    Rule: ring: c - 1 steps, each exposing what 1/c of the core does not hide; twice the bytes in the backward, where
    the gradients of keys and values go round too. all_gather: 2·s·b·k·d bytes gathered, in the backward again, and
    as many reduce-scattered. ulysses: queries, keys, values and output, four all-to-alls each way.
    Reference: arXiv 2310.01889 (ring), arXiv 2407.21783, section 3.3.2 (all-gather), arXiv 2309.14509 (Ulysses).
    Ignored: that the steps of a ring are uneven under a sliding window.
    """
    if cp.ranks == 1:
        return 0.0, 0.0
    width = job.stack.recipes[job.training.precision].compute
    method, cluster, c = job.stack.context_parallel, job.cluster, cp.ranks
    if method == "ulysses":
        queries = core.batch * core.heads * core.queries
        keys = core.batch * core.key_value_heads * core.keys
        tensors = (queries * core.qk_dim, keys * core.qk_dim, keys * core.v_dim, queries * core.v_dim)
        one_way = sum(collective_seconds("all_to_all", width * elements, cp, cluster) for elements in tensors)
        return one_way, one_way
    block = key_value_bytes(core, width)
    if method == "all_gather":
        gather = collective_seconds("all_gather", c * block, cp, cluster)
        return gather, gather + collective_seconds("reduce_scatter", c * block, cp, cluster)
    there, back = (sum(message_seconds(size, _neighbours(cp), cluster)) for size in (block, 2 * block))
    if not job.stack.overlap_cp:
        return (c - 1) * there, (c - 1) * back
    gpu = cluster.gpu
    return (c - 1) * gpu.exposed(there, forward / c), (c - 1) * gpu.exposed(back, backward / c)


def _neighbours(cp: GroupShape) -> GroupShape:
    """Two ranks that follow each other in the ring; between domains they have one rank's share of the cards."""
    share = cp.ranks_per_domain if cp.domains > 1 else 1
    return dataclasses.replace(cp, ranks=2, ranks_per_domain=1, bandwidth=cp.bandwidth / share)
