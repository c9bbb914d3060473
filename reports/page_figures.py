"""The page's bars as figures for papers and slides: each as PNG and as SVG."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

from planner.plan import Plan
from simulator.files import write_bytes
from simulator.memory import capacity
from simulator.results import Breakdown, MemoryBreakdown, Prediction

matplotlib.use("Agg")

# Okabe and Ito's palette, which the colour-blind can tell apart (jfly.uni-koeln.de/color), and greys.
COLORS = {
    "compute": "#0072B2", "recompute": "#56B4E9", "tp": "#E69F00", "cp": "#F0E442", "ep": "#CC79A7", "pp": "#D55E00",
    "dp": "#009E73", "bubble": "#D0D0D0", "optimizer": "#5A5A5A", "host": "#8C6D46",
    "parameters": "#0072B2", "gradients": "#009E73", "optimizer state": "#E69F00", "activations": "#56B4E9",
    "buffers": "#CC79A7", "overhead": "#9A9A9A",
}  # fmt: skip
GIB = 2**30


def time_bars(named: Sequence[tuple[str, Prediction]], path: Path, title: str) -> list[Path]:
    """A bar for each layout: seconds of its step by kind. Writes `path`.png and `path`.svg."""
    kinds = [field.name for field in dataclasses.fields(Breakdown)]
    rows = [(name, {kind: max(0.0, getattr(p.breakdown, kind)) for kind in kinds}) for name, p in named]
    return _stacked(rows, path, title, "seconds of a step")


def memory_bars(plan: Plan, path: Path, title: str) -> list[Path]:
    """A bar for each pipeline rank of the best layout: GiB by item, with the capacity as a line."""
    kinds = [field.name for field in dataclasses.fields(MemoryBreakdown) if field.name != "peak"]
    shown = {kind: "optimizer state" if kind == "optimizer" else kind for kind in kinds}
    rows = [
        (f"rank {rank}", {shown[kind]: getattr(memory, kind) / GIB for kind in kinds})
        for rank, memory in enumerate(plan.best.memory_per_stage)
    ]
    return _stacked(rows, path, title, "GiB", capacity(plan.job, plan.layout) / GIB)


def _stacked(
    rows: Sequence[tuple[str, dict[str, float]]], path: Path, title: str, label: str, limit: float | None = None
) -> list[Path]:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 1.6 + 0.34 * len(rows)), layout="constrained")
    places = list(range(len(rows)))
    begins = [0.0] * len(rows)
    for kind in rows[0][1]:
        widths = [parts[kind] for _, parts in rows]
        if any(widths):
            axes.barh(places, widths, 0.7, left=begins, color=COLORS[kind], label=kind)
        begins = [begin + width for begin, width in zip(begins, widths, strict=True)]
    if limit is not None:
        axes.axvline(limit, color="#333333", linestyle="--", linewidth=1, label="capacity")
    axes.set_yticks(places, [name for name, _ in rows])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.set_title(title, fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    return write_both(figure, path)


def write_both(figure: Any, path: Path) -> list[Path]:
    """A figure as `path`.png and `path`.svg; closes it. The SVG is the same whenever it is made."""
    from matplotlib import pyplot as plt

    written = []
    with matplotlib.rc_context({"svg.hashsalt": "layoutwise"}):
        for form, options in (("png", {"dpi": 150}), ("svg", {"metadata": {"Date": None}})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=form, **options)
            written.append(write_bytes(path.with_suffix(f".{form}"), buffer.getvalue()))
    plt.close(figure)
    return written
