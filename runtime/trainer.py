"""The step loop: forward, backward, clip, step; the same code for every layout, on CPU and on GPUs."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import loss_parallel

from planner.plan import Plan
from runtime.data import load_batch, read_tokens, sample_offsets, share_of
from runtime.launchers import check_plan
from runtime.parallelize import build_mesh, gradient_sync, parallelize
from runtime.pipeline import build_schedule, build_stage
from runtime.record import Recorder
from simulator.errors import UserError
from simulator.job import Job, Training
from simulator.layout import Layout
from simulator.results import Measurement

MAX_GRAD_NORM = 1.0
# What GPT-3, Llama and torchtitan train with.
ADAM_BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1

Progress = Callable[[int, int, float, float, float], None]


def find_device() -> torch.device:
    """This rank's GPU, or the processor where torch sees no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def train(plan: Plan, steps: int, warmup: int, progress: Progress | None = None) -> Measurement:
    """Train the plan's model with the plan's layout, and measure it.

    The process group must be initialised, with as many ranks as the layout has. Every rank returns the same
    measurement.

    Args:
        steps: optimizer steps in all; the first `warmup` of them are left out of the step times.
        progress: called after every step with (steps done, steps, loss, gradient norm, seconds).

    Raises:
        UserError: the layout cannot run, or there is nothing to train on.
    """
    check_plan(plan, dist.get_world_size(), steps, warmup)
    training = plan.job.training
    tokens = read_tokens(training.data)
    device = find_device()
    recorder = Recorder(device)
    run = build_run(plan.job, plan.layout, device)
    share = share_of(plan.layout, dist.get_rank(), training.global_batch_size)
    for step in range(steps):
        begin = time.perf_counter()
        offsets = sample_offsets(len(tokens), training.seed, step, training.global_batch_size, training.seq_len)
        loss, norm = run.step(*load_batch(tokens, offsets[share], training.seq_len, device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(
                f"training diverged at step {step + 1} (loss {loss:g}, gradient norm {norm:g}); "
                f"lower training.learning_rate = {training.learning_rate:g}"
            )
        recorder.add(seconds, loss, norm)
        if progress is not None:
            progress(step + 1, steps, loss, norm, seconds)
    return recorder.measurement(plan, warmup)


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

    @property
    def microbatches(self) -> int:
        return self.layout.microbatches(self.training.global_batch_size)

    def step(self, inputs: Tensor, targets: Tensor) -> tuple[float, float]:
        """One step on this rank's samples, (samples, T) each. Returns the loss of the global batch and the norm of
        its gradient before clipping, the same on every rank."""
        # The cross entropy of a head cut by vocabulary has its own kernels, forward and backward.
        with loss_parallel() if self.layout.tp > 1 else contextlib.nullcontext():
            forward_backward = self._run_microbatches if self.schedule is None else self._run_schedule
            loss = forward_backward(inputs, targets)
        sum_partial_gradients(self._parameters(), self.mesh)
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

    def _run_microbatches(self, inputs: Tensor, targets: Tensor) -> Tensor:
        (stage,) = self.stages
        total = torch.zeros((), device=self.device)
        size = self.layout.micro_batch_size
        for number, (x, y) in enumerate(zip(inputs.split(size), targets.split(size), strict=True), start=1):
            with gradient_sync(stage, self.layout, last=number == self.microbatches):
                loss = self._microbatch_loss(stage(x), y)
                loss.backward()
            total += _plain(loss.detach())
        return total

    def _run_schedule(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """The same through the pipeline; ranks without the last stage know no loss and return 0."""
        numbers = self.layout.stages_of(self.mesh["pp"].get_local_rank())
        first, last = 0 in numbers, self.layout.stages - 1 in numbers
        losses: list[Tensor] = []
        self.schedule.step(
            *([inputs] if first else []),
            target=targets if last else None,
            losses=losses if last else None,
            return_outputs=False,
        )
        return sum((_plain(loss.detach()) for loss in losses), start=torch.zeros((), device=self.device))

    def _reduce(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient norm over all ranks, in one all-reduce of two numbers."""
        per_stage = self.layout.dp * self.layout.tp
        both = torch.stack((loss.double() / per_stage, squared_norm(self._parameters(), per_stage)))
        dist.all_reduce(both)
        return both[0], both[1].sqrt()


def build_run(job: Job, layout: Layout, device: torch.device) -> Run:
    """The rank's stages, cut and initialised, their schedule and optimizer."""
    training = job.training
    mesh = build_mesh(layout, device.type)
    numbers = layout.stages_of(mesh["pp"].get_local_rank())
    stages = [
        parallelize(build_stage(job.model, layout, training.seq_len, number), layout, training, mesh, device)
        for number in numbers
    ]
    optimizer = build_optimizer([p for stage in stages for p in stage.parameters()], training)
    run = Run(layout, training, mesh, device, stages, None, optimizer)
    if layout.pp > 1:
        run.schedule = build_schedule(stages, job.model, layout, training, mesh, device, run._microbatch_loss)
    return run


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
            by_copies[ranks_per_stage // _pieces(parameter.grad)].append(_plain(parameter.grad))
    parts = [torch.nn.utils.get_total_norm(grads).double().square() / n for n, grads in by_copies.items()]
    return torch.stack(parts).sum()


def clip_gradients(parameters: Iterable[nn.Parameter], norm: Tensor, most: float = MAX_GRAD_NORM) -> None:
    """Scale gradients so that their global norm is at most `most`, without waiting for the device."""
    grads = [_plain(p.grad) for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, (most / (norm + 1e-6)).clamp(max=1.0).float())


def _pieces(gradient: Tensor) -> int:
    if not isinstance(gradient, DTensor):
        return 1
    sizes = [gradient.device_mesh.size(i) for i, x in enumerate(gradient.placements) if not x.is_replicate()]
    return math.prod(sizes)


def _plain(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
