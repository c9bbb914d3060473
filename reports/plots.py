"""Figures. Every function draws one figure into one file and returns its path."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from reports.tables import Comparison, speedups
from simulator.files import write_bytes
from simulator.results import MeasuredTimeline, Prediction

matplotlib.use("Agg")

PREDICTED, MEASURED = "#9db4d0", "#1f4e79"
OP_COLORS = {
    "F": "#4c78a8",
    "B": "#e4894f",
    "I": "#d5b13f",
    "W": "#72a35a",
    "OVERLAP_F_B": "#9467bd",
    "OPTIMIZER": "#777777",
}


def predicted_vs_measured(comparisons: Sequence[Comparison], path: Path | str, title: str) -> Path:
    """`draw_predicted_vs_measured` as PNG."""
    return write_figure(draw_predicted_vs_measured(comparisons, title), path)


def draw_predicted_vs_measured(
    comparisons: Sequence[Comparison], title: str, names: Sequence[str] | None = None
) -> Any:
    """Bars of the speedup over the first layout, predicted beside measured.

    Error bars of the measurement span the 10th to 90th percentile of its step times. Above each pair stands the error
    of the predicted speedup; those of the step times are in the table. `names` are those of the layouts where the
    comparisons' own are too long.
    """
    from matplotlib import pyplot as plt

    results, shown = speedups(comparisons), names or [c.name for c in comparisons]
    many = len(results) > 8
    figure, axes = plt.subplots(figsize=(1.6 + (0.7 if many else 1.5) * len(results), 4.6), layout="constrained")
    places = range(len(results))
    spread = [[r.measured - r.low for r in results], [r.high - r.measured for r in results]]
    axes.bar([x - 0.2 for x in places], [r.predicted for r in results], 0.38, color=PREDICTED, label="predicted")
    axes.bar(
        [x + 0.2 for x in places], [r.measured for r in results], 0.38, color=MEASURED, label="measured",
        yerr=spread, ecolor="#d08030", capsize=4,
    )  # fmt: skip
    for x, result in list(zip(places, results, strict=True))[1:]:
        top, error = max(result.predicted, result.high), result.predicted / result.measured - 1
        axes.annotate(f"{error:+.0%}", (x, top), (0, 5), textcoords="offset points", ha="center", fontsize=9)
    axes.axhline(1.0, color="#888888", linewidth=0.8, linestyle=":")
    labels = [name.replace(" + ", "\n+ ").replace(" (", "\n(").replace(" x ", "\nx ") for name in shown]
    turned = {"rotation": 45, "ha": "right"} if many else {}
    axes.set_xticks(list(places), labels, **turned)
    axes.set_ylabel(f"speedup over {shown[0]}")
    axes.set_ylim(top=1.15 * max(max(r.predicted, r.high) for r in results))
    figure.suptitle(f"{title}\nabove the bars: error of the predicted speedup", fontsize=11)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def parity(points: Mapping[str, Sequence[tuple[float, float]]], path: Path | str, title: str) -> Path:
    """`draw_parity` as PNG."""
    return write_figure(draw_parity(points, title), path)


def draw_parity(points: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Any:
    """Measured (x) against predicted (y), a color for each group of points, with lines at equality and 20 % off it."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 6.0), layout="constrained")
    values = [value for group in points.values() for pair in group for value in pair] or [1.0]
    ends = [min(values) / 1.3, max(values) * 1.3]
    axes.plot(ends, ends, color="#444444", linewidth=1)
    for factor in (0.8, 1.2):
        axes.plot(ends, [factor * end for end in ends], color="#888888", linewidth=0.8, linestyle=":")
    colors = plt.get_cmap("tab10")
    for place, name in enumerate(sorted(points, key=lambda name: (-len(points[name]), name))):
        x, y = zip(*points[name], strict=True)
        axes.scatter(
            x,
            y,
            s=10 if len(values) > 100 else 36,
            alpha=0.6,
            color=colors(place % 10),
            linewidths=0,
            label=f"{name} ({len(x)})",
        )
    axes.set(xscale="log", yscale="log", xlim=ends, ylim=ends, xlabel="measured", ylabel="predicted")
    axes.set_aspect("equal")
    axes.set_title(f"{title}\ndotted: 20 % off", fontsize=11)
    if points:
        axes.legend(frameon=False, loc="upper left", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def timelines(prediction: Prediction, measured: MeasuredTimeline, path: Path | str, most_ranks: int = 8) -> Path:
    """`draw_timelines` as PNG."""
    return write_figure(draw_timelines(prediction, measured, most_ranks), path)


def draw_timelines(prediction: Prediction, measured: MeasuredTimeline, most_ranks: int = 8) -> Any:
    """Two rows for each of the first ranks of the pipeline: its ops as predicted, and below them as measured."""
    from matplotlib import pyplot as plt

    from reports.timeline import kind_of

    ranks = sorted({span.rank for span in prediction.timeline.spans})[:most_ranks]
    figure, axes = plt.subplots(figsize=(11, 1.4 + 0.8 * len(ranks)), layout="constrained")
    labels = []
    for place, rank in enumerate(ranks):
        sides = [
            ("predicted", prediction.timeline.spans, rank),
            ("measured", measured.spans, measured.layout.rank(pp=rank)),
        ]
        for row, (name, spans, number) in enumerate(sides):
            labels.append((2.4 * place + row, f"{name}, rank {number}"))
            for kind, color in OP_COLORS.items():
                bars = [
                    (span.start * 1e3, span.seconds * 1e3)
                    for span in spans
                    if span.rank == number and span.stream == "compute" and kind_of(span.name) == kind
                ]
                axes.broken_barh(bars, (2.4 * place + row - 0.4, 0.8), color=color, edgecolor="white", linewidth=0.4)
    axes.set_yticks([y for y, _ in labels], [text for _, text in labels])
    axes.invert_yaxis()
    axes.set_xlabel(f"ms since the step began, {measured.layout.short()}")
    handles = [plt.Rectangle((0, 0), 1, 1, color=color) for color in OP_COLORS.values()]
    figure.legend(handles, OP_COLORS, loc="outside upper center", ncols=len(OP_COLORS), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def write_figure(figure: Any, path: Path | str) -> Path:
    """A figure as PNG; closes it."""
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    plt.close(figure)
    return write_bytes(path, buffer.getvalue())
