"""Curves and scatters of a page as plain data, which web/chart.js draws, and as tables for who cannot see them.

A chart: `x` and `y` axes (`label`, `log`), `series` of (`name`, `kind` points | line | steps, `color` a place in the
palette, `points` [x, y, low, high, text], low and high null where no interval is known), `levels` (`y`, `label`, and
`below` where that stands) and `diagonals` (factors of x).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from planner.plan import Plan
from reports.page_inputs import ENOUGH_RUNS, Exam, ExamRow, Ratio, error_figures, exam_groups, step_interval
from simulator.job import Job
from simulator.memory import capacity
from simulator.results import Measurement, Prediction

GIB = 2**30
MOST_MOMENTS = 600
# The exam's groups by GPU, stack or architecture with fewer runs than this are not worth a choice of their own.
LEAST_RUNS = 5

Chart = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def dollars(prediction: Prediction, job: Job, tokens: float = 1e9) -> float | None:
    """Price of so many tokens on all GPUs of the job; None where the cluster file has no price."""
    price = job.cluster.price_per_gpu_hour
    return None if price is None else gpu_hours(prediction, job, tokens) * price


def gpu_hours(prediction: Prediction, job: Job, tokens: float = 1e9) -> float:
    """Hours of all GPUs of the job for so many tokens."""
    return tokens / prediction.tokens_per_second / 3600 * job.world_size


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
    """Bytes of the fullest rank over the step: what is always there, and the activations above it.

    Ignores what comes and goes besides activations. None where the prediction was made without a timeline.
    """
    rank = max(range(len(prediction.memory_per_stage)), key=lambda r: prediction.memory_per_stage[r].peak)
    memory = prediction.memory_per_stage[rank]
    always = memory.peak - memory.activations
    samples = [(s.seconds, always + s.activations) for s in prediction.timeline.memory if s.rank == rank]
    if not samples:
        return None
    samples = [(0.0, always), *samples, (prediction.step_seconds, samples[-1][1])]
    points = [(seconds, held / GIB) for seconds, held in thinned(samples, MOST_MOMENTS)]
    return {
        "x": axis("seconds since the step began"),
        "y": axis("GiB", zero=True),
        "series": [series(f"pipeline rank {rank}", "steps", 0, points)],
        "levels": [
            {"y": _short(capacity(job, prediction.layout) / GIB), "label": "capacity"},
            {"y": _short(always / GIB), "label": "always there", "below": True},
        ],
    }


def thinned(samples: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most about so many samples, with the least and the largest of every stretch, so that the peak stays."""
    stretch = -(-2 * len(samples) // most)
    if stretch <= 2:
        return list(samples)
    found: list[tuple[float, float]] = [samples[0]]
    for place in range(0, len(samples), stretch):
        part = samples[place : place + stretch]
        found += sorted({min(part, key=lambda s: s[1]), max(part, key=lambda s: s[1])})
    return [*found, samples[-1]]


def loss_chart(measurement: Measurement) -> Chart:
    """The loss of every step that was run."""
    points = [(step, loss, f"step {step}: loss {loss:.4f}") for step, loss in enumerate(measurement.losses, start=1)]
    return {"x": axis("step"), "y": axis("loss"), "series": [series("loss", "line", 0, points)]}


def scaling_chart(plans: Sequence[Plan], known: Ratio | None) -> Chart:
    """Tokens per second of the best layout over the number of GPUs, and what the smallest would give in proportion."""
    ordered = sorted(plans, key=lambda plan: plan.job.world_size)
    first = ordered[0]
    points = []
    for plan in ordered:
        best, devices = plan.best, plan.job.world_size
        interval = step_interval(best, known)
        speeds = [plan.job.tokens_per_step / seconds for seconds in reversed(interval)] if interval else [None, None]
        text = f"{devices} GPUs: {best.tokens_per_second:,.0f} tokens/s, {best.layout.short()}"
        points.append((devices, best.tokens_per_second, *speeds, text))
    per_gpu = first.best.tokens_per_second / first.job.world_size
    ideal = [(plan.job.world_size, per_gpu * plan.job.world_size) for plan in ordered]
    return {
        "x": axis("GPUs", log=True),
        "y": axis("tokens/s", log=True),
        "series": [
            series("in proportion to the smallest", "line", 7, ideal),
            series("best layout", "line", 0, points),
        ],
    }


def pareto_front(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which points no other beats: none is at most as large in everything and smaller in something."""
    return [
        not any(all(a <= b for a, b in zip(other, point, strict=True)) and other != point for other in points)
        for point in points
    ]


def pareto_rows(plans: Sequence[Plan]) -> list[tuple[Plan, Prediction, bool]]:
    """The layouts of all plans that fit, and whether they are on the front of time, cost and GPUs."""
    rows = [(plan, p) for plan in plans for p in (plan.best, *plan.runners_up) if p.fits]
    figures = [(1 / p.tokens_per_second, gpu_hours(p, plan.job), plan.job.world_size) for plan, p in rows]
    return [(plan, p, front) for (plan, p), front in zip(rows, pareto_front(figures), strict=True)]


def pareto_chart(plans: Sequence[Plan]) -> Chart:
    """Hours against dollars (or GPU hours, without a price) for a billion tokens."""
    priced = plans[0].job.cluster.price_per_gpu_hour is not None
    groups: dict[bool, list[tuple[float, float, str]]] = {True: [], False: []}
    for plan, p, front in pareto_rows(plans):
        hours, cost = 1e9 / p.tokens_per_second / 3600, dollars(p, plan.job)
        spent = gpu_hours(p, plan.job) if cost is None else cost
        unit = f"{spent:,.0f} GPU hours" if cost is None else f"${spent:,.0f}"
        groups[front].append((spent, hours, f"{plan.job.world_size} GPUs: {hours:.3g} h, {unit}, {p.layout.short()}"))
    return {
        "x": axis("$ for 10⁹ tokens" if priced else "GPU hours for 10⁹ tokens"),
        "y": axis("hours for 10⁹ tokens", log=True),
        "series": [
            series("other layouts", "points", 7, sorted(groups[False])),
            series("on the front of time, cost and GPUs", "points", 0, sorted(groups[True])),
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
    """The points of a chart as a table, for who cannot see it."""
    rows = [[one["name"], f"{point[0]:,.6g}", f"{point[1]:,.6g}"] for one in chart["series"] for point in one["points"]]
    return ["", chart["x"]["label"], chart["y"]["label"]], rows
