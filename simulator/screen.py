"""Screening: for many layouts at once, seconds that no schedule of them can beat, and bytes that they need at least.

The same unit costs that the simulator adds up (unit_table.py) in closed form, as array arithmetic: a million layouts
take seconds. Both are lower bounds; what they leave is judged by the exact costs and by the simulator.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.axes import AXES
from simulator.collectives import message_seconds
from simulator.columns import Column, Columns, distinct
from simulator.compute import accumulation_seconds
from simulator.expert_parallel import expert_grid
from simulator.layout import Layout
from simulator.memory import fragmented, overhead_bytes, state_bytes
from simulator.messages import message_bytes, message_shapes
from simulator.passing import Sharding
from simulator.schedules import SPLIT_BACKWARD, V_PLACEMENT, Schedule
from simulator.step_end import norm_seconds, update_seconds
from simulator.unit_table import Floats, UnitTable

if TYPE_CHECKING:
    from simulator.job import Job


@dataclass(frozen=True)
class Screened:
    """What screening says of each row: seconds of a step, of them those of its pipeline, and bytes of the fullest rank,
    all at least."""

    seconds: Floats
    pipeline: Floats
    memory: Floats


def screen(job: Job, columns: Columns) -> Screened:
    """Lower bounds of legal layouts (all rows must be)."""
    if not len(columns):
        return Screened(np.zeros(0), np.zeros(0), np.zeros(0))
    screening = _Screening(job, columns)
    pipeline = screening.pipeline()
    return Screened(pipeline + screening.update() + screening.norm(), pipeline, screening.memory())


@dataclass(frozen=True)
class _Ranks:
    """The pipeline ranks of every way to cut a model into stages of which one has most to do, whatever units cost.

    Arrays are cuts x ranks (x units); cuts with fewer such ranks repeat one. `own` counts the units of a rank, `before`
    those that a microbatch passes before it comes to the rank, `hops` its messages on the way there, `sends` those that
    the rank sends for each microbatch, `place` is the rank.
    """

    code: Column
    own: Floats
    before: Floats
    hops: Floats
    sends: Floats


class _Screening:
    def __init__(self, job: Job, columns: Columns) -> None:
        self.job, self.columns = job, columns
        self.units = UnitTable(job, columns)
        self.count = columns.microbatches(job.training.global_batch_size).astype(np.float64)
        self.split = columns.is_named("schedule", *SPLIT_BACKWARD)
        sizes = [columns[name] for name in (*AXES, "ep", "zero_stage", "offload")]
        grids, self.grid = distinct(columns["rank_order"], *sizes)
        self.grids = columns.layouts(grids)
        self.shards, self.expert_shards = self._shards()
        self.ranks = self._ranks()

    def pipeline(self) -> Floats:
        """Seconds that no schedule can beat.

        Rule: max over ranks of (forwards and messages on the way to the rank) + m · (its own work) + (backwards and
        messages on the way back), as every microbatch's first forward climbs to the rank and its last backward comes
        back from it; then the update of the rank with the most parameters and the gradient norm. Where the backward
        is split a rank may end with weight gradients, which nobody waits for: nothing follows. Of overlapped pairs
        what the stack hides in them does not count. A sender that waits for its messages has them as own work.
        Ignored, so that it stays below: data-parallel communication, waiting of ranks for each other.
        """
        units, job, code = self.units, self.job, self.units.code
        forward, backward = units["forward"][code], units["backward"][code] + self._accumulation()
        passes = forward + backward
        own = passes - units["hidden"][code] * self.columns.is_named("schedule", "DualPipeV")[:, None]
        before = np.where(self.split[:, None], forward, passes)
        hop = self._hop_seconds()
        waits = np.zeros(len(hop)) if job.stack.overlap_p2p else hop
        best = np.zeros(len(self.columns))
        ranks = self.ranks
        for place in range(ranks.own.shape[1]):
            work = _dot(ranks.own[ranks.code, place], own)
            climb = _dot(ranks.before[ranks.code, place], before)
            hops = ranks.hops[ranks.code, place]
            # A sender that waits has the first hop of its way back among its own messages.
            back = np.where(self.split, 0.0, hops if job.stack.overlap_p2p else np.maximum(0.0, hops - 1))
            climb += (hops + back) * hop
            best = np.maximum(best, climb + self.count * (work + ranks.sends[ranks.code, place] * waits))
        return best

    def memory(self) -> Floats:
        """Bytes that the fullest rank needs at least.

        Rule: parameters, optimizer state and what the microbatches keep whose forwards come before a rank's first
        backward; gradients where they have their memory from the start.
        Left out, so that it stays below: what a backward works on, gathered parameters, buffers.
        """
        job, units, columns = self.job, self.units, self.columns
        # Which stacks hold whole gradients from the start may depend on whether the backward is split.
        rows, recipe = distinct(self.grid, self.split)
        layouts = columns.layouts(rows)
        held = self._held(layouts, recipe)
        # Activations that leave for the host are none that are kept; which do is up to the stage.
        saved = units["saved"][units.code] * (not job.stack.offloaded_blocks)
        firsts, code = distinct(
            *(columns[name] for name in ("pp", "virtual_stages", "stage_layers", "schedule")), self._rounds()
        )
        batch = job.training.global_batch_size
        cuts = [_fullest(layout, batch, units.block_kinds, units.units) for layout in columns.layouts(firsts)]
        ranks, count = _padded(cuts), units.units
        most = np.zeros(len(columns))
        for place in range(ranks.shape[1]):
            own, kept = ranks[code, place, :count], ranks[code, place, count:]
            activations: Any = _dot(kept, saved)
            most = np.maximum(most, _dot(own, held) + activations + fragmented(job, activations, 0.0))
        overhead = np.array([overhead_bytes(job, layout) for layout in layouts])[recipe]
        return most + overhead

    def _held(self, layouts: list[Layout], recipe: Column) -> Floats:
        """Bytes of the state that is there all through a step, for each unit: linear in parameters and experts'."""
        found = []
        for layout in layouts:
            sharding = Sharding.of(self.job, layout)
            dense, routed = (state_bytes(self.job, layout, sharding, 1.0, experts) for experts in (0.0, 1.0))
            found.append((sum(dense.values()), sum(routed.values())))
        per_dense, per_routed = np.array(found, dtype=np.float64)[recipe].T
        parameters, experts = self.units["parameters"][self.units.code], self.units["experts"][self.units.code]
        return parameters * per_dense[:, None] + experts * (per_routed - per_dense)[:, None]

    def _rounds(self) -> Column:
        """Numbers of microbatches that differ in what is alive before the first backward: a depth-first schedule goes
        through rounds of equally many, of which the first few decide; all that come together count alone where they
        are all alive."""
        count, pp = self.count.astype(np.int64), np.maximum(self.columns["pp"], 1)
        rounds = np.maximum(1, count // pp)
        whole = self.columns.is_named("schedule", "GPipe", "LoopedBFS")
        return np.where(whole, count, np.minimum(rounds, 4) * (count // rounds))

    def _accumulation(self) -> Floats:
        """Seconds of adding up gradients, on top of what the table has for units without it."""
        job, units = self.job, self.units
        if job.stack.fused_accumulation or job.training.peft != "none":
            return np.zeros((len(self.columns), units.units))
        parameters, experts = units["parameters"][units.code], units["experts"][units.code]
        sharded = ((self.columns["zero_stage"] >= 2) & (self.columns["pp"] == 1))[:, None]
        shards = (parameters - experts) / self.shards[:, None] + experts / self.expert_shards[:, None]
        share = (self.count - 1) / np.maximum(self.count, 1)
        added: Any = np.where(sharded, shards, parameters)
        seconds = accumulation_seconds(job.cluster.gpu, added) * share[:, None]
        # A host that launches more slowly than the device computes is busy longer anyway.
        return np.maximum(0.0, seconds - units["host"][units.code])

    def update(self) -> Floats:
        """Seconds of the optimizer on the rank that has most to update."""
        units, ranks = self.units, self.ranks
        parameters, experts = units["parameters"][units.code], units["experts"][units.code]
        most = np.zeros(len(self.columns))
        for place in range(ranks.own.shape[1]):
            own = ranks.own[ranks.code, place]
            held, routed = _dot(own, parameters), _dot(own, experts)
            most = np.maximum(most, (held - routed) / self.shards + routed / self.expert_shards)
        offloaded = self.columns.is_named("offload", "optimizer")
        ranks_per_node = np.minimum(self.job.cluster.gpus_per_node, self._world())
        seconds: Floats = update_seconds(self.job, most, ranks_per_node, offloaded)
        return seconds

    def _world(self) -> Column:
        columns = self.columns
        return columns["dp_replicate"] * columns["dp_shard"] * columns["cp"] * columns["tp"] * columns["pp"]

    def norm(self) -> Floats:
        firsts, code = distinct(self._world())
        return np.array([norm_seconds(self.job, layout) for layout in self.columns.layouts(firsts)])[code]

    def _shards(self) -> tuple[Floats, Floats]:
        """Ranks that share the state of a parameter, and of one of a routed expert."""
        found = []
        for layout in self.grids:
            found.append((layout.shards, expert_grid(layout, self.job.stack).shards))
        shards = np.array(found, dtype=np.float64)[self.grid]
        return shards[:, 0], shards[:, 1]

    def _hop_seconds(self) -> Floats:
        """Seconds of the message between two pipeline ranks that lie best."""
        columns, known = self.columns, dict[object, int]()
        lies = (message_shapes(self.job, layout) for layout in self.grids)
        shapes = [known.setdefault(shapes, len(known)) for shapes in lies]
        fields = [columns[name] for name in ("tp", "cp", "micro_batch_size", "sequence_parallel")]
        firsts, code = distinct(np.array(shapes)[self.grid], *fields)
        return np.array([self._least_message(layout) for layout in columns.layouts(firsts)])[code]

    def _least_message(self, layout: Layout) -> float:
        size = message_bytes(self.job, layout)
        costs = (message_seconds(size, shape, self.job.cluster) for shape in message_shapes(self.job, layout))
        return min((latency + seconds for latency, seconds in costs), default=0.0)

    def _ranks(self) -> _Ranks:
        columns = self.columns
        v_shaped = columns.is_named("schedule", *V_PLACEMENT)
        firsts, code = distinct(columns["pp"], columns["virtual_stages"], columns["stage_layers"], v_shaped)
        count = self.units.units
        table = _padded([_busiest(layout, self.units.block_kinds, count) for layout in columns.layouts(firsts)])
        return _Ranks(code, table[:, :, :count], table[:, :, count : 2 * count], table[:, :, -2], table[:, :, -1])


def stage_units(layout: Layout, block_kinds: tuple[int, ...], units: int) -> Floats:
    """How many of each unit every stage has: stages x units. `block_kinds` are the places of the model's blocks among
    the units, of which the last two are the embedding and the head."""
    return _cut_units(layout.layers_per_stage(len(block_kinds)), block_kinds, units)


@functools.lru_cache(maxsize=4096)
def _cut_units(layers: tuple[int, ...], block_kinds: tuple[int, ...], units: int) -> Floats:
    found, first = np.zeros((len(layers), units)), 0
    for stage, count in enumerate(layers):
        for kind in block_kinds[first : first + count]:
            found[stage, kind] += 1
        first += count
    found[0, -2] += 1
    found[-1, -1] += 1
    found.flags.writeable = False
    return found


def _busiest(layout: Layout, block_kinds: tuple[int, ...], units: int) -> list[Floats]:
    """Vectors (own units, units before, hops, sends) of the ranks that no other rank exceeds in everything."""
    stages, pp = stage_units(layout, block_kinds, units), layout.pp
    ranks = [layout.rank_of_stage(stage) for stage in range(layout.stages)]
    own, sends = np.zeros((pp, units)), np.zeros((pp, 1))
    for stage, rank in enumerate(ranks):
        own[rank] += stages[stage]
        sends[rank] += sum(ranks[near] != rank for near in (stage - 1, stage + 1) if 0 <= near < len(ranks))
    before = np.vstack([np.zeros(units), np.cumsum(stages[: pp - 1], axis=0)])
    return _undominated(np.hstack([own, before, np.arange(pp)[:, None], sends]))


def _fullest(layout: Layout, batch: int, block_kinds: tuple[int, ...], units: int) -> list[Floats]:
    """Vectors (own units, units whose microbatches are kept) of the ranks that no other rank exceeds in everything."""
    held = _held_stages(layout.pp, layout.virtual_stages, layout.schedule)
    stages = stage_units(layout, block_kinds, units)[held]
    kept = _kept(layout.schedule, layout.pp, layout.virtual_stages, layout.microbatches(batch))
    return _undominated(np.hstack([stages.sum(axis=1), np.einsum("rc,rcu->ru", kept, stages)]))


@functools.lru_cache(maxsize=4096)
def _held_stages(ranks: int, chunks: int, schedule: Schedule) -> Column:
    """The stages of each rank: ranks x chunks."""
    layout = Layout(pp=ranks, virtual_stages=chunks, schedule=schedule)
    return np.array([layout.stages_of(rank) for rank in range(ranks)])


@functools.lru_cache(maxsize=65536)
def _kept(schedule: Schedule, ranks: int, chunks: int, microbatches: int) -> Floats:
    """Microbatches before the first backward: ranks x chunks."""
    layout = Layout(pp=ranks, virtual_stages=chunks, schedule=schedule)
    return np.array([before_backward(layout, rank, microbatches) for rank in range(ranks)], dtype=np.float64)


def before_backward(layout: Layout, rank: int, microbatches: int) -> list[int]:
    """Microbatches of each chunk of a rank whose forwards come before its first backward (schedules.py)."""
    ranks, chunks, schedule = layout.pp, layout.virtual_stages, layout.schedule
    if schedule in ("GPipe", "LoopedBFS"):
        return [microbatches] * chunks
    if schedule == "1F1B":
        return [min(ranks - rank, microbatches)]
    if schedule == "DualPipeV":
        return [min(microbatches, 2 * ranks - rank - 1), min(microbatches, rank + 1)]
    if schedule == "ZBVZeroBubble":
        first = 2 * (ranks - rank) - 1 + rank
        return [min(microbatches, first), min(microbatches, rank + 1)]
    per_round = microbatches // max(1, microbatches // ranks)
    hops = (2 if schedule == "Interleaved1F1B" else 1) * (ranks - 1 - rank)
    forwards = min((chunks - 1) * per_round + hops + 1, chunks * microbatches)
    turns, rest = divmod(forwards, per_round)
    rounds, started = divmod(turns, chunks)
    return [rounds * per_round + per_round * (chunk < started) + rest * (chunk == started) for chunk in range(chunks)]


def _undominated(vectors: Floats) -> list[Floats]:
    """Those vectors that no other exceeds in everything; of equal ones the first."""
    count = np.arange(len(vectors))
    exceeded = (vectors[None, :, :] >= vectors[:, None, :]).all(axis=2)
    exceeded &= ~(exceeded & exceeded.T) | (count[None, :] < count[:, None])
    return [vectors[i] for i in np.flatnonzero(~exceeded.any(axis=1))]


def _padded(cuts: list[list[Floats]]) -> Floats:
    """Cuts x vectors x numbers; cuts with fewer vectors repeat their last."""
    widest = max(len(cut) for cut in cuts)
    return np.array([[cut[min(place, len(cut) - 1)] for place in range(widest)] for cut in cuts])


def _dot(a: Floats, b: Floats) -> Floats:
    """The sum of products of each row."""
    return np.einsum("nu,nu->n", a, b)
