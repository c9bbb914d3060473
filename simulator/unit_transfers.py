"""What a unit, a block, the embedding or the head, sends for one microbatch: the collectives inside of the model.

What shards and replicas gather and reduce is data_parallel.py's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from simulator.cluster import GroupShape
from simulator.collectives import Transfer
from simulator.context_parallel import context_transfers
from simulator.expert_parallel import expert_grid, expert_transfers
from simulator.kernels import Attention, Cut, Kernel, block_kernels
from simulator.layout import Layout
from simulator.tensor_parallel import (
    HEAD_CUTS,
    block_cuts,
    embedding_cuts,
    loss_transfers,
    repeated_transfers,
    tensor_transfers,
)

if TYPE_CHECKING:
    from simulator.job import Job

Transfers = tuple[Transfer, ...]


class UnitTransfers(NamedTuple):
    """Of the axes tp, ep and cp: the collectives of a forward, of a backward, and those that recomputation repeats."""

    forward: dict[str, Transfers]
    backward: dict[str, Transfers]
    again: dict[str, Transfers]


def cut_of(job: Job, layout: Layout) -> Cut:
    """What a rank computes of a microbatch."""
    return Cut(
        layout.micro_batch_size, job.training.seq_len, layout.tp, layout.sequence_parallel, layout.cp, layout.ep,
        expert_grid(layout, job.stack).tp,
    )  # fmt: skip


def stream_bytes(job: Job, cut: Cut) -> float:
    """Of the activations of a microbatch between two blocks, whole over tp."""
    return cut.tokens * job.model.hidden_size * job.stack.recipes[job.training.precision].compute


def kernels_of_block(job: Job, cut: Cut, index: int) -> list[Kernel]:
    """The kernels of one of the model's blocks on a rank."""
    model = job.model
    kind, causal, window = model.block_kind(index), model.block_is_causal(index), model.block_window(index)
    return block_kernels(model, kind, causal, cut, job.stack, window)


def of_block(
    job: Job, layout: Layout, cut: Cut, index: int, kernels: Iterable[Kernel], ep: GroupShape
) -> UnitTransfers:
    """Of one of the model's blocks with its kernels; `ep` is how the group of its experts lies.

    Recomputation that keeps outputs of kernels repeats dispatches and the ring, whose messages are no kernel's output.
    """
    kind = job.model.block_kind(index)
    spread = kind in ("moe", "experts") and layout.ep > 1
    cuts, size = block_cuts(job.model, kind, spread, job.stack.reduces_every_projection), stream_bytes(job, cut)
    there, back = tensor_transfers(layout, size, *cuts)
    forward, backward, again = {"tp": there}, {"tp": back}, {"tp": repeated_transfers(job, layout, size, *cuts)}
    selective = layout.recompute == "selective"
    if spread:
        forward["ep"], backward["ep"] = expert_transfers(job, cut, ep)
        if layout.recompute == "full" or (selective and job.stack.selective_keeps_outputs):
            again["ep"] = forward["ep"]
    if layout.cp > 1:
        pairs = [context_transfers(job, core, layout.cp) for core in kernels if isinstance(core, Attention)]
        forward["cp"] = tuple(transfer for there, _ in pairs for transfer in there)
        backward["cp"] = tuple(transfer for _, back in pairs for transfer in back)
        if layout.recompute == "full" or (selective and repeats_context(job)):
            again["cp"] = forward["cp"]
    return UnitTransfers(forward, backward, again)


def repeats_context(job: Job) -> bool:
    """Whether selective recomputation repeats what attention cores exchange over cp."""
    return job.stack.selective_keeps_outputs or job.stack.selective_recompute.get("attention", 0.0) > 0


def of_embedding(job: Job, layout: Layout, cut: Cut) -> UnitTransfers:
    """Of the embedding, which is not run again."""
    there, back = tensor_transfers(layout, stream_bytes(job, cut), *embedding_cuts(job.model))
    return UnitTransfers({"tp": there}, {"tp": back}, {})


def of_head(job: Job, layout: Layout, cut: Cut) -> UnitTransfers:
    """Of the head and its loss."""
    there, back = tensor_transfers(layout, stream_bytes(job, cut), *HEAD_CUTS)
    return UnitTransfers({"tp": (*there, *loss_transfers(layout, cut.tokens))}, {"tp": back}, {})
