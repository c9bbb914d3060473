"""One optimizer step: forward and backward of every microbatch, gradients that agree, clip, update. The same code for
every layout, on CPU and on GPUs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.profiler import record_function

from runtime.data import Batch
from runtime.experts import scale_expert_gradients
from runtime.optimizer import build_optimizer, clip_gradients, squared_norm, sum_partial_gradients
from runtime.parallelize import build_expert_mesh, build_mesh, gradient_sync, parallelize
from runtime.pipeline import build_schedule, build_stage
from runtime.shards import local_tensor
from simulator.job import Job, Training
from simulator.layout import Layout


@dataclass
class Run:
    """What one rank holds during a training run. `step` does one optimizer step."""

    layout: Layout
    training: Training
    mesh: DeviceMesh
    device: torch.device
    stages: list[nn.Module]
    schedule: Any
    optimizer: torch.optim.Optimizer
    # The same ranks as routed experts see them, where expert parallelism spreads them.
    experts: DeviceMesh | None = None

    @property
    def microbatches(self) -> int:
        return self.layout.microbatches(self.training.global_batch_size)

    def step(self, batch: Batch) -> tuple[float, float]:
        """One step on this rank's share of the global batch. Returns the loss of the global batch and the norm of its
        gradient before clipping, the same on every rank."""
        # The cross entropy of a head cut by vocabulary has its own kernels, forward and backward.
        with loss_parallel() if self.layout.tp > 1 else contextlib.nullcontext():
            forward_backward = self._run_microbatches if self.schedule is None else self._run_schedule
            loss = forward_backward(batch)
        with record_function("OPTIMIZER"):
            sum_partial_gradients(self._parameters(), self.mesh)
            if self.layout.ep > 1:
                scale_expert_gradients(self.stages, self.layout.tp, self.layout.ep)
            loss, norm = self._reduce(loss)
            clip_gradients(self._parameters(), norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.item(), norm.item()

    def _parameters(self) -> Iterator[nn.Parameter]:
        return (p for stage in self.stages for p in stage.parameters())

    def _microbatch_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of a microbatch over the number of microbatches, so that a step's losses add up."""
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) / self.microbatches

    def _run_microbatches(self, batch: Batch) -> Tensor:
        (stage,) = self.stages
        total = torch.zeros((), device=self.device)
        size = self.layout.micro_batch_size
        for number, part in enumerate(batch.split(size), start=1):
            with gradient_sync(stage, self.layout, last=number == self.microbatches):
                # Named as torch's schedules name theirs, microbatches from 0.
                with record_function(f"PP:0F{number - 1}"):
                    loss = self._microbatch_loss(stage(*part.inputs), part.targets)
                with record_function(f"PP:0B{number - 1}"):
                    loss.backward()
            total += local_tensor(loss.detach())
        return total

    def _run_schedule(self, batch: Batch) -> Tensor:
        """The same through the pipeline; ranks without the last stage know no loss and return 0."""
        numbers = self.layout.stages_of(self.mesh["pp"].get_local_rank())
        first, last = 0 in numbers, self.layout.stages - 1 in numbers
        losses: list[Tensor] = []
        self.schedule.step(
            *(batch.inputs if first else ()),
            target=batch.targets if last else None,
            losses=losses if last else None,
            return_outputs=False,
        )
        return sum((local_tensor(loss.detach()) for loss in losses), start=torch.zeros((), device=self.device))

    def _reduce(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm over all ranks, in one all-reduce of two numbers."""
        per_stage = self.layout.dp * self.layout.cp * self.layout.tp
        both = torch.stack((loss.double() / per_stage, squared_norm(self._parameters(), per_stage)))
        dist.all_reduce(both)
        return both[0], both[1].sqrt()


def build_run(job: Job, layout: Layout, device: torch.device) -> Run:
    """The rank's stages, cut and initialised, their schedule and optimizer."""
    training = job.training
    mesh = build_mesh(layout, device.type)
    experts = build_expert_mesh(job, layout, device.type)
    numbers = layout.stages_of(mesh["pp"].get_local_rank())
    stages = [
        parallelize(build_stage(job.model, layout, training.seq_len, number), layout, job, mesh, experts, device)
        for number in numbers
    ]
    optimizer = build_optimizer([p for stage in stages for p in stage.parameters()], training)
    run = Run(layout, training, mesh, device, stages, None, optimizer, experts)
    if layout.pp > 1:
        run.schedule = build_schedule(stages, job.model, layout, training, mesh, device, run._microbatch_loss)
    return run
