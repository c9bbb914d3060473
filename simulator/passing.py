"""Bytes of one stage: of what a rank holds between ops, and of what comes and goes within an op.

Data parallelism as FSDP2 does it (torch/distributed/fsdp/_fully_shard, torch 2.13), in units: each block, and the ends
of the stage (embedding, final norm, head) as one.

    gathered     zero_stage 3 holds the unit in use and the gathered buffer of the next one; under a pipeline blocks
                 stay from their backward to their next forward. 1 and 2 hold all of the stage. A group of one rank is
                 copied from its shard just the same
    gradients    come in the width of matmuls and stay so until their unit's backward ends, those of the ends until
                 the stage's; then they are reduced, or added up whole in the width of the reduction
    a reduction  copies a unit's gradients into one buffer, which stays until the next unit's is needed

Without FSDP gradients are added up one by one as they come.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from simulator.compute import activation_width, matmul_input_width
from simulator.data_parallel import uses_fsdp
from simulator.expert_parallel import expert_grid, per_shard
from simulator.layout import Layout
from simulator.lifetimes import Running

if TYPE_CHECKING:
    from simulator.job import Job
    from simulator.stage import StageCost
    from simulator.unit_cost import UnitCost


def stream_bytes(job: Job, layout: Layout) -> float:
    """Bytes of a microbatch on this rank's residual stream: what stages hand to each other."""
    tokens = layout.micro_batch_size * job.training.seq_len / layout.cp
    tokens /= layout.tp if layout.sequence_parallel else 1
    return tokens * job.model.hidden_size * job.stack.recipes[job.training.precision].compute


class Worth(NamedTuple):
    """Bytes of one of each that Held counts."""

    kept: float
    deferred: float
    ends: float
    blocks: float
    whole: float
    reduced: float
    fresh: float
    returned: float


class Passing(NamedTuple):
    """Bytes that are there within an op besides what the rank holds: what its microbatch keeps, what the unit in work
    makes besides, gradients, gathered parameters, those that come ahead, and gradients on their way to a reduction."""

    kept: float = 0.0
    working: float = 0.0
    gradients: float = 0.0
    gathered: float = 0.0
    prefetched: float = 0.0
    reducing: float = 0.0

    @property
    def activations(self) -> float:
        return self.kept + self.working

    @property
    def buffers(self) -> float:
        return self.gathered + self.prefetched + self.reducing

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class Sharding:
    """What a layout does with parameters and gradients.

    fsdp: stages are FSDP modules; drops: blocks are gathered for each use alone; scatters: gradients are reduced to
    shards within every backward; whole: gradients have their memory from the first moment of the step on; late: they
    are added up when a backward has ended, and come in the width of matmuls until then.
    """

    fsdp: bool
    drops: bool
    scatters: bool
    whole: bool
    late: bool
    trains: bool
    compute: float
    reduce: float
    gradients: float

    @classmethod
    def of(cls, job: Job, layout: Layout) -> Sharding:
        stack, training = job.stack, job.training
        recipe = stack.recipes[training.precision]
        fsdp = uses_fsdp(job, layout)
        microbatches = layout.microbatches(training.global_batch_size)
        ddp = layout.zero_stage == 0 and layout.dp_replicate * layout.cp > 1 and not fsdp
        trains = training.peft == "none" and not stack.host_optimizer_bandwidth
        return cls(
            fsdp,
            layout.zero_stage == 3,
            layout.shards_gradients or (fsdp and layout.pp == 1 and microbatches == 1),
            stack.preallocates_gradients or (ddp and not fsdp),
            stack.adds_after_backward and trains and not fsdp,
            trains,
            recipe.compute if training.peft == "none" else matmul_input_width(training.precision),
            recipe.gradient_reduce,
            recipe.gradients,
        )

    @property
    def apart(self) -> bool:
        """Whether fresh gradients stand apart from those added up, in another width."""
        return self.fsdp and self.compute != self.reduce


