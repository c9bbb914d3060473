"""The one order of a pipeline's turns: everything of every rank once, in its order, and after what it waits for."""

from __future__ import annotations

import pytest

from simulator.schedules import Schedule, compute_order
from simulator.topological_order import KINDS, topological_order

SHAPES: list[tuple[Schedule, int, int, int]] = [
    ("GPipe", 4, 1, 6), ("1F1B", 1, 1, 3), ("1F1B", 4, 1, 6), ("Interleaved1F1B", 4, 3, 8), ("LoopedBFS", 2, 2, 5),
    ("InterleavedZeroBubble", 3, 2, 6), ("ZBVZeroBubble", 4, 2, 8), ("DualPipeV", 3, 2, 8),
]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
def test_turns_come_after_what_they_wait_for(shape: tuple[Schedule, int, int, int]) -> None:
    order = topological_order(*shape)
    there: set[int] = set()
    for received, sent in zip(order.received, order.sent, strict=True):
        assert received < 0 or received in there
        there |= {sent} - {-1}
    # Between ranks m microbatches cross each border of two stages twice; at the turn of a V nothing is sent.
    schedule, ranks, chunks, count = shape
    borders = ranks * chunks - 1 - (schedule in ("ZBVZeroBubble", "DualPipeV"))
    assert len(there) == 2 * count * (borders if ranks > 1 else 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_turns_of_a_rank_are_its_schedule(shape: tuple[Schedule, int, int, int]) -> None:
    schedule, ranks, chunks, count = shape
    order, stages = topological_order(*shape), ranks * chunks
    for rank in range(ranks):
        works = [work for whose, work in zip(order.ranks, order.works, strict=True) if whose == rank]
        works = [order.edges[-1 - work].work if work < 0 else work for work in works]
        # -1 asks for parameters, and 4 x stages only waits or sends.
        done = [work for work in works if work not in (-1, len(KINDS) * stages)]
        expected = [
            KINDS.index(op.kind) * stages + (op.stage or 0)
            if not op.parts
            else len(KINDS) * stages + 1 + order.pairs.index((op.parts[0].stage or 0, op.parts[1].stage or 0))
            for op in compute_order(schedule, rank, ranks, chunks, count)
        ]
        assert done == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_every_stage_has_one_first_forward_and_one_last_gradient(shape: tuple[Schedule, int, int, int]) -> None:
    _, ranks, chunks, _ = shape
    edges = topological_order(*shape).edges
    for which in ("first", "final"):
        named = [stage for edge in edges if edge.work >= 0 for stage in getattr(edge, which)]
        assert sorted(named) == list(range(ranks * chunks))
