"""Predict runs whose measurements are known, and say how far the predictions are off."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.commands import app
from planner.commands.options import AsJson, Folder
from planner.commands.terminal import print_json, progress
from simulator.errors import UserError

validate = typer.Typer(help="Predict runs whose measurements are known, and say how far the predictions are off.")
app.add_typer(validate, name="validate")


@validate.command("published")
def validate_published(
    rows: Annotated[
        Path | None, typer.Option("--rows", metavar="FILE.csv", help="Your rows, in the columns of docs/files.md.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="DIR", help="Write validation.md with its figure here.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict training runs that others published: how fast, which layout, does it fit."""
    from planner import show
    from reports.published import published_rows
    from reports.validation import read, validation_json
    from reports.validation import validate as examine
    from simulator.files import check_writable

    given = published_rows() if rows is None else read(rows)
    if output is not None:
        check_writable(output / "validation.md")
    with progress("predicting", quiet=as_json, lines=True) as report:
        found = examine(given, report)
    written = []
    if output is not None:
        from reports.validation_page import write_page

        written = write_page(found, output, ours=rows is None)
    if as_json:
        print_json(validation_json(found))
        return
    from reports.validation_page import terminal_tables

    for table in terminal_tables(found):
        show.print_texts(table.title, table.columns, table.rows, table.texts)
    typer.echo(f"{len(found.results)} rows in {found.seconds:.0f} s")
    for path in written:
        typer.echo(f"written to {path}")


@validate.command("sync")
def validate_sync(
    job_file: Annotated[
        Path | None, typer.Argument(metavar="JOB.toml", help="What to train; 12 M parameters on bytes by default.")
    ] = None,
    workers: Annotated[str, typer.Option(metavar="N,N", help="Numbers of replicas.")] = "2,4",
    slow: Annotated[float, typer.Option(min=1, help="How many times as long the last of them computes.")] = 2.0,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run.")] = 60,
    output: Folder = Path("out/sync"),
    as_json: AsJson = False,
) -> None:
    """Run every way to keep replicas together here, with a straggler: speed, its prediction, and what it learns."""
    from planner import show
    from planner.sync_trial import Trial, run_trial, trial_job
    from simulator.files import check_writable
    from simulator.job import read_job

    counts = [int(one) if one.strip().isdigit() else 0 for one in workers.split(",")]
    if min(counts) < 2:
        raise UserError(f"--workers '{workers}' must be numbers of at least 2, like 2,4")
    check_writable(output / "sync.md")
    job = trial_job(None) if job_file is None else read_job(job_file)
    trial = Trial(tuple(counts), slow, steps, min(5, steps - 1))
    with progress("training", quiet=as_json, lines=True) as report:
        found = run_trial(job, trial, output, report)
    if as_json:
        print_json(found)
        return
    from reports.synchronisation import COLUMNS, SyncRow, cells

    for count, ways in found["workers"].items():
        show.print_texts(f"{count} workers", COLUMNS, [cells(SyncRow(**row)) for row in ways])
    typer.echo(f"written to {output / 'sync.md'}")


@validate.command("here")
def validate_here(
    job_files: Annotated[
        list[Path] | None, typer.Argument(metavar="[JOB.toml ...]", help="What to train; a small ladder by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every layout is run; medians over them count.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Steps of each run, the first five of them without times.")] = 10,
    link: Annotated[
        str | None,
        typer.Option(
            metavar="RATE [DELAY]", help='Two hosts made of this machine, joined so: "100 MB/s", "1 GB/s 1 ms", none.'
        ),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(metavar="PROFILE.json", help="Predict with this; else with a fresh profile of here.")
    ] = None,
    output: Folder = Path("out/here"),
    as_json: AsJson = False,
) -> None:
    """Plan jobs for this machine, run the recommendation and its rivals in rounds, and compare with the predictions."""
    from planner import show
    from planner.here_trial import Course, skipped, validate_machine
    from reports.here import ops_of_all
    from reports.here_page import COLUMNS, OPS, layout_cells, said_of
    from reports.timeline import cells
    from simulator.files import check_writable
    from simulator.hosts import parse_wire

    wire = None if link is None else parse_wire(link)
    check_writable(output / "here.json")
    if wire is not None and (reason := skipped(wire)):
        if as_json:
            print_json({"layouts": [], "recommended": None, "summary": None, "skipped": reason})
        else:
            typer.echo(f"skipped: {reason}")
        return
    course = Course(rounds, steps, min(Course.warmup, steps - 1))
    with progress("validating", quiet=as_json, lines=True) as report:
        jobs, document, written = validate_machine(job_files or [], course, output, report, wire, profile)
    if as_json:
        print_json(document)
        return
    typer.echo(f"{document['profile']}; {document['course']}")
    for job in jobs:
        title = f"{job.model} (* {job.recommended} is recommended)"
        show.print_texts(title, COLUMNS, [layout_cells(trial, job.recommended) for trial in job.trials])
        for name, reason in job.missing.items():
            typer.echo(f"not run: {name}: {reason}")
    every = [trial for job in jobs for trial in job.trials]
    show.print_texts("where it errs, all ranks", OPS, [cells(one) for one in ops_of_all(every)])
    for sentence in said_of(document):
        typer.echo(sentence)
    for path in written:
        typer.echo(f"written to {path}")
