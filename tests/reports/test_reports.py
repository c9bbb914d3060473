"""Tables and figures say what the numbers say."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from reports.plots import predicted_vs_measured
from reports.tables import Comparison, comparison_table, prediction_table, speedups
from reports.trace import chrome_trace
from simulator.job import build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.results import Measurement, Prediction, Quantiles, Span, Timeline
from simulator.simulate import simulate


@pytest.fixture(scope="module")
def prediction() -> Prediction:
    job = build_job({"model": "gpt2", "cluster": "dgx-a100", "nodes": 1, "training": {"global_batch_size": 64}}, "test")
    return simulate(job, parse_layout("pp=2", job), trace=True)


def comparison(prediction: Prediction, name: str, predicted: float, measured: float, peak: float) -> Comparison:
    spread = Quantiles(median=measured, p10=measured * 0.9, p90=measured * 1.2)
    measurement = Measurement(
        layout=Layout(), world_size=2, steps=10, warmup=2, step_seconds=spread, tokens_per_second=1.0,
        peak_memory=(peak / 2, peak), losses=(2.0,), grad_norms=(1.0,), device="cpu", versions={},
    )  # fmt: skip
    return Comparison(name, dataclasses.replace(prediction, step_seconds=predicted), measurement)


@pytest.fixture
def comparisons(prediction: Prediction) -> list[Comparison]:
    peak = prediction.memory.peak
    return [
        comparison(prediction, "one process", 1.0, 1.25, peak),
        comparison(prediction, "data parallel 2", 0.5, 0.5, peak * 2),
    ]


def test_speedup_is_over_the_first(comparisons: list[Comparison]) -> None:
    """Predicted 1.0 / 0.5 = 2; measured 1.25 / 0.5 = 2.5, from 1.25 / 0.6 to 1.25 / 0.45."""
    first, second = speedups(comparisons)
    assert first.predicted == first.measured == 1.0
    assert (second.predicted, second.measured) == (2.0, 2.5)
    assert (second.low, second.high) == pytest.approx((1.25 / 0.6, 1.25 / 0.45))


def test_errors_are_predicted_over_measured(comparisons: list[Comparison]) -> None:
    assert comparisons[0].error == pytest.approx(1.0 / 1.25 - 1)
    assert comparisons[1].memory_error == pytest.approx(-0.5)


def test_table_is_markdown_with_every_layout(comparisons: list[Comparison]) -> None:
    lines = comparison_table(comparisons).splitlines()
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    assert "one process" in lines[2] and "-20.0%" in lines[2]
    assert "2.50" in lines[3] and "-50.0%" in lines[3]


def test_prediction_table_marks_what_does_not_fit(prediction: Prediction) -> None:
    small = dataclasses.replace(prediction, fits=False)
    text = prediction_table([("1", prediction), ("plain", small)])
    assert text.count("does not fit") == 1 and f"`{prediction.layout.short()}`" in text


def test_figure_is_a_png(comparisons: list[Comparison], tmp_path: Path) -> None:
    path = predicted_vs_measured(comparisons, tmp_path / "new" / "figure.png", "title")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


def predicted(layout: str, model: str = "gpt2", nodes: int = 1, stack: str = "megatron-core") -> Prediction:
    data = {"model": model, "cluster": "dgx-a100", "nodes": nodes}
    job = build_job(data | {"training": {"global_batch_size": 64, "stack": stack}}, "test")
    chosen = parse_layout(layout, job)
    assert not chosen.problems(job)
    return simulate(job, chosen, trace=True)


LAYOUTS = (
    "dp_replicate=8",
    "pp=2",
    "pp=8",
    "tp=4 pp=2 schedule=GPipe",
    "pp=4 virtual_stages=3",
    "pp=2 virtual_stages=2",
)


@pytest.fixture(params=LAYOUTS)
def traced(request: pytest.FixtureRequest) -> tuple[Prediction, list[dict[str, Any]]]:
    prediction = predicted(request.param, stack="torchtitan" if "GPipe" in request.param else "megatron-core")
    return prediction, json.loads(json.dumps(chrome_trace(prediction)))["traceEvents"]


Traced = tuple[Prediction, list[dict[str, Any]]]


def test_trace_is_a_chrome_trace(traced: Traced) -> None:
    """Complete events with microseconds; spans of one thread do not overlap; every thread has a name."""
    prediction, events = traced
    spans = [e for e in events if e["ph"] == "X"]
    assert {e["pid"] for e in spans} == set(range(prediction.layout.pp))
    assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(prediction.step_seconds * 1e6)
    threads = {(e["pid"], e["tid"]) for e in spans}
    assert threads <= {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    for thread in threads:
        line = sorted((e["ts"], e["dur"]) for e in spans if (e["pid"], e["tid"]) == thread)
        assert all(a + d <= b + 1e-6 for (a, d), (b, _) in itertools.pairwise(line))


def test_every_message_has_an_arrow(traced: Traced) -> None:
    """As many as messages: two for each microbatch at each of the boundaries between stages. Each begins within its
    send and ends after it began, within the receive of the same microbatch."""
    prediction, events = traced
    layout = prediction.layout
    begins, ends = ({e["id"]: e for e in events if e["ph"] == phase} for phase in "sf")
    assert begins.keys() == ends.keys()
    assert len(begins) == 2 * (layout.stages - 1) * layout.microbatches(64)
    spans: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for e in events:
        if e["ph"] == "X":
            spans.setdefault((e["pid"], e["tid"]), []).append(e)

    def touches(arrow: dict[str, Any], way: str) -> bool:
        around = (e for e in spans[arrow["pid"], arrow["tid"]] if e["ts"] <= arrow["ts"] <= e["ts"] + e["dur"])
        names = [e["name"] for e in around if f"{way}_{arrow['name'][0]}" in e["name"]]
        return any(name.endswith(f"_{arrow['name']}") for name in names)

    for number, begin in begins.items():
        assert begin["ts"] < ends[number]["ts"]
        assert touches(begin, "SEND") and touches(ends[number], "RECV")


def test_the_memory_counter_peaks_where_memory_says(traced: Traced) -> None:
    """The largest height of a rank's counter is its peak in memory_per_stage, and it ends as it began."""
    prediction, events = traced
    for rank, memory in enumerate(prediction.memory_per_stage):
        counters = [e for e in events if e["ph"] == "C" and e["pid"] == rank]
        assert max(sum(e["args"].values()) for e in counters) == pytest.approx(memory.peak, rel=1e-12)
        assert counters[0]["ts"] == 0.0 and counters[0]["args"] == counters[-1]["args"]
        assert [e["ts"] for e in counters] == sorted(e["ts"] for e in counters)
        assert counters[-1]["ts"] <= prediction.step_seconds * 1e6 * (1 + 1e-9)


def test_spans_that_overlap_get_threads_of_their_own(prediction: Prediction) -> None:
    """A rank in the middle may send forward while it still sends back; the third message fits behind the first."""
    spans = (Span(0, "send", "a", 0.0, 2.0), Span(0, "send", "b", 1.0, 3.0), Span(0, "send", "c", 2.0, 1.0))
    events = chrome_trace(dataclasses.replace(prediction, timeline=Timeline(spans)))["traceEvents"]
    thread = {e["name"]: e["tid"] for e in events if e["ph"] == "X"}
    assert thread["a"] == thread["c"] != thread["b"]
    names = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names[thread["a"]] == names[thread["b"]] == "send"


def test_processes_say_how_many_ranks_they_stand_for() -> None:
    events = chrome_trace(predicted("tp=4 pp=2"))["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "process_name"]
    assert names == ["pipeline rank 0 (4 alike)", "pipeline rank 1 (4 alike)"]
