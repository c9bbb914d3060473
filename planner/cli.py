"""The command line. The one module that may import every package, and only inside the command that needs it.

stdout carries the result, stderr the progress and the errors. Exit codes: 0 done, 1 a bug of ours, 2 the user's error
(one sentence), 3 nothing fits.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from simulator.errors import NothingFitsError, UserError

app = typer.Typer(
    name="layoutwise",
    help="Lay out a training job on a cluster: predict every layout, pick the best, run it, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

validate = typer.Typer(help="Predict runs whose measurements are known, and say how far the predictions are off.")
app.add_typer(validate, name="validate")

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="Model, cluster, nodes and recipe.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="What `layoutwise plan` wrote.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job, like training.seq_len=4096."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where to write.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps to train.")]
Warmup = Annotated[int | None, typer.Option(min=0, help="First steps that do not count; 5, or all but one.")]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Save here, and go on from what is saved here; all nodes see it.")
]
CheckpointEvery = Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps between saves; 100.")]
Weights = Annotated[Path | None, typer.Option(metavar="DIR", help="Safetensors to begin with.")]
Export = Annotated[Path | None, typer.Option(metavar="DIR", help="Write the trained model as safetensors.")]
MaxRestarts = Annotated[int, typer.Option(min=0, metavar="R", help="Restarts from DIR when a rank dies.")]
SlowRank = Annotated[
    str | None,
    typer.Option(metavar="R:X", help="An artificial straggler: rank R computes X times as long; 1:2.0,3:1.5."),
]


def main() -> None:
    """Entry point: a user's error becomes one sentence and its exit code, a bug stays a traceback."""
    # A scheduler ends a job with SIGTERM; the ranks that we started must not outlive it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], standalone_mode=False))
    except UserError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except BrokenPipeError:
        # The reader of our output has gone, as `head` does.
        sys.stderr.close()
        sys.exit(0)
    except Exception as error:
        # Wrong options, which typer knows and has a sentence for.
        if not hasattr(error, "format_message"):
            raise
        _fail(error.format_message(), 2)


