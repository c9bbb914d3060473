"""The whole story on one machine: plan a large job; then measure, plan, run and compare here.

Like the command line that starts it, this module may import every package, inside its functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import typer

from planner import show, show_measured
from planner.here_trial import SMALL, Contest, Course, run_contests
from planner.plan import Plan, write_plan
from planner.rivals import Search, pinned, planned, with_recommended
from planner.search import plan
from simulator.files import write_text
from simulator.job import Job, build_job

Progress = Callable[[str, float], None]

LARGE_JOB = {
    "model": "llama-3.1-70b",
    "cluster": "dgx-h100",
    "nodes": 32,
    "training": {"global_batch_size": 512, "seq_len": 8192, "stack": "megatron-core"},
}
# The reference first. Each pins the axes; the planner chooses the rest (micro-batch, recompute, schedule).
RIVALS: dict[str, Search] = {
    "one process": pinned(),
    "data parallel 2": pinned(dp_replicate=2),
    "tensor parallel 2": pinned(tp=2),
    "pipeline 2": pinned(pp=2),
    "pipeline 2 + data 2": pinned(dp_replicate=2, pp=2),
}
STEPS, WARMUP = 20, 5


def run_demo(output: Path, report: Progress) -> None:
    """Tell the story, print each chapter's result, and leave its files in `output`."""
    from reports.plots import predicted_vs_measured

    report("planning llama-3.1-70b on 256 GPUs", 0.0)
    large = plan(build_job(LARGE_JOB, "the demo's large job"), progress=lambda what, _: report(what, 0.02))
    write_plan(large, output / "large" / "plan.json")
    show.print_plan(large)

    profile = _measure(output, report)
    small = plan(build_job(SMALL | {"profile": str(profile)}, "the demo's small job"))
    write_plan(small, output / "plan.json")
    show.print_plan(small)

    trials = _run_all(small, output, report)
    comparisons = [trial.comparison for trial in trials]
    report("drawing", 0.98)
    machine = f"{small.job.model.name} on this machine ({small.job.world_size} processors, gloo)"
    figure = predicted_vs_measured(comparisons, output / "predicted_vs_measured.png", machine)
    text = write_text(output / "report.md", _report(large, small, comparisons, figure.name))
    page = _page(small, output)
    for path in (output / "plan.json", figure, text, page):
        typer.echo(f"written to {path}")


def _measure(output: Path, report: Progress) -> Path:
    from runtime.measure import measure

    path = output / "profile.json"
    show_measured.print_profile(measure(path, lambda what, done: report(f"measuring {what}", 0.05 + 0.25 * done)))
    return path


def _run_all(small: Plan, output: Path, report: Progress) -> list[Any]:
    """Run the rivals, and the recommendation where it is none of them, and put each beside its prediction."""
    plans, missing = planned(small.job, RIVALS)
    plans, name = with_recommended(plans, small)
    course = Course(rounds=1, steps=STEPS, warmup=WARMUP)
    (trials,), failed = run_contests(
        [Contest(small.job, plans, name, missing)], course, output, lambda what, done: report(what, 0.3 + 0.65 * done)
    )
    if failed:
        raise RuntimeError(failed[0])
    for trial in trials:
        show_measured.print_measurement(trial.measured, trial.prediction)
    return [
        dataclasses.replace(trial, label=f"{trial.name} (recommended)")
        if trial.name == name != "recommended"
        else trial
        for trial in trials
    ]


def _page(small: Plan, output: Path) -> Path:
    """report.html, as `layoutwise report` writes it of this folder."""
    from planner.explain import explain, sentences
    from reports.page import write_report
    from reports.page_inputs import find_inputs

    reasons = tuple(sentences(explain(small)))
    return write_report(small, dataclasses.replace(find_inputs(small, output), reasons=reasons), output)[0]


def _report(large: Plan, small: Plan, comparisons: list[Any], figure: str) -> str:
    """report.md: both recommendations and the comparison."""
    from reports.tables import comparison_table, prediction_table

    errors = sorted(abs(c.error) for c in comparisons)
    ranked = [(f"{i}", p) for i, p in enumerate((large.best, *large.runners_up), start=1)]
    return "\n".join(
        [
            "# layoutwise demo",
            "",
            f"## {_title(large.job)}",
            "",
            prediction_table([*ranked, ("data parallel", large.baseline)]),
            f"## {_title(small.job)}",
            "",
            f"Recommended: `{small.layout.short()}`. Every constant was measured on this machine just before; "
            f"the median error of the step time is {errors[len(errors) // 2]:.1%}.",
            "",
            comparison_table(comparisons),
            f"![predicted and measured speedup]({figure})",
            "",
        ]
    )


def _title(job: Job) -> str:
    batch = f"{job.training.global_batch_size} x {job.training.seq_len} tokens"
    return f"{job.model.name} on {job.nodes} x {job.cluster.name}, {batch} a step, {job.training.precision}"
