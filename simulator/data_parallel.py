"""Seconds of data-parallel communication: gathering sharded parameters, reducing gradients, and what kernels hide.

    zero_stage 0   gradients are all-reduced in buckets, once a step
    zero_stage 1   gradients are reduce-scattered and parameters all-gathered, once a step
    zero_stage 2   parameters are gathered once a step; gradients are scattered after every microbatch
    zero_stage 3   parameters are gathered before each use; gradients are scattered after every microbatch

Under a pipeline torch reduces gradients once, at the end of the step. With dp_replicate the shards are all-reduced over
the replicas, once a step. The ranks of cp hold the same parameters, so they shard and reduce with dp_shard, and with
dp_replicate where nothing is sharded. Routed experts under expert parallelism have groups of their own
(expert_parallel.py); the two go one after the other over the same links. A unit is what FSDP wraps: a block, the
embedding, the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from simulator.cluster import GroupShape
from simulator.collectives import Transfer, on_one_host, transfer_seconds
from simulator.expert_parallel import expert_grid
from simulator.layout import Layout
from simulator.schedules import SPLIT_BACKWARD

if TYPE_CHECKING:
    from simulator.job import Job


_GROUPS = ("shard", "replicate", "expert_shard", "expert_replicate")


def uses_fsdp(job: Job, layout: Layout) -> bool:
    """Whether units are gathered and reduced as FSDP does, one by one. A stack that replicates by FSDP does so unless
    replicas of a whole model compute in fp32, which DDP serves, or are no replicas at all (runtime/parallelize.py)."""
    if layout.zero_stage >= 2 or not job.stack.replicates_by_fsdp:
        return layout.zero_stage >= 2
    without_ddp = layout.tp > 1 or layout.schedule in SPLIT_BACKWARD
    replicated = without_ddp and layout.dp_replicate * layout.cp > 1
    return job.training.precision != "fp32" or layout.zero_stage > 0 or layout.ep > 1 or replicated


def reduces_beside(job: Job, layout: Layout) -> bool:
    """Whether gradients are reduced bucket by bucket, once a step, beside the backward that makes them. Ranks that send
    with the processors they compute with gain nothing from that unless a wire between hosts carries the bytes, and
    then from DDP only: torch's FSDP waits on a CPU until a reduction is done."""
    if job.stack.overlap_grad_reduce:
        return layout.zero_stage < 2
    return job.cluster.wired and layout.zero_stage == 0 and not uses_fsdp(job, layout)


def gather_transfer(job: Job, parameters: float, group: str, pieces: int = 1) -> Transfer:
    """All-gather this many parameters, in the width that kernels read."""
    width = job.stack.recipes[job.training.precision].compute
    return Transfer("all_gather", group, parameters * width / pieces, pieces)


def scatter_transfer(job: Job, parameters: float, group: str, pieces: int = 1) -> Transfer:
    """Reduce-scatter their gradients."""
    return Transfer("reduce_scatter", group, gradient_bytes(job, parameters) / pieces, pieces)


def replica_transfer(job: Job, parameters: float, group: str, shards: int, pieces: int = 1) -> Transfer:
    """All-reduce a shard of their gradients over replicas."""
    return Transfer("all_reduce", group, gradient_bytes(job, parameters) / shards / pieces, pieces)


def gradient_bytes(job: Job, parameters: float) -> float:
    return parameters * job.stack.recipes[job.training.precision].gradient_reduce


def bucket_sizes(sizes: Sequence[float]) -> list[float]:
    """Bytes of DDP's buckets of gradients of these sizes, in the order of the parameters: from the last on they fill a
    bucket until it has 25 MiB, the first one 1 MiB (torch 2.13, compute_bucket_assignment_by_size)."""
    found, filled, most = [], 0.0, 2.0**20
    for size in reversed(sizes):
        filled += size
        if filled >= most:
            found.append(filled)
            filled, most = 0.0, 25 * 2.0**20
    return [*found, filled] if filled else found


def _of_each(units: Sequence[Unit], seconds: Callable[[Unit], float]) -> list[float]:
    """Seconds of each unit; a stage has the same block many times."""
    known = {id(unit): seconds(unit) for unit in {id(unit): unit for unit in units}.values()}
    return [known[id(unit)] for unit in units]


class Unit(Protocol):
    """What this module needs to know of a unit: seconds of its passes, and its parameters on this rank, of which
    some are routed experts'."""

    @property
    def forward_seconds(self) -> float: ...
    @property
    def backward_seconds(self) -> float: ...
    @property
    def parameters(self) -> float: ...
    @property
    def experts(self) -> float: ...
    @property
    def stays_gathered(self) -> bool: ...