def _fail(message: str, code: int) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


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
    top: Annotated[int, typer.Option(min=1, help="How many layouts to rank.")] = 5,
    gap: Annotated[str, typer.Option(metavar="SHARE", help="Stop where nothing left can be faster by more.")] = "0%",
    as_json: AsJson = False,
) -> None:
    """Recommend a layout; writes plan.json."""
    from planner import show
    from planner.plan import write_plan
    from planner.search import plan as search
    from simulator.files import check_writable
    from simulator.job import read_job

    job, path = read_job(job_file, overrides), output / "plan.json"
    check_writable(path)
    try:
        with _progress("planning", quiet=as_json) as report:
            found = search(job, top, report, _share(gap))
    except NothingFitsError as error:
        _fail_with_remedies(job, error, as_json)
    write_plan(found, path)
    if as_json:
        _print_json(show.plan_json(found))
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
        _print_json(show.nothing_fits_json(error, found))
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
        _print_json(show.prediction_json(prediction) | show.remedies_json(found))
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
        _print_json(comparison_json(found))
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
        _print_json(documents | {"reasons": sentences(columns)})
        return
    show.print_columns(columns, read.job)
    for sentence in sentences(columns):
        typer.echo(sentence)
    for name, one in found.items():
        show.print_memory(name, dict(columns)[name], read.job)
        show.print_advice(dict(columns)[name], read.job, one, name)


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
        _print_json({"target": to, "written_for": target.WRITTEN_FOR, "files": files})
        return
    for path in texts:
        typer.echo(f"written to {path}")


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
    from planner import show
    from planner.plan import read_plan
    from runtime.here import run_here
    from runtime.settings import Settings
    from simulator.files import plain

    if not alone and (fake or rank is not None):
        raise UserError("--rank and --fake belong to --alone, which runs one rank by itself")
    settings = Settings(
        steps, _warmup(warmup, steps - profile), None, checkpoint, checkpoint_every, weights, export,
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
    with _progress("training", quiet=as_json) as report:
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
        _print_json(plain(measured))
        return
    show.print_measurement(measured, read_plan(plan_file).best)
    if totals:
        columns = ("ops of the last step", "count", "predicted ms", "measured ms", "ratio")
        show.print_texts("predicted and measured, all ranks", columns, [cells(one) for one in totals])
    for one in written:
        typer.echo(f"written to {one}")


def _warmup(given: int | None, steps: int) -> int:
    return max(0, min(5, steps - 1)) if given is None else given


def _run_alone(plan_file: Path, path: Path, rank: int, settings: Any, fake: bool, as_json: bool) -> None:
    from planner import show
    from planner.plan import read_plan
    from runtime.here import run_alone_here
    from simulator.files import plain

    found = run_alone_here(plan_file, path, rank, settings, fake=fake)
    if as_json:
        _print_json(plain(found))
        return
    show.print_alone(found, read_plan(plan_file))
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

    settings = Settings(steps, _warmup(warmup, steps), None, checkpoint, checkpoint_every, weights, export)
    files = launch_files(read_plan(plan_file), on, LaunchOptions(settings, image, max_restarts))
    if any((output / name).resolve() == plan_file.resolve() for name in files):
        raise UserError(f"-o '{output}' would overwrite '{plan_file}'; name another folder")
    for name, text in files.items():
        path = write_text(output / name, text)
        if name.endswith(".sh"):
            path.chmod(path.stat().st_mode | 0o111)
    if as_json:
        _print_json(files)
        return
    for name in files:
        typer.echo(f"written to {output / name}")


@app.command()
def measure(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="PROFILE.json", help="Default: this user's cache.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Profile this machine: matmul, memory, attention, collectives. The cluster `this-machine` is made of it."""
    from planner import show
    from runtime.measure import measure as measure_machine
    from simulator.files import plain
    from simulator.presets import user_profile

    path = output or user_profile()
    with _progress("measuring", quiet=as_json, lines=True) as report:
        profile = measure_machine(path, report)
    if as_json:
        _print_json(plain(profile))
        return
    show.print_profile(profile)
    typer.echo(f"written to {path}")


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
    with _progress("predicting", quiet=as_json, lines=True) as report:
        found = examine(given, report)
    written = []
    if output is not None:
        from reports.validation_page import write_page

        written = write_page(found, output, ours=rows is None)
    if as_json:
        _print_json(validation_json(found))
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
    with _progress("training", quiet=as_json, lines=True) as report:
        found = run_trial(job, trial, output, report)
    if as_json:
        _print_json(found)
        return
    from reports.synchronisation import COLUMNS, SyncRow, cells

    for count, ways in found["workers"].items():
        show.print_texts(f"{count} workers", COLUMNS, [cells(SyncRow(**row)) for row in ways])
    typer.echo(f"written to {output / 'sync.md'}")


@app.command()
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
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page: the layouts, where time and memory go, prediction beside measurement."""
    import dataclasses
    import math

    from planner.explain import explain, sentences
    from planner.other_nodes import PATIENCE, node_counts, plans_for
    from planner.plan import read_plan
    from reports.page import write_report
    from reports.page_inputs import find_inputs, find_plan
    from simulator.files import check_writable

    path = find_plan(plan_given)
    read, folder = read_plan(path), output or path.parent
    check_writable(folder / "report.html")
    counts = node_counts(read, nodes)
    inputs = find_inputs(read, path.parent, validation)
    with _progress("planning", quiet=as_json) as progress:
        plans, notes = plans_for(read, counts, progress, PATIENCE if nodes is None else math.inf)
    written = write_report(
        read,
        dataclasses.replace(inputs, plans=plans, reasons=tuple(sentences(explain(read))), notes=inputs.notes + notes),
        folder,
    )
    if as_json:
        _print_json({"page": str(written[0]), "files": [str(one) for one in written]})
        return
    for one in written:
        typer.echo(f"written to {one}")


@app.command()
def demo(output: Folder = Path("out/demo")) -> None:
    """The whole story in a few minutes: plan a large job, then measure, plan, run and compare on this machine."""
    from planner.demo import run_demo
    from simulator.files import check_writable

    check_writable(output / "plan.json")
    with _progress("demo", quiet=False, lines=True) as report:
        run_demo(output, report)


def _print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


@contextmanager
def _progress(title: str, quiet: bool, lines: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr where that is a terminal; elsewhere nothing, or a line for every tenth."""
    if not quiet and not sys.stderr.isatty() and lines:
        yield _line_by_line(title)
        return
    if quiet or not sys.stderr.isatty():
        yield lambda what, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda what, fraction: bar.update(task, description=f"{title}: {what}", completed=fraction)


def _line_by_line(title: str) -> Callable[[str, float], None]:
    """Say on stderr when another tenth is done, and what is being done."""
    said = -1

    def report(what: str, fraction: float) -> None:
        nonlocal said
        if int(10 * fraction) > said:
            said = int(10 * fraction)
            print(f"{title} {fraction:4.0%}  {what}", file=sys.stderr, flush=True)

    return report


if __name__ == "__main__":
    main()
