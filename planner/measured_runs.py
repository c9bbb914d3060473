"""Measured runs on disk, and what a calibration with them found, as rows and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from planner.plan import read_plan
from simulator.calibrate import Checked, Outcome, Run, run_of
from simulator.errors import UserError
from simulator.files import plain, read_json, to_dataclass
from simulator.profile import Changed
from simulator.results import MeasuredTimeline, Measurement

COLUMNS = {
    "changed": ("constant", "before", "after", "change", "known to"),
    "checked": ("run", "layout", "measured", "error before", "error after"),
}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of measurement files, or of all in folders that have a plan.json beside them. A profiled step lies
    there as profile/timeline.json.

    Raises:
        UserError: a folder without any, no plan beside one, or one of another layout.
    """
    files: list[Path] = []
    for path in paths:
        found = [path]
        if path.is_dir():
            found = [file for file in sorted(path.rglob("measurement.json")) if (file.parent / "plan.json").exists()]
        if not found:
            raise UserError(f"folder '{path}' holds no measurement.json with a plan.json beside it; `run` writes them")
        files += [file for file in found if file not in files]
    return [_read_run(file) for file in files]


def _read_run(path: Path) -> Run:
    measured = to_dataclass(Measurement, read_json(path, "measurement"), f"measurement '{path}'")
    beside = path.parent / "plan.json"
    if not beside.exists():
        raise UserError(f"measurement '{path}' has no plan.json beside it, so that its job is not known; put it there")
    plan = read_plan(beside)
    if plan.layout != measured.layout:
        raise UserError(
            f"measurement '{path}' is of the layout '{measured.layout.short()}', but '{beside}' is a plan of "
            f"'{plan.layout.short()}'"
        )
    if measured.layout.sync != "all_reduce":
        raise UserError(f"measurement '{path}': sync = '{measured.layout.sync}' is not calibrated with; leave it out")
    timeline = None
    profiled = path.parent / "profile" / "timeline.json"
    if profiled.exists():
        timeline = to_dataclass(MeasuredTimeline, read_json(profiled, "timeline"), f"timeline '{profiled}'")
        timeline = timeline if timeline.layout == measured.layout else None
    return run_of(path.resolve().parent.name, plan.job, measured, timeline)


def changed_cells(one: Changed) -> tuple[str, ...]:
    change = one.after / one.before - 1
    return (one.name, f"{one.before:.4g}", f"{one.after:.4g}", f"{change:+.1%}", f"{one.spread:.1%}")


def checked_cells(one: Checked) -> tuple[str, ...]:
    return (one.name, one.layout.short(), f"{one.measured:.4g} s", f"{one.before:+.1%}", f"{one.after:+.1%}")


def sentences(found: Outcome) -> list[str]:
    """What the calibration did and did not do, the verdict first."""
    errors = f"median error of runs that the fit did not use: {found.before:.1%} before, {found.after:.1%} after"
    if found.worse:
        verdict = f"{errors}; worse, so that the profile stays as it is"
    elif not found.changed:
        verdict = "no constant is changed: the measurements determine none that differs from the profile"
    else:
        verdict = errors
    agreed = [f"{name} stays: the measurements agree with it" for name in found.agreed]
    refused = [f"{name} stays: {reason}" for name, reason in found.refused.items()]
    return [verdict, *agreed, *refused]


def outcome_json(found: Outcome) -> dict[str, Any]:
    """The outcome without the profile."""
    names = ("changed", "refused", "agreed", "checked", "before", "after", "worse")
    return {name: plain(getattr(found, name)) for name in names}
