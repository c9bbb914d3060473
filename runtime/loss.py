"""Mean cross entropy that keeps nothing but the logits, and turns them into their own gradient where they lie.

`F.cross_entropy` of 16-bit logits holds three tensors of their shape in fp32 at once (12 bytes per logit, 4 of them
from the forward on), and torch's `loss_parallel` for a vocabulary that is cut holds four. With vocabularies of 100,000
that is the peak of the last stage. Here logits are read a few rows at a time, in fp32, forward and backward: what is
kept is the logits as the head made them and two numbers of each token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from runtime.data import NO_TARGET

# Elements in fp32 at a time: 64 MiB. simulator/data/stacks has the same number.
PIECE = 2**24


def mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not NO_TARGET of -log softmax(logits)[target], a scalar in fp32.

    Its backward overwrites the logits with their gradient, so that it runs once and nobody may read them after it.

    Args:
        logits: (..., V); a DTensor is cut by its last dim, over the ranks of a one-dimensional mesh.
        targets: int64 of the shape without the last dim.
    """
    group = None
    if isinstance(logits, DTensor):
        group, logits = logits.device_mesh.get_group(), logits.to_local()
    loss: Tensor = _CrossEntropy.apply(logits.flatten(0, -2), targets.flatten(), group)
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        width = logits.shape[1]
        counted = targets != NO_TARGET
        own = targets - (0 if group is None else dist.get_rank(group) * width)
        here = counted & (own >= 0) & (own < width)
        own = own.masked_fill(~here, 0).unsqueeze(1)
        highest = logits.amax(1).float()
        if group is not None:
            dist.all_reduce(highest, dist.ReduceOp.MAX, group)
        total = torch.empty_like(highest)
        for rows in _pieces(logits):
            shifted = torch.sub(logits[rows], highest[rows, None])
            torch.sum(shifted.exp_(), 1, out=total[rows])
            # Before the next piece is made.
            del shifted
        chosen = logits.gather(1, own).squeeze(1).float().masked_fill(~here, 0.0)
        if group is not None:
            dist.all_reduce(total, group=group)
            dist.all_reduce(chosen, group=group)
        logarithm = highest + total.log()
        count = counted.sum()
        ctx.save_for_backward(logits, logarithm, own, here, counted, count)
        return (logarithm - chosen).masked_fill(~counted, 0.0).sum() / count

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        logits, logarithm, own, here, counted, count = ctx.saved_tensors
        scale = (gradient / count * counted).unsqueeze(1)
        for rows in _pieces(logits):
            found = torch.sub(logits[rows], logarithm[rows, None]).exp_()
            found.scatter_add_(1, own[rows], -here[rows, None].to(found.dtype))
            logits[rows] = found.mul_(scale[rows])
            del found
        return logits, None, None


def _pieces(logits: Tensor) -> list[slice]:
    """Rows to work on at a time."""
    rows = max(1, PIECE // logits.shape[1])
    return [slice(first, first + rows) for first in range(0, logits.shape[0], rows)]
