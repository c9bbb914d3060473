"""Tensor-parallel collectives of a unit, their seconds, and what a stack hides of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.cluster import GroupShape
from simulator.collectives import Transfer, transfer_seconds
from simulator.layout import Layout
from simulator.model import BlockKind, ModelSpec

if TYPE_CHECKING:
    from simulator.job import Job

Transfers = tuple[Transfer, ...]
# Families with norms behind the residual sums and not in front of each part.
NORMS_BEHIND = ("bert", "bart")
# Column-parallel inputs and row-parallel outputs of the head.
HEAD_CUTS = (1, 0)


def block_cuts(model: ModelSpec, kind: BlockKind, spread: bool, every_projection: bool) -> tuple[int, int]:
    """Column-parallel inputs and row-parallel outputs of a block that have a collective each: one of each for attention
    and for feed-forward, and an input more for what cross attention looks at. Experts that are spread over ep take
    their tokens from where they are; shared ones are a feed-forward. With every_projection q, k, v, up, and gate where
    there is one, are an input each."""
    modules = model.block_norms(kind) - (spread and not model.num_shared_experts)
    if every_projection:
        return 3 * (2 if kind == "cross" else 1) + (2 if model.gated_mlp else 1), modules
    return modules + (kind == "cross"), modules


def embedding_cuts(model: ModelSpec) -> tuple[int, int]:
    """A vocabulary-parallel lookup is a row-parallel output; an encoder and a decoder have one each."""
    return 0, 2 if model.encoder_decoder else 1


def tensor_transfers(layout: Layout, size: float, columns: int, rows: int) -> tuple[Transfers, Transfers]:
    """Collectives of a unit with `columns` column-parallel inputs and `rows` row-parallel outputs, forward and
    backward; `size` is the bytes of the activations of one microbatch.

    Megatron (arXiv 1909.08053): an all-reduce behind every row-parallel output, and in the backward behind every
    column-parallel input. With sequence parallelism (arXiv 2205.05198) each becomes an all-gather before the
    column-parallel input and a reduce-scatter behind the row-parallel output.
    """
    if layout.tp == 1:
        return (), ()
    if not layout.sequence_parallel:
        return (Transfer("all_reduce", "tp", size, rows),), (Transfer("all_reduce", "tp", size, columns),)
    gather, scatter = Transfer("all_gather", "tp", size), Transfer("reduce_scatter", "tp", size)
    forward = gather._replace(times=columns), scatter._replace(times=rows)
    return forward, (scatter._replace(times=columns), gather._replace(times=rows))


def repeated_transfers(job: Job, layout: Layout, size: float, columns: int, rows: int) -> Transfers:
    """The collectives that a backward repeats where a block with these cuts is recomputed.

    Full recomputation that stops early ends ahead of the last reduction, unless a norm stands behind it; selective
    recomputation that keeps outputs keeps those of reductions.
    """
    if layout.recompute == "full":
        last = job.stack.recompute_stops_early and job.model.family not in NORMS_BEHIND
        return tensor_transfers(layout, size, columns, rows - last)[0]
    if layout.recompute == "selective" and job.stack.selective_keeps_outputs and layout.sequence_parallel:
        return tensor_transfers(layout, size, columns, 0)[0]
    return ()


def loss_transfers(layout: Layout, tokens: float) -> Transfers:
    """Of the cross entropy over a vocabulary that is cut: maximum, sum and target logit of every token, in fp32."""
    return (Transfer("all_reduce", "tp", 4.0 * tokens, 3),) if layout.tp > 1 else ()


def tensor_seconds(job: Job, group: GroupShape, transfers: Transfers) -> float:
    return transfer_seconds(transfers, {"tp": group}, job.cluster)


def hidden_seconds(job: Job, collectives: float, work: float) -> float:
    """Seconds of the collectives of a unit that run beside its kernels, where the stack cuts them into pieces.

    Rule: of the pieces into which each collective is cut one waits for the matmul, or the matmul for it; the rest is
    hidden as far as the kernels reach. Reference: Transformer Engine's userbuffers, and asynchronous tensor parallelism
    in torch. Ignored: that smaller pieces have lower bandwidth.
    """
    pieces = job.stack.overlap_tp
    return min(collectives * (1 - 1 / pieces), work) if pieces else 0.0


def exposed_seconds(job: Job, collectives: float, work: float) -> float:
    """What collectives beside this work add to it: what is not hidden, and what hiding the rest costs."""
    hidden = hidden_seconds(job, collectives, work)
    return collectives - hidden + job.cluster.gpu.hiding_cost(hidden)
