"""A step of one pipeline rank in parts: its kernels by name, and its collectives and messages with the links that they
go over.

The same cost functions as everywhere, added up by another key: kernels sum to the `compute` of the rank's forwards and
backwards (tests/simulator/test_step_parts.py), and collectives have their seconds alone on their links, of which a
Breakdown holds what nothing hides.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from simulator.cluster import GroupShape
from simulator.collectives import Collective, Transfer, bus_bytes, collective_seconds, slowest_link
from simulator.compute import activation_width, kernel_time
from simulator.context_parallel import moved_seconds
from simulator.data_parallel import DataParallel
from simulator.kernels import Attention, Cut, Kernel, Matmul, embedding_kernels, head_kernels
from simulator.layout import Layout
from simulator.messages import message_bytes, message_cost, message_shapes
from simulator.placement import Groups
from simulator.program import Program, stage_messages
from simulator.results import Breakdown
from simulator.stage import StageCost, StageCosts
from simulator.unit_cost import UnitCost
from simulator.unit_transfers import UnitTransfers, kernels_of_block, of_block, of_embedding, of_head

if TYPE_CHECKING:
    from simulator.job import Job


@dataclass(frozen=True)
class KernelPart:
    """All kernels of one name in a step: seconds of forward and backward, the FLOPs of those that count arithmetic, the
    bytes of those that memory bounds."""

    name: str
    kind: Literal["matmul", "attention", "memory"]
    seconds: float
    flops: float
    bytes: float


@dataclass(frozen=True)
class TransferPart:
    """All collectives or messages of one kind and size on one axis in a step. `bytes` is the buffer of each, `seconds`
    are those of all of them alone on their links, `bandwidth` what passes their slowest link in a second
    (collectives.bus_bytes). They go over `link`, between `domains` scale-up domains; `limited_by` are the links whose
    bandwidth they wait for, inside of a domain also where they leave it (collectives.slowest_link)."""

    axis: str
    kind: str
    count: float
    bytes: float
    seconds: float
    bandwidth: float
    link: str
    ranks: int
    domains: int
    limited_by: str


@dataclass(frozen=True)
class StepParts:
    """What a pipeline rank does in a step. accumulation is the adding up of gradients over microbatches in seconds,
    with what data parallelism copies; work is all forwards and backwards of the rank, blocks how many blocks it holds,
    parameters what it updates of them before sharding."""

    rank: int
    kernels: tuple[KernelPart, ...]
    transfers: tuple[TransferPart, ...]
    accumulation: float
    blocks: int
    parameters: float

    @property
    def flops(self) -> float:
        """Of matmuls and attention, recomputation not counted."""
        return sum(kernel.flops for kernel in self.kernels)

    @property
    def arithmetic(self) -> float:
        """Seconds of matmuls and attention."""
        return sum(kernel.seconds for kernel in self.kernels if kernel.kind != "memory")

    def of(self, axis: str) -> list[TransferPart]:
        """The transfers along an axis, the longest first."""
        return sorted((t for t in self.transfers if t.axis == axis), key=lambda t: -t.seconds)


def critical_rank(job: Job, layout: Layout, stages: tuple[StageCost, ...], breakdown: Breakdown) -> int:
    """The pipeline rank whose forwards and backwards a breakdown holds: the one whose seconds are nearest to it."""
    count = layout.microbatches(job.training.global_batch_size)

    def off(rank: int) -> float:
        own = [stages[s].forward + stages[s].backward for s in layout.stages_of(rank)]
        names = ("compute", "recompute", "tp", "cp", "ep")
        return sum(abs(count * sum(getattr(work, n) for work in own) - getattr(breakdown, n)) for n in names)

    return min(range(layout.pp), key=off)


def step_parts(job: Job, layout: Layout, program: Program, rank: int) -> StepParts:
    """The parts of a step of a pipeline rank of a legal layout."""
    return _Parts(job, layout, program, rank).parts()


class _Parts:
    def __init__(self, job: Job, layout: Layout, program: Program, rank: int) -> None:
        self.job, self.layout, self.program, self.rank = job, layout, program, rank
        self.costs = StageCosts(job, layout)
        self.cut: Cut = self.costs.units.cut
        self.groups: Groups = self.costs.groups[rank]
        self.count = layout.microbatches(job.training.global_batch_size)
        self.kernels: Counter[Kernel] = Counter()
        self.moved: dict[tuple[str, Transfer], float] = {}
        self.blocks = 0

    def parts(self) -> StepParts:
        job, layout, cut = self.job, self.layout, self.cut
        layers = layout.layers_per_stage(job.model.num_hidden_layers)
        held = [self.program.stages[stage] for stage in layout.stages_of(self.rank)]
        for stage in layout.stages_of(self.rank):
            first = sum(layers[:stage])
            self.blocks += layers[stage]
            for index in range(first, first + layers[stage]):
                block = kernels_of_block(job, cut, index)
                self._unit(block, of_block(job, layout, cut, index, block, self.groups.ep))
            if stage == 0:
                self._unit(embedding_kernels(job.model, cut, job.stack), of_embedding(job, layout, cut))
            if stage == layout.stages - 1:
                self._unit(head_kernels(job.model, cut, job.stack), of_head(job, layout, cut))
            self._data(stage)
        kernels = tuple(self._kernel_parts())
        compute = self.count * sum(s.forward.compute + s.backward.compute for s in held)
        return StepParts(
            self.rank,
            kernels,
            (*self._transfer_parts(), *self._messages()),
            max(0.0, compute - sum(kernel.seconds for kernel in kernels)),
            self.blocks,
            sum(s.parameters for s in held),
        )

    def _unit(self, kernels: Iterable[Kernel], transfers: UnitTransfers) -> None:
        for kernel in kernels:
            self.kernels[kernel] += 1
        for way in transfers:
            for axis, moved in way.items():
                self._move(axis, moved, self.count)

    def _move(self, axis: str, transfers: Iterable[Transfer], times: float) -> None:
        for transfer in transfers:
            if transfer.size > 0 and transfer.times and times:
                key = axis, transfer._replace(times=1)
                self.moved[key] = self.moved.get(key, 0.0) + transfer.times * times

    def _data(self, stage: int) -> None:
        """Gathers, scatters and reductions over replicas of a stage, as data_parallel.py places them."""
        groups, cost, layout = self.groups, self.program.stages[stage], self.layout
        data = DataParallel(
            self.job, layout, groups.shard, groups.replicate, groups.expert_shard, groups.expert_replicate
        )
        every = data.gathers_every_microbatch and layout.pp == 1
        for unit, many in cost.blocks:
            if every:
                self._move("dp", data.gathers(unit.parameters, unit.experts), many * self.count * _passes(unit))
            elif data.gathers_every_microbatch:
                backward = 0 if unit.stays_gathered else many * self.count
                self._move("dp", data.gathers(unit.parameters, unit.experts), backward)
            if layout.shards_gradients:
                self._move("dp", data.scatters(unit.parameters, unit.experts), many * self.count)
        if cost.gather:
            times = sum(op.kind == "UNSHARD" and op.stage == stage for op in self.program.orders[self.rank])
            self._move("dp", data.gathers(cost.parameters, cost.experts, cost.units), times)
        if cost.reduce:
            self._move("dp", data.replicas(cost.parameters, cost.experts, cost.units), 1)
            if not layout.shards_gradients:
                self._move("dp", data.scatters(cost.parameters, cost.experts, cost.units), 1)

    def _kernel_parts(self) -> Iterator[KernelPart]:
        job, found = self.job, dict[str, KernelPart]()
        precision, stack, gpu = job.training.precision, job.stack, job.cluster.gpu
        frozen = job.training.peft != "none"
        for kernel, many in self.kernels.items():
            time = kernel_time([kernel], gpu, stack, precision, self.layout.tp)
            time = time.without_weights() if frozen else time
            flops = moved = 0.0
            if isinstance(kernel, Matmul):
                flops = 2.0 * kernel.m * kernel.n * kernel.k * kernel.copies * (2 if frozen else 3)
            elif isinstance(kernel, Attention):
                flops = 3.5 * kernel.flops
            else:
                entry = stack.elementwise[kernel.name]
                moved = kernel.elements * (entry.forward + entry.backward) * activation_width(precision)
            kind: Literal["matmul", "attention", "memory"] = "memory"
            if flops:
                kind = "matmul" if isinstance(kernel, Matmul) else "attention"
            times = many * self.count
            known = found.get(kernel.name, KernelPart(kernel.name, kind, 0.0, 0.0, 0.0))
            found[kernel.name] = dataclasses.replace(
                known,
                seconds=known.seconds + times * (time.forward + time.backward),
                flops=known.flops + times * flops,
                bytes=known.bytes + times * moved,
            )
        return iter(sorted(found.values(), key=lambda part: -part.seconds))

    def _transfer_parts(self) -> Iterator[TransferPart]:
        for (axis, transfer), count in self.moved.items():
            shape: GroupShape = getattr(self.groups, transfer.group)
            if shape.ranks == 1:
                continue
            if axis == "cp":
                each = moved_seconds(self.job, [transfer], shape)
                ring = self.job.stack.context_parallel == "ring"
                passed = transfer.size if ring else bus_bytes(transfer.kind, shape.ranks, transfer.size)
            else:
                each = collective_seconds(transfer.kind, transfer.size, shape, self.job.cluster)
                passed = bus_bytes(transfer.kind, shape.ranks, transfer.size)
            yield self._part(axis, transfer.kind, count, transfer.size, each, passed, shape)

    def _messages(self) -> Iterator[TransferPart]:
        """What the rank sends along the pipeline."""
        layout, job = self.layout, self.job
        if layout.pp == 1:
            return
        kinds, sent = stage_messages(layout), 0
        for stage in layout.stages_of(self.rank):
            sent += sum(bool(kinds[kind, stage][1]) for kind in ("F", "B"))
        if not sent:
            return
        neighbour = self.rank + 1 if self.rank + 1 < layout.pp else self.rank - 1
        ends = layout.rank(pp=self.rank), layout.rank(pp=neighbour)
        latency, seconds, _ = message_cost(job, layout, *ends, None, fold=True)
        shape = max(message_shapes(job, layout), key=lambda one: (one.domains, -one.slowest))
        size = message_bytes(job, layout)
        yield self._part("pp", "send_recv", sent * self.count, size, latency + seconds, size, shape)

    def _part(
        self, axis: str, kind: Collective, count: float, size: float, each: float, passed: float, shape: GroupShape
    ) -> TransferPart:
        spec = self.job.cluster
        link = spec.scale_up if shape.domains == 1 else spec.scale_out
        assert link is not None
        limit = slowest_link(kind, size, shape, spec)
        bandwidth = passed / each if each else 0.0
        ranks = self.layout.pp if axis == "pp" else shape.ranks
        shown = "send" if kind == "send_recv" and axis == "pp" else kind
        return TransferPart(axis, shown, count, size, count * each, bandwidth, link.kind, ranks, shape.domains, limit)


def _passes(unit: UnitCost) -> int:
    """How often FSDP gathers a unit in a microbatch: for its forward, and again for its backward unless it stays."""
    return 1 if unit.stays_gathered else 2