def stage_bytes(job: Job, layout: Layout, stage: StageCost, sharding: Sharding) -> StageBytes:
    """The bytes of a stage. A search asks for them with one schedule after the other, on which nothing of them depends
    but by the sharding."""
    known: dict[object, StageBytes] = stage.known_bytes
    key = (sharding, layout.zero_stage, layout.shards, layout.pp, layout.stages)
    if key not in known:
        known[key] = StageBytes(job, layout, stage, sharding)
    return known[key]


class StageBytes:
    """What the counts of a stage's moments are worth, and what passes within its ops."""

    def __init__(self, job: Job, layout: Layout, stage: StageCost, sharding: Sharding) -> None:
        self.job, self.layout, self.stage, self.how = job, layout, stage, sharding
        ends = [unit for unit, _ in stage.blocks if unit.stays_gathered]
        self.ends = sum(unit.parameters for unit in ends)
        self.inner = stage.parameters - self.ends
        self.stays, saved = self._outputs()
        self.saved, self.deferred = stage.saved + saved, stage.deferred
        gathers = sharding.fsdp and not (sharding.drops and layout.pp == 1)
        self.ends_gathered = self.ends * sharding.compute * gathers
        self.blocks_gathered = self.inner * sharding.compute * gathers
        self.shard = self._shard(stage.parameters, stage.experts) * sharding.gradients
        # Gradients of the whole stage, where they are added up.
        self.added = self.shard if sharding.scatters else stage.parameters * sharding.gradients
        born = sharding.trains and not sharding.whole
        self.whole = self.added * born
        self.reduced = (self.shard if sharding.fsdp else self.added) * born
        self.fresh = stage.parameters * sharding.compute * (sharding.apart and sharding.trains)
        gathered = (self.ends_gathered, self.blocks_gathered)
        returned = stream_bytes(job, layout) * job.stack.preallocates_receives
        self.worth = Worth(self.saved, self.deferred, *gathered, self.whole, self.reduced, self.fresh, returned)
        self._known: dict[tuple[str, bool, bool, bool], Passing] = {}

    def passing(self, running: Running) -> Passing:
        """What passes within an op at its fullest."""
        kind, _, first, last, finds = running
        # Stages that cost the same share this object: which of them runs does not matter.
        key = (kind, first, last, finds)
        if key not in self._known:
            # Without a pipeline blocks are gathered one by one, by hooks and not by the ops of a program.
            gathered = finds and self.layout.pp > 1
            if kind == "F":
                found = self._forward(gathered)
            elif kind == "B":
                found = self._backward(first, last, gathered)
            elif kind in ("I", "W"):
                found = self._split(kind, first, finds)
            elif kind == "REDUCE_GRAD":
                found = self._reduction()
            elif kind == "UNSHARD" and self.how.fsdp and self.layout.shards > 1:
                # The buffer of what was gathered, until it is copied out: of the ends at the latest.
                found = Passing(prefetched=self.ends * self.how.compute)
            else:
                found = Passing()
            self._known[key] = found
        return self._known[key]

    def _shard(self, parameters: float, experts: float) -> float:
        if not self.layout.zero_stage:
            return parameters
        return per_shard(self.layout, self.job.stack, parameters, experts)

    def _outputs(self) -> tuple[float, float]:
        """Torch's pipelines hold the output of a stage until its backward has ended: bytes that stay when the head
        has used them, and bytes that come to what units save. The input of a stage lies in the buffer in which it was
        received, so that a norm which keeps it takes nothing."""
        job, layout = self.job, self.layout
        if layout.pp == 1 or not job.stack.preallocates_receives:
            return 0.0, 0.0
        width = activation_width(job.training.precision)
        stream = stream_bytes(job, layout)
        first, last = (self.stage.blocks[i][0].stays_gathered for i in (0, -1))
        norm = job.stack.elementwise[job.model.norm]
        kept = norm.saved + norm.saved_fp32 * (width == 4)
        keeps_input = kept > 0 or layout.recompute != "none"
        saved = 0.0 if first or not keeps_input else -stream
        if not last:
            return 0.0, saved + stream
        logits = layout.micro_batch_size * job.training.seq_len / layout.cp * job.model.vocab_size / layout.tp * width
        return (logits, saved) if job.stack.loss_in_place else (0.0, saved + logits)

    def _prefetched(self, unit: UnitCost | None) -> float:
        """Bytes of the gathered buffer of the unit that is needed next."""
        if unit is None or not self.how.drops:
            return 0.0
        alone = self._expert_shards == 1
        own = (unit.parameters - unit.experts) * (self.layout.shards > 1), unit.experts * (not alone)
        return max(own) * self.how.compute

    @functools.cached_property
    def _expert_shards(self) -> int:
        return expert_grid(self.layout, self.job.stack).shards

    def _reduced_at_once(self, unit: UnitCost) -> float:
        """Parameters of a unit whose gradients are reduced together: spread experts are a unit of FSDP's of their own
        within their block."""
        return max(unit.parameters - unit.experts, unit.experts)

    def _forward(self, gathered: bool) -> Passing:
        """Blocks keep what they save one after the other; where they are dropped the last one is gathered still."""
        how, points = self.how, []
        kept, left = 0.0, self.inner * how.compute * (how.drops and gathered)
        in_use = self.ends * how.compute * (how.drops and self.layout.pp == 1)
        for unit, count in self.stage.blocks:
            own = 0.0 if unit.stays_gathered else unit.parameters * how.compute * how.drops
            for place in {1, count}:
                rest = max(own, left - (place - 1) * own) if gathered else own
                ahead = 0.0 if gathered else own
                points.append(Passing(kept + place * unit.saved, gathered=in_use + rest, prefetched=ahead))
            kept += count * unit.saved
            left -= count * own * gathered
        return max(points, key=lambda point: point.total, default=Passing(self.saved))

    def _backward(self, first: bool, last: bool, gathered: bool) -> Passing:
        """Walk the units backwards: what they saved goes, gradients come."""
        how = self.how
        runs = self.stage.blocks[::-1]
        points: list[Passing] = []
        left = self.saved
        # Of gradients: those added up or scattered, those of the ends that wait for the backward's end, and the buffer
        # of the reduction before.
        added = waiting = reducing = 0.0
        in_use = self.ends * how.compute * (how.fsdp and how.drops and self.layout.pp == 1)
        behind = late = 0.0
        once = how.fsdp and not how.drops and last
        born = how.trains and not how.whole
        for number, (unit, count) in enumerate(runs):
            following = runs[number + 1][0] if number + 1 < len(runs) else None
            keeps = how.late or (born and how.fsdp and (how.apart or how.scatters))
            keeps = keeps or (born and first and not how.scatters)
            # An embedding's gradient is made whole every time, wherever it is added up.
            keeps = keeps or (how.trains and unit.stays_gathered)
            size = unit.parameters * how.compute
            shard = self._shard(unit.parameters, unit.experts) * how.gradients
            # The second of a run meets what the first has left.
            for place in sorted({1, min(2, count), count}):
                before = place - 1
                own = 0.0 if unit.stays_gathered else size * how.drops * how.fsdp
                ahead = following if place == count else unit
                if ahead is not None and (ahead.stays_gathered or (gathered and how.drops)):
                    ahead = None
                kept_blocks = 0.0
                if how.drops and gathered:
                    own, kept_blocks = 0.0, self.inner * how.compute
                elif how.drops and self.layout.pp > 1:
                    kept_blocks = behind + before * own
                elif once:
                    kept_blocks = -(behind + before * size * (not unit.stays_gathered))
                grown = 0.0
                if born and first:
                    grown = before * (shard if how.scatters else unit.parameters * how.gradients)
                last_reduced = reducing
                if how.scatters and how.fsdp and before and not unit.stays_gathered:
                    last_reduced = self._reduced_at_once(unit) * how.reduce
                points.append(
                    Passing(
                        left - before * unit.saved,
                        unit.growing if keeps else unit.working,
                        (added + grown if first else 0.0) * born + (late + before * size) * how.late,
                        in_use + own + kept_blocks,
                        self._prefetched(ahead),
                        waiting + last_reduced * how.trains,
                    )
                )
            left -= count * unit.saved
            late += count * size
            if number == 0:
                left += self.stays
            if number == 0 and self._tied and how.trains:
                # The embedding's gradient, which autograd holds from the head on.
                waiting += self._tied * how.compute
            if unit.stays_gathered:
                if how.fsdp and how.trains:
                    if how.apart or how.scatters:
                        waiting += size
                    elif first:
                        added += size
                elif first:
                    added += unit.parameters * how.gradients
            else:
                if first:
                    added += count * (shard if how.scatters else unit.parameters * how.gradients)
                behind += count * size
                reducing = self._reduced_at_once(unit) * how.reduce * (how.scatters and how.fsdp)
        points.append(self._end_of_backward(first, added, waiting, once)._replace(kept=max(0.0, left)))
        return max(points, key=lambda point: point.total)

    @property
    def _tied(self) -> float:
        """Weights that the head of this stage takes from its embedding."""
        model = self.job.model
        return (
            model.vocab_size
            * model.hidden_size
            / self.layout.tp
            * (model.tie_word_embeddings and self.layout.stages == 1)
        )

    def _end_of_backward(self, first: bool, added: float, waiting: float, once: bool) -> Passing:
        """The gradients of the ends are reduced, or added up in the width of the reduction."""
        how = self.how
        if not (how.fsdp and how.trains):
            return Passing(gradients=self.stage.parameters * how.compute * how.late)
        blocks = 0.0
        if how.drops and self.layout.pp > 1:
            blocks = self.inner * how.compute
        elif once:
            blocks = -self.stage.parameters * how.compute
        if how.scatters:
            shard = self._shard(self.ends, 0.0) * how.reduce
            return Passing(
                gradients=added * first, gathered=blocks, reducing=max(waiting, shard) + self.ends * how.reduce
            )
        if once:
            return Passing(gathered=blocks, reducing=self.ends * how.reduce)
        if how.apart:
            largest = max((u.parameters for u, _ in self.stage.blocks if u.stays_gathered), default=0.0)
            wide = (added + self.ends * how.gradients) if first else 0.0
            fresh = largest * how.compute if first else waiting
            return Passing(gradients=wide, gathered=blocks, reducing=fresh)
        return Passing(gradients=added * first, gathered=blocks)

    def _split(self, kind: str, first: bool, finds: bool) -> Passing:
        """An input gradient keeps all that was saved and adds what the weight gradient needs; on its way fresh
        gradients of the microbatch before are added up. A weight gradient frees both unit by unit and makes fresh
        gradients."""
        how, units = self.how, [unit for unit, _ in self.stage.blocks]
        if kind == "W":
            made = self.fresh if how.apart else self.whole
            points = [Passing(self.saved, self.deferred), Passing(gradients=made * first)]
        else:
            begins = Passing(self.saved, units[-1].working, (self.fresh - self.whole * first) * finds)
            # Of the unit whose backward ends last they are still there: of the ends, if the stage has one.
            cast = (self.ends or units[0].parameters) * how.compute
            norm = max(unit.norm_working for unit in units)
            points = [begins, Passing(self.saved, self.deferred + norm, reducing=cast * finds)]
        return max(points, key=lambda point: point.total)

    def _reduction(self) -> Passing:
        """Unit by unit, the ends first: the gradients of those that are not reduced yet, and a unit's copy."""
        how = self.how
        if not how.fsdp or not how.trains:
            return Passing(gradients=self.whole, gathered=self.ends_gathered)
        if how.scatters or self.layout.pp == 1:
            return Passing(gradients=self.whole)
        # What is scattered comes out beside what goes in.
        shard = self._shard(self.ends, 0.0) * (self.layout.shards > 1)
        return Passing(gradients=self.whole, reducing=(self.ends + shard) * how.reduce)
