"""Memory over a step: moments of the program at the seconds of its spans."""

from __future__ import annotations

import pytest

from simulator.job import build_job
from simulator.layout_text import parse_layout
from simulator.memory_curve import memory_curve
from simulator.results import MemoryBreakdown, MemoryMoment, MemorySample, Span
from simulator.simulate import simulate


def held(activations: float, buffers: float = 0.0) -> MemoryBreakdown:
    return MemoryBreakdown(1.0, 0.0, 0.0, activations, buffers, 0.0, 1.0 + activations + buffers)


MOMENTS = (
    MemoryMoment("0UNSHARD", held(0, 5), held(0, 5)),
    MemoryMoment("0F0", held(10, 5), held(10, 5)),
    MemoryMoment("0B0", held(30, 5), held(0, 5)),
    MemoryMoment("0RESHARD", held(0, 5), held(0)),
    MemoryMoment("OPTIMIZER", held(0), held(0)),
)
SPANS = (
    Span(0, "dp", "PP:0UNSHARD", 0.0, 1.0),
    Span(0, "compute", "PP:0F0", 1.0, 2.0),
    Span(0, "recv", "PP:0RECV_B0", 3.0, 1.0),
    Span(0, "compute", "PP:0B0", 4.0, 4.0),
    Span(0, "dp", "PP:0B0", 6.0, 3.0),
    Span(0, "compute", "OPTIMIZER", 9.0, 1.0),
)


def test_ops_hold_their_memory_from_begin_to_end() -> None:
    """The forward keeps 10 from second 1 on, the backward works on 30 from 4 to 8; gathered parameters are there at
    once and until the backward has ended. What does not change is not said again, but for the last."""
    assert memory_curve([MOMENTS], SPANS) == (
        MemorySample(0, 0.0, "", held(0)),
        MemorySample(0, 0.0, "0UNSHARD", held(0, 5)),
        MemorySample(0, 1.0, "0F0", held(10, 5)),
        MemorySample(0, 4.0, "0B0", held(30, 5)),
        MemorySample(0, 8.0, "0B0", held(0, 5)),
        MemorySample(0, 8.0, "0RESHARD", held(0)),
        MemorySample(0, 10.0, "OPTIMIZER", held(0)),
    )


def test_no_ops_no_samples() -> None:
    assert memory_curve([()], ()) == ()


@pytest.mark.parametrize("stack", ["megatron-core", "torchtitan"])
@pytest.mark.parametrize(
    "layout", ["", "pp=4", "pp=2 virtual_stages=4", "pp=2 schedule=ZBVZeroBubble", "pp=2 schedule=DualPipeV", "tp=8"]
)
def test_a_rank_is_never_above_its_peak_and_once_at_it(layout: str, stack: str) -> None:
    training = {"global_batch_size": 64, "seq_len": 2048, "stack": stack}
    task = build_job({"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 1, "training": training}, "test")
    chosen = parse_layout(layout, task)
    if chosen.problems(task):
        pytest.skip("not a layout of this stack")
    predicted = simulate(task, chosen, trace=True)
    for rank, memory in enumerate(predicted.memory_per_stage):
        samples = [sample for sample in predicted.timeline.memory if sample.rank == rank]
        assert max(sample.memory.peak for sample in samples) == memory.peak
        seconds = [sample.seconds for sample in samples]
        assert seconds == sorted(seconds) and 0 <= seconds[-1] <= predicted.step_seconds * (1 + 1e-9)
        assert samples[0].memory == samples[-1].memory, "the next step begins where this one ends"


def test_without_a_trace_there_is_no_curve() -> None:
    task = build_job({"model": "gpt2", "cluster": "dgx-h100", "nodes": 1}, "test")
    assert simulate(task, parse_layout("tp=4", task)).timeline == ((), ())
