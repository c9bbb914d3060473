"""Decide: plan, simulate, compare, explain."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from planner.commands import app
from planner.commands.options import AsJson, Folder, JobFile, Overrides, PlanFile, WhatIf, WithOptionalWhatIf
from planner.commands.terminal import print_json, progress, say
from simulator.errors import NothingFitsError, UserError

# Each layout that is ranked is simulated, on large jobs for half a second; so many are where nobody says how many.
MOST_RANKED, RANKED = 100, 5


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
    top: Annotated[int | None, typer.Option(help="How many layouts to rank, each one simulated; 5.")] = None,
    gap: Annotated[str, typer.Option(metavar="SHARE", help="Stop where nothing left can be faster by more.")] = "0%",
    fastest: Annotated[
        bool, typer.Option("--fastest", help="Take the shortest predicted step, however little it wins by.")
    ] = False,
    nodes: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Plan for these numbers of nodes: the scaling curve.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(metavar="GOAL", help="fastest, cheapest (tokens) or deadline: which of them is best.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(metavar="N", help="Tokens of the whole training, like 1.5T.")] = None,
    deadline: Annotated[str | None, typer.Option(metavar="TIME", help="When they are trained, like 30 days.")] = None,
    scale_batch: Annotated[
        bool, typer.Option("--scale-batch", help="As many tokens a step for each GPU, not the same batch for all.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Recommend a layout; writes plan.json. Over several numbers of nodes, also scaling.json and a plan for each."""
    from planner import documents, show
    from planner.commands.scaling import plan_over_nodes
    from planner.plan import write_plan
    from planner.scaling_table import cost_sentence
    from planner.search import plan as search
    from simulator.files import check_writable
    from simulator.job import read_job

    if top is not None and not 1 <= top <= MOST_RANKED:
        raise UserError(f"--top {top} must be from 1 to {MOST_RANKED}: every layout that is ranked is simulated")
    # In quotes, so that a number without a unit is not taken for seconds.
    quoted = None if deadline is None else json.dumps(deadline)
    given = {"goal": objective, "tokens": tokens, "deadline": quoted}
    options = [f"objective.{key}={value}" for key, value in given.items() if value is not None]
    job, path = read_job(job_file, [*(overrides or []), *options]), output / "plan.json"
    check_writable(path)
    if nodes is not None or job.objective.nodes or job.objective.goal != "fastest":
        if fastest:
            raise UserError("--fastest is for one number of nodes; leave out --nodes and [objective], or --fastest")
        plan_over_nodes(job, nodes, scale_batch, output, (top or 1, top or RANKED), _share(gap), as_json)
        return
    if scale_batch:
        raise UserError("--scale-batch says nothing for one number of nodes; add --nodes, like --nodes 4,8,16")
    try:
        with progress("planning", quiet=as_json) as report:
            found = search(job, top or RANKED, report, _share(gap), ties=not fastest)
    except NothingFitsError as error:
        _fail_with_remedies(job, error, as_json)
    write_plan(found, path)
    if as_json:
        print_json(documents.plan_json(found))
        return
    show.print_plan(found)
    typer.echo(cost_sentence(found))
    typer.echo(f"written to {path}")


def _fail_with_remedies(job: Any, error: NothingFitsError, as_json: bool) -> NoReturn:
    """The sentence of the error, and the changes that would make the nearest miss fit."""
    from planner import documents
    from planner.remedies import remedy_lines, when_nothing_fits

    found = when_nothing_fits(job, error.misses)
    print(f"error: {error}", file=sys.stderr)
    if as_json:
        print_json(documents.nothing_fits_json(error, found))
    else:
        for line in remedy_lines(found, "the nearest"):
            print(line, file=sys.stderr)
    sys.exit(error.exit_code)


@app.command()
def simulate(
    job_file: JobFile,
    layout: Annotated[
        str,
        typer.Option(
            metavar="LAYOUT",
            help='Like "tp=8 pp=4"; ranks left over go to data. Or flags of Megatron-LM or torchtitan, or @FILE.',
        ),
    ],
    overrides: Overrides = None,
    trace: Annotated[Path | None, typer.Option(metavar="T.json", help="Write a Chrome / Perfetto trace.")] = None,
    as_json: AsJson = False,
) -> None:
    """Predict one layout."""
    from planner import documents, show
    from planner.imports import read_layout
    from planner.memory_parts_report import parts_json
    from planner.remedies import advice
    from simulator.files import write_json
    from simulator.job import read_job
    from simulator.simulate import simulate as predict

    job = read_job(job_file, overrides)
    given = read_layout(layout, job)
    chosen = given.layout
    say(given.lines())
    problems = chosen.problems(job)
    if problems:
        shown = chosen.short() if given.framework else layout
        raise UserError(f"layout '{shown}' cannot run this job: {'; '.join(problems)}")
    prediction = predict(job, chosen, trace=trace is not None)
    if trace is not None:
        from reports.trace import chrome_trace

        write_json(trace, chrome_trace(prediction))
    found = advice(job, prediction)
    if as_json:
        said = documents.warnings_json(job, prediction) | documents.remedies_json(found) | parts_json(job, prediction)
        print_json(documents.prediction_json(prediction) | said)
        return
    show.print_columns([("predicted", prediction)], job)
    show.print_advice(prediction, job, found)


@app.command()
def compare(
    job_file: JobFile,
    layout: Annotated[
        str,
        typer.Option(metavar="LAYOUT", help="What lies in a replica and how many there are; as `simulate` takes it."),
    ] = "",
    sync: Annotated[str, typer.Option(metavar="WAYS", help="all, or some like all_reduce,parameter_server.")] = "all",
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Predict one layout under every way to keep its replicas together: all-reduce, centre, servers, local SGD."""
    from planner import show
    from planner.compare import compare as put_together
    from planner.compare import comparison_json
    from planner.imports import read_layout
    from simulator.job import read_job

    job = read_job(job_file, overrides)
    given = read_layout(layout, job)
    say(given.lines())
    found = put_together(job, given.fields, sync)
    if as_json:
        print_json(comparison_json(found))
        return
    show.print_comparison(found, job)


@app.command(cls=WithOptionalWhatIf)
def explain(
    plan_file: PlanFile,
    against: Annotated[
        str | None,
        typer.Option(metavar="LAYOUT", help="Another to put beside it: ours, flags of another framework, or @FILE."),
    ] = None,
    what_if: WhatIf = None,
    as_json: AsJson = False,
) -> None:
    """Say where time and memory of a plan go, what binds it, what would change it, and why another layout loses."""
    from planner.explain import explain as put_together
    from planner.explain_report import explanation_json, look_further, print_explanation
    from planner.imports import read_layout
    from planner.plan import read_plan

    read = read_plan(plan_file)
    other = None if against is None else read_layout(against, read.job)
    say(other.lines() if other else ())
    found = put_together(read, other.layout if other else None)
    with progress("planning", quiet=as_json) as report:
        further = look_further(read, what_if, report)
    if as_json:
        print_json(explanation_json(read, found, further))
        return
    print_explanation(read, found, further)
