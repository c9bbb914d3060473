"""Learn from measured runs: calibrate a profile, read the logs of other software."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.commands import app
from planner.commands.options import AsJson
from planner.commands.terminal import print_json, progress
from simulator.errors import UserError


@app.command()
def calibrate(
    profile_file: Annotated[Path, typer.Argument(metavar="PROFILE.json", help="What `layoutwise measure` wrote.")],
    measurements: Annotated[
        list[Path], typer.Argument(metavar="MEASUREMENT.json...", help="Of runs, or folders of them; plan.json beside.")
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="NEW.json", help="Write the calibrated profile.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Update the constants of a profile that measured runs determine, and check them on runs left out in turn."""
    from datetime import UTC, datetime

    from planner import show
    from planner.measured_runs import COLUMNS, changed_cells, checked_cells, outcome_json, read_runs, sentences
    from simulator.calibrate import recalibrate
    from simulator.files import check_writable, write_json
    from simulator.profile import read_profile

    profile, runs = read_profile(profile_file), read_runs(measurements)
    if output is not None:
        check_writable(output)
    with progress("calibrating", quiet=as_json) as report:
        found = recalibrate(profile, runs, datetime.now(UTC).isoformat(timespec="seconds"), report)
    if output is not None:
        write_json(output, found.profile)
    if as_json:
        print_json(outcome_json(found))
        return
    show.print_texts("constants", COLUMNS["changed"], [changed_cells(one) for one in found.changed])
    show.print_texts(
        "runs, each predicted without itself", COLUMNS["checked"], [checked_cells(c) for c in found.checked]
    )
    for sentence in sentences(found):
        typer.echo(sentence)
    if output is not None:
        typer.echo(f"written to {output}")


@app.command("import-log")
def import_log(
    log: Annotated[Path, typer.Argument(metavar="LOG", help="What torchtitan or Megatron-LM printed.")],
    plan_file: Annotated[Path, typer.Option("--plan", metavar="PLAN.json", help="The plan that was exported to it.")],
    warmup: Annotated[int, typer.Option(min=0, help="First steps that do not count.")] = 10,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="MEASUREMENT.json", help="Default: beside the plan.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read the log of another framework's run of a plan; writes measurement.json."""
    from planner import show_measured
    from planner.plan import read_plan
    from planner.training_log import measurement_of
    from simulator.files import check_writable, plain, read_text, write_json

    path = output or plan_file.parent / "measurement.json"
    if path.resolve() == log.resolve():
        raise UserError(f"-o {path} is the log itself; name another file")
    check_writable(path)
    plan = read_plan(plan_file)
    measured = measurement_of(read_text(log, "log").splitlines(), plan, warmup, str(log))
    write_json(path, measured)
    if as_json:
        print_json(plain(measured))
        return
    if measured.peak_memory and measured.losses:
        show_measured.print_measurement(measured, plan.best)
    else:
        typer.echo(f"median step {measured.step_seconds.median:.4g} s, predicted {plan.best.step_seconds:.4g} s")
    typer.echo(f"written to {path}")
