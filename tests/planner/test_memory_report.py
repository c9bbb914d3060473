"""Which moment of which rank decides, and the chart of it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from planner.memory_report import (
    HEIGHT,
    ITEMS,
    PLAIN_BLOCKS,
    binding,
    binding_sentence,
    chart,
    fullest_samples,
    stage_rows,
)
from simulator.job import Job, build_job
from simulator.layout_text import parse_layout
from simulator.memory import capacity
from simulator.results import MemoryBreakdown, MemorySample, Prediction
from simulator.simulate import simulate

GIB = 2.0**30


@pytest.fixture(scope="module")
def task() -> Job:
    training = {"global_batch_size": 64, "seq_len": 4096, "stack": "torchtitan"}
    return build_job({"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 1, "training": training}, "test")


@pytest.fixture(scope="module")
def predicted(task: Job) -> Prediction:
    return simulate(task, parse_layout("pp=4", task), trace=True)


def sample(seconds: float, state: float, activations: float) -> MemorySample:
    memory = MemoryBreakdown(state * GIB, 0.0, 0.0, activations * GIB, 0.0, 0.0, (state + activations) * GIB)
    return MemorySample(0, seconds, f"op at {seconds:g}", memory)


def test_the_fullest_rank_and_moment_decide(task: Job, predicted: Prediction) -> None:
    """1F1B: the first rank keeps most microbatches, four of them before its first backward."""
    found = binding(task, predicted)
    peaks = [memory.peak for memory in predicted.memory_per_stage]
    assert found.peak == max(peaks) and found.rank == peaks.index(found.peak)
    assert found.free == capacity(task, predicted.layout) - found.peak
    span = next(s for s in predicted.timeline.spans if s.rank == found.rank and s.name == f"PP:{found.op}")
    assert found.seconds == span.start
    assert found.item == max(ITEMS, key=lambda item: getattr(predicted.memory_per_stage[found.rank], item))


def test_the_sentence_says_rank_op_item_and_what_is_free(task: Job, predicted: Prediction) -> None:
    found, said = binding(task, predicted), binding_sentence(task, predicted)
    assert f"pipeline rank {found.rank} of 4 (2 alike) is fullest at {found.op}," in said
    assert f"{found.peak / GIB:.2f} GiB" in said and f"most of it {found.item}" in said
    assert said.endswith(" GiB are free")


def test_what_does_not_fit_says_by_how_much(task: Job) -> None:
    full = simulate(task, parse_layout("micro_batch_size=8", task), trace=True)
    limit = capacity(task, full.layout)
    over = full.memory.peak - limit
    assert over > 0
    said = binding_sentence(task, full)
    assert f"{over / GIB:.2f} GiB more than the {limit / GIB:.2f} GiB there are" in said
    assert binding_sentence(task, full).startswith("every rank is fullest")


def test_ranks_with_the_same_bytes_are_one_row(predicted: Prediction) -> None:
    one, other = predicted.memory_per_stage[0], dataclasses.replace(predicted.memory_per_stage[0], gradients=1.0)
    rows = stage_rows(dataclasses.replace(predicted, memory_per_stage=(one, other, other, other, one)))
    assert rows == [("0", one), ("1-3", other), ("4", one)]


def test_chart_by_hand() -> None:
    """20 GiB all the time of 28, 8 more in the second half of a step of 2 s. The axis begins a quarter of the 8 that
    change below what is there all the time, at 18; a row is 10 / 8 = 1.25 GiB. 20 GiB fill one row and 0.6 of the next,
    which shows as the third of four blocks; 28 GiB fill all eight."""
    samples = [sample(0.0, 20, 0), sample(1.0, 20, 8), sample(2.0, 20, 0)]
    lines = chart(samples, 2.0, 28 * GIB, width=4, blocks=PLAIN_BLOCKS)
    assert lines[:HEIGHT] == [
        "  28.0 |--##",
        "       |  ##",
        "  25.5 |  ##",
        "       |  ##",
        "  23.0 |  ##",
        "       |  ##",
        "  20.5 |::##",
        "       |####",
    ]
    assert lines[HEIGHT:] == [
        "  18.0 +----",
        "   GiB  0 s2.00 s",
        "        the axis begins at 18.0 GiB, not at zero",
        "          ##  activations, 0 B to 8.00 GiB",
    ]


def test_chart_marks_the_memory_there_is() -> None:
    """40 GiB from the first moment on, where 20 are there: the axis is 40 GiB, half of it above the line."""
    lines = chart([sample(0.0, 0, 40), sample(0.5, 0, 0), sample(1.0, 0, 0)], 1.0, 20 * GIB, width=2, blocks=" #")
    assert lines[0] == "  40.0 |# " and lines[4] == "  20.0 |#-"
    assert not any("not at zero" in line for line in lines)


def test_a_short_peak_is_not_lost() -> None:
    """A millisecond of 100 in the 73rd part of a step is in the chart."""
    samples = [sample(0.0, 1, 0), sample(0.5, 1, 8), sample(0.501, 1, 0), sample(1.0, 1, 0)]
    lines = chart(samples, 1.0, 10 * GIB)
    assert any(line[8 + 36] == "█" for line in lines[:2])


@pytest.mark.parametrize("layout", ["pp=4", "tp=8", "pp=2 virtual_stages=4", "zero_stage=3", "pp=8 schedule=GPipe"])
def test_the_chart_reaches_the_peak(task: Job, layout: str) -> None:
    found = simulate(task, parse_layout(layout, task), trace=True)
    samples = fullest_samples(found)
    assert max(s.memory.peak for s in samples) == found.memory.peak
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(samples))
    lines = chart(samples, found.step_seconds, capacity(task, found.layout))
    assert {len(line) for line in lines[:HEIGHT]} == {8 + 72}
