"""The scaling curve as a figure: throughput over GPUs with its bend, and time against cost with its front."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from planner.scaling import Scaling, bend_of
from reports.page_figures import write_both
from simulator.price import hours_name
from simulator.units import duration_unit, show_tokens

BEST, OTHERS, BEND = "#0072B2", "#9A9A9A", "#D55E00"


def curve(scaling: Scaling, path: Path) -> list[Path]:
    """Writes `path`.png and `path`.svg."""
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    _throughput(left, scaling)
    _costs(right, scaling)
    job = scaling.job
    figure.suptitle(f"{job.model.name} on {job.cluster.name}, {job.stack.name}: predicted", fontsize=11)
    return write_both(figure, path)


def _throughput(axes: Any, scaling: Scaling) -> None:
    rows = scaling.rows
    gpus = [row.gpus for row in rows]
    speeds = [row.prediction.tokens_per_second for row in rows]
    ideal = [row.prediction.tokens_per_second / row.efficiency for row in rows]
    axes.plot(gpus, ideal, color=OTHERS, linestyle="--", linewidth=1, label="in proportion to the smallest")
    axes.plot(gpus, speeds, color=BEST, marker="o", label="best layout")
    for row, speed in zip(rows, speeds, strict=True):
        axes.annotate(f"{row.efficiency:.0%}", (row.gpus, speed), (4, -12), textcoords="offset points", fontsize=8)
    if bend := bend_of(scaling.changes):
        ends = [row for row in rows if row.nodes in bend.nodes]
        places, values = [row.gpus for row in ends], [row.prediction.tokens_per_second for row in ends]
        axes.plot(places, values, color=BEND, linewidth=2.5, label="efficiency falls most")
    axes.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="tokens/s")
    axes.set_xticks(gpus, [str(count) for count in gpus])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def _costs(axes: Any, scaling: Scaling) -> None:
    job, tokens = scaling.job, show_tokens(scaling.tokens)
    unit = "USD" if job.cluster.price_per_gpu_hour is not None else hours_name(job)
    name, size = duration_unit(max(row.seconds for row in scaling.rows))
    for on, color, label in ((True, BEST, "front of time and cost"), (False, OTHERS, "slower and dearer than another")):
        rows = [row for row in scaling.rows if row.on_time_cost_front == on]
        if rows:
            axes.scatter([row.cost for row in rows], [row.seconds / size for row in rows], color=color, label=label)
    for row in scaling.rows:
        chosen = ", chosen" if row.nodes == scaling.chosen else ""
        place = (row.cost, row.seconds / size)
        axes.annotate(f"{row.gpus} GPUs{chosen}", place, (5, 3), textcoords="offset points", fontsize=8)
    if (deadline := job.objective.deadline) is not None:
        axes.axhline(deadline / size, color=BEND, linewidth=1, linestyle=":", label="deadline")
    axes.set(yscale="log", xlabel=f"{unit} for {tokens} tokens", ylabel=f"{name} for {tokens} tokens")
    axes.margins(x=0.25)
    axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
