"""Prediction and measurement of the same layouts, side by side as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.results import Measurement, Prediction
from simulator.units import show_bytes, show_seconds


@dataclass(frozen=True)
class Comparison:
    """One layout, predicted and measured. `name` is what a reader calls it: "data parallel 2"."""

    name: str
    prediction: Prediction
    measurement: Measurement

    @property
    def error(self) -> float:
        """Predicted over measured median step time, minus 1: positive where the prediction is too slow."""
        return self.prediction.step_seconds / self.measurement.step_seconds.median - 1

    @property
    def memory_error(self) -> float:
        """Predicted over measured peak of the fullest rank, minus 1."""
        return self.prediction.memory.peak / max(self.measurement.peak_memory) - 1


@dataclass(frozen=True)
class Speedup:
    """Speedup over the reference layout; low and high are from the 90th and 10th percentile of the step time."""

    predicted: float
    measured: float
    low: float
    high: float


def speedups(comparisons: Sequence[Comparison]) -> list[Speedup]:
    """Speedup of every layout over the first one, which is the reference (one process)."""
    first = comparisons[0]
    predicted, measured = first.prediction.step_seconds, first.measurement.step_seconds.median
    return [
        Speedup(
            predicted=predicted / c.prediction.step_seconds,
            measured=measured / c.measurement.step_seconds.median,
            low=measured / c.measurement.step_seconds.p90,
            high=measured / c.measurement.step_seconds.p10,
        )
        for c in comparisons
    ]


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """A Markdown table: step time, speedup and peak memory, predicted and measured, with the errors."""
    header = (
        "| layout | ranks | step predicted | step measured (p10 to p90) | error | speedup predicted | measured "
        "| peak memory predicted | measured | error |"
    )
    lines = [header, "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for c, speedup in zip(comparisons, speedups(comparisons), strict=True):
        step = c.measurement.step_seconds
        lines.append(
            f"| {c.name}: `{c.prediction.layout.short()}` | {c.measurement.world_size} "
            f"| {show_seconds(c.prediction.step_seconds)} "
            f"| {show_seconds(step.median)} ({show_seconds(step.p10)} to {show_seconds(step.p90)}) | {c.error:+.1%} "
            f"| {speedup.predicted:.2f} | {speedup.measured:.2f} "
            f"| {show_bytes(c.prediction.memory.peak)} | {show_bytes(max(c.measurement.peak_memory))} "
            f"| {c.memory_error:+.1%} |"
        )
    return "\n".join(lines) + "\n"


def prediction_table(predictions: Sequence[tuple[str, Prediction]]) -> str:
    """A Markdown table of predicted layouts: step, throughput, MFU, memory, and the risk of running out of it."""
    header = "| | layout | step | tokens/s/GPU | MFU | GiB per GPU | risk of running out |"
    lines = [header, "|---|---|---:|---:|---:|---:|---:|"]
    for name, p in predictions:
        fits = "" if p.fits else " (does not fit)"
        lines.append(
            f"| {name} | `{p.layout.short()}` | {show_seconds(p.step_seconds)} | {p.tokens_per_second_per_gpu:,.0f} "
            f"| {p.mfu:.1%} | {p.memory.peak / 2**30:.1f}{fits} | {p.out_of_memory_probability:.0%} |"
        )
    return "\n".join(lines) + "\n"
