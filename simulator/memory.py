"""Peak bytes of a rank, itemised: parameters, gradients, optimizer state, activations, buffers, overhead.

Every item follows from the same program that the engine runs: activations are what kernels save times the
microbatches that the schedule keeps alive. Where the backward is split they are kept whole until the weight gradient,
and gradients of activations besides from the input gradient on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.expert_parallel import per_shard
from simulator.layout import Layout
from simulator.lifetimes import Held, Moment, Running, fullest_moments, lifetimes
from simulator.passing import Sharding, Worth, stage_bytes, stream_bytes
from simulator.results import MemoryBreakdown, MemoryMoment
from simulator.schedules import SPLIT_BACKWARD
from simulator.stage import StageCost

if TYPE_CHECKING:
    from simulator.job import Job


def memory_per_rank(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> tuple[MemoryBreakdown, ...]:
    """The peak of each pipeline rank in bytes; ranks of a stage are alike."""
    sharding = Sharding.of(job, layout)
    return tuple(RankBytes(job, layout, stages, rank, sharding).peak() for rank in range(layout.pp))


def fullest(ranks: tuple[MemoryBreakdown, ...]) -> MemoryBreakdown:
    """The rank that decides whether the layout fits."""
    return max(ranks, key=lambda rank: rank.peak)


def capacity(job: Job, layout: Layout) -> float:
    """Bytes that a rank may use: those of its GPU, or its part of a machine whose ranks share the memory."""
    spec = job.cluster
    if spec.gpu.kind == "gpu":
        return spec.gpu.memory
    machine, ranks = spec.gpu.memory * spec.gpus_per_node * job.nodes, max(layout.world_size, job.nodes)
    return (machine - _server_bytes(job, layout)) / ranks


def _server_bytes(job: Job, layout: Layout) -> float:
    """What parameter servers hold in the memory of their hosts: parameters, optimizer state, the last gradient of every
    replica (runtime/parameter_server.py receives each into its own) and, where they apply them together, their mean."""
    if layout.sync != "parameter_server":
        return 0.0
    recipe = job.stack.recipes[job.training.precision]
    gradients = layout.dp_replicate + (layout.staleness == 0)
    width = recipe.parameters + gradients * recipe.gradients + recipe.optimizer[job.training.optimizer]
    return job.model.parameters() * width


def memory_timeline(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> tuple[tuple[MemoryMoment, ...], ...]:
    """For each pipeline rank and each op of its program, in order, the bytes during and after it. Ops are forwards,
    backwards, what is gathered, dropped and reduced between them (messages have no memory of their own: their buffers
    are there all the time), and the optimizer's step."""
    sharding = Sharding.of(job, layout)
    return tuple(_curve(RankBytes(job, layout, stages, rank, sharding)) for rank in range(layout.pp))


def _curve(bytes_of: RankBytes) -> tuple[MemoryMoment, ...]:
    return tuple(
        MemoryMoment(
            str(step.op),
            max((bytes_of.at(moment) for moment in step.during), key=lambda memory: memory.peak),
            bytes_of.at(Moment(Running(""), step.after)),
        )
        for step in lifetimes(*bytes_of.pipeline)
    )


