"""What a rank of the project's runtime sends in a step: its collectives and messages, counted from the program.

The list is what `layoutwise run --alone --fake` counts in the real runtime (tests/runtime/test_communication_oracle.py
holds both equal). Sizes and numbers of each collective come from where the simulator prices them: unit_transfers.py,
data_parallel.py, messages.py.

What FSDP gathers depends on what was gathered before, so a rank's ops are walked through in their order:

    UNSHARD    gathers all units of a stage that are not there
    F          gathers what is not there; zero_stage 3 drops the blocks behind it, never the root
    B, I       gathers what is not there; without a pipeline zero_stage 3 drops everything behind it
    RESHARD, REDUCE_GRAD     drop everything

Left out on purpose: nothing but what a step of the runtime does not do every time (checkpoints, metrics). Tokens are
spread evenly over experts, as all-to-alls with a fake process group have them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.cluster import GroupShape
from simulator.collectives import Transfer
from simulator.data_parallel import (
    bucket_sizes,
    gather_transfer,
    replica_transfer,
    scatter_transfer,
    uses_fsdp,
)
from simulator.expert_parallel import expert_grid
from simulator.layout import Layout
from simulator.messages import message_bytes
from simulator.program import sharded_order, stage_messages
from simulator.results import Collective
from simulator.schedules import Op, compute_order
from simulator.unit_transfers import Transfers, cut_of, kernels_of_block, of_block, of_embedding, of_head, stream_bytes
from simulator.weights import Cutting, Weights, block_weights, elements, embedding_weights, expert_weights, head_weights

if TYPE_CHECKING:
    from simulator.job import Job

# Loss and squared gradient norm over all ranks, both float64.
AGREEMENT = Transfer("all_reduce", "world", 16.0)


def communication(job: Job, layout: Layout, rank: int) -> tuple[Collective, ...]:
    """The collectives and messages of one step of a rank, by axis and kind; bytes are of the whole buffer that a
    collective gathers, reduces, scatters or exchanges, and of the tensor that a message moves.

    Args:
        job: with a stack that the runtime executes (`layoutwise-...`): others cut and bundle differently.
        rank: a global rank; ranks of a pipeline stage send the same.
    """
    names = _group_names(layout)
    counts: Counter[tuple[str, str]] = Counter()
    sizes: Counter[tuple[str, str]] = Counter()
    for transfer in _Walk(job, layout, layout.coordinates(rank)["pp"]).step():
        if transfer.size > 0 and transfer.times:
            # A message lies along pp, whichever way it goes.
            row = ("pp", transfer.group) if transfer.kind == "send_recv" else (names[transfer.group], transfer.kind)
            counts[row] += transfer.times
            sizes[row] += round(transfer.times * transfer.size)
    return tuple(Collective(kind, axis, counts[axis, kind], float(sizes[axis, kind])) for axis, kind in sorted(counts))


def group_name(layout: Layout, ranks: tuple[int, ...]) -> str:
    """What a group of ranks is called: the axes along which they differ, outermost first, or `world` for all ranks of a
    layout with more than one such axis.

    >>> group_name(Layout(dp_shard=2, cp=2, tp=2, zero_stage=3), (0, 2, 4, 6))
    'dp_shard_cp'
    """
    places = [layout.coordinates(rank) for rank in ranks]
    return _axes_name(layout, [axis for axis in layout.axes if len({place[axis] for place in places}) > 1])


def _axes_name(layout: Layout, axes: Iterable[str]) -> str:
    wide = [axis for axis in reversed(layout.axes) if axis in axes and getattr(layout, axis) > 1]
    everybody = all(axis in wide for axis in layout.axes if getattr(layout, axis) > 1)
    return "world" if not wide or (everybody and len(wide) > 1) else "_".join(wide)


def _group_names(layout: Layout) -> dict[str, str]:
    """The names of the groups that a transfer may be in."""
    axes: dict[str, tuple[str, ...]] = {axis: (axis,) for axis in ("tp", "cp", "pp")}
    axes["shard"] = ("dp_shard", "cp") if layout.zero_stage else ("dp_shard",)
    axes["replicate"] = ("dp_replicate",) if layout.zero_stage else ("dp_replicate", "cp")
    axes["world"] = layout.axes
    own = {name: name for name in ("ep", "expert_shard", "expert_replicate")}
    return own | {name: _axes_name(layout, group) for name, group in axes.items()}


@dataclass
class _Unit:
    """What FSDP wraps, or a part of it: weights, the ranks that they are sharded over, whether it is (with) the root,
    and what moves in a forward, in a backward, and in a forward that is run again."""

    weights: Weights
    group: str
    shards: int
    replicas: int
    root: bool = False
    gathered: bool = False


@dataclass
class _Stage:
    """A stage's units, and the transfers of its ops besides those of FSDP."""

    units: list[_Unit]
    forward: Transfers
    backward: Transfers


