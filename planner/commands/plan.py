"""Decide: plan, simulate, compare, explain."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from planner.commands import app
from planner.commands.options import AsJson, Folder, JobFile, Overrides, PlanFile
from planner.commands.terminal import print_json, progress
from simulator.errors import NothingFitsError, UserError

# Each of them is simulated: on large jobs half a second.
MOST_RANKED = 100


def _share(text: str) -> float:
    """A share of the step: 1% or 0.01."""
    from simulator.errors import UserError

    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1:
        raise UserError(f"--gap '{text}' must be a share of the step from 0 to below 1, like 1% or 0.01")
    return share


@app.command()
def plan(
    job_file: JobFile,
    overrides: Overrides = None,
    output: Folder = Path("."),
    top: Annotated[int, typer.Option(help="How many layouts to rank; each one is simulated.")] = 5,
    gap: Annotated[str, typer.Option(metavar="SHARE", help="Stop where nothing left can be faster by more.")] = "0%",
    as_json: AsJson = False,
) -> None:
    """Recommend a layout; writes plan.json."""
    from planner import show
    from planner.plan import write_plan
    from planner.search import plan as search
    from simulator.files import check_writable
    from simulator.job import read_job

    if not 1 <= top <= MOST_RANKED:
        raise UserError(f"--top {top} must be from 1 to {MOST_RANKED}: every layout that is ranked is simulated")
    job, path = read_job(job_file, overrides), output / "plan.json"
    check_writable(path)
    try:
        with progress("planning", quiet=as_json) as report:
            found = search(job, top, report, _share(gap))
    except NothingFitsError as error:
        _fail_with_remedies(job, error, as_json)
    write_plan(found, path)
    if as_json:
        print_json(show.plan_json(found))
        return
    show.print_plan(found)
    typer.echo(f"written to {path}")


def _fail_with_remedies(job: Any, error: NothingFitsError, as_json: bool) -> NoReturn:
    """The sentence of the error, and the changes that would make the nearest miss fit."""
    from planner import show
    from planner.remedies import remedy_lines, when_nothing_fits

    found = when_nothing_fits(job, error.misses)
    print(f"error: {error}", file=sys.stderr)
    if as_json:
        print_json(show.nothing_fits_json(error, found))
    else:
        for line in remedy_lines(found, "the nearest"):
            print(line, file=sys.stderr)
    sys.exit(error.exit_code)


@app.command()
def simulate(
    job_file: JobFile,
    layout: Annotated[str, typer.Option(metavar="LAYOUT", help='Like "tp=8 pp=4"; ranks left over go to data.')],
    overrides: Overrides = None,
    trace: Annotated[Path | None, typer.Option(metavar="T.json", help="Write a Chrome / Perfetto trace.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict one layout."""
    from planner import show
    from planner.remedies import advice
    from simulator.files import write_json
    from simulator.job import read_job
    from simulator.layout_text import parse_layout
    from simulator.simulate import simulate as predict

    job = read_job(job_file, overrides)
    chosen = parse_layout(layout, job)
    problems = chosen.problems(job)
    if problems:
        raise UserError(f"layout '{layout}' cannot run this job: {'; '.join(problems)}")
    prediction = predict(job, chosen, trace=trace is not None)
    if trace is not None:
        from reports.trace import chrome_trace

        write_json(trace, chrome_trace(prediction))
    found = advice(job, prediction)
    if as_json:
        print_json(show.prediction_json(prediction) | show.remedies_json(found))
        return
    show.print_columns([("predicted", prediction)], job)
    show.print_advice(prediction, job, found)


@app.command()
def compare(
    job_file: JobFile,
    layout: Annotated[str, typer.Option(metavar="LAYOUT", help="What lies in a replica and how many there are.")] = "",
    sync: Annotated[str, typer.Option(metavar="WAYS", help="all, or some like all_reduce,parameter_server.")] = "all",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Predict one layout under every way to keep its replicas together: all-reduce, centre, servers, local SGD."""
    from planner import show
    from planner.compare import compare as put_together
    from planner.compare import comparison_json
    from simulator.job import read_job

    job = read_job(job_file, overrides)
    found = put_together(job, layout, sync)
    if as_json:
        print_json(comparison_json(found))
        return
    show.print_comparison(found, job)


@app.command()
def explain(
    plan_file: PlanFile,
    against: Annotated[str | None, typer.Option(metavar="LAYOUT", help="Another layout to put beside it.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say where the time and the memory of a plan go, beside plain data parallelism and a layout of yours."""
    from planner import show
    from planner.explain import explain as compare
    from planner.explain import sentences
    from planner.plan import read_plan
    from planner.remedies import advice

    read = read_plan(plan_file)
    columns = compare(read, against)
    # The plain baseline is there to be compared; nobody wants to make it fit.
    found = {name: advice(read.job, p) for name, p in columns if name != "data parallel"}
    if as_json:
        documents = {name: show.prediction_json(p) for name, p in columns}
        for name, one in found.items():
            documents[name] |= show.memory_json(dict(columns)[name], read.job) | show.remedies_json(one)
        print_json(documents | {"reasons": sentences(columns)})
        return
    show.print_columns(columns, read.job)
    for sentence in sentences(columns):
        typer.echo(sentence)
    for name, one in found.items():
        show.print_memory(name, dict(columns)[name], read.job)
        show.print_advice(dict(columns)[name], read.job, one, name)
