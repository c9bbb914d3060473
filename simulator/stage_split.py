"""The cut of a model into pipeline stages that lets the slowest rank do least: the embedding and the head are work too,
and their ranks get fewer blocks for it.
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from simulator.columns import Columns, distinct, legal
from simulator.layout import Layout
from simulator.schedules import V_PLACEMENT
from simulator.unit_table import UnitTable

if TYPE_CHECKING:
    from simulator.job import Job

# Work is compared in parts of a block: finer differences between layouts do not make another cut.
PARTS = 16


def with_balanced_splits(job: Job, columns: Columns) -> Columns:
    """Add to every legal layout with a pipeline its twin whose stages are balanced, where that is another cut."""
    candidates = np.flatnonzero((columns["pp"] > 1) & (columns["stage_layers"] == 0))
    rows = candidates[legal(job, columns.take(candidates))] if len(candidates) else candidates
    if not len(rows):
        return columns
    some = columns.take(rows)
    units = UnitTable(job, some)
    seconds = units["forward"] + units["backward"]
    blocks = len(units.kinds)
    # In parts of the longest kind of block.
    parts = np.maximum(1, np.rint(seconds / seconds[:, :blocks].max(axis=1, keepdims=True) * PARTS)).astype(np.int64)
    ratios, ratio = distinct(*(parts[:, i] for i in range(units.units)))
    v_shaped = some.is_named("schedule", *V_PLACEMENT)
    firsts, codes = distinct(ratio[units.code], some["pp"], some["virtual_stages"], v_shaped)
    splits = list(columns.names["stage_layers"])
    known = {split: i for i, split in enumerate(splits)}
    found = []
    for row in firsts.tolist():
        layout = some.layout(row)
        weights = parts[ratios[ratio[units.code[row]]]].tolist()
        works = tuple(weights[kind] for kind in units.block_kinds)
        split = balanced_layers(works, weights[-2], weights[-1], layout.pp, layout.virtual_stages, bool(v_shaped[row]))
        if split == layout.layers_per_stage(len(works)):
            found.append(0)
            continue
        if split not in known:
            known[split] = len(splits)
            splits.append(split)
        found.append(known[split])
    code = np.array(found, dtype=np.int64)[codes]
    other = some.replace(stage_layers=code).take(code > 0)
    names = columns.names | {"stage_layers": splits}
    numbers = {name: np.concatenate((column, other[name])) for name, column in columns.numbers.items()}
    return Columns(numbers, names)


@functools.lru_cache(maxsize=65536)
def balanced_layers(
    works: tuple[int, ...], embedding: int, head: int, ranks: int, chunks: int, v_shaped: bool
) -> tuple[int, ...]:
    """Blocks of each stage such that the rank with the most work has least.

    Args:
        works: the work of every block, in any unit; so are embedding and head.

    Equal blocks are dealt to the ranks one by one, each to the one with least work, evenly on its chunks. Blocks of
    several kinds are cut where the longest stage is shortest, so that chunks of a rank do not make up for each other.

    >>> balanced_layers((16,) * 14, 8, 8, 4, 1, False)
    (3, 4, 4, 3)
    """
    if len(set(works)) > 1:
        return _cut(works, embedding, head, ranks * chunks)
    layout = Layout(pp=ranks, virtual_stages=chunks, schedule="ZBVZeroBubble" if v_shaped else "1F1B")
    last = layout.rank_of_stage(ranks * chunks - 1)
    block, counts = works[0], [chunks] * ranks
    load = [chunks * block + embedding * (rank == 0) + head * (rank == last) for rank in range(ranks)]
    # Of ranks with equal work the last one: it keeps fewest microbatches, and nobody waits for its first forward.
    queue = [(work, -rank) for rank, work in enumerate(load)]
    heapq.heapify(queue)
    for _ in range(len(works) - ranks * chunks):
        work, rank = queue[0]
        counts[-rank] += 1
        heapq.heapreplace(queue, (work + block, rank))
    layers = [0] * (ranks * chunks)
    for rank, count in enumerate(counts):
        stages = layout.stages_of(rank)
        share, rest = divmod(count, chunks)
        # The rank of the head has that to do in its last chunk.
        fuller = stages[:rest] if rank == last else stages[chunks - rest :]
        for stage in stages:
            layers[stage] = share + (stage in fuller)
    return tuple(layers)


def _cut(works: Sequence[int], embedding: int, head: int, stages: int) -> tuple[int, ...]:
    """Consecutive blocks in so many stages, none empty, the longest as short as can be."""
    low, high = 0, sum(works) + embedding + head
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _filled(works, embedding, head, stages, middle) else (middle, high)
    found = _filled(works, embedding, head, stages, high)
    assert found is not None
    return tuple(found)


def _filled(works: Sequence[int], embedding: int, head: int, stages: int, most: int) -> list[int] | None:
    """Blocks of each stage where none has more than `most` to do, filled from the last, or None if that cannot be."""
    counts, block = [], len(works)
    for stage in reversed(range(stages)):
        work = head * (stage == stages - 1) + embedding * (stage == 0)
        count = 0
        while block > stage and (work + works[block - 1] <= most):
            work, count, block = work + works[block - 1], count + 1, block - 1
        if not count:
            return None
        counts.append(count)
    return None if block else counts[::-1]
