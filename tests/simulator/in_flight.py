"""What is alive on a rank of a pipeline at its fullest moments, counted from the order of its ops."""

from __future__ import annotations

import functools
import operator
from typing import NamedTuple

from simulator.schedules import compute_order


class Held(NamedTuple):
    """What a rank holds of one of its stages at a moment: microbatches alive, and how many of them have had their
    input gradient but not yet their weight gradient."""

    stage: int
    alive: int
    deferred: int


@functools.lru_cache(maxsize=65536)
def peak_in_flight(
    schedule: str, rank: int, ranks: int, chunks: int, microbatches: int
) -> tuple[tuple[Held, ...], ...]:
    """The fullest moments of a rank. Any other moment holds no more of anything than one of these does; which of them
    is the peak depends on the bytes of each stage.

    A microbatch lives from its forward to its full backward or, where that is split, to its weight gradient.
    """
    leaves = [leaf for op in compute_order(schedule, rank, ranks, chunks, microbatches) for leaf in op.leaves]
    stages = sorted({leaf.stage for leaf in leaves if leaf.stage is not None})
    place = {stage: i for i, stage in enumerate(stages)}
    # The microbatches alive of each stage, then those deferred.
    counts, grown = [0] * (2 * len(stages)), False
    moments: set[tuple[int, ...]] = set()
    for kind, stage, *_ in leaves:
        assert stage is not None
        at = place[stage]
        if kind in ("F", "I"):
            counts[at if kind == "F" else at + len(stages)] += 1
            grown = True
            continue
        if grown:
            moments.add(tuple(counts))
        counts[at] -= 1
        counts[at + len(stages)] -= kind == "W"
        grown = False
    fullest: list[tuple[int, ...]] = []
    # A moment holds less in total than one that holds at least as much of everything.
    for moment in sorted(moments, key=sum, reverse=True):
        if not any(all(map(operator.ge, other, moment)) for other in fullest):
            fullest.append(moment)
    return tuple(tuple(map(Held, stages, moment, moment[len(stages) :])) for moment in fullest)
