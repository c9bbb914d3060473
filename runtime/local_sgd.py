"""Replicas that take steps of their own and meet now and then: local SGD, and DiLoCo.

Every replica clips and updates for itself; after each `sync_interval` steps parameters are averaged over the replicas
(Stich, arXiv 1805.09767; Lin et al., arXiv 1808.07217). State of the inner optimizers stays where it is. Where no
parameter is cut, this is torch's PostLocalSGDOptimizer with its PeriodicModelAverager; these take no DTensors (they put
whole parameters of one kind into one vector), so that a replica with tensor parallelism or FSDP averages its local
parts here.

With the outer optimizer "nesterov" the mean change of the replicas is a gradient for SGD with Nesterov momentum
(DiLoCo, arXiv 2311.08105, section 2); torch has nothing for it. Every replica takes the same outer step from the same
numbers.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.optimizer import clip_gradients
from runtime.replicas import FlatState, holds_dtensors
from runtime.step import Run
from simulator.layout import Layout

# arXiv 2311.08105, table 5: Nesterov momentum with these was the best outer optimizer.
OUTER_LEARNING_RATE, OUTER_MOMENTUM = 0.7, 0.9


class LocalSgd:
    """`update` of a run whose replicas average every layout.sync_interval steps.

    Args:
        peers: the ranks with the same place in the other replicas.
    """

    def __init__(self, run: Run, layout: Layout, peers: dist.ProcessGroup) -> None:
        self.run, self.interval, self.peers = run, layout.sync_interval, peers
        self.replicas, self.done = layout.dp_replicate, 0
        # Whether a checkpoint has been loaded into `state`.
        self.resumed = False
        self.flat = FlatState(run, run.device)
        self.outer: nn.Parameter | None = None
        self.torchs: Any = None
        if layout.outer_optimizer == "nesterov":
            self.outer = nn.Parameter(self.flat.read_parameters().clone())
            self.outer_optimizer = torch.optim.SGD(
                [self.outer], lr=OUTER_LEARNING_RATE, momentum=OUTER_MOMENTUM, nesterov=True
            )
            self.outer.grad = torch.zeros_like(self.outer)
            # Make the momentum, which is zero: zero times anything.
            self.outer_optimizer.step()
        elif not holds_dtensors(run):
            with warnings.catch_warnings():
                # That an interval of 1 is better done by DDP, and that it compiles what we do not use.
                warnings.simplefilter("ignore")
                # Here, because it takes half a second.
                from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
                from torch.distributed.optim import PostLocalSGDOptimizer

                averager = PeriodicModelAverager(self.interval, warmup_steps=self.interval - 1, process_group=peers)
            self.torchs = PostLocalSGDOptimizer(run.optimizer, averager)

    def begin(self, step: int) -> None:
        """Start with parameters as they are now, after `step` steps, and with the state of a checkpoint if it had
        one."""
        self.done = step
        if self.torchs is not None:
            self.torchs.averager.step = step
        if self.outer is not None and not self.resumed:
            with torch.no_grad():
                self.outer.copy_(self.flat.read_parameters())

    def __call__(self, run: Run, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Loss is the mean of the replicas' losses, norm the root of the mean of their squared norms."""
        loss, norm = run.reduce(loss)
        clip_gradients(run.parameters(), norm, run.training.max_grad_norm)
        # torch's averager looks for gradients, so that they are freed behind it.
        (self.torchs or run.optimizer).step()
        run.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        if self.torchs is None and self.done % self.interval == 0:
            self.meet()
        both = torch.stack((loss, norm.square()))
        dist.all_reduce(both, group=self.peers)
        return both[0] / self.replicas, (both[1] / self.replicas).sqrt()

    def meet(self) -> None:
        """Average parameters, and take the outer step if there is one."""
        mean = self.flat.read_parameters()
        mean /= self.replicas
        dist.all_reduce(mean, group=self.peers)
        if self.outer is not None:
            assert self.outer.grad is not None
            torch.sub(self.outer.detach(), mean, out=self.outer.grad)
            self.outer_optimizer.step()
            mean.copy_(self.outer.detach())
        self.flat.write_parameters()

    def finish(self) -> None:
        """One model for all: the mean, where the last steps did not end with one."""
        if self.done % self.interval:
            mean = self.flat.read_parameters()
            mean /= self.replicas
            dist.all_reduce(mean, group=self.peers)
            self.flat.write_parameters()

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of this rank besides; the same in all replicas."""
        if self.outer is None:
            return {}
        momentum = self.outer_optimizer.state[self.outer]["momentum_buffer"]
        return {"outer": self.outer.detach(), "outer_momentum": momentum}
