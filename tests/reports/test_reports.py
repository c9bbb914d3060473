"""Tables and figures say what the numbers say."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from reports.plots import predicted_vs_measured
from reports.tables import Comparison, comparison_table, prediction_table, speedups
from reports.trace import chrome_trace
from simulator.job import build_job
from simulator.layout import Layout, parse_layout
from simulator.results import Measurement, Prediction, Quantiles
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


def test_trace_is_a_chrome_trace(prediction: Prediction) -> None:
    """Complete events with microseconds; spans of one stream of one rank do not overlap."""
    trace = json.loads(json.dumps(chrome_trace(prediction.timeline)))
    events = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert {e["pid"] for e in events} == {0, 1}
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(prediction.step_seconds * 1e6)
    for pid in (0, 1):
        line = sorted((e["ts"], e["dur"]) for e in events if e["pid"] == pid and e["cat"] == "compute")
        assert all(a + d <= b + 1e-6 for (a, d), (b, _) in itertools.pairwise(line))
