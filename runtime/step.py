"""One optimizer step: forward and backward of every microbatch, gradients that agree, clip, update. The same code for
every layout, on CPU and on GPUs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import record_function

from runtime.data import Batch
from runtime.experts import scale_expert_gradients
from runtime.loss import mean_cross_entropy
from runtime.optimizer import build_optimizer, clip_gradients, squared_norm, sum_partial_gradients
from runtime.parallelize import build_expert_mesh, build_mesh, gradient_sync, parallelize
from runtime.pipeline import build_schedule, build_stage
from runtime.shards import local_tensor
from simulator.job import Job, Training
from simulator.layout import Layout


@dataclass
class Run:
    """What one rank holds during a training run. `step` does one optimizer step.

    Where replicas keep together in another way than by all-reduce (sync.py), layout, training and mesh are those of one
    replica, `group` are its ranks, and `update` is what follows the gradients of a step; it takes this run and the
    rank's share of the replica's loss, and returns loss and gradient norm.
    slowdown: an artificial straggler computes so many times as long.
    """

    layout: Layout
    training: Training
    mesh: DeviceMesh
    device: torch.device
    stages: list[nn.Module]
    schedule: Any
    optimizer: torch.optim.Optimizer
    # The same ranks as routed experts see them, where expert parallelism spreads them.
    experts: DeviceMesh | None = None
    group: dist.ProcessGroup | None = None
    update: Callable[[Run, Tensor], tuple[Tensor, Tensor]] = field(default=lambda run, loss: run.apply(loss))
    slowdown: float = 1.0
    updates: int = 0

    @property
    def microbatches(self) -> int:
        return self.layout.microbatches(self.training.global_batch_size)

    def step(self, batch: Batch) -> tuple[float, float]:
        """One step on this rank's share of the global batch. Returns the loss of the global batch and the norm of its
        gradient before clipping, the same on every rank."""
        loss = self.forward_backward(batch)
        with record_function("OPTIMIZER"):
            self.complete_gradients()
            loss, norm = self.update(self, loss)
        return loss.item(), norm.item()

    def forward_backward(self, batch: Batch) -> Tensor:
        """Returns this rank's share of the loss."""
        begin = self._clock()
        loss = self._run_microbatches(batch) if self.schedule is None else self._run_schedule(batch)
        if self.slowdown > 1:
            time.sleep((self.slowdown - 1) * (self._clock() - begin))
        return loss

    def complete_gradients(self) -> None:
        """What neither autograd nor data parallelism has summed inside a replica."""
        sum_partial_gradients(self.parameters(), self.mesh)
        if self.layout.ep > 1:
            scale_expert_gradients(self.stages, self.layout.tp, self.layout.ep)

    def apply(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Clip and update. Returns the loss, and the norm before clipping, of the ranks of `group`."""
        loss, norm = self.reduce(loss)
        clip_gradients(self.parameters(), norm, self.training.max_grad_norm)
        self.optimizer.step()
        self.updates += 1
        self.optimizer.zero_grad(set_to_none=not self._accumulates_in_buckets())
        return loss, norm

    def _accumulates_in_buckets(self) -> bool:
        """Whether gradients stay where DDP reduces them, and microbatches add up there. A gradient that is dropped is
        made anew beside its bucket by the microbatches before the last one, so that all gradients would be there
        twice. Not before the second step, at whose begin DDP orders its buckets anew."""
        replicated = any(isinstance(stage, DistributedDataParallel) for stage in self.stages)
        return replicated and self.microbatches > 1 and self.updates > 1

    def _clock(self) -> float:
        """Seconds that this rank has computed: of its thread on a processor, where waiting for others does not count;
        on a GPU those that passed."""
        if self.device.type != "cuda":
            return time.thread_time()
        if self.slowdown > 1:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def parameters(self) -> Iterator[nn.Parameter]:
        return (p for stage in self.stages for p in stage.parameters())

    def _microbatch_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy of a microbatch over the number of microbatches, so that a step's losses add up."""
        return mean_cross_entropy(logits, targets) / self.microbatches

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

    def reduce(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm over the ranks of `group`, in one all-reduce of two numbers."""
        per_stage = self.layout.dp * self.layout.cp * self.layout.tp
        both = torch.stack((loss.double() / per_stage, squared_norm(self.parameters(), per_stage)))
        dist.all_reduce(both, group=self.group)
        return both[0], both[1].sqrt()


def build_run(job: Job, layout: Layout, device: torch.device) -> Run:
    """The rank's stages, cut and initialised, their schedule and optimizer, for replicas that all-reduce."""
    return build_on(job, layout, build_mesh(layout, device.type), build_expert_mesh(job, layout, device.type), device)


def build_on(job: Job, layout: Layout, mesh: DeviceMesh, experts: DeviceMesh | None, device: torch.device) -> Run:
    """The same on a mesh that is there already."""
    training = job.training
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
