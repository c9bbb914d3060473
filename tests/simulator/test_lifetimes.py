"""Counts of what is alive: against a walk through every op."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.layout import Layout
from simulator.lifetimes import Held, Moment, fullest_moments, lifetimes
from simulator.schedules import MULTI_STAGE, SPLIT_BACKWARD, V_PLACEMENT


@st.composite
def pipelines(draw: st.DrawFn) -> tuple[Any, int, int, int, int, bool]:
    """A schedule, its ranks, chunks and microbatches, a zero_stage, and whether fresh gradients stand apart."""
    schedule = draw(st.sampled_from(["GPipe", "1F1B", *MULTI_STAGE]))
    ranks = draw(st.sampled_from([2, 3, 4]))
    chunks = 1 if schedule not in MULTI_STAGE else 2 if schedule in V_PLACEMENT else draw(st.sampled_from([2, 3]))
    microbatches = ranks * draw(st.integers(2, 7))
    zero = draw(st.sampled_from([1, 2] if schedule in SPLIT_BACKWARD else [1, 2, 3]))
    return schedule, ranks, chunks, microbatches, zero, schedule in SPLIT_BACKWARD and draw(st.booleans())


def worth(moment: Moment, sizes: list[int]) -> int:
    """Bytes, if one of each count is worth as much as `sizes` says, a stage's number shifting them, and what runs
    another."""
    held = sum(count * sizes[(i + one.stage) % len(sizes)] for one in moment.held for i, count in enumerate(one[1:]))
    running = moment.running
    return held + 5 * sizes[(len(running.kind) + running.stage) % len(sizes)] * (1 + running.first)


@given(pipelines(), st.lists(st.integers(0, 9), min_size=11, max_size=11))
@settings(deadline=None, max_examples=150)
def test_the_fullest_moments_hold_the_fullest_of_all(shape: tuple[Any, ...], sizes: list[int]) -> None:
    schedule, ranks, chunks, microbatches, zero, apart = shape
    for rank in range(ranks):
        pipeline = (schedule, rank, ranks, chunks, microbatches, zero, apart)
        everything = [moment for step in lifetimes(*pipeline) for moment in step.during]
        within = [m for m in everything if m.running.kind not in ("NOTHING", "RESHARD", "OPTIMIZER")]
        known = fullest_moments(*pipeline)
        fullest = max(worth(known.moment(row), sizes) for row in range(len(known.counts)))
        assert fullest == max(worth(moment, sizes) for moment in within)


@given(pipelines())
@settings(deadline=None, max_examples=50)
def test_what_is_born_dies(shape: tuple[Any, ...]) -> None:
    schedule, ranks, chunks, microbatches, zero, apart = shape
    for rank in range(ranks):
        steps = lifetimes(schedule, rank, ranks, chunks, microbatches, zero, apart)
        assert steps[-1].after == tuple(
            Held(stage) for stage in sorted(Layout(pp=ranks, virtual_stages=chunks, schedule=schedule).stages_of(rank))
        )
        assert all(min(held[1:]) >= 0 for step in steps for held in step.after)
        assert all(held.deferred <= held.kept for step in steps for held in step.after)


@pytest.mark.parametrize("zero", [1, 3])
def test_a_stage_between_its_ops(zero: int) -> None:
    """1F1B on the last of two ranks: 0UNSHARD 1F0 1B0 1F1 1B1. With zero_stage 3 blocks are dropped after a forward and
    stay after a backward."""
    after = {str(step.op): step.after[0] for step in lifetimes("1F1B", 1, 2, 1, 2, zero)}
    assert after["1F0"] == Held(1, kept=1, ends=1, blocks=int(zero != 3))
    assert after["1B0"] == Held(1, ends=1, blocks=1, whole=1)
    assert after["1REDUCE_GRAD"] == Held(1, reduced=1)
