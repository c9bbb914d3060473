"""Hand over: the configuration of another framework, scripts for a cluster, a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    Steps,
    Warmup,
    Weights,
    WhatIf,
    WithOptionalWhatIf,
    default_warmup,
)
from planner.commands.terminal import print_json, progress
from simulator.errors import UserError


@app.command()
def export(
    plan_file: PlanFile,
    to: Annotated[
        str,
        typer.Option(
            metavar="TARGET",
            help="torchtitan, torchtitan-main, megatron, megatron-bridge, transformers, accelerate or deepspeed.",
        ),
    ],
    output: Folder = Path("."),
    as_json: AsJson = False,
) -> None:
    """Write the layout of a plan in another framework's configuration."""
    from planner.export import export as write_for
    from planner.export import find_target
    from planner.plan import read_plan
    from simulator.files import check_writable, write_text

    target = find_target(to)
    texts = {output / name: text for name, text in write_for(read_plan(plan_file), to).items()}
    for path in texts:
        check_writable(path)
    for path, text in texts.items():
        write_text(path, text)
    if as_json:
        files = {str(path): text for path, text in texts.items()}
        print_json({"target": to, "written_for": target.WRITTEN_FOR, "files": files})
        return
    for path in texts:
        typer.echo(f"written to {path}")


@app.command()
def launch(
    plan_file: PlanFile,
    on: Annotated[str, typer.Option("--on", metavar="TARGET", help="torchrun, slurm or kubernetes.")],
    output: Folder = Path("launch"),
    steps: Steps = 20,
    warmup: Warmup = None,
    image: Annotated[str, typer.Option(help="Kubernetes: the image, with layoutwise installed.")] = "",
    checkpoint: Checkpoint = None,
    checkpoint_every: CheckpointEvery = None,
    max_restarts: MaxRestarts = 0,
    weights: Weights = None,
    export: Export = None,
    as_json: AsJson = False,
) -> None:
    """Write what starts a plan on a cluster: a script for torchrun or Slurm, a TrainJob for Kubernetes."""
    from planner.plan import read_plan
    from runtime.launchers import LaunchOptions, launch_files
    from runtime.settings import Settings
    from simulator.files import write_text

    settings = Settings(steps, default_warmup(warmup, steps), None, checkpoint, checkpoint_every, weights, export)
    files = launch_files(read_plan(plan_file), on, LaunchOptions(settings, image, max_restarts))
    if any((output / name).resolve() == plan_file.resolve() for name in files):
        raise UserError(f"-o '{output}' would overwrite '{plan_file}'; name another folder")
    for name, text in files.items():
        path = write_text(output / name, text)
        if name.endswith(".sh"):
            path.chmod(path.stat().st_mode | 0o111)
    if as_json:
        print_json(files)
        return
    for name in files:
        typer.echo(f"written to {output / name}")


@app.command(cls=WithOptionalWhatIf)
def report(
    plan_given: Annotated[
        Path, typer.Argument(metavar="PLAN_OR_DIR", help="A plan, or a folder with plan.json and what was measured.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Where to write; beside the plan.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Output of `validate published --json`; validation.json beside the plan."),
    ] = None,
    nodes: Annotated[
        str | None,
        typer.Option(metavar="N,N,...", help="Plan the job on these numbers of nodes too, or none; nearby by default."),
    ] = None,
    what_if: WhatIf = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page: the layouts, where time and memory go, prediction beside measurement."""
    import dataclasses

    from planner.explain import explain
    from planner.explain_report import reasons
    from planner.other_nodes import for_report
    from planner.plan import read_plan
    from planner.what_if import COLUMNS, asked, what_if_rows
    from planner.what_if import what_if as plan_variants
    from reports.page import write_report
    from reports.page_inputs import find_inputs, find_plan
    from simulator.files import check_writable

    path = find_plan(plan_given)
    read, folder = read_plan(path), output or path.parent
    check_writable(folder / "report.html")
    inputs = find_inputs(read, path.parent, validation)
    with progress("planning", quiet=as_json) as report_progress:
        scaling = for_report(read, nodes, inputs.scaling, report_progress)
        tried = what_if_rows(plan_variants(read, asked(read, what_if), report_progress))
    why = tuple(reasons(read, explain(read)))
    written = write_report(
        read, dataclasses.replace(inputs, scaling=scaling, reasons=why, what_if=(COLUMNS, tried)), folder
    )
    if as_json:
        print_json({"page": str(written[0]), "files": [str(one) for one in written]})
        return
    for one in written:
        typer.echo(f"written to {one}")
