"""Curves and scatters of a page as plain data, which web/chart.js draws, and as tables for who cannot see them.

A chart: `x` and `y` axes (`label`, `log`), `series` of (`name`, `kind` points | line | area, `color` a place in the
palette, `points` [x, y, low, high, text], low and high null where no interval is known, low the lower edge of an area;
`named` where the texts' first words stand beside the points), `levels` (`y`, `label`) and `diagonals` (factors of x).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from planner.scaling import Scaling
from reports.page_inputs import ENOUGH_RUNS, Exam, ExamRow, error_figures, exam_groups, step_interval
from reports.synchronisation import Ways
from simulator.job import Job
from simulator.memory import capacity
from simulator.price import hours_name
from simulator.results import Measurement, MemoryBreakdown, Prediction
from simulator.units import duration_unit, show_duration, show_tokens

GIB = 2**30
MEMORY = tuple(field.name for field in dataclasses.fields(MemoryBreakdown) if field.name != "peak")
# Places in the palette of web/page.css: blue, green, orange, sky, purple, grey.
ITEM_COLORS = {
    "parameters": 0, "gradients": 2, "optimizer": 3, "activations": 4, "buffers": 5, "overhead": 7, "always there": 7,
}  # fmt: skip
LINES = (0, 1, 2, 3, 4, 5, 7)
MOST_MOMENTS = 600
# The exam's groups by GPU, stack or architecture with fewer runs than this are not worth a choice of their own.
LEAST_RUNS = 5

Chart = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def axis(label: str, log: bool = False, zero: bool = False) -> dict[str, Any]:
    return {"label": label, "log": log, "zero": zero}


def series(name: str, kind: str, color: int, points: Iterable[Sequence[Any]]) -> dict[str, Any]:
    """Points are (x, y), (x, y, text) or (x, y, low, high, text)."""
    full = []
    for point in points:
        x, y, *rest = point
        low, high = (rest[0], rest[1]) if len(rest) == 3 else (None, None)
        full.append([_short(x), _short(y), _short(low), _short(high), rest[-1] if rest else ""])
    return {"name": name, "kind": kind, "color": color, "points": full}


def _short(value: float | None) -> float | None:
    """Six digits: more would only make the page longer."""
    return None if value is None else float(f"{value:.6g}")


def memory_chart(prediction: Prediction, job: Job) -> Chart | None:
    """Bytes of the fullest rank over the step, by item where the timeline tells them apart, else what is always there
    and the activations above it. None where the prediction was made without a timeline.
    """
    ranks = prediction.memory_per_stage
    rank = max(range(len(ranks)), key=lambda r: ranks[r].peak)
    samples = [
        (sample.seconds, _items(sample, ranks[rank])) for sample in prediction.timeline.memory if sample.rank == rank
    ]
    if not samples:
        return None
    samples.append((prediction.step_seconds, samples[-1][1]))
    kept = [samples[place] for place in thinned([sum(items.values()) for _, items in samples], MOST_MOMENTS)]
    areas, below = [], [0.0] * len(kept)
    for name in kept[0][1]:
        above = [low + items[name] / GIB for low, (_, items) in zip(below, kept, strict=True)]
        if above != below:
            points = [(t, high, low, None, "") for (t, _), high, low in zip(kept, above, below, strict=True)]
            areas.append(series(name, "area", ITEM_COLORS.get(name, 0), points))
        below = above
    return {
        "x": axis("seconds since the step began"),
        "y": axis("GiB", zero=True),
        "series": areas,
        "levels": [{"y": _short(capacity(job, prediction.layout) / GIB), "label": "capacity"}],
    }


def _items(sample: Any, peak: MemoryBreakdown) -> dict[str, float]:
    """What a rank holds at a moment, in bytes: a sample tells all items, or its activations alone."""
    held = getattr(sample, "memory", None)
    if held is not None:
        return {name: float(getattr(held, name)) for name in MEMORY}
    return {"always there": peak.peak - peak.activations, "activations": float(sample.activations)}


def thinned(values: Sequence[float], most: int) -> list[int]:
    """Places of at most about so many values: the least and the largest of every stretch, so that the peak stays."""
    stretch = -(-2 * len(values) // most)
    if stretch <= 2:
        return list(range(len(values)))
    found = {0, len(values) - 1}
    for begin in range(0, len(values), stretch):
        part = range(begin, min(begin + stretch, len(values)))
        found |= {min(part, key=values.__getitem__), max(part, key=values.__getitem__)}
    return sorted(found)


def loss_chart(measurement: Measurement) -> Chart:
    """The loss of every step that was run."""
    points = [(step, loss, f"step {step}: loss {loss:.4f}") for step, loss in enumerate(measurement.losses, start=1)]
    return {"x": axis("step"), "y": axis("loss"), "series": [series("loss", "line", 0, points)]}


def ways_chart(ways: Ways) -> Chart:
    """Loss over time of every way to keep replicas together: means over a twentieth of the steps."""
    lines = []
    for place, (row, curve) in enumerate(zip(ways.rows, ways.curves, strict=True)):
        points = [
            (seconds, loss, f"{row.name}: loss {loss:.3f} after {seconds:.1f} s and {tokens:,.0f} tokens")
            for seconds, loss, tokens in zip(curve.seconds, curve.smoothed(), curve.tokens, strict=True)
        ]
        lines.append(series(row.name, "line", LINES[place % len(LINES)], points))
    return {"x": axis("seconds of training"), "y": axis("loss"), "series": lines}


def scaling_chart(scaling: Scaling) -> Chart:
    """Tokens per second of the best layout over the number of GPUs, and what the smallest would give in proportion."""
    rows, points = scaling.rows, []
    for row in rows:
        p = row.prediction
        interval = step_interval(p)
        tokens = p.tokens_per_second * p.step_seconds
        speeds = [tokens / seconds for seconds in reversed(interval)] if interval else [None, None]
        text = (
            f"{row.gpus} GPUs: {p.tokens_per_second:,.0f} tokens/s, {row.efficiency:.1%} efficient, {p.layout.short()}"
        )
        points.append((row.gpus, p.tokens_per_second, *speeds, text))
    ideal = [(row.gpus, row.prediction.tokens_per_second / row.efficiency) for row in rows]
    return {
        "x": axis("GPUs", log=True),
        "y": axis("tokens/s", log=True),
        "series": [
            series("in proportion to the smallest", "line", 7, ideal),
            series("best layout", "line", 0, points),
        ],
    }


def pareto_chart(scaling: Scaling) -> Chart:
    """Time against dollars (or GPU-hours, without a price) for the tokens of the scaling."""
    job, tokens = scaling.job, show_tokens(scaling.tokens)
    unit = "$" if job.cluster.price_per_gpu_hour is not None else hours_name(job)
    name, size = duration_unit(max(row.seconds for row in scaling.rows))
    groups: dict[bool, list[tuple[float, float, str]]] = {True: [], False: []}
    for row in scaling.rows:
        text = f"{row.gpus} GPUs: {show_duration(row.seconds)}, {row.cost:,.0f} {unit}, {row.prediction.layout.short()}"
        groups[row.on_time_cost_front].append((row.cost, row.seconds / size, text))
    return {
        "x": axis(f"{unit} for {tokens} tokens"),
        "y": axis(f"{name} for {tokens} tokens", log=True),
        "series": [
            series("slower and dearer than a larger one", "points", 7, sorted(groups[False])) | {"named": True},
            series("on the front of time and cost", "points", 0, sorted(groups[True])) | {"named": True},
        ],
    }


def parity_chart(exam: Exam, job: Job) -> Chart:
    """Measured (x) against predicted tokens per second and GPU; the reader chooses which runs stand out."""
    rows = exam.compared
    groups = [(name, of) for name, of in exam_groups(rows) if len(of) >= LEAST_RUNS]
    place = {row.id: n for n, row in enumerate(rows)}
    points = [
        (row.measured.tokens_per_second_per_gpu, row.predicted.tokens_per_second_per_gpu, _run_text(row))
        for row in rows
    ]
    return {
        "x": axis("measured tokens/s/GPU", log=True),
        "y": axis("predicted tokens/s/GPU", log=True),
        "diagonals": [1.0, 0.8, 1.2],
        "series": [series("published run", "points", 0, points)],
        "groups": [
            {"name": name, "points": [place[row.id] for row in of], **error_figures(of)}
            for name, of in [("all runs", rows), *groups]
        ],
        "group": f"stack: {job.stack.name}" if _known(groups, f"stack: {job.stack.name}") else "all runs",
    }


def _known(groups: Sequence[tuple[str, list[ExamRow]]], name: str) -> bool:
    return any(one == name and len(rows) >= ENOUGH_RUNS for one, rows in groups)


def _run_text(row: ExamRow) -> str:
    assert row.error is not None
    return f"{row.id} ({row.gpu}, {row.framework}): {row.error:+.1%}"


def table_of(chart: Chart) -> Table:
    """The points of a chart as a table, for who cannot see it; of an area its height."""
    rows = []
    for one in chart["series"]:
        for x, y, low, _, _ in one["points"]:
            height = y - low if one["kind"] == "area" else y
            rows.append([one["name"], f"{x:,.6g}", f"{height:,.6g}"])
    return ["", chart["x"]["label"], chart["y"]["label"]], rows