class RankBytes:
    """Gives the counts of a rank's moments their bytes."""

    def __init__(self, job: Job, layout: Layout, stages: tuple[StageCost, ...], rank: int, sharding: Sharding) -> None:
        self.job, self.layout = job, layout
        held = {s: stages[s] for s in layout.stages_of(rank)}
        self.stages = {s: stage_bytes(job, layout, stage, sharding) for s, stage in held.items()}
        parameters, experts = sum(s.parameters for s in held.values()), sum(s.experts for s in held.values())
        # What torch gathers where nothing is dropped has its moments of the schedule with zero_stage 1.
        microbatches = layout.microbatches(job.training.global_batch_size)
        apart = sharding.apart and layout.schedule in SPLIT_BACKWARD
        shape = (rank, layout.pp, layout.virtual_stages, microbatches)
        self.pipeline = (layout.schedule, *shape, max(1, layout.zero_stage) if sharding.fsdp else 1, apart)
        self.parameters, self.experts, self.sharding = parameters, experts, sharding
        self.state = state_bytes(job, layout, sharding, parameters, experts)
        self.update = update_bytes(job, layout, sharding, parameters, experts)
        self.standing = standing_buffers(job, layout, tuple(held), parameters)
        self.overhead = overhead_bytes(job, layout)

    def peak(self) -> MemoryBreakdown:
        """The bytes of the fullest of the rank's moments."""
        return self.at(self.fullest())

    def fullest(self) -> Moment:
        """The moment at which the rank holds most."""
        known = fullest_moments(*self.pipeline)
        apart = [self.stages[one.stage].passing(one) for one in known.runnings]
        passing = np.array([one.total + fragmented(self.job, one.activations, one.buffers) for one in apart])
        moving = 1 + fragmented(self.job, 1.0, 0.0)
        grows = np.array(Worth(moving, moving, moving, moving, whole=1, reduced=1, fresh=moving, returned=moving))
        each = np.concatenate([np.array(stage.worth) * grows for _, stage in sorted(self.stages.items())])
        found = known.moment(int((known.counts @ each + passing[known.running]).argmax()))
        if not self.update:
            return found
        # Gradients have their memory all the time where the update needs more.
        end = Moment(Running("OPTIMIZER"), tuple(Held(stage) for stage in known.stages))
        return max(found, end, key=lambda moment: self.at(moment).peak)

    def _items(self, moment: Moment) -> tuple[float, float, float]:
        """Bytes of activations, gradients and buffers that are not there all the time."""
        activations = gradients = buffers = 0.0
        for number, kept, deferred, ends, blocks, whole, reduced, fresh, returned in moment.held:
            worth = self.stages[number].worth
            activations += kept * worth.kept + deferred * worth.deferred
            gradients += whole * worth.whole + reduced * worth.reduced
            buffers += ends * worth.ends + blocks * worth.blocks + fresh * worth.fresh + returned * worth.returned
        running = moment.running
        if running.kind == "OPTIMIZER":
            gradients += self.update
        if running.stage >= 0:
            passing = self.stages[running.stage].passing(running)
            activations += passing.activations
            gradients += passing.gradients
            buffers += passing.buffers
        return activations, gradients, buffers

    def at(self, moment: Moment) -> MemoryBreakdown:
        """Bytes at a moment, with what is there all the time."""
        activations, gradients, buffers = self._items(moment)
        items = {
            "parameters": self.state["parameters"],
            "gradients": self.state["gradients"] + gradients,
            "optimizer": self.state["optimizer"],
            "activations": activations,
            "buffers": sum(self.standing.values()) + buffers,
        }
        overhead = self.overhead + fragmented(self.job, items["activations"], items["buffers"])
        return MemoryBreakdown(**items, overhead=overhead, peak=sum(items.values()) + overhead)


def fragmented(job: Job, activations: float, buffers: float) -> float:
    """Bytes that the allocator holds and cannot give out, as a share of what comes and goes within a step. Parameters,
    gradients and optimizer state are allocated once and stay where they are."""
    share = job.stack.fragmentation
    return (job.cluster.gpu.fragmentation if share is None else share) * (activations + buffers)


