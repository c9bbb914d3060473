"""What one pipeline stage costs one rank: its units one after the other, and what its data-parallel collectives add.

A stage is the embedding (first), some blocks, the head (last). All ranks of a stage cost the same.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulator.data_parallel import DataParallel, gradient_bytes, reduces_beside
from simulator.layout import Layout
from simulator.model import BlockKind
from simulator.placement import Groups, known_to, layout_groups
from simulator.unit_cost import UnitCost, UnitCosts
from simulator.weights import Cutting, block_weights, embedding_weights, head_weights
from simulator.work import NOTHING, Work

if TYPE_CHECKING:
    from simulator.job import Job


@dataclass(frozen=True)
class StageCost:
    """A stage as the engine sees it. reduce and gather are the seconds of its data-parallel collectives where they
    happen once a step; where they happen in every microbatch they are part of forward and backward. backward_weight
    is the part of backward that a schedule may put off: the gradients of weights and their adding up; deferred is the
    bytes that are kept for it besides saved once the rest is done. blocks are its units in order with how many of them
    follow each other. copying is the share of reduce and gather in which ranks that send with their processors are at
    work: less than 1 where they wait for a wire between hosts (of both together; one may wait more than the other).
    reductions are the pieces of reduce, each with its shares of the backward before it and of the bytes
    (data_parallel.py)."""

    forward: Work
    backward: Work
    parameters: float
    saved: float
    working: float
    units: int
    reduce: float
    gather: float
    backward_weight: Work = NOTHING
    deferred: float = 0.0
    blocks: tuple[tuple[UnitCost, int], ...] = ()
    copying: float = 1.0
    reductions: tuple[tuple[float, float], ...] = ((1.0, 1.0),)

    @functools.cached_property
    def known_bytes(self) -> dict[object, Any]:
        """What memory.py has found about this stage."""
        return {}

    def pieces(self, gathered: int, overlaps: bool) -> tuple[tuple[float, float], ...]:
        """The pieces of a forward or backward that waits for so many gathers one after another, or hands over its
        gradients as it goes, each with its shares of the op and of what is reduced behind it."""
        if gathered:
            return ((1 / gathered, 1 / gathered),) * gathered
        return self.reductions if overlaps else ((1.0, 1.0),)

    @property
    def backward_input(self) -> Work:
        """The rest of the backward, which the stage before waits for: recomputation and the input gradient."""
        return self.backward - self.backward_weight

    experts: float = 0.0


def _runs(units: list[UnitCost]) -> tuple[tuple[UnitCost, int], ...]:
    """Units in order, with how many of the same follow each other."""
    runs = [list(same) for _, same in itertools.groupby(units, key=id)]
    return tuple((run[0], len(run)) for run in runs)


class StageCosts:
    """Costs of all stages of one layout. Stages of the same blocks are costed once."""

    def __init__(self, job: Job, layout: Layout) -> None:
        self.job, self.layout = job, layout
        self.groups = layout_groups(job, layout)
        self.units = UnitCosts(job, layout)
        self._stages: dict[tuple[object, ...], StageCost] = {}

    def stages(self) -> tuple[StageCost, ...]:
        """The costs of all stages, in torch's global stage order."""
        model, layout = self.job.model, self.layout
        known = known_to(self.job, "blocks")
        if not known:
            known["all"] = [
                (model.block_kind(i), model.block_is_causal(i), model.block_window(i))
                for i in range(model.num_hidden_layers)
            ]
        blocks: list[tuple[BlockKind, bool, int]] = known["all"]
        found, first = [], 0
        for index, count in enumerate(layout.layers_per_stage(len(blocks))):
            found.append(self._stage(index, tuple(blocks[first : first + count])))
            first += count
        return tuple(found)

    def stage(self, index: int) -> StageCost:
        """The cost of one stage."""
        return self.stages()[index]

    def _stage(self, index: int, blocks: tuple[tuple[BlockKind, bool, int], ...]) -> StageCost:
        groups = self.groups[self.layout.rank_of_stage(index)]
        ends = index == 0, index == self.layout.stages - 1
        # Equal groups of a layout are one object.
        key = (blocks, *ends, id(groups))
        if key not in self._stages:
            units = self._offloaded([self.units.block(*block, groups) for block in blocks])
            if index == 0:
                units.insert(0, self.units.embedding(groups))
            if index == self.layout.stages - 1:
                units.append(self.units.head(groups))
            cost = self._sum(units, groups, self._bucketed(blocks, *ends))
            # Nobody waits for an input gradient of the first stage: torch runs its whole backward in the weights' turn.
            if index == 0:
                cost = dataclasses.replace(cost, backward_weight=cost.backward, deferred=0.0)
            self._stages[key] = cost
        return self._stages[key]

    def _offloaded(self, blocks: list[UnitCost]) -> list[UnitCost]:
        """The blocks of a stage, the first of them with their activations in host memory.

        Two blocks at least stay: the one whose backward runs and the one before it, on its way back. The peak is the
        end of the forward, when what is offloaded has left.
        Reference: Transformer Engine's activation offloading (NVIDIA/Megatron-LM@d98e8a64, cpu_offloading_num_layers).
        Ignored: copies that PCIe or NVLink-C2C cannot hide.
        """
        count = min(self.job.stack.offloaded_blocks, len(blocks) - 2)
        gone = (dataclasses.replace(block, saved=0.0, kinds=()) for block in blocks[: max(0, count)])
        return [*gone, *blocks[max(0, count) :]]

    def _bucketed(self, blocks: Iterable[tuple[BlockKind, bool, int]], first: bool, last: bool) -> list[list[float]]:
        """Bytes of the gradients of a stage's weights unit by unit, where DDP reduces them beside a backward; it meets
        neither tensor nor expert parallelism here."""
        job, model, cut = self.job, self.job.model, Cutting()
        if not job.cluster.wired or not reduces_beside(job, self.layout):
            return []
        units = [block_weights(model, kind, cut) for kind, _, _ in blocks]
        if first:
            units.insert(0, embedding_weights(model, cut))
        if last:
            units.append(head_weights(model, cut, first and model.tie_word_embeddings))
        return [[gradient_bytes(job, weight.elements) for weight in weights] for weights in units]

    def _sum(self, units: list[UnitCost], groups: Groups, bucketed: list[list[float]]) -> StageCost:
        data = DataParallel(
            self.job, self.layout, groups.shard, groups.replicate, groups.expert_shard, groups.expert_replicate
        )
        forward = functools.reduce(Work.__add__, (u.forward for u in units))
        backward = functools.reduce(Work.__add__, (u.backward for u in units))
        weights = functools.reduce(Work.__add__, (u.backward_weight for u in units))
        parameters, experts = sum(u.parameters for u in units), sum(u.experts for u in units)
        reduce = data.once_reduce_seconds(parameters, experts, len(units))
        gather = data.once_gather_seconds(parameters, experts, len(units))
        copied_forward, copied_backward = data.copies(units)
        copying = 1.0
        if data.over_wire and reduce + gather:
            near = data.on_one_host()
            inside = near.once_reduce_seconds(parameters, experts, len(units))
            inside += near.once_gather_seconds(parameters, experts, len(units))
            copying = min(1.0, inside / (reduce + gather))
        return StageCost(
            forward=forward + Work(compute=copied_forward, dp=data.exposed_forward(units)),
            backward=backward + Work(compute=copied_backward, dp=data.exposed_backward(units)),
            parameters=parameters,
            saved=sum(u.saved for u in units),
            working=max(u.working for u in units),
            units=len(units),
            reduce=reduce,
            gather=gather,
            backward_weight=weights,
            deferred=sum(u.deferred for u in units),
            experts=experts,
            blocks=_runs(units),
            copying=copying,
            reductions=data.reductions(units, bucketed),
        )
