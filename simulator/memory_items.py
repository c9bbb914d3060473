"""What the items of a rank's memory consist of at its fullest moment: whose bytes they are, and of how many of what."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.expert_parallel import per_shard
from simulator.files import STRICT
from simulator.layout import Layout
from simulator.lifetimes import Moment
from simulator.memory import RankBytes, communicators, fragmented, state_bytes
from simulator.passing import Passing, Sharding, StageBytes
from simulator.stage import StageCost

if TYPE_CHECKING:
    from simulator.job import Job


@dataclass(frozen=True)
class MemoryPart:
    """A part of an item of MemoryBreakdown in bytes; `count` of what it is made of (microbatches alive,
    communicators), 0 where it is one thing."""

    item: str
    name: str
    bytes: float
    count: int = 0

    __pydantic_config__ = STRICT


def memory_parts(job: Job, layout: Layout, stages: tuple[StageCost, ...]) -> tuple[tuple[MemoryPart, ...], ...]:
    """Of each pipeline rank at its fullest moment, the parts of all items; those of an item sum to it.

    Args:
        stages: what stage_costs gives for this job and layout.
    """
    sharding = Sharding.of(job, layout)
    ranks = (RankBytes(job, layout, stages, rank, sharding) for rank in range(layout.pp))
    return tuple(_parts(rank, rank.fullest()) for rank in ranks)


def _parts(rank: RankBytes, moment: Moment) -> tuple[MemoryPart, ...]:
    running = moment.running
    passing = rank.stages[running.stage].passing(running) if running.stage >= 0 else Passing()
    known = rank.at(moment)
    found = [*_state(rank), *_gradients(rank, moment, passing), *_activations(rank, moment, passing)]
    found += [*_buffers(rank, moment, passing), *_overhead(rank, known.activations, known.buffers)]
    least = 1e-12 * known.peak
    return tuple(part for part in found if abs(part.bytes) > least)


def _state(rank: RankBytes) -> list[MemoryPart]:
    """Parameters by where they are, and the optimizer's state."""
    ends = sum(stage.ends for stage in rank.stages.values())
    blocks = rank.parameters - rank.experts - ends
    share = rank.state["parameters"] / (_sharded(rank, rank.parameters, rank.experts) or 1.0)
    found = [
        MemoryPart("parameters", "blocks", share * _sharded(rank, blocks, 0.0)),
        MemoryPart("parameters", "embedding and head", share * _sharded(rank, ends, 0.0)),
        MemoryPart("parameters", "experts", share * _sharded(rank, rank.experts, rank.experts)),
    ]
    job, layout = rank.job, rank.layout
    recipe = job.stack.recipes[job.training.precision]
    moments = state_bytes(job, _plain(layout), rank.sharding, rank.parameters, rank.experts)["optimizer"]
    words = "moments" if recipe.parameters >= 4 else "moments and main weights"
    found.append(MemoryPart("optimizer", words, min(moments, rank.state["optimizer"])))
    found.append(MemoryPart("optimizer", "agreement of replicas", max(0.0, rank.state["optimizer"] - moments)))
    return found


def _plain(layout: Layout) -> Layout:
    return dataclasses.replace(layout, sync="all_reduce", outer_optimizer="none")


def _sharded(rank: RankBytes, parameters: float, experts: float) -> float:
    """Elements on the rank, if parameters are sharded as their state says."""
    layout, zero = rank.layout, rank.layout.zero_stage
    sharded = zero >= 2 or (zero == 1 and rank.sharding.fsdp)
    return per_shard(layout, rank.job.stack, parameters, experts) if sharded else parameters


def _gradients(rank: RankBytes, moment: Moment, passing: Passing) -> list[MemoryPart]:
    whole = sum(held.whole * rank.stages[held.stage].worth.whole for held in moment.held)
    reduced = sum(held.reduced * rank.stages[held.stage].worth.reduced for held in moment.held)
    return [
        MemoryPart("gradients", "there all the time", rank.state["gradients"]),
        MemoryPart("gradients", "added up", whole),
        MemoryPart("gradients", "reduced", reduced),
        MemoryPart("gradients", "of the op that runs", passing.gradients),
        MemoryPart("gradients", "in fp32 for the update", rank.update * (moment.running.kind == "OPTIMIZER")),
    ]


def _activations(rank: RankBytes, moment: Moment, passing: Passing) -> list[MemoryPart]:
    """What microbatches keep, by kind, besides the one that is worked on; and what that one has."""
    sizes: dict[str, float] = defaultdict(float)
    for held in moment.held:
        for kind, size in kept_by_kind(rank.stages[held.stage]).items():
            sizes[kind] += held.kept * size
    deferred = sum(held.deferred * rank.stages[held.stage].worth.deferred for held in moment.held)
    alive, waiting = sum(held.kept for held in moment.held), sum(held.deferred for held in moment.held)
    return [
        *(MemoryPart("activations", kind, size, alive) for kind, size in sizes.items()),
        MemoryPart("activations", "gradients for weight gradients", deferred, waiting),
        MemoryPart("activations", "kept by the microbatch in work", passing.kept, 1),
        MemoryPart("activations", "made by the unit in work", passing.working, 1),
    ]


def kept_by_kind(stage: StageBytes) -> dict[str, float]:
    """Bytes that a microbatch keeps on a stage, by what they are; they sum to the stage's `saved`."""
    found: dict[str, float] = defaultdict(float)
    for unit, count in stage.stage.blocks:
        for kind, size in unit.kinds:
            found[kind] += count * size
    # The stage's output, which torch's pipelines hold, less its input, which lies in a receive buffer.
    found["inputs and outputs of stages"] += stage.saved - sum(found.values())
    return dict(found)


def _buffers(rank: RankBytes, moment: Moment, passing: Passing) -> list[MemoryPart]:
    gathered = fresh = returned = 0.0
    for held in moment.held:
        worth = rank.stages[held.stage].worth
        gathered += held.ends * worth.ends + held.blocks * worth.blocks
        fresh += held.fresh * worth.fresh
        returned += held.returned * worth.returned
    standing = rank.standing
    return [
        MemoryPart("buffers", "gathered weights", gathered + passing.gathered),
        MemoryPart("buffers", "prefetched weights", passing.prefetched),
        MemoryPart("buffers", "reductions of gradients", standing["reductions"] + passing.reducing),
        MemoryPart("buffers", "fresh gradients", fresh),
        MemoryPart("buffers", "gathered activations", standing["gathers"]),
        MemoryPart("buffers", "messages between stages", standing["messages"] + returned),
    ]


def _overhead(rank: RankBytes, activations: float, buffers: float) -> list[MemoryPart]:
    gpu, groups = rank.job.cluster.gpu, communicators(rank.layout)
    return [
        MemoryPart("overhead", "device context" if gpu.kind == "gpu" else "process", gpu.context_memory),
        MemoryPart("overhead", "communicators", groups * gpu.communicator_memory, groups),
        MemoryPart("overhead", "fragmentation", fragmented(rank.job, activations, buffers)),
    ]
