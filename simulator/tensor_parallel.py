"""Seconds of tensor-parallel collectives of a unit, and what a stack hides of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.cluster import GroupShape
from simulator.collectives import collective_seconds
from simulator.layout import Layout

if TYPE_CHECKING:
    from simulator.job import Job


def tensor_seconds(
    job: Job, layout: Layout, group: GroupShape, size: float, columns: int, rows: int
) -> tuple[float, float]:
    """Seconds of the collectives of a unit with `columns` column-parallel inputs and `rows` row-parallel outputs,
    forward and backward; `size` is the bytes of the activations of one microbatch.

    Megatron (arXiv 1909.08053): an all-reduce behind every row-parallel output, and in the backward behind every
    column-parallel input. With sequence parallelism (arXiv 2205.05198) each becomes an all-gather before the
    column-parallel input and a reduce-scatter behind the row-parallel output.
    """
    if layout.tp == 1:
        return 0.0, 0.0
    if not layout.sequence_parallel:
        one = collective_seconds("all_reduce", size, group, job.cluster)
        return rows * one, columns * one
    gather = collective_seconds("all_gather", size, group, job.cluster)
    scatter = collective_seconds("reduce_scatter", size, group, job.cluster)
    return columns * gather + rows * scatter, columns * scatter + rows * gather


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
