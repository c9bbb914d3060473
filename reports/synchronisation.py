"""Runs of one job that synchronise in different ways: how fast each step is, and what the model has learnt for it.

A step is as many updates as there are replicas, so that after as many steps all runs have seen as many samples. Times
are those of metrics.jsonl, added up, so that they are the training's alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reports.plots import write_figure
from simulator.errors import UserError
from simulator.files import STRICT, read_json, to_dataclass
from simulator.results import Measurement, Prediction
from simulator.units import show_seconds

# The last loss that a table shows is a mean over this part of the steps: single batches differ.
LAST = 0.1


@dataclass(frozen=True)
class Curve:
    """Loss of every step, with tokens seen and seconds since the beginning at its end."""

    losses: tuple[float, ...]
    tokens: tuple[float, ...]
    seconds: tuple[float, ...]

    def mean_seconds(self, warmup: int) -> float:
        """Of a step after the first `warmup`."""
        begin = self.seconds[warmup - 1] if warmup else 0.0
        return (self.seconds[-1] - begin) / (len(self.seconds) - warmup)

    def smoothed(self) -> list[float]:
        """Of every step the mean over a twentieth of the steps up to it."""
        width = max(1, len(self.losses) // 20)
        return [statistics.fmean(self.losses[max(0, n + 1 - width) : n + 1]) for n in range(len(self.losses))]

    def loss_after(self, seconds: float) -> float:
        """Mean of the last LAST of the losses of the steps that were done by then; of the first one where none was."""
        done = self.losses[: max(1, sum(one <= seconds for one in self.seconds))]
        return statistics.fmean(done[-max(1, round(LAST * len(self.losses))) :])


@dataclass(frozen=True)
class SyncRun:
    """One way to synchronise: a name, its prediction if there is one, its measurement and its curve."""

    name: str
    prediction: Prediction | None
    measurement: Measurement
    curve: Curve


@dataclass(frozen=True)
class SyncRow:
    """Seconds are means over the steps after the warm-up; speedups are over the first run, errors those of the
    predicted speedup. equal_samples and equal_time are losses: at the end, and when the first run to end has ended."""

    name: str
    layout: str
    seconds: float
    predicted_seconds: float | None
    speedup: float
    predicted_speedup: float | None
    error: float | None
    equal_samples: float
    equal_time: float
    mean_staleness: float | None
    most_staleness: int | None
    most_lead: int | None


def run_folder(output: Path, workers: int, name: str) -> Path:
    """Where the run of a way on so many replicas lies.

    >>> run_folder(Path("out"), 2, "local SGD, every 8 steps").as_posix()
    'out/2-workers/local-SGD-every-8-steps'
    """
    return output / f"{workers}-workers" / name.replace(", ", "-").replace(" ", "-")


def read_curve(path: Path | str) -> Curve:
    """A metrics.jsonl. Raises UserError if it cannot be read, or has no steps."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line.strip()]
        losses = tuple(float(line["loss_metrics/global_avg_loss"]) for line in lines)
        tokens = tuple(float(line["ntokens_seen"]) for line in lines)
        each = [float(line["time_metrics/end_to_end(s)"]) for line in lines]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"metrics '{path}' cannot be read: {error}") from None
    if not losses:
        raise UserError(f"metrics '{path}' holds no step")
    return Curve(losses, tokens, tuple(sum(each[: n + 1]) for n in range(len(each))))


@dataclass(frozen=True)
class Ways:
    """What a trial left of so many replicas: a row for every way to keep them together, and its curve."""

    workers: int
    rows: tuple[SyncRow, ...]
    curves: tuple[Curve, ...]


@dataclass(frozen=True)
class _Trial:
    """Of sync.json, rows by number of replicas."""

    workers: dict[int, tuple[SyncRow, ...]]

    __pydantic_config__ = {**STRICT, "extra": "ignore"}  # noqa: RUF012 (pydantic's own name)


def read_ways(folder: Path) -> tuple[Ways, ...]:
    """What `validate sync` left in a folder; nothing where it left nothing. Raises UserError if a file of it is
    something else, or is missing."""
    path = folder / "sync.json"
    if not path.is_file():
        return ()
    trial = to_dataclass(_Trial, read_json(path, "trial"), f"trial '{path}'")
    return tuple(
        Ways(count, rows, tuple(read_curve(run_folder(folder, count, row.name) / "metrics.jsonl") for row in rows))
        for count, rows in trial.workers.items()
    )


def rows(runs: Sequence[SyncRun]) -> list[SyncRow]:
    """One row for each run; the first is what the others are compared with."""
    first, shortest = runs[0], min(run.curve.seconds[-1] for run in runs)
    base = first.curve.mean_seconds(first.measurement.warmup)
    found = []
    for run in runs:
        seconds = run.curve.mean_seconds(run.measurement.warmup)
        predicted = gain = error = None
        if run.prediction is not None and first.prediction is not None:
            predicted = run.prediction.step_seconds
            gain = first.prediction.step_seconds / predicted
            error = gain / (base / seconds) - 1
        updates = run.measurement.updates
        stale = None if updates is None else updates.staleness
        found.append(
            SyncRow(
                run.name,
                run.measurement.layout.short(),
                seconds,
                predicted,
                base / seconds,
                gain,
                error,
                run.curve.loss_after(run.curve.seconds[-1]),
                run.curve.loss_after(shortest),
                None if stale is None else sum(n * count for n, count in enumerate(stale)) / sum(stale),
                None if stale is None else len(stale) - 1,
                None if updates is None else len(updates.lead) - 1,
            )
        )
    return found


COLUMNS = (
    "way", "step", "predicted", "speedup", "predicted", "error", "loss at equal samples", "at equal time",
    "staleness: mean", "most", "lead",
)  # fmt: skip


def cells(row: SyncRow) -> list[str]:
    """A row as text, in the order of COLUMNS."""

    def shown(value: float | None, spec: str) -> str:
        return "" if value is None else f"{value:{spec}}"

    predicted = "" if row.predicted_seconds is None else show_seconds(row.predicted_seconds)
    return [
        row.name, show_seconds(row.seconds), predicted, f"{row.speedup:.2f}", shown(row.predicted_speedup, ".2f"),
        shown(row.error, "+.1%"), f"{row.equal_samples:.3f}", f"{row.equal_time:.3f}", shown(row.mean_staleness, ".2f"),
        shown(row.most_staleness, "d"), shown(row.most_lead, "d"),
    ]  # fmt: skip


def table(runs: Sequence[SyncRun]) -> str:
    """The rows as Markdown."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" + "|---:" * (len(COLUMNS) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows(runs)]
    return "\n".join(lines) + "\n"


def loss_curves(runs: Sequence[SyncRun], path: Path | str, title: str) -> Path:
    """Two panels: loss over samples, and loss over time; each line is a mean over a few steps."""
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    colors = plt.get_cmap("tab10")
    for place, run in enumerate(runs):
        curve = run.curve
        smooth = curve.smoothed()
        for panel, x in zip(panels, (curve.tokens, curve.seconds), strict=True):
            panel.plot(x, smooth, color=colors(place % 10), linewidth=1.4, label=run.name)
    panels[0].set(xlabel="tokens seen", ylabel="training loss")
    panels[1].set(xlabel="seconds of training")
    panels[1].axvline(min(run.curve.seconds[-1] for run in runs), color="#888888", linewidth=0.8, linestyle=":")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{title}\ndotted: the time at which losses are compared", fontsize=11)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return write_figure(figure, path)
