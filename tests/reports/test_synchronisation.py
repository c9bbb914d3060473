"""Runs that synchronise in different ways, side by side: every number by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reports.synchronisation import Curve, SyncRun, cells, loss_curves, read_curve, rows, table
from simulator.errors import UserError
from simulator.layout import Layout
from simulator.results import Breakdown, Measurement, MemoryBreakdown, Prediction, Quantiles, Updates

_NOTHING = MemoryBreakdown(0, 0, 0, 0, 0, 0, 0)


def run(
    name: str, predicted: float, seconds: list[float], losses: list[float], updates: Updates | None = None
) -> SyncRun:
    layout = Layout(dp_replicate=2)
    prediction = Prediction(layout, True, (), predicted, 1, 1, 0, 0, Breakdown(), _NOTHING, (_NOTHING,), 0.0)
    spread = Quantiles(1, 1, 1)
    steps = len(losses)
    measured = Measurement(
        layout, 2, steps, 1, spread, 1, (1.0,), tuple(losses), tuple(losses), "cpu", {}, updates=updates
    )
    ends = [sum(seconds[: n + 1]) for n in range(steps)]
    curve = Curve(tuple(losses), tuple(100.0 * (n + 1) for n in range(steps)), tuple(ends))
    return SyncRun(name, prediction, measured, curve)


def two_runs() -> list[SyncRun]:
    """Ends of steps: 5, 7, 9, 11 s; and 3, 4, 5, 6 s."""
    return [
        run("synchronous", 2.2, [5, 2, 2, 2], [4.0, 3.0, 2.0, 1.0]),
        run("asynchronous", 1.0, [3, 1, 1, 1], [4.0, 3.5, 3.0, 2.5], Updates((5, 2, 1), (6, 2), (5, 3))),
    ]


def test_rows_by_hand() -> None:
    """Without the first step 2 s and 1 s a step: speedup 2.0, predicted 2.2 / 1.0 = 2.2, 10 % too much. When the fast
    one has ended, after 6 s, the slow one has done one step, of loss 4. Staleness (0 · 5 + 1 · 2 + 2 · 1) / 8 = 0.5."""
    slow, fast = rows(two_runs())
    assert (slow.seconds, slow.speedup, slow.predicted_speedup, slow.error) == (2.0, 1.0, 1.0, 0.0)
    assert (slow.equal_samples, slow.equal_time) == (1.0, 4.0)
    assert (fast.seconds, fast.speedup, fast.predicted_speedup) == (1.0, 2.0, pytest.approx(2.2))
    assert fast.error == pytest.approx(0.1)
    assert (fast.equal_samples, fast.equal_time) == (2.5, 2.5)
    assert (fast.mean_staleness, fast.most_staleness, fast.most_lead) == (0.5, 2, 1)
    assert (slow.mean_staleness, slow.most_staleness) == (None, None)
    assert cells(fast)[:6] == ["asynchronous", "1.00 s", "1.00 s", "2.00", "2.20", "+10.0%"]


def test_a_table_and_a_figure(tmp_path: Path) -> None:
    assert table(two_runs()).count("\n") == 4
    assert loss_curves(two_runs(), tmp_path / "sync.png", "title").read_bytes().startswith(b"\x89PNG")


def test_curves_come_from_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        {"loss_metrics/global_avg_loss": 3.0, "ntokens_seen": 64, "time_metrics/end_to_end(s)": 0.5},
        {"loss_metrics/global_avg_loss": 2.0, "ntokens_seen": 128, "time_metrics/end_to_end(s)": 0.25},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_curve(path) == Curve((3.0, 2.0), (64.0, 128.0), (0.5, 0.75))
    path.write_text("{}\n")
    with pytest.raises(UserError, match="cannot be read"):
        read_curve(path)
    path.write_text("")
    with pytest.raises(UserError, match="holds no step"):
        read_curve(path)
