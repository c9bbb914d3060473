"""Every way to keep replicas together, run on this machine with a straggler, beside what was predicted of it.

Like the command line that starts it, this module may import every package, inside its functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from planner.here_trial import SMALL
from planner.plan import Certificate, Plan, write_plan
from simulator.errors import UserError
from simulator.files import plain, write_json, write_text
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.simulate import simulate
from simulator.stragglers import Stragglers

Progress = Callable[[str, float], None]

JOB: dict[str, Any] = SMALL | {"data": {"sharding": "random"}}
# The first is what the others are compared with. Every one on as many replicas as there are workers.
WAYS: dict[str, dict[str, Any]] = {
    "servers, synchronous": {"sync": "parameter_server", "servers": 1, "staleness": 0},
    "servers, bounded by 2": {"sync": "parameter_server", "servers": 1, "staleness": 2},
    "servers, asynchronous": {"sync": "parameter_server", "servers": 1, "staleness": None},
    "all-reduce": {},
    "reduce and broadcast": {"sync": "reduce_broadcast"},
    "local SGD, every 8 steps": {"sync": "local_sgd", "sync_interval": 8},
    "DiLoCo, every 8 steps": {"sync": "local_sgd", "sync_interval": 8, "outer_optimizer": "nesterov"},
}


@dataclasses.dataclass(frozen=True)
class Trial:
    """What to run: numbers of workers, how many times as long the last of them computes, and steps, of which the first
    `warmup` do not count in the times."""

    workers: tuple[int, ...] = (2, 4)
    slow: float = 2.0
    steps: int = 60
    warmup: int = 5


def layouts(job: Job, workers: int) -> dict[str, Layout]:
    """Each way on so many replicas, which accumulate nothing.

    Raises:
        UserError: the job cannot be run so.
    """
    share = job.training.global_batch_size // workers
    found = {
        name: Layout(dp_replicate=workers, micro_batch_size=max(1, share), **fields) for name, fields in WAYS.items()
    }
    for name, layout in found.items():
        if problems := layout.problems(job):
            raise UserError(f"{name} on {workers} workers: {problems[0]}")
    return found


def plan_of(job: Job, layout: Layout) -> Plan:
    """A plan for a layout that nobody had to look for."""
    best = simulate(job, layout)
    return Plan(job, best, (), best, Certificate(1, 0, 0, 0, 1, 0.0, 0.0), {"chosen": "validate sync"})


def run_trial(job: Job, trial: Trial, output: Path, report: Progress) -> dict[str, Any]:
    """Run all ways on all numbers of workers, one after the other. Leaves a folder for each run, sync.md and a figure
    for each number of workers in `output`, and the plan of the all-reduce, so that `layoutwise report` shows the
    folder; returns what sync.json holds."""
    from reports.synchronisation import SyncRun, loss_curves, read_curve, rows, run_folder, table
    from runtime.here import run_here
    from runtime.settings import Settings

    todo = {workers: layouts(job, workers) for workers in trial.workers}
    total, done = sum(map(len, todo.values())), 0
    write_plan(plan_of(job, todo[trial.workers[0]]["all-reduce"]), output / "plan.json")
    text = [f"# Ways to synchronise: {job.model.name} on this machine", ""]
    document: dict[str, Any] = {"trial": plain(trial), "workers": {}}
    errors = []
    for workers, ways in todo.items():
        # On the last worker, so that the first writes its metrics undisturbed.
        straggler = {str(workers - 1): trial.slow} if trial.slow > 1 else {}
        slow_job = dataclasses.replace(job, stragglers=Stragglers(factors=straggler, steps=trial.steps))
        slow_rank = f"{workers - 1}:{trial.slow:g}" if straggler else None
        runs = []
        for name, layout in ways.items():
            folder = run_folder(output, workers, name)
            plan = plan_of(slow_job, layout)

            def progress(step: int, steps: int, name: str = name, workers: int = workers, done: int = done) -> None:
                report(f"{name} on {workers} workers, step {step}", (done + step / steps) / total)

            measured = run_here(
                write_plan(plan, folder / "plan.json"), folder / "measurement.json",
                Settings(trial.steps, trial.warmup, slow_rank=slow_rank), progress=progress,
            )  # fmt: skip
            runs.append(SyncRun(name, plan.best, measured, read_curve(folder / "metrics.jsonl")))
            done += 1
        title = f"{workers} workers" + (f", the last one {trial.slow:g} times as slow" if straggler else "")
        figure = loss_curves(runs, output / f"sync-{workers}-workers.png", f"{job.model.name}, {title}")
        found = rows(runs)
        errors += [abs(row.error) for row in found[1:] if row.error is not None]
        document["workers"][str(workers)] = [plain(row) for row in found]
        text += [f"## {title}", "", table(runs), f"![losses]({figure.name})", ""]
    document["median_abs_error"] = sorted(errors)[len(errors) // 2] if errors else None
    text += [
        f"{trial.steps} steps each, the first {trial.warmup} without times. Speedups are over the first row; their "
        f"errors have a median of {document['median_abs_error']:.1%}. Staleness counts updates of others between "
        "pulling parameters and pushing a gradient, lead updates ahead of the slowest.",
        "",
    ]
    write_text(output / "sync.md", "\n".join(text))
    write_json(output / "sync.json", document)
    return document


def trial_job(profile: str | None) -> Job:
    """The job of the trial, on this machine as a profile says."""
    return build_job(JOB | ({"profile": profile} if profile else {}), "the trial's job")