def state_bytes(job: Job, layout: Layout, sharding: Sharding, parameters: float, experts: float) -> dict[str, float]:
    """Bytes of parameters, gradients and optimizer state (ZeRO, arXiv 1910.02054; bytes each by the stack's recipe)
    that are there all through a step: gradients only where they have their memory from the start.

    Sharded over dp_shard and cp from zero_stage 3, 2 and 1 on, routed experts over the ranks that hold the same ones.
    Under a pipeline torch reduces gradients at the end of the step, so until then they are whole. Offloaded, moments
    and main weights are the host's.
    """
    recipe, zero = job.stack.recipes[job.training.precision], layout.zero_stage

    def held(width: float, sharded: bool) -> float:
        return per_shard(layout, job.stack, parameters * width, experts * width) if sharded else parameters * width

    # FSDP2 keeps master parameters sharded, in ZeRO-1 too; the gathered copy for the kernels is a buffer.
    sharded = zero >= 2 or (zero == 1 and sharding.fsdp)
    if not sharding.trains:
        # Frozen weights in the width of the kernels; or the host has the rest, and gradients leave as they come.
        return {"parameters": held(sharding.compute, zero >= 2), "gradients": 0.0, "optimizer": 0.0}
    optimizer = held(recipe.optimizer[job.training.optimizer], zero > 0)
    if layout.offload == "optimizer":
        optimizer = 0.0
    if layout.sync == "parameter_server":
        # The servers update, in the memory of their hosts.
        optimizer = 0.0
    elif layout.outer_optimizer == "nesterov":
        # What the last average was, its gradient and momentum, in fp32.
        optimizer += held(12.0, sharded)
    if layout.sync in ("reduce_broadcast", "local_sgd"):
        # The one vector in fp32 that replicas exchange (servers' clients have theirs in the host's memory).
        optimizer += held(4.0, sharded)
    return {
        "parameters": held(recipe.parameters, sharded),
        "gradients": held(recipe.gradients, layout.shards_gradients) * sharding.whole,
        "optimizer": optimizer,
    }


def update_bytes(job: Job, layout: Layout, sharding: Sharding, parameters: float, experts: float) -> float:
    """Bytes that the optimizer's step holds besides its state, of a stack that keeps gradients in narrow memory of
    their own: Megatron's fp16 recipe has them in fp32 beside, 20 bytes per parameter in all
    (NVIDIA/Megatron-LM@d98e8a64, dist_optimizer.md)."""
    if not sharding.trains or not sharding.whole or layout.offload == "optimizer":
        # To the host gradients go in their own width.
        return 0.0
    width = job.stack.recipes[job.training.precision].update
    if layout.zero_stage:
        return per_shard(layout, job.stack, parameters * width, experts * width)
    return parameters * width


def standing_buffers(job: Job, layout: Layout, stages: tuple[int, ...], parameters: float) -> dict[str, float]:
    """Bytes of buffers that are there all the time.

    reductions: the stack's own, and the buckets of its replicas as large as their weights. gathers: for the whole of
    what sequence parallelism gathers. messages: for tensors from neighbours, activations for all but the first of the
    rank's `stages`, their gradients for all but the last. torch allocates those of all microbatches ahead; others hold
    two of each.
    """
    size, stack = stream_bytes(job, layout), job.stack
    reductions = stack.reduce_buffer_bytes
    if stack.buckets_apart and layout.shards * layout.dp_replicate > 1 and job.training.peft == "none":
        reductions += parameters * stack.recipes[job.training.precision].compute
    gathers = stack.gather_buffers * size * layout.tp * layout.sequence_parallel
    if layout.pp == 1:
        messages = 0.0
    elif not stack.preallocates_receives:
        messages = 4 * size
    else:
        sides = sum((stage > 0) + (stage + 1 < layout.stages) for stage in stages)
        messages = sides * layout.microbatches(job.training.global_batch_size) * size
    return {"reductions": reductions, "gathers": gathers, "messages": messages}


def communicators(layout: Layout) -> int:
    """Axes in use, each of which has a communicator."""
    sizes = (layout.tp, layout.cp, layout.ep, layout.pp, layout.dp_shard, layout.dp_replicate)
    return sum(size > 1 for size in sizes)


def overhead_bytes(job: Job, layout: Layout) -> float:
    """The device context (on a CPU: the process with its libraries) and a communicator per axis in use."""
    gpu = job.cluster.gpu
    return gpu.context_memory + gpu.communicator_memory * communicators(layout)
