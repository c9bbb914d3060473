"""Ranges of a Chrome trace as spans of pipeline ops: times counted by hand."""

from __future__ import annotations

from typing import Any

import pytest

from runtime.spans import align, read_spans
from simulator.results import Span


def event(
    name: str, begin: float, length: float, category: str = "user_annotation", **arguments: Any
) -> dict[str, Any]:
    return {"ph": "X", "name": name, "ts": begin, "dur": length, "cat": category, "args": arguments}


def times(spans: list[Span]) -> list[tuple[str, str, float, float]]:
    return [(s.stream, s.name, round(s.start * 1e6, 3), round(s.seconds * 1e6, 3)) for s in spans]


# A step that begins at 1000 us: stage 1 receives, computes, sends back.
HOST = [
    event("STEP", 1000, 900),
    event("PP:1RECV_F0", 1010, 5),
    event("PP:1F0", 1020, 200),
    event("WAIT unshard", 1020, 30),
    event("WAIT recv", 1050, 70),
    event("PP:1B0", 1230, 300),
    event("PP:1SEND_B0", 1530, 10),
    event("PP:1RESHARD", 1540, 2),
    event("WAIT recv", 1545, 50),
    event("OPTIMIZER", 1600, 100),
    event("aten::mm", 1125, 80, "cpu_op"),
    event("PP:1F0", 100, 50),
]


def test_waits_are_no_computation() -> None:
    assert times(read_spans({"traceEvents": HOST}, 3)) == [
        ("recv", "PP:1RECV_F0", 10, 5),
        ("dp", "PP:1UNSHARD", 20, 30),
        ("recv", "PP:1RECV_F0", 50, 70),
        ("compute", "PP:1F0", 120, 100),
        ("compute", "PP:1B0", 230, 300),
        ("send", "PP:1SEND_B0", 530, 10),
        ("compute", "OPTIMIZER", 600, 100),
    ]
    assert {span.rank for span in read_spans({"traceEvents": HOST}, 3)} == {3}


def test_on_a_gpu_ops_last_as_long_as_their_kernels() -> None:
    """The host is ahead: kernels begin when their range is over. A backward's are launched by autograd's thread."""
    device = [
        event("cudaLaunchKernel", 1130, 4, "cuda_runtime", correlation=1),
        event("cudaLaunchKernel", 1140, 4, "cuda_runtime", correlation=2),
        event("cudaLaunchKernel", 1150, 4, "cuda_runtime", correlation=3),
        event("cudaLaunchKernel", 1300, 4, "cuda_runtime", correlation=4),
        event("gemm", 1250, 100, "kernel", correlation=1),
        event("norm", 1400, 50, "kernel", correlation=2),
        event("ncclDevKernel_SendRecv", 1200, 400, "kernel", correlation=3),
        event("gemm", 1450, 300, "kernel", correlation=4),
    ]
    found = times(read_spans({"traceEvents": HOST + device}, 0))
    assert ("compute", "PP:1F0", 250, 200) in found
    assert ("compute", "PP:1B0", 450, 300) in found
    # Nothing was launched in it: the host's time stays.
    assert ("compute", "OPTIMIZER", 600, 100) in found


def test_a_pair_counts_without_both_waits() -> None:
    pair = "PP:(0F4;3B1)OVERLAP_F_B"
    events = [event("STEP", 0, 500), event(pair, 100, 300), event("WAIT recv", 110, 50), event("WAIT recv", 250, 40)]
    assert times(read_spans({"traceEvents": events}, 0)) == [("compute", pair, 190, 210)]


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 7 holds no range 'STEP'"):
        read_spans({"traceEvents": HOST[1:]}, 7)


def test_the_optimizer_begins_when_the_last_rank_is_there() -> None:
    early, late = Span(0, "compute", "OPTIMIZER", 1.0, 5.0), Span(1, "compute", "OPTIMIZER", 4.0, 1.5)
    other = Span(0, "compute", "PP:0B0", 0.0, 1.0)
    assert align([other, early, late]) == [other, Span(0, "compute", "OPTIMIZER", 4.0, 2.0), late]
