"""Do it here: run, measure, demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from planner.commands import app
from planner.commands.options import (
    AsJson,
    Checkpoint,
    CheckpointEvery,
    Export,
    Folder,
    MaxRestarts,
    PlanFile,
    SlowRank,
    Steps,
    Warmup,
    Weights,
    default_warmup,
)
from planner.commands.terminal import print_json, progress
from simulator.errors import UserError


@app.command()
def run(
    plan_file: PlanFile,
    steps: Steps = 20,
    warmup: Warmup = None,
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="Processes, servers included; the layout's own by default.")
    ] = None,
    output: Folder = Path("."),
    checkpoint: Checkpoint = None,
    checkpoint_every: CheckpointEvery = None,
    max_restarts: MaxRestarts = 0,
    weights: Weights = None,
    export: Export = None,
    profile: Annotated[bool, typer.Option("--profile", help="Profile the last step, beside its prediction.")] = False,
    slow_rank: SlowRank = None,
    alone: Annotated[bool, typer.Option("--alone", help="Run --rank by itself, communication faked.")] = False,
    rank: Annotated[int | None, typer.Option(min=0, help="With --alone: which rank of the layout.")] = None,
    fake: Annotated[bool, typer.Option("--fake", help="With --alone: count memory, compute nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train for real with torchrun on this machine; writes measurement.json and metrics.jsonl.

    With --alone one rank of a layout of any size runs by itself; writes alone.json.
    """
    from planner import show, show_measured
    from planner.plan import read_plan
    from runtime.here import run_here
    from runtime.settings import Settings
    from simulator.files import plain

    if not alone and (fake or rank is not None):
        raise UserError("--rank and --fake belong to --alone, which runs one rank by itself")
    settings = Settings(
        steps, default_warmup(warmup, steps - profile), None, checkpoint, checkpoint_every, weights, export,
        output / "profile" if profile else None, slow_rank,
    )  # fmt: skip
    if alone:
        unused = {
            "--checkpoint": checkpoint, "--weights": weights, "--export": export, "--max-restarts": max_restarts,
            "--nproc-per-node": nproc_per_node, "--profile": profile,
        }  # fmt: skip
        if given := [name for name, value in unused.items() if value]:
            raise UserError(f"{given[0]} does not go with --alone, which runs one rank without the others")
        _run_alone(plan_file, output / "alone.json", rank or 0, settings, fake, as_json)
        return
    path = output / "measurement.json"
    with progress("training", quiet=as_json) as report:
        measured = run_here(
            plan_file, path, settings, nproc=nproc_per_node, max_restarts=max_restarts,
            progress=lambda done, total: report(f"step {done} of {total}", done / total),
        )  # fmt: skip
    written = [path, output / "metrics.jsonl"]
    totals = None
    if settings.profile is not None:
        from reports.timeline import cells, write_timeline

        totals, pages = write_timeline(read_plan(plan_file), settings.profile)
        written += [settings.profile / "timeline.json", *pages]
    written += [export] if export else []
    if as_json:
        print_json(plain(measured))
        return
    show_measured.print_measurement(measured, read_plan(plan_file).best)
    if totals:
        columns = ("ops of the last step", "count", "predicted ms", "measured ms", "ratio")
        show.print_texts("predicted and measured, all ranks", columns, [cells(one) for one in totals])
    for one in written:
        typer.echo(f"written to {one}")


def _run_alone(plan_file: Path, path: Path, rank: int, settings: Any, fake: bool, as_json: bool) -> None:
    from planner import show_measured
    from planner.plan import read_plan
    from runtime.here import run_alone_here
    from simulator.files import plain

    found = run_alone_here(plan_file, path, rank, settings, fake=fake)
    if as_json:
        print_json(plain(found))
        return
    show_measured.print_alone(found, read_plan(plan_file))
    typer.echo(f"written to {path}")


@app.command()
def measure(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PROFILE.json", help="Default: this user's cache.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Profile this machine: matmul, memory, attention, collectives. The cluster `this-machine` is made of it."""
    from planner import show_measured
    from runtime.measure import measure as measure_machine
    from simulator.files import plain
    from simulator.presets import user_profile

    path = output or user_profile()
    with progress("measuring", quiet=as_json, lines=True) as report:
        profile = measure_machine(path, report)
    if as_json:
        print_json(plain(profile))
        return
    show_measured.print_profile(profile)
    typer.echo(f"written to {path}")


@app.command()
def demo(output: Folder = Path("out/demo")) -> None:
    """The whole story in a few minutes: plan a large job, then measure, plan, run and compare on this machine."""
    from planner.demo import run_demo
    from simulator.files import check_writable

    check_writable(output / "plan.json")
    with progress("demo", quiet=False, lines=True) as report:
        run_demo(output, report)
