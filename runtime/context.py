"""Context parallelism: each rank keeps a part of every sequence, and keys and values go round to the queries.

The attention is torch's own ring (`torch.distributed.tensor.experimental`, arXiv 2310.01889), called with the flash
kernel of the device: torch's `context_parallel()` has no rule for the processor's kernel. A causal mask is balanced: of
2c chunks of a sequence rank r holds the r-th from the front and the r-th from the back.

    cp = 2, sequence 0 1 2 3 4 5 6 7      rank 0 holds 0 1 6 7, rank 1 holds 2 3 4 5
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.experimental._context_parallel import _attention as torch_ring

if TYPE_CHECKING:
    from runtime.model import Stage

# The dim of positions in (batch, heads, positions, head_dim).
_SEQUENCE = 2


def own_positions(seq_len: int, ranks: int, place: int) -> Tensor:
    """The positions of a sequence that the rank at this place of the cp axis holds, int64 of seq_len / ranks.

    >>> own_positions(8, 2, 0).tolist(), own_positions(8, 2, 1).tolist()
    ([0, 1, 6, 7], [2, 3, 4, 5])
    """
    if ranks == 1:
        return torch.arange(seq_len)
    chunks = torch.arange(seq_len).view(2 * ranks, -1)
    return torch.cat((chunks[place], chunks[2 * ranks - 1 - place]))


def apply_context_parallel(stage: Stage, mesh: DeviceMesh) -> None:
    """Let a stage work on this rank's positions, with the ring in place of each attention core."""
    stage.context_ranks, stage.context_place = mesh.size(), mesh.get_local_rank()
    for block in stage.layers.values():
        block.attention.ring = RingAttention(mesh)


class RingAttention:
    """Causal attention of this rank's queries, q (B, a, T, d), to all keys and values, k and v (B, k, T, d), T a rank's
    share of the sequence. Groups of queries share a key as they do in `scaled_dot_product_attention`."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        # Both hold for the process. Blocks go to the next rank one by one, where the default gathers all of them ahead.
        torch_ring._cp_options.enable_load_balance = True
        torch_ring.set_rotate_method("alltoall")

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        result: Tensor = _Ring.apply(q, k, v, self.mesh)
        return result


class _Ring(torch.autograd.Function):
    """Torch's template has a forward and a backward, and leaves it to DTensor's dispatch to join them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh) -> Tensor:
        if q.is_cuda:
            out, lse, *rest = torch_ring._scaled_dot_product_ring_flash_attention(mesh, q, k, v, is_causal=True)
            # Sequence ends, longest lengths and the state of dropout, which the kernel's backward takes.
            ctx.rest = rest[:6]
        else:
            out, lse, *_ = torch_ring._templated_ring_attention(
                mesh.get_group(), _SEQUENCE, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu,
                query=q, key=k, value=v, is_causal=True, dropout_p=0.0,
            )  # fmt: skip
        ctx.mesh = mesh
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        gradient = gradient.contiguous()
        if q.is_cuda:
            ends_q, ends_k, longest_q, longest_k, seed, offset = ctx.rest
            found = torch_ring._scaled_dot_product_ring_flash_attention_backward(
                ctx.mesh, gradient, q, k, v, out, lse, ends_q, ends_k, longest_q, longest_k, 0.0, True, seed, offset
            )
        else:
            found = torch_ring._templated_ring_attention_backward(
                ctx.mesh.get_group(), _SEQUENCE,
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
                grad_out=gradient, grad_out_name="grad_out", query=q, key=k, value=v, out=out, logsumexp=lse,
                is_causal=True, dropout_p=0.0,
            )  # fmt: skip
        return found[0], found[1], found[2], None