@dataclass(frozen=True)
class DataParallel:
    """The data-parallel groups of one pipeline rank, and what communication over them costs."""

    job: Job
    layout: Layout
    shard: GroupShape
    replicate: GroupShape
    expert_shard: GroupShape
    expert_replicate: GroupShape

    @property
    def over_wire(self) -> bool:
        """Whether ranks that send with the processors they compute with wait for a wire meanwhile."""
        return self.job.cluster.wired and any(getattr(self, name).domains > 1 for name in _GROUPS)

    def on_one_host(self) -> DataParallel:
        """The same with each group on one host."""
        near = [on_one_host(getattr(self, name), self.job.cluster) for name in _GROUPS]
        return DataParallel(self.job, self.layout, *near)

    @property
    def gathers_every_microbatch(self) -> bool:
        return self.layout.zero_stage == 3

    def gather_seconds(self, parameters: float, experts: float, units: int = 1) -> float:
        """All-gather parameters of this many units."""
        return self.seconds(self.gathers(parameters, experts, units))

    def gathers(self, parameters: float, experts: float, units: int = 1) -> tuple[Transfer, ...]:
        """The collectives of that, of dense parameters and of experts."""
        width, dense = self.job.stack.recipes[self.job.training.precision].compute, parameters - experts
        return (
            gather_transfer(self.job, dense, "shard", self._pieces(dense * width, units)),
            gather_transfer(self.job, experts, "expert_shard", self._pieces(experts * width, units)),
        )

    def scatter_seconds(self, parameters: float, experts: float, units: int = 1) -> float:
        """Reduce-scatter the gradients of this many units over the shards; frozen weights have none."""
        return self.seconds(self.scatters(parameters, experts, units))

    def scatters(self, parameters: float, experts: float, units: int = 1) -> tuple[Transfer, ...]:
        """The collectives of that."""
        if self.job.training.peft != "none":
            return ()
        dense = parameters - experts
        return (
            scatter_transfer(self.job, dense, "shard", self._reduced_pieces(dense, units)),
            scatter_transfer(self.job, experts, "expert_shard", self._reduced_pieces(experts, units)),
        )

    def once_reduce_seconds(self, parameters: float, experts: float, units: int) -> float:
        """What is reduced at the end of the step: everything, or only shards over their replicas."""
        replicas = self.seconds(self.replicas(parameters, experts, units))
        return replicas + (0.0 if self.layout.shards_gradients else self.scatter_seconds(parameters, experts, units))

    def replicas(self, parameters: float, experts: float, units: int) -> tuple[Transfer, ...]:
        """The collectives over replicas at the end of the step; frozen weights have none."""
        if self.job.training.peft != "none":
            return ()
        dense, shards = parameters - experts, expert_grid(self.layout, self.job.stack).shards
        pieces = [self._reduced_pieces(one, units) for one in (dense, experts)]
        return (
            replica_transfer(self.job, dense, "replicate", self.layout.shards, pieces[0]),
            replica_transfer(self.job, experts, "expert_replicate", shards, pieces[1]),
        )

    def reductions(self, units: Sequence[Unit], weights: Sequence[Sequence[float]]) -> tuple[tuple[float, float], ...]:
        """The pieces in which gradients are reduced beside a backward, one after another: how much of the backward
        there is up to each since the one before, and how much of the bytes it has. These are DDP's buckets, where the
        bytes of the weights of every unit are given, and else units, taken for alike."""
        if not weights:
            return ((1 / len(units), 1 / len(units)),) * len(units)
        ends = np.cumsum(bucket_sizes([size for sizes in weights for size in sizes]))
        made = np.cumsum([0.0, *(sum(sizes) for sizes in reversed(weights))])
        spent = np.cumsum([0.0, *(unit.backward_seconds for unit in reversed(units))])
        shares = (np.diff(values / values[-1], prepend=0.0) for values in (np.interp(ends, made, spent), ends))
        return tuple((float(before), float(size)) for before, size in zip(*shares, strict=True))

    def once_gather_seconds(self, parameters: float, experts: float, units: int) -> float:
        """What is gathered once, ahead of the step's first forward."""
        changed = self.job.training.peft == "none" or self.layout.zero_stage >= 2
        if self.gathers_every_microbatch or not self.layout.zero_stage or not changed:
            return 0.0
        return self.gather_seconds(parameters, experts, units)

    def seconds(self, transfers: Iterable[Transfer]) -> float:
        """Seconds of collectives over these groups, one after another."""
        return transfer_seconds(transfers, {name: getattr(self, name) for name in _GROUPS}, self.job.cluster)

    def exposed_forward(self, units: Sequence[Unit]) -> float:
        """Seconds that a forward waits for parameters: what the unit before does not hide.

        Under a pipeline the gathers of the backward serve the next forward too: torch keeps a unit that its backward
        left gathered.
        """
        if not self.gathers_every_microbatch or self.layout.pp > 1:
            return 0.0
        gathers = _of_each(units, lambda unit: self.gather_seconds(unit.parameters, unit.experts))
        if not self.job.stack.overlap_param_gather:
            return sum(gathers)
        beside = [u.forward_seconds for u in units[:-1]]
        exposed = self.job.cluster.gpu.exposed
        return gathers[0] + sum(exposed(g, work) for g, work in zip(gathers[1:], beside, strict=True))

    def exposed_backward(self, units: Sequence[Unit]) -> float:
        """Seconds that a backward waits. Beside a unit's backward run the gather of the next unit and the reduction
        of the one behind; they share one network."""
        backwards, reduces = units[::-1], self.layout.shards_gradients
        if not (reduces or self.gathers_every_microbatch):
            return 0.0
        gathers = _of_each(backwards, self._backward_gather)
        scatters = _of_each(
            backwards, lambda unit: self.scatter_seconds(unit.parameters, unit.experts) if reduces else 0.0
        )
        stack, exposed = self.job.stack, gathers[0] + scatters[-1]
        for i, unit in enumerate(backwards):
            gather = gathers[i + 1] if i + 1 < len(gathers) else 0.0
            scatter = scatters[i - 1] if i else 0.0
            beside = gather * stack.overlap_param_gather + scatter * stack.overlap_grad_reduce
            exposed += gather + scatter - beside + self.job.cluster.gpu.exposed(beside, unit.backward_seconds)
        return exposed

    def copies(self, units: Sequence[Unit]) -> tuple[float, float]:
        """Seconds that a forward and a backward copy: parameters behind gathers, gradients ahead of reductions.

        Rule: every copy that the stack makes reads and writes them once, in the width that kernels read, and the last
        one of gradients writes in that of the reduction; at the bandwidth of elementwise kernels, hidden by nothing.
        What is gathered or reduced once a step is spread over its microbatches.
        Reference: torch 2.13, _fsdp_collectives.py (split_with_sizes_copy, chunk_cat) and reducer.cpp
        (mark_variable_ready_dense). Of 86 published runs under FSDP1 it takes the median signed error of tokens per
        second from 1.3 to 0.2 %, of 38 under FSDP2 from 10.3 to 7.4 %.
        Ignored: copying a shard into the buffer that is gathered, and a reduction over one rank out of its buffer.
        """
        job, layout, stack = self.job, self.layout, self.job.stack
        if not (stack.gather_copies or stack.reduce_copies):
            return 0.0, 0.0
        fsdp = uses_fsdp(job, layout)
        once = 1 / layout.microbatches(job.training.global_batch_size)
        recipe, gpu = stack.recipes[job.training.precision], job.cluster.gpu
        weights = sum(unit.parameters for unit in units)
        forward = backward = 0.0
        if stack.gather_copies and (fsdp or self.shard.ranks > 1):
            each = stack.gather_copies * 2 * recipe.compute
            forward = each * weights * (1.0 if self.gathers_every_microbatch and layout.pp == 1 else once)
            if self.gathers_every_microbatch:
                backward = each * sum(unit.parameters for unit in units if not unit.stays_gathered)
        reduces = fsdp or self.shard.ranks * self.replicate.ranks > 1
        if stack.reduce_copies and reduces and job.training.peft == "none":
            each = (2 * stack.reduce_copies - 1) * recipe.compute + recipe.gradient_reduce
            backward += each * weights * (1.0 if layout.shards_gradients else once)
        per_byte = job.cluster.streaming_cost(layout.world_size) / (gpu.memory_bandwidth * gpu.memory_efficiency)
        return forward * per_byte, backward * per_byte

    def _backward_gather(self, unit: Unit) -> float:
        if not self.gathers_every_microbatch or unit.stays_gathered:
            return 0.0
        return self.gather_seconds(unit.parameters, unit.experts)

    def _reduced_pieces(self, parameters: float, units: int) -> int:
        return self._pieces(gradient_bytes(self.job, parameters), units)

    def _pieces(self, size: float, units: int) -> int:
        """Collectives that a transfer of this size is cut into: FSDP's units, or DDP's buckets."""
        if uses_fsdp(self.job, self.layout):
            return units * self.job.stack.gathers_per_unit
        return max(1, round(size / self.job.stack.bucket_bytes))
