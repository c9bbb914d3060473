"""The forwards and backwards of all ranks of a pipeline in one order in which each comes after what it waits for.

The order follows from the schedule alone: layouts that share it differ in seconds, not in who waits for whom. So a walk
along it needs no queue of what is ready, and a search that asks for the same pipeline with other seconds finds it here.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

from simulator.layout import Layout
from simulator.schedules import Op, Schedule, compute_order

# The places of the kinds of work in a list of seconds, each with one entry for every stage; then comes
# nothing, 0, and after it pairs.
KINDS = "FBIW"


class Edge(NamedTuple):
    """A turn of an op that is a stage's first forward or finishes its gradients. `work` is -1 where parameters are
    asked for, before the op waits for its tensors; first and final are the stages in question."""

    work: int
    op: Op
    first: tuple[int, ...]
    final: tuple[int, ...]


@dataclass(frozen=True)
class TopologicalOrder:
    """Turns as columns: who, what it does, which tensor it waits for before and which it sends afterwards.

    ranks: pipeline ranks. works: places in a list of seconds (see KINDS), or -1 - i for edges[i]. received and sent:
    numbers of tensors, -1 for none; there are `tensors` of them. ways: of sent tensors the stage that they come from,
    those of backwards counted from the number of stages on. pairs: (forward, backward) stages of overlapped pairs, in
    the order of their works.
    """

    ranks: list[int]
    works: list[int]
    received: list[int]
    sent: list[int]
    ways: list[int]
    edges: tuple[Edge, ...]
    pairs: tuple[tuple[int, int], ...]
    tensors: int


Turn = tuple[int, int, int, int]


@functools.lru_cache(maxsize=64)
def topological_order(schedule: Schedule, ranks: int, chunks: int, microbatches: int) -> TopologicalOrder:
    """The order of a pipeline; each rank's turns are those of schedules.py."""
    found = _Turns(schedule, ranks, chunks, microbatches)
    turns = [found.of(rank) for rank in range(ranks)]
    whose: list[int] = []
    order: list[Turn] = []
    there = bytearray(found.tensors)
    places, waits, ready = [0] * ranks, dict[int, int](), list(range(ranks))
    while ready:
        rank = ready.pop()
        own, begin = turns[rank], places[rank]
        place = begin
        for _, received, sent, _ in itertools.islice(own, begin, None):
            if received >= 0 and not there[received]:
                waits[received] = rank
                break
            place += 1
            if sent >= 0:
                there[sent] = 1
                if sent in waits:
                    ready.append(waits.pop(sent))
        order += own[begin:place]
        whose += [rank] * (place - begin)
        places[rank] = place
    assert places == [len(one) for one in turns], "ranks wait for each other"
    works, received_, sent_, ways = (list(column) for column in zip(*order, strict=True))
    return TopologicalOrder(whose, works, received_, sent_, ways, tuple(found.edges), tuple(found.pairs), found.tensors)


class _Turns:
    """Compiles the ops of each rank of a pipeline."""

    def __init__(self, schedule: Schedule, ranks: int, chunks: int, microbatches: int) -> None:
        self.layout = Layout(pp=ranks, virtual_stages=chunks, schedule=schedule)
        self.count, self.stages = microbatches, ranks * chunks
        self.tensors = 2 * self.stages * microbatches
        holder = [self.layout.rank_of_stage(stage) for stage in range(self.stages)]
        # Whether the stage before (behind) is on another rank.
        self.before = [stage > 0 and holder[stage - 1] != holder[stage] for stage in range(self.stages)]
        self.behind = [*self.before[1:], False]
        self.edges: list[Edge] = []
        self.pairs: dict[tuple[int, int], int] = {}

    def of(self, rank: int) -> list[Turn]:
        shape = (self.layout.pp, self.layout.virtual_stages, self.count)
        order = compute_order(self.layout.schedule, rank, *shape)
        firsts, finals = self._places(order)
        turns: list[Turn] = []
        works = {kind: place * self.stages for place, kind in enumerate(KINDS)}
        tensors = {(kind, stage): self._tensors(kind, stage) for kind in KINDS for stage in self.layout.stages_of(rank)}
        for place, (kind, stage, number, parts) in enumerate(order):
            first, final = firsts.get(place, ()), finals.get(place, ())
            if first:
                turns.append((self._edge(-1, order[place], first, ()), -1, -1, 0))
            if parts:
                turns += self._pair(order[place], first, final)
                continue
            work = works[kind] + stage  # type: ignore[operator]
            if first or final:
                work = self._edge(work, order[place], first, final)
            received, sent, way = tensors[kind, stage]  # type: ignore[index]
            turns.append((work, received + number if received >= 0 else -1, sent + number if sent >= 0 else -1, way))  # type: ignore[operator]
        return turns

    def _pair(self, op: Op, first: tuple[int, ...], final: tuple[int, ...]) -> list[Turn]:
        """A pair waits for both of its tensors, and sends both when it is done."""
        stages = op.parts[0].stage or 0, op.parts[1].stage or 0
        nothing = len(KINDS) * self.stages
        work = nothing + 1 + self.pairs.setdefault(stages, len(self.pairs))
        if first or final:
            work = self._edge(work, op, first, final)
        (wait, first_sent, first_way), (last, sent, way) = map(self._of_part, op.parts)
        turns = [(nothing, wait, -1, 0)] if wait >= 0 else []
        turns.append((work, last, first_sent, first_way))
        return [*turns, (nothing, -1, sent, way)] if sent >= 0 else turns

    def _of_part(self, op: Op) -> tuple[int, int, int]:
        received, sent, way = self._tensors(op.kind, op.stage or 0)
        number = op.microbatch or 0
        return received + number if received >= 0 else -1, sent + number if sent >= 0 else -1, way

    def _tensors(self, kind: str, stage: int) -> tuple[int, int, int]:
        """Of the first microbatch the tensor that an op waits for, the one that it sends, and its way."""
        if kind == "W":
            return -1, -1, 0
        before, behind = self.before[stage], self.behind[stage]
        at = stage * self.count
        if kind == "F":
            return at if before else -1, at + self.count if behind else -1, stage
        at += self.stages * self.count
        return at if behind else -1, at - self.count if before else -1, self.stages + stage

    def _edge(self, work: int, op: Op, first: tuple[int, ...], final: tuple[int, ...]) -> int:
        self.edges.append(Edge(work, op, first, final))
        return -len(self.edges)

    @staticmethod
    def _places(order: tuple[Op, ...]) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[int, ...]]]:
        """The stages whose first forward, and whose last gradient, is at a place of a rank's order."""
        first: dict[int, int] = {}
        final: dict[int, int] = {}
        for place, op in enumerate(order):
            for kind, stage, *_ in op.parts or (op,):
                assert stage is not None
                if kind == "F":
                    first.setdefault(stage, place)
                elif kind != "I":
                    final[stage] = place
        found: list[dict[int, tuple[int, ...]]] = []
        for places in (first, final):
            at: dict[int, tuple[int, ...]] = {}
            for stage, place in places.items():
                at[place] = (*at.get(place, ()), stage)
            found.append(at)
        return found[0], found[1]
