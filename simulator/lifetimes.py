"""What a pipeline rank holds before, in and after each op of its program: whose microbatches are alive, what is
gathered, whose gradients are there.

    a microbatch   is kept from its forward to its full backward or, where that is split, to its weight gradient;
                   deferred from its input gradient to its weight gradient
    parameters     are gathered from UNSHARD to RESHARD
    gradients      are born with a stage's first backward, whole; REDUCE_GRAD leaves the shard; the optimizer's step
                   ends them

Counts alone, no bytes: they depend on the order of ops, not on the model, so that all layouts with the same pipeline
share them. memory.py gives them their bytes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from simulator.layout import Layout
from simulator.program import OPTIMIZER, sharded_order
from simulator.schedules import SPLIT_BACKWARD, Op, Schedule, compute_order


class Held(NamedTuple):
    """What a rank holds of one of its stages, besides what an op works on: microbatches that are kept, those of them
    whose weight gradient is due, and whether (0 or 1) the parameters of its ends (embedding, head) and of its blocks
    are gathered, and its gradients are there: whole, reduced, or fresh, in the width of matmuls beside those whole;
    and input gradients of a split backward, which torch keeps until the step ends."""

    stage: int = -1
    kept: int = 0
    deferred: int = 0
    ends: int = 0
    blocks: int = 0
    whole: int = 0
    reduced: int = 0
    fresh: int = 0
    returned: int = 0


class Running(NamedTuple):
    """What runs at a moment: the kind of an op and its stage (-1 if none), whether its gradients are the stage's first
    or, without a pipeline, whether it is the step's last, and whether it finds the blocks gathered that it drops or
    gathers one by one (F, B), or fresh gradients (I, W)."""

    kind: str
    stage: int = -1
    first: bool = False
    last: bool = False
    finds: bool = False


_running = functools.lru_cache(maxsize=65536)(Running)


class Moment(NamedTuple):
    """What runs, and what the rank holds of its stages besides."""

    running: Running
    held: tuple[Held, ...]


class FullestMoments(NamedTuple):
    """Moments as numbers: what they hold as rows of counts, Held's fields but the stage for one of `stages` after the
    other, and which of `runnings` each of them has."""

    stages: tuple[int, ...]
    runnings: tuple[Running, ...]
    counts: np.ndarray
    running: np.ndarray

    def moment(self, row: int) -> Moment:
        """One of them by its row."""
        of_stages = self.counts[row].astype(int).reshape(len(self.stages), -1).tolist()
        held = tuple(Held(stage, *counts) for stage, counts in zip(self.stages, of_stages, strict=True))
        return Moment(self.runnings[int(self.running[row])], held)


class Step(NamedTuple):
    """An op of the program: its moments (two where it is a pair, which torch runs one after the other), and what it
    leaves."""

    op: Op
    during: tuple[Moment, ...]
    after: tuple[Held, ...]


@functools.lru_cache(maxsize=1024)
def lifetimes(
    schedule: Schedule, rank: int, ranks: int, chunks: int, microbatches: int, zero_stage: int, apart: bool = False
) -> tuple[Step, ...]:
    """The ops of a rank and what is alive around them."""
    steps: list[Step] = []
    parts: list[Moment] = []
    stages = _stages(schedule, rank, ranks, chunks)
    for op, running, at, after, held in _walk(schedule, rank, ranks, chunks, microbatches, zero_stage, apart):
        parts.append(Moment(running, _named(stages, held)))
        held[at] = after
        if len(parts) == len(op.leaves):
            steps.append(Step(op, tuple(parts), _named(stages, held)))
            parts = []
    end = _named(stages, held)
    left = tuple(one._replace(whole=0, reduced=0, returned=0) for one in end)
    return (*steps, Step(OPTIMIZER, (Moment(_running("OPTIMIZER"), end),), left))


def _stages(schedule: Schedule, rank: int, ranks: int, chunks: int) -> list[int]:
    return sorted(Layout(pp=ranks, virtual_stages=chunks, schedule=schedule).stages_of(rank))


def _named(stages: list[int], held: Iterable[Held]) -> tuple[Held, ...]:
    return tuple(one._replace(stage=stage) for stage, one in zip(stages, held, strict=True))


def _walk(
    schedule: Schedule, rank: int, ranks: int, chunks: int, microbatches: int, zero_stage: int, apart: bool = False
) -> Iterator[tuple[Op, Running, int, Held, list[Held]]]:
    """Each op of a rank, or each part of a pair: what runs, at which of the rank's stages, what it leaves of that
    stage, and what is held meanwhile. A step of a large job has thousands of ops, and a search asks for thousands of
    pipelines: what is the same for many is looked up."""
    layout = Layout(pp=ranks, virtual_stages=chunks, schedule=schedule, zero_stage=zero_stage)  # type: ignore[arg-type]
    order = sharded_order(compute_order(schedule, rank, ranks, chunks, microbatches), layout)
    place = {stage: i for i, stage in enumerate(_stages(schedule, rank, ranks, chunks))}
    # Stages are named later: the same counts are found for all of them.
    held = [Held()] * len(place)
    drops = zero_stage == 3
    final = microbatches - 1 if ranks == 1 else -1
    for op in order:
        for kind, stage, microbatch, _ in op.parts or (op,):
            assert stage is not None
            at = place[stage]
            if stage == 0 and kind in "IW":
                # Nobody waits for an input gradient of tokens: torch does nothing, and all of it in the weights' turn.
                kind = "B" if kind == "W" else "NOTHING"
            before = held[at]
            now, after = _around(kind, before, drops, apart)
            finds = before.fresh > 0 if kind in "IW" else drops and before.blocks > 0
            first = not before.whole and (kind == "B" or (kind == "W" and not finds) or (kind == "I" and finds))
            running = _running(kind, stage, first, microbatch == final, finds)
            held[at] = now
            yield op, running, at, after, held
            held[at] = after


@functools.lru_cache(maxsize=65536)
def _around(kind: str, held: Held, drops: bool, apart: bool) -> tuple[Held, Held]:
    """What is held of a stage besides what an op works on, and what it leaves. With `drops` blocks are dropped after
    their forward and gathered for their backward; with `apart` fresh gradients of a weight gradient are added to those
    that are whole by the hooks of the next input gradient."""
    if kind == "F":
        now = held._replace(blocks=0 if drops else held.blocks)
        return now, now._replace(kept=held.kept + 1)
    if kind == "I":
        now = held._replace(kept=held.kept - 1, whole=max(held.whole, held.fresh), fresh=0)
        return now, now._replace(kept=held.kept, deferred=held.deferred + 1, returned=held.returned + 1)
    if kind == "W":
        now = held._replace(kept=held.kept - 1, deferred=held.deferred - 1)
        return now, now._replace(**({"fresh": 1} if apart else {"whole": 1}))
    if kind == "B":
        now = held._replace(kept=held.kept - 1, blocks=0 if drops else held.blocks)
        return now, now._replace(whole=1, blocks=max(held.blocks, drops), fresh=0)
    if kind == "UNSHARD":
        return held, held._replace(ends=1, blocks=1)
    if kind == "RESHARD":
        return held, held._replace(ends=0, blocks=0)
    if kind == "REDUCE_GRAD":
        return held._replace(whole=0, ends=0), held._replace(ends=0, blocks=0, whole=0, fresh=0, reduced=1)
    return held, held


# Ops within which nothing passes, so that there is less than within the ops around them.
_EMPTY = ("NOTHING", "RESHARD", "OPTIMIZER")


@functools.lru_cache(maxsize=65536)
def fullest_moments(
    schedule: Schedule, rank: int, ranks: int, chunks: int, microbatches: int, zero_stage: int, apart: bool = False
) -> FullestMoments:
    """The moments of a rank of which one is its peak: any other moment with the same running holds no more of
    anything. Which one it is depends on the bytes of each stage."""
    fewer, split = as_good_as(schedule, ranks, microbatches), schedule in SPLIT_BACKWARD
    found: dict[Running, set[tuple[Held, ...]]] = {}
    for _, running, _, _, held in _walk(schedule, rank, ranks, chunks, fewer, zero_stage, apart):
        if running.kind not in _EMPTY:
            moments = found.get(running)
            if moments is None:
                moments = found[running] = set()
            moments.add(tuple(held))
    stages = _stages(schedule, rank, ranks, chunks)
    rows: list[tuple[int, ...]] = []
    of: list[int] = []
    for place, some in enumerate(found.values()):
        fullest = _undominated(some, split)
        rows += fullest
        of += [place] * len(fullest)
    counts = np.array(rows, dtype=np.float64).reshape(len(rows), len(stages), len(Held._fields))[:, :, 1:]
    return FullestMoments(tuple(stages), tuple(found), counts.reshape(len(rows), -1), np.array(of))


def as_good_as(schedule: Schedule, ranks: int, microbatches: int) -> int:
    """Microbatches that go through the same moments. Between its begin and its end 1F1B repeats itself with every
    microbatch, interleaved with every round of one for each rank: a few rounds have both and a repetition between."""
    if schedule not in ("1F1B", "Interleaved1F1B") or microbatches % ranks:
        return microbatches
    return min(microbatches, ranks * (2 if schedule == "1F1B" and ranks > 1 else 3))


def _undominated(moments: set[tuple[Held, ...]], split: bool) -> list[tuple[int, ...]]:
    """The counts of those of which no other holds at least as much of everything. With a split backward what is kept
    and not deferred counts for itself, because it may weigh more than what is."""
    flat: dict[tuple[int, ...], tuple[int, ...]] = {counts: counts for counts in (sum(one, ()) for one in moments)}
    if len(flat) == 1:
        return list(flat)
    if split:
        flat = {(*sum(moment, ()), *(one.kept - one.deferred for one in moment)): sum(moment, ()) for moment in moments}
    fullest: list[tuple[int, ...]] = []
    # A moment holds less in total than one that holds at least as much of everything.
    for counts in sorted(flat, key=sum, reverse=True):
        if not any(all(map(operator.ge, other, counts)) for other in fullest):
            fullest.append(counts)
    return [flat[counts] for counts in fullest]
