"""Peak bytes of a rank, itemised: parameters, gradients, optimizer state, activations, buffers, overhead.

Every item follows from the same program that the engine runs: activations are what kernels save times the
microbatches that the schedule keeps alive. Where the backward is split they are kept whole until the weight gradient,
and gradients of activations besides from the input gradient on.
"""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from simulator.compute import matmul_input_width
from simulator.expert_parallel import per_shard
from simulator.layout import SPLIT_BACKWARD, Layout
from simulator.program import MOST_UNSHARDED
from simulator.results import MemoryBreakdown
from simulator.schedules import as_full, peak_in_flight
from simulator.stage import StageCost

if TYPE_CHECKING:
    from simulator.job import Job


def memory_per_rank(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> tuple[MemoryBreakdown, ...]:
    """The peak of each pipeline rank in bytes; ranks of a stage are alike."""
    return tuple(_rank_memory(job, layout, stages, rank) for rank in range(layout.pp))


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
    """What parameter servers hold in the memory of their hosts: parameters, optimizer state and a sum of gradients."""
    if layout.sync != "parameter_server":
        return 0.0
    recipe = job.stack.recipes[job.training.precision]
    width = recipe.parameters + recipe.gradients + recipe.optimizer[job.training.optimizer]
    return job.model.parameters() * width


def _rank_memory(job: Job, layout: Layout, stages: tuple[StageCost, ...], rank: int) -> MemoryBreakdown:
    held = [stages[s] for s in layout.stages_of(rank)]
    microbatches = as_full(layout.schedule, layout.pp, layout.microbatches(job.training.global_batch_size))
    moments = peak_in_flight(layout.schedule, rank, layout.pp, layout.virtual_stages, microbatches)
    alive = max(sum(stages[s].saved * n + stages[s].deferred * d for s, n, d in moment) for moment in moments)
    items = {
        **_state(job, layout, sum(s.parameters for s in held), sum(s.experts for s in held)),
        "activations": alive + max(s.working for s in held),
        "buffers": _buffers(job, layout, held),
        "overhead": _overhead(job, layout),
    }
    gpu = job.cluster.gpu
    items["overhead"] += gpu.fragmentation * sum(v for k, v in items.items() if k != "overhead")
    return MemoryBreakdown(**items, peak=sum(items.values()))


def _state(job: Job, layout: Layout, parameters: float, experts: float) -> dict[str, float]:
    """Bytes of parameters, gradients and optimizer state (ZeRO, arXiv 1910.02054; bytes each by the stack's recipe).

    Sharded over dp_shard and cp from zero_stage 3, 2 and 1 on, routed experts over the ranks that hold the same ones.
    Under a pipeline torch reduces gradients at the end of the step, so until then they are whole.
    """
    recipe, zero = job.stack.recipes[job.training.precision], layout.zero_stage

    def held(width: float, sharded: bool) -> float:
        return per_shard(layout, job.stack, parameters * width, experts * width) if sharded else parameters * width

    if job.training.peft != "none":
        width = matmul_input_width(job.training.precision)
        return {"parameters": held(width, zero >= 2), "gradients": 0.0, "optimizer": 0.0}
    if job.stack.host_optimizer_bandwidth:
        # Gradients leave for the host as they come; what kernels read is all that stays.
        return {"parameters": held(recipe.compute, zero >= 2), "gradients": 0.0, "optimizer": 0.0}
    # FSDP2 keeps master parameters sharded, in ZeRO-1 too; the gathered copy for the kernels is a buffer.
    shards_parameters = zero >= 2 or (zero == 1 and job.stack.replicates_by_fsdp)
    optimizer = held(recipe.optimizer[job.training.optimizer], zero > 0)
    if layout.sync == "parameter_server":
        # The servers update, in the memory of their hosts.
        optimizer = 0.0
    elif layout.outer_optimizer == "nesterov":
        # What the last average was, and the outer momentum, both in fp32.
        optimizer += held(8.0, shards_parameters)
    return {
        "parameters": held(recipe.parameters, shards_parameters),
        "gradients": held(recipe.gradients, layout.shards_gradients),
        "optimizer": optimizer,
    }


def _buffers(job: Job, layout: Layout, stages: list[StageCost]) -> float:
    """Bytes that are neither state nor activations: gathered parameters, a gradient on its way to the
    reduction, tensors to and from neighbours."""
    stack, recipe = job.stack, job.stack.recipes[job.training.precision]
    total = 0.0
    keeps_all = layout.zero_stage == 1 and stack.replicates_by_fsdp
    whole_stage = keeps_all or layout.zero_stage == 2 or (layout.zero_stage == 3 and layout.pp > 1)
    if layout.zero_stage == 3 and not whole_stage:
        unit = max(s.largest_unit for s in stages)
        # The unit in use and the one being fetched, and a gradient on its way to the reduction.
        total += unit * recipe.compute * (2 if stack.overlap_param_gather else 1) + unit * recipe.gradient_reduce
    elif whole_stage:
        # Under a pipeline torch does not reshard a stage after a backward, so zero_stage 3 holds all of it too; of more
        # than three stages it drops those that are needed last.
        gathered = sorted(s.parameters for s in stages)
        total += sum(gathered if keeps_all else gathered[-MOST_UNSHARDED:]) * recipe.compute
        total += max(s.largest_unit for s in stages) * recipe.gradient_reduce
    elif stack.replicates_by_fsdp and _copies_replicas(job, layout):
        # FSDP over a shard group of one still copies what it gathers.
        total += sum(s.parameters for s in stages) * recipe.compute
    if layout.pp > 1:
        tokens = layout.micro_batch_size * job.training.seq_len / layout.cp
        tokens /= layout.tp if layout.sequence_parallel else 1
        # Received activations and gradients; torch allocates those of all microbatches ahead, on every stage.
        count = 2 * layout.microbatches(job.training.global_batch_size) * layout.virtual_stages
        total += (count if stack.preallocates_receives else 4) * tokens * job.model.hidden_size * recipe.compute
    return total


def _copies_replicas(job: Job, layout: Layout) -> bool:
    """Whether what is not sharded is replicated by FSDP all the same: in bf16, where tensors are cut over tp, under a
    split backward, and where experts have ranks of their own."""
    without_ddp = layout.tp > 1 or layout.schedule in SPLIT_BACKWARD
    replicas = layout.dp * layout.cp
    return job.training.precision == "bf16" or (replicas > 1 and without_ddp) or layout.ep > 1


def _overhead(job: Job, layout: Layout) -> float:
    """The device context (on a CPU: the process with its libraries) and a communicator per axis in use."""
    gpu = job.cluster.gpu
    sizes = (layout.tp, layout.cp, layout.ep, layout.pp, layout.dp_shard, layout.dp_replicate)
    groups = sum(size > 1 for size in sizes)
    return gpu.context_memory + gpu.communicator_memory * groups


def shortfall(job: Job, layout: Layout, memory: MemoryBreakdown) -> str:
    """Why a layout does not fit, with its largest items; empty if it fits."""
    limit = capacity(job, layout)
    over = memory.peak - limit
    if over <= 0:
        return ""
    items = {f.name: getattr(memory, f.name) for f in fields(memory) if f.name != "peak"}
    largest = sorted(items, key=lambda name: -items[name])[:2]
    shown = ", ".join(f"{name} {items[name] / 2**30:.1f}" for name in largest)
    return (
        f"needs {memory.peak / 2**30:.1f} GiB of {limit / 2**30:.1f}: {over / 2**30:.1f} GiB too much "
        f"(mostly {shown} GiB)"
    )
