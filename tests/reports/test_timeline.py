"""A predicted and a measured step, joined: numbers counted by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from planner.plan import Certificate, Plan
from reports.timeline import OpTime, cells, join, kind_of, timeline_page, totals_by_kind, totals_by_rank, write_timeline
from reports.trace import measured_trace
from simulator.errors import UserError
from simulator.files import write_json
from simulator.job import build_job
from simulator.layout import Layout
from simulator.results import MeasuredTimeline, Prediction, Span, Timeline
from simulator.simulate import simulate

LAYOUT = Layout(pp=2, dp_replicate=2)


def spans(rank: int, *found: tuple[str, str, float, float]) -> list[Span]:
    return [Span(rank, *one) for one in found]


@pytest.fixture
def predicted() -> Prediction:
    job = build_job({"model": "gpt2", "cluster": "dgx-h100", "nodes": 1, "training": {"global_batch_size": 8}}, "test")
    found = simulate(job, Layout(dp_replicate=8))
    timeline = [
        *spans(0, ("compute", "PP:0F0", 0, 1), ("compute", "PP:0B0", 4, 2), ("dp", "PP:0B0", 6, 0.5)),
        *spans(1, ("recv", "PP:1RECV_F0", 0, 1), ("compute", "PP:1F0", 1, 1), ("compute", "PP:1B0", 2, 2)),
    ]
    return dataclasses.replace(found, step_seconds=7.0, timeline=Timeline(tuple(timeline)))


# Ranks 0 and 1 are the replicas of the first stage, 2 and 3 of the second.
MEASURED = MeasuredTimeline(
    LAYOUT,
    step=20,
    seconds=14.0,
    device="cpu",
    spans=(
        *spans(0, ("compute", "PP:0F0", 0, 2), ("compute", "PP:0B0", 8, 4), ("dp", "PP:0REDUCE_GRAD", 12, 1)),
        *spans(1, ("compute", "PP:0F0", 0, 2.5), ("compute", "PP:0B0", 8, 3.5)),
        *spans(2, ("recv", "PP:1RECV_F0", 0, 0.25), ("recv", "PP:1RECV_F0", 0.25, 1.75), ("compute", "PP:1F0", 2, 2)),
        *spans(2, ("compute", "PP:1B0", 4, 4), ("send", "PP:1SEND_B0", 8, 0.1)),
        *spans(3, ("compute", "PP:1F0", 2, 2), ("compute", "PP:1B0", 4, 4), ("dp", "PP:1UNSHARD", 1, 0.5)),
    ),
)


def test_every_rank_stands_beside_its_pipeline_rank(predicted: Prediction) -> None:
    rows = join(predicted, MEASURED)
    assert rows[:3] == [OpTime(0, "PP:0F0", 1, 2), OpTime(0, "PP:0B0", 2, 4), OpTime(0, "PP:0REDUCE_GRAD", 0.5, 1)]
    assert [row for row in rows if row.rank == 2] == [
        OpTime(2, "PP:1RECV_F0", 1, 2.0), OpTime(2, "PP:1F0", 1, 2), OpTime(2, "PP:1B0", 2, 4)
    ]  # fmt: skip
    # What one side alone has takes the other no time.
    assert OpTime(3, "PP:1UNSHARD", 0, 0.5) in rows
    assert OpTime(1, "PP:0REDUCE_GRAD", 0.5, 0) in rows


def test_a_reduction_beside_the_backward_makes_it_longer_by_what_outlasts_it() -> None:
    """A backward from 1 to 3 s, its reduction from 2 to 4 s: measured without an op of its own it is in a backward of
    3 s, not of 4. The second stage reduces while it computes, so that its backward stays as it is."""
    told = (
        *spans(0, ("compute", "PP:0B0", 1, 2), ("dp", "PP:0B0", 2, 2)),
        *spans(1, ("compute", "PP:1B0", 1, 2), ("dp", "PP:1B0", 1.5, 1)),
    )
    overlapped: Any = SimpleNamespace(timeline=SimpleNamespace(spans=told))
    found = tuple(span for span in MEASURED.spans if "REDUCE" not in span.name)
    rows = {(row.rank, row.name): row.predicted for row in join(overlapped, dataclasses.replace(MEASURED, spans=found))}
    assert (rows[0, "PP:0B0"], rows[2, "PP:1B0"]) == (3, 2)
    assert not any("REDUCE" in name for _, name in rows)


def test_totals(predicted: Prediction) -> None:
    rows = join(predicted, MEASURED)
    kinds = {one.name: one for one in totals_by_kind(rows)}
    assert (kinds["F"].count, kinds["F"].predicted, kinds["F"].measured) == (4, 4.0, 8.5)
    assert (kinds["B"].predicted, kinds["B"].measured) == (8.0, 15.5)
    assert kinds["computation"].ratio == pytest.approx(12 / 24)
    assert [one.measured for one in totals_by_rank(rows)] == [6.0, 6.0, 6.0, 6.0]
    assert cells(kinds["UNSHARD"]) == ["UNSHARD", "1", "0.000", "500.000", "0.00"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("PP:12F3", "F"),
        ("PP:0RECV_B11", "RECV_B"),
        ("PP:1UNSHARD", "UNSHARD"),
        ("PP:(0F7;3B1)OVERLAP_F_B", "OVERLAP_F_B"),
        ("OPTIMIZER", "OPTIMIZER"),
    ],
)
def test_kinds(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_page_has_every_op(predicted: Prediction) -> None:
    page = timeline_page(predicted, MEASURED, "timeline.png")
    assert "Predicted 7000.00 ms; measured 14000.00 ms" in page
    assert "| F | 4 | 4000.000 | 8500.000 | 0.47 |" in page
    assert "| PP:1B0 | 3 | 2000.000 | 4000.000 | 0.50 |" in page


def test_measured_trace_points_from_a_send_to_its_receive() -> None:
    events: list[dict[str, Any]] = measured_trace(
        dataclasses.replace(MEASURED, spans=(*MEASURED.spans, Span(0, "send", "PP:0SEND_F0", 2, 0.1)))
    )["traceEvents"]
    begin, end = (next(e for e in events if e["ph"] == ph) for ph in "sf")
    # The receive was posted at 0 and waited for until 2.
    assert (begin["pid"], begin["ts"], end["pid"], end["ts"]) == (0, 2e6, 2, 2e6)
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {f"rank {n}" for n in range(4)}


def test_files(tmp_path: Path) -> None:
    training = {"global_batch_size": 8, "seq_len": 1024, "stack": "layoutwise-cuda"}
    job = build_job({"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 1, "training": training}, "test")
    layout = Layout(pp=2, dp_shard=4, zero_stage=3)
    found = simulate(job, layout, trace=True)
    plan = Plan(job, found, (), found, Certificate(1, 0, 0, 0, 1, 0, 0), {})
    with pytest.raises(UserError, match="does not exist"):
        write_timeline(plan, tmp_path)
    # A measurement that is the prediction, on every rank.
    measured = [
        dataclasses.replace(span, rank=rank)
        for rank in range(8)
        for span in found.timeline.spans
        if span.rank == layout.coordinates(rank)["pp"]
    ]
    write_json(tmp_path / "timeline.json", MeasuredTimeline(layout, 5, found.step_seconds, "cuda", tuple(measured)))
    totals, written = write_timeline(plan, tmp_path)
    assert {one.name for one in totals} >= {"F", "B", "OPTIMIZER", "computation"}
    assert [one.ratio for one in totals] == pytest.approx([1.0] * len(totals))
    assert all(path.stat().st_size > 500 for path in written)
    assert json.loads((tmp_path / "measured.trace.json").read_text())["displayTimeUnit"] == "ms"
