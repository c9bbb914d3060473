"""Context parallelism: bytes and seconds of bringing the keys and values of other ranks to a rank's queries.

    ring         blocks of keys and values go round, each step beside the attention on the block before
    all_gather   all keys and values are gathered ahead of the attention
    ulysses      all-to-alls turn a part of the sequence into a part of the heads, and back

Causal attention is balanced: of 2c chunks of the sequence rank i holds the i-th from the front and from the back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING

from simulator.cluster import GroupShape
from simulator.collectives import Transfer, message_seconds, transfer_seconds
from simulator.kernels import Attention

if TYPE_CHECKING:
    from simulator.job import Job

Transfers = tuple[Transfer, ...]


def key_value_bytes(core: Attention, width: float) -> float:
    """Bytes of one rank's keys and values: e·b·(s/c)·(k/t)·(d_qk + d_v)."""
    return width * core.batch * core.keys * core.key_value_heads * (core.qk_dim + core.v_dim)


def context_transfers(job: Job, core: Attention, c: int) -> tuple[Transfers, Transfers]:
    """What one attention core moves over c ranks, forward and backward; the steps of a ring are exchanges in which each
    rank sends to its neighbour alone.

    Rule: ring: c - 1 steps with a block of keys and values; in the backward again, and the gradients go with them in
    the same width, or apart from them in fp32 and in c steps, the last of them home. all_gather: 2·s·b·k·d bytes
    gathered, in the backward again, and as many reduce-scattered. ulysses: queries, keys, values and output, four
    all-to-alls each way.
    Reference: arXiv 2310.01889 (ring; torch 2.13, _templated_ring_attention_backward), arXiv 2407.21783, section 3.3.2
    (all-gather), arXiv 2309.14509 (Ulysses).
    """
    if c == 1:
        return (), ()
    width = job.stack.recipes[job.training.precision].compute
    block, method = key_value_bytes(core, width), job.stack.context_parallel
    if method == "ulysses":
        queries = core.batch * core.heads * core.queries
        keys = core.batch * core.key_value_heads * core.keys
        tensors = (queries * core.qk_dim, keys * core.qk_dim, keys * core.v_dim, queries * core.v_dim)
        one_way = tuple(Transfer("all_to_all", "cp", width * elements) for elements in tensors)
        return one_way, one_way
    if method == "all_gather":
        gather = Transfer("all_gather", "cp", c * block)
        return (gather,), (gather, Transfer("reduce_scatter", "cp", c * block))
    there = Transfer("all_to_all", "cp", block, c - 1)
    if not job.stack.ring_gradients_apart:
        return (there,), (there._replace(size=2 * block),)
    return (there,), (there, Transfer("all_to_all", "cp", key_value_bytes(core, 4.0), c))


def context_seconds(job: Job, core: Attention, cp: GroupShape, forward: float, backward: float) -> tuple[float, float]:
    """Exposed seconds of one attention core's communication, forward and backward.

    Args:
        forward, backward: seconds of the core itself, behind which a ring hides: a step behind 1/c of the core.

    Ignored: that the steps of a ring are uneven under a sliding window.
    """
    there, back = (moved_seconds(job, transfers, cp) for transfers in context_transfers(job, core, cp.ranks))
    if job.stack.context_parallel != "ring" or not job.stack.overlap_cp:
        return there, back
    gpu, steps = job.cluster.gpu, cp.ranks - 1
    hidden_by = (forward * steps / cp.ranks, backward * steps / cp.ranks)
    return gpu.exposed(there, hidden_by[0]), gpu.exposed(back, hidden_by[1])


def moved_seconds(job: Job, transfers: Iterable[Transfer], cp: GroupShape) -> float:
    """Seconds of an attention core's transfers alone on their links; a step of a ring is a message to the neighbour."""
    if job.stack.context_parallel != "ring":
        return transfer_seconds(transfers, {"cp": cp}, job.cluster)
    return sum(t.times * sum(message_seconds(t.size, _neighbours(cp), job.cluster)) for t in transfers)


def _neighbours(cp: GroupShape) -> GroupShape:
    """Two ranks that follow each other in the ring; between domains they have one rank's share of the cards."""
    share = cp.ranks_per_domain if cp.domains > 1 else 1
    return dataclasses.replace(cp, ranks=2, ranks_per_domain=1, bandwidth=cp.bandwidth / share)
