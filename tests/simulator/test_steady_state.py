"""A long step holds no more than a short one where the schedule limits what is alive: fullest_moments cuts it short."""

from __future__ import annotations

import pytest

from simulator.layout import Schedule
from simulator.lifetimes import FullestMoments, Moment, fullest_moments, fullest_of_all


def moments(found: FullestMoments) -> set[Moment]:
    return set(found.moments)


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize(("schedule", "chunks"), [("1F1B", 1), ("Interleaved1F1B", 2), ("Interleaved1F1B", 5)])
def test_a_few_rounds_have_every_moment(schedule: Schedule, chunks: int, zero_stage: int) -> None:
    for ranks in (1, 2, 3, 4) if schedule == "1F1B" else (2, 3, 4):
        for rank in range(ranks):
            for microbatches in (4 * ranks, 6 * ranks, 9 * ranks):
                shape = (schedule, rank, ranks, chunks, microbatches, zero_stage)
                assert moments(fullest_moments(*shape)) == moments(fullest_of_all(*shape)), shape


def test_rounds_need_not_be_as_many_as_ranks() -> None:
    """17 microbatches over 4 ranks; 54 over 8 are six rounds of nine where they are interleaved."""
    shapes: list[tuple[Schedule, int, int, int]] = [
        ("1F1B", 4, 1, 17),
        ("1F1B", 4, 1, 5),
        ("Interleaved1F1B", 8, 2, 54),
    ]
    for schedule, ranks, chunks, microbatches in shapes:
        for rank in range(ranks):
            shape = (schedule, rank, ranks, chunks, microbatches, 3)
            assert moments(fullest_moments(*shape)) == moments(fullest_of_all(*shape)), shape


def test_what_a_split_backward_returns_adds_up() -> None:
    """Input gradients that torch holds until the step ends: of all microbatches but the one that runs."""
    found = fullest_moments("ZBVZeroBubble", 1, 2, 2, 40, 1, True)
    assert max(held.returned for moment in found.moments for held in moment.held) >= 39


def test_a_schedule_that_keeps_everything_is_not_cut_short() -> None:
    found = fullest_moments("GPipe", 0, 2, 1, 40, 1)
    assert max(held.kept for moment in found.moments for held in moment.held) >= 39