class _Walk:
    """One step of a pipeline rank. Stages are made once; `gathered` of their units changes as ops go by."""

    def __init__(self, job: Job, layout: Layout, pp_rank: int) -> None:
        self.job, self.layout, self.pp_rank = job, layout, pp_rank
        self.grid = expert_grid(layout, job.stack)
        self.cutting = Cutting(layout.tp, layout.sequence_parallel, layout.ep, self.grid.tp)
        self.cut = cut_of(job, layout)
        self.microbatches = layout.microbatches(job.training.global_batch_size)
        self.fsdp = uses_fsdp(job, layout)
        self.recipe = job.stack.recipes[job.training.precision]
        self.stages = {number: self._stage(number) for number in layout.stages_of(pp_rank)}

    def step(self) -> Iterator[Transfer]:
        yield from self._through_pipeline() if self.layout.pp > 1 else self._one_stage()
        if not self.fsdp:
            yield from self._without_fsdp()
        yield AGREEMENT

    def _one_stage(self) -> Iterator[Transfer]:
        (stage,) = self.stages.values()
        for number in range(self.microbatches):
            last = number == self.microbatches - 1
            yield from self._gather(stage)
            yield from stage.forward
            self._drop(stage, blocks=True)
            yield from self._gather(stage)
            yield from stage.backward
            if self.fsdp and (last or self.layout.shards_gradients):
                yield from self._reduce(stage, last)
            self._drop(stage, blocks=False)

    def _through_pipeline(self) -> Iterator[Transfer]:
        shape = (self.layout.pp, self.layout.virtual_stages, self.microbatches)
        order = compute_order(self.layout.schedule, self.pp_rank, *shape)
        messages, size = stage_messages(self.layout), message_bytes(self.job, self.layout)
        for op in sharded_order(order, self.layout):
            for leaf in op.leaves:
                assert leaf.stage is not None
                yield from self._op(leaf, self.stages[leaf.stage], leaf.stage == 0)
                for kind in messages.get((leaf.kind, leaf.stage), ()):
                    if kind:
                        yield Transfer("send_recv", kind.partition("_")[0].lower(), size)

    def _op(self, op: Op, stage: _Stage, first: bool) -> Iterator[Transfer]:
        if op.kind in ("UNSHARD", "F", "B", "I", "W"):
            yield from self._gather(stage)
        if op.kind == "F":
            yield from stage.forward
            self._drop(stage, blocks=True)
        # Nobody waits for an input gradient of the first stage: torch runs its whole backward in the weights' turn.
        elif op.kind == "B" or op.kind == ("W" if first else "I"):
            yield from stage.backward
        elif op.kind == "REDUCE_GRAD" and self.fsdp:
            yield from self._reduce(stage, last=True)
        if op.kind in ("RESHARD", "REDUCE_GRAD"):
            for unit in stage.units:
                unit.gathered = False

    def _drop(self, stage: _Stage, blocks: bool) -> None:
        """What zero_stage 3 drops behind a forward (blocks), and without a pipeline behind a backward (everything)."""
        for unit in stage.units:
            if self.layout.zero_stage == 3 and not (blocks and unit.root):
                unit.gathered = False

    def _gather(self, stage: _Stage) -> Iterator[Transfer]:
        for unit in stage.units:
            if self.fsdp and not unit.gathered:
                unit.gathered = True
                if unit.shards > 1:
                    yield gather_transfer(self.job, elements(unit.weights, unit.shards), unit.group + "shard")

    def _reduce(self, stage: _Stage, last: bool) -> Iterator[Transfer]:
        """FSDP's reduction: what tensor-parallel ranks have summands of first, then to shards, then over replicas."""
        # Gradients that were added up over microbatches have the width in which they are reduced.
        added = self.layout.pp > 1 or (self.microbatches > 1 and not self.layout.shards_gradients)
        width = self.recipe.gradient_reduce if added else self.recipe.compute
        for unit in stage.units:
            for weight in unit.weights:
                if weight.partial:
                    yield Transfer("all_reduce", "tp", width * weight.elements)
            whole = elements(unit.weights, unit.shards)
            if unit.shards > 1:
                yield scatter_transfer(self.job, whole, unit.group + "shard")
            if last and unit.replicas > 1:
                yield replica_transfer(self.job, whole, unit.group + "replicate", unit.shards)

    def _without_fsdp(self) -> Iterator[Transfer]:
        """Gradients in DDP's buckets, or where there are no replicas the summands of tensor-parallel ranks at once."""
        partial = [w for s in self.stages.values() for u in s.units for w in u.weights if w.partial]
        if partial:
            yield Transfer("all_reduce", "tp", 4.0 * elements(partial))
        if self.layout.dp_replicate * self.layout.cp > 1:
            for stage in self.stages.values():
                sizes = [4.0 * weight.elements for unit in stage.units for weight in unit.weights]
                for size in bucket_sizes(sizes):
                    yield Transfer("all_reduce", "replicate", size)

    def _stage(self, number: int) -> _Stage:
        model, layout = self.job.model, self.layout
        layers = layout.layers_per_stage(model.num_hidden_layers)
        first, last = number == 0, number == layout.stages - 1
        units: list[_Unit] = []
        forward: list[Transfer] = []
        backward: list[Transfer] = []
        for index in range(sum(layers[:number]), sum(layers[: number + 1])):
            units += self._block_units(index)
            # No stack that runs sends a token once for several experts: how the group lies does not matter.
            ep = GroupShape(layout.ep, 1, layout.ep, 1.0)
            moved = of_block(self.job, layout, self.cut, index, kernels_of_block(self.job, self.cut, index), ep)
            forward += _flat(moved.forward)
            backward += _flat(moved.backward) + _flat(moved.again)
        ends: Weights = ()
        if first:
            ends += embedding_weights(model, self.cutting)
            moved = of_embedding(self.job, layout, self.cut)
            forward, backward = [*_flat(moved.forward), *forward], [*backward, *_flat(moved.backward)]
        if last:
            ends += head_weights(model, self.cutting, first and model.tie_word_embeddings)
            moved = of_head(self.job, layout, self.cut)
            forward += _flat(moved.forward)
            backward += _flat(moved.backward)
            if model.family == "bert" and layout.tp > 1 and not layout.sequence_parallel:
                # The transform in front of the head is cut by columns, and its output gathered again.
                size = stream_bytes(self.job, self.cut)
                forward.append(Transfer("all_gather", "tp", size))
                backward.append(Transfer("all_reduce", "tp", size))
        if ends:
            # FSDP's root holds what is in no block; torch sets its hooks up first.
            units.insert(0, self._dense(ends, root=True))
        return _Stage(units, tuple(forward), tuple(backward))

    def _dense(self, weights: Weights, root: bool = False) -> _Unit:
        layout = self.layout
        replicas = layout.dp * layout.cp // layout.shards
        return _Unit(weights, "", layout.shards, replicas, root)

    def _block_units(self, index: int) -> list[_Unit]:
        model = self.job.model
        kind = model.block_kind(index)
        found = [self._dense(block_weights(model, kind, self.cutting))]
        if kind == "moe" and self.layout.ep > 1:
            weights = expert_weights(model, self.cutting)
            found.append(_Unit(weights, "expert_", self.grid.shards, self.grid.replicas))
        return found


def _flat(moved: dict[str, Transfers]) -> Transfers:
    """The transfers of all axes."""
    return tuple(transfer for transfers in moved.values() for transfer in transfers)
