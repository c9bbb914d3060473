"""The forwards and backwards of all ranks of a pipeline in one order in which each comes after what it waits for.

The order follows from the schedule alone: layouts that share it differ in seconds, not in who waits for whom. So a walk
along it needs no queue of what is ready, and a search that asks for the same pipeline with other seconds finds it here.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

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


Stages = tuple[int, ...]


class _Turns(NamedTuple):
    """The turns of a rank, with columns as in TopologicalOrder."""

    works: list[int]
    received: list[int]
    sent: list[int]
    ways: list[int]


@functools.lru_cache(maxsize=64)
def topological_order(schedule: Schedule, ranks: int, chunks: int, microbatches: int) -> TopologicalOrder:
    """The order of a pipeline; each rank's turns are those of schedules.py."""
    compiler = _Compiler(schedule, ranks, chunks, microbatches)
    turns = [compiler.turns(rank) for rank in range(ranks)]
    # Who takes turns without a break, from which place on and up to which.
    runs: list[tuple[int, int, int]] = []
    there = bytearray(compiler.tensors)
    places, waits, ready = [0] * ranks, dict[int, int](), list(range(ranks))
    while ready:
        rank = ready.pop()
        _, received, sent, _ = turns[rank]
        begin = place = places[rank]
        while place < len(received):
            tensor = received[place]
            if tensor >= 0 and not there[tensor]:
                waits[tensor] = rank
                break
            tensor = sent[place]
            place += 1
            if tensor >= 0:
                there[tensor] = 1
                if tensor in waits:
                    ready.append(waits.pop(tensor))
        runs.append((rank, begin, place))
        places[rank] = place
    assert places == [len(one.works) for one in turns], "ranks wait for each other"
    whose = [rank for rank, begin, end in runs for _ in range(begin, end)]
    works, received, sent, ways = (
        [value for rank, begin, end in runs for value in turns[rank][column][begin:end]]
        for column in range(len(_Turns._fields))
    )
    edges, pairs = tuple(compiler.edges), tuple(compiler.pairs)
    return TopologicalOrder(whose, works, received, sent, ways, edges, pairs, compiler.tensors)


class _Compiler:
    """Compiles the ops of each rank of a pipeline. It has a hundred thousand of them where it is large: what is the
    same for all ops of a kind and stage is found once."""

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

    def turns(self, rank: int) -> _Turns:
        """The turns of one rank."""
        order = compute_order(self.layout.schedule, rank, self.layout.pp, self.layout.virtual_stages, self.count)
        kinds, stages, numbers, parts = zip(*order, strict=True)
        rows = _Rows(list(zip(kinds, stages, strict=True)), numbers, numbers, order)
        leaves: Leaves = rows.keys, range(len(order))
        if any(parts):
            rows, leaves = _with_pairs(order)
        known = {key: number for number, key in enumerate(dict.fromkeys(rows.keys))}
        each = np.array([self._turn(*key) for key in known]).T
        works, received, sent, ways = each[:, list(map(known.__getitem__, rows.keys))]
        received = np.where(received >= 0, received + rows.received, -1)
        sent = np.where(sent >= 0, sent + rows.sent, -1)
        found = _Turns(works.tolist(), received.tolist(), sent.tolist(), ways.tolist())
        firsts, finals = _ends(*leaves)
        for place in sorted(firsts | finals, reverse=True):
            first, final = firsts.get(place, ()), finals.get(place, ())
            found.works[place] = self._edge(found.works[place], rows.ops[place], first, final)
            if first:
                # Parameters are asked for before a pair waits for anything.
                begin = place - 1 if rows.ops[place].parts else place
                turn = (self._edge(-1, rows.ops[place], first, ()), -1, -1, 0)
                for column, value in zip(found, turn, strict=True):
                    column.insert(begin, value)
        return found

    def _turn(self, kind: str, stage: int, other: int = -1) -> tuple[int, int, int, int]:
        """What an op does, the tensor of the first microbatch that it waits for, the one that it sends, and its way."""
        nothing = len(KINDS) * self.stages
        if kind == "WAIT":
            return nothing, self._tensors("F", stage)[0], -1, 0
        if kind == "HAND OVER":
            return nothing, -1, *self._tensors("B", stage)[1:]
        if kind == "PAIR":
            work = nothing + 1 + self.pairs.setdefault((stage, other), len(self.pairs))
            return work, self._tensors("B", other)[0], *self._tensors("F", stage)[1:]
        return KINDS.index(kind) * self.stages + stage, *self._tensors(kind, stage)

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


class _Rows(NamedTuple):
    """The turns of a rank before they have numbers: kinds with their stages, the microbatches of the tensors that are
    received and sent, and the ops."""

    keys: list[tuple[Any, ...]]
    received: Sequence[int | None]
    sent: Sequence[int | None]
    ops: Sequence[Op]


Leaves = tuple[list[tuple[Any, ...]], Sequence[int]]


def _with_pairs(order: tuple[Op, ...]) -> tuple[_Rows, Leaves]:
    """The turns of an order with pairs, and its forwards and backwards with their places. A pair, whose ops are a
    forward and a backward, waits for both of its tensors and sends both when it is done: it takes three turns."""
    rows, leaves, places = _Rows([], [], [], []), list[tuple[Any, ...]](), list[int]()
    received, sent, ops = list[int | None](), list[int | None](), list[Op]()
    for op in order:
        place = len(ops)
        if op.parts:
            (_, stage, number, _), (_, other, second, _) = op.parts
            rows.keys.extend([("WAIT", stage), ("PAIR", stage, other), ("HAND OVER", other)])
            received += [number, second, second]
            sent += [number, number, second]
            ops += [op] * 3
            place += 1
        else:
            rows.keys.append((op.kind, op.stage))
            received.append(op.microbatch)
            sent.append(op.microbatch)
            ops.append(op)
        leaves += [(leaf.kind, leaf.stage) for leaf in op.leaves]
        places += [place] * len(op.leaves)
    return _Rows(rows.keys, received, sent, ops), (leaves, places)


def _ends(leaves: list[tuple[Any, ...]], places: Sequence[int]) -> tuple[dict[int, Stages], dict[int, Stages]]:
    """The stages whose first forward, and whose last gradient, is at a place."""
    first = dict(zip(reversed(leaves), reversed(places), strict=True))
    final: dict[int, int] = {}
    for (kind, stage), place in dict(zip(leaves, places, strict=True)).items():
        if kind in ("B", "W"):
            final[stage] = max(place, final.get(stage, 0))
    firsts: dict[int, Stages] = {}
    finals: dict[int, Stages] = {}
    for (kind, stage), place in first.items():
        if kind == "F":
            firsts[place] = (*firsts.get(place, ()), stage)
    for stage, place in final.items():
        finals[place] = (*finals.get(place, ()), stage)
    return firsts, finals
