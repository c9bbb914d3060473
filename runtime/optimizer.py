"""Optimizer, gradient norm and clipping over parameters that are cut in any way."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from runtime.shards import local_tensor
from simulator.job import Training

# What GPT-3, Llama and torchtitan train with.
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1


def build_optimizer(parameters: Iterable[nn.Parameter], training: Training) -> torch.optim.Optimizer:
    """AdamW or plain SGD, with one parameter group per device mesh: a kernel over many parameters at once takes
    either plain tensors or DTensors of one mesh."""
    groups = defaultdict(list)
    for parameter in parameters:
        groups[parameter.device_mesh if isinstance(parameter, DTensor) else None].append(parameter)
    grouped = [{"params": members} for members in groups.values()]
    if training.optimizer == "sgd":
        return torch.optim.SGD(grouped, lr=training.learning_rate, foreach=True)
    return torch.optim.AdamW(
        grouped, lr=training.learning_rate, betas=ADAM_BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )


def sum_partial_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Add up over the tensor axis what each of its ranks found for a replicated parameter: the norms under sequence
    parallelism see a share of the positions each. One all-reduce for all of them.

    FSDP does this itself before it reduces, so that only stages without it have partial gradients left here.
    """
    found = [p for p in parameters if isinstance(p.grad, DTensor) and any(x.is_partial() for x in p.grad.placements)]
    if not found:
        return
    locals_ = [p.grad.to_local() for p in found]
    flat = torch.cat([g.flatten() for g in locals_])
    dist.all_reduce(flat, group=mesh["tp"].get_group())
    for parameter, old, new in zip(found, locals_, flat.split([g.numel() for g in locals_]), strict=True):
        assert isinstance(parameter, DTensor)
        parameter.grad = DTensor.from_local(
            new.view_as(old), parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim, run_check=False
        )


def squared_norm(parameters: Iterable[nn.Parameter], ranks_per_stage: int) -> Tensor:
    """This rank's share of the squared gradient norm, so that the sum over all ranks counts every weight once.

    A gradient that is cut over n of the ranks of its stage lies on ranks_per_stage / n of them.
    """
    by_copies = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            by_copies[ranks_per_stage // pieces(parameter.grad)].append(local_tensor(parameter.grad))
    parts = [torch.nn.utils.get_total_norm(grads).double().square() / n for n, grads in by_copies.items()]
    return torch.stack(parts).sum()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, most: float = 1.0) -> None:
    """Scale gradients so that their global norm is at most `most`, without waiting for the device."""
    grads = [local_tensor(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0).float())


def pieces(gradient: Tensor) -> int:
    """Over how many ranks of its mesh a tensor is cut."""
    if not isinstance(gradient, DTensor):
        return 1
    sizes = [gradient.device_mesh.size(i) for i, x in enumerate(gradient.placements) if not x.is_replicate()]
    return math.prod(sizes)
