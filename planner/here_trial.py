"""Layouts of real models, planned for this machine and run on it in rounds, beside what was predicted of them.

Like the command line that starts it, this module may import every package, inside its functions.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from planner.plan import Plan, write_plan
from planner.rivals import Search, planned, rivals, rivals_of_hosts, with_recommended
from planner.search import plan
from simulator.errors import UserError
from simulator.files import read_json, read_toml, to_dataclass, write_json
from simulator.hosts import Wire, two_hosts
from simulator.job import Job, build_job, read_job
from simulator.presets import THIS_MACHINE, user_profile
from simulator.profile import Profile, read_profile
from simulator.results import MeasuredTimeline, Measurement
from simulator.simulate import simulate

Progress = Callable[[str, float], None]

SMALL: dict[str, Any] = {
    "model": "llama-bytes-12m",
    "cluster": "this-machine",
    "nodes": 1,
    "training": {"global_batch_size": 8, "seq_len": 128, "learning_rate": 1e-3},
}
# Ten times the parameters on a quarter of the tokens: what is reduced and updated weighs more than what is computed.
LARGE: dict[str, Any] = {
    "model": "gpt2",
    "cluster": "this-machine",
    "nodes": 1,
    "training": {"global_batch_size": 4, "seq_len": 64, "learning_rate": 1e-4},
}
# More samples for two hosts: what four ranks exchange is then worth it where the link is fast.
LINKED = SMALL | {"training": {"global_batch_size": 32, "seq_len": 128, "learning_rate": 1e-3}}
# Jobs, and the rivals that are run of each; None means all of them. Tensor parallel ranks cannot halve the odd
# vocabulary of gpt2, and pipeline ranks would each hold its tied embedding.
LADDER: tuple[tuple[dict[str, Any], tuple[str, ...] | None], ...] = (
    (SMALL, None),
    (LARGE, ("1 process", "data 2", "FSDP 2, ZeRO 2", "FSDP 2, ZeRO 3")),
)
# The project's own runtime, by what a profile is of.
STACKS = {"cpu": "layoutwise-cpu", "gpu": "layoutwise-cuda"}
# A profile that is older may be of another state of the machine.
FRESH = datetime.timedelta(days=1)


@dataclasses.dataclass(frozen=True)
class Course:
    """How long to run: rounds over all layouts, and steps of each run, of which the first `warmup` do not count: two in
    which memory is counted, and three in which the process takes for good what steps need (fresh pages cost a step of
    FSDP up to a third of its time). In the last round a step more is profiled."""

    rounds: int = 3
    steps: int = 10
    warmup: int = 5

    @property
    def warning(self) -> str | None:
        """What speaks against its figures; None if nothing does."""
        if self.warmup >= Course.warmup:
            return None
        return f"Runs grow faster until their sixth step, and these left out {self.warmup}: give --steps 7 or more."


@dataclasses.dataclass(frozen=True)
class Contest:
    """The layouts of one job that are run: plans by name, which of them is recommended, and why others are not run."""

    job: Job
    plans: dict[str, Plan]
    recommended: str
    missing: dict[str, str]

    @property
    def best(self) -> Plan:
        return self.plans[self.recommended]


def profile_for(given: Path | None, report: Progress) -> tuple[Path, str]:
    """The profile to predict with, and a sentence that says which: the one given, this user's if it is fresh, else
    one that is measured now and kept for the user."""
    if given is not None:
        return given, f"profile {given}, measured {read_profile(given).created}"
    path = user_profile()
    stale = _staleness(path)
    if stale is None:
        return path, f"profile of {read_profile(path).created} ({path})"
    from runtime.measure import measure

    measure(path, lambda what, done: report(f"measuring {what}", done))
    return path, f"profile measured now, because {stale} ({path})"


def _staleness(path: Path) -> str | None:
    """Why a profile does not hold here and now; None if it does."""
    from runtime.machine import processors

    if not path.is_file():
        return "there was none"
    try:
        found: Profile = read_profile(path)
        age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(found.created)
    except (UserError, ValueError, TypeError):
        return "the one there could not be read"
    if age > FRESH:
        return f"that of {found.created} is more than a day old"
    version = metadata.version("torch")
    if found.versions.get("torch", version).partition("+")[0] != version.partition("+")[0]:
        return f"torch is {version}, no longer {found.versions['torch']}"
    if found.kind == "cpu" and found.devices != (count := processors()):
        return f"this process may use {count} processors, no longer {found.devices}"
    return None


def contest(job: Job, chosen: Mapping[str, Search], report: Progress) -> Contest:
    """Plan a job, and each of its rivals."""
    report(f"planning {job.model.name}", 0.0)
    best = plan(job)
    plans, missing = planned(job, chosen)
    plans, name = with_recommended(plans, best)
    # The plan with its runners-up is the one to keep.
    return Contest(job, plans | {name: best}, name, missing)


def ladder(profile: Path, wire: Wire | None = None) -> list[tuple[Job, dict[str, Search]]]:
    """The jobs that are run by default with their rivals; a single one over a link between two hosts."""
    stack = STACKS[read_profile(profile).kind]
    found = []
    for data, names in LADDER if wire is None else ((LINKED, None),):
        own = data | {"profile": str(profile), "training": data["training"] | {"stack": stack}}
        job = build_job(own, f"the job of {data['model']}")
        found.append(with_rivals(job, wire, names))
    return found


def with_rivals(job: Job, wire: Wire | None, names: Sequence[str] | None = None) -> tuple[Job, dict[str, Search]]:
    """A job as it is on this machine, or on two hosts that are made of it, and the rivals to run."""
    if wire is not None:
        job = dataclasses.replace(job, cluster=two_hosts(job.cluster, wire), nodes=2)
        chosen = rivals_of_hosts(job.cluster.gpus_per_node)
    else:
        chosen = rivals(job.world_size)
    return job, {name: limits for name, limits in chosen.items() if names is None or name in names}


def run_contests(
    contests: Sequence[Contest], course: Course, output: Path, report: Progress, wire: Wire | None = None
) -> tuple[list[list[Any]], list[str]]:
    """Run all layouts of all contests in rounds, every other round in reverse, so that a machine that grows faster or
    slower meanwhile changes none of them more than the others. What is left in `output`/runs/NAME is the plan, the
    measurement of all rounds together, those of each round, and the profiled step of the last one.

    Returns the trials (reports.here.Trial) of each contest, and a sentence for every layout whose run failed.
    """
    from runtime.here import run_here
    from runtime.settings import Settings

    several = len(contests) > 1
    todo = [(c, name, one) for c in contests for name, one in c.plans.items()]
    folders = [output / "runs" / slug(f"{c.job.model.name} {name}" if several else name) for c, name, _ in todo]
    paths = [write_plan(one, folder / "plan.json") for folder, (_, _, one) in zip(folders, todo, strict=True)]
    measured: list[list[Measurement]] = [[] for _ in todo]
    failed: dict[int, str] = {}
    total, done = course.rounds * len(todo), 0
    for number in range(course.rounds):
        last = number == course.rounds - 1
        order = range(len(todo)) if number % 2 == 0 else reversed(range(len(todo)))
        for place in order:
            c, name, _ = todo[place]
            what = f"round {number + 1} of {course.rounds}, {c.job.model.name}, {name}"
            report(what, done / total)
            done += 1
            if place in failed:
                continue
            settings = Settings(
                course.steps + last, course.warmup, profile=folders[place] / "profile" if last else None
            )
            try:
                one = run_here(
                    paths[place], folders[place] / f"round-{number + 1}" / "measurement.json", settings, wire=wire
                )
            except RuntimeError as error:
                failed[place] = f"{c.job.model.name}, {name}: {error}"
                print(f"warning: {failed[place]}", file=sys.stderr)
                continue
            measured[place].append(one)
    report("comparing", 1.0)
    return _trials(contests, todo, folders, measured, failed), list(failed.values())


def _trials(
    contests: Sequence[Contest],
    todo: Sequence[tuple[Contest, str, Plan]],
    folders: Sequence[Path],
    measured: Sequence[Sequence[Measurement]],
    failed: Mapping[int, str],
) -> list[list[Any]]:
    """What ran through, contest by contest; its measurement is written beside its plan."""
    from reports.here import Trial

    found: list[list[Any]] = [[] for _ in contests]
    for place, (c, name, one) in enumerate(todo):
        if place in failed:
            continue
        path = folders[place] / "profile" / "timeline.json"
        timeline = to_dataclass(MeasuredTimeline, read_json(path, "timeline"), f"timeline '{path}'")
        prediction = simulate(one.job, one.layout, trace=True)
        trial = Trial(name, one, prediction, tuple(measured[place]), timeline)
        write_json(folders[place] / "measurement.json", trial.measured)
        found[next(n for n, other in enumerate(contests) if other is c)].append(trial)
    return found


def slug(name: str) -> str:
    """A name as that of a folder: "data 2 x tensor 2" is data-2-x-tensor-2."""
    return "-".join(re.findall(r"[\w.]+", name))


def skipped(wire: Wire) -> str | None:
    """Why two hosts cannot be made here; None if they can."""
    from runtime.hosts import hindrance

    return hindrance(wire)


def validate_machine(
    job_files: Sequence[Path],
    course: Course,
    output: Path,
    report: Progress,
    wire: Wire | None = None,
    profile: Path | None = None,
) -> tuple[list[Any], dict[str, Any], list[Path]]:
    """The whole of `validate here`: a profile, plans, runs, comparison. The first job's plan goes to `output`, so that
    the folder is one that `layoutwise report` shows.

    Returns the jobs with their trials (reports.here_page.Examined), what here.json holds, and what was written.
    """
    from reports.here import restless
    from reports.here_page import Examined, write_here
    from runtime.measure import busy_seconds

    found, said = profile_for(profile or _named_profile(job_files), lambda what, done: report(what, 0.25 * done))
    given = [with_rivals(read_job_here(path, found), wire) for path in job_files] or ladder(found, wire)
    contests = [contest(job, chosen, lambda what, _: report(what, 0.25)) for job, chosen in given]
    write_plan(contests[0].best, output / "plan.json")
    busy, begin = busy_seconds(), time.perf_counter()
    trials, failed = run_contests(contests, course, output, lambda what, done: report(what, 0.27 + 0.7 * done), wire)
    warnings = _others(busy, busy_seconds(), time.perf_counter() - begin)
    if course.warning:
        warnings.append(course.warning)
    warnings += restless([trial for runs in trials for trial in runs])
    jobs = [
        Examined(c.job.model.name, runs, c.recommended, c.missing) for c, runs in zip(contests, trials, strict=True)
    ]
    for c, runs in zip(contests[:1], trials, strict=False):
        chosen_trial = next((trial for trial in runs if trial.name == c.recommended), None)
        if chosen_trial is not None and chosen_trial.timeline is not None:
            write_json(output / "profile" / "timeline.json", chosen_trial.timeline)
    about = {
        "profile": said,
        "link": None if wire is None else str(wire),
        "course": f"{course.rounds} rounds of {course.steps} steps, the first {course.warmup} without times"
        + ("" if wire is None else f", on two hosts made of this machine, linked by {wire}"),
        "warnings": warnings,
        "failed": failed,
    }
    document, written = write_here(jobs, about, output)
    return jobs, document, [output / "plan.json", *written]


def _named_profile(job_files: Sequence[Path]) -> Path | None:
    """The profile that the jobs name. Raises UserError where they name several: what is compared has to be of one
    machine."""
    named = {}
    for path in job_files:
        name = read_toml(path, "job").get("profile")
        if isinstance(name, str):
            beside = path.parent / Path(name).expanduser()
            named[beside if beside.exists() else Path(name)] = path
    if len(named) > 1:
        raise UserError(f"jobs name {len(named)} profiles, {' and '.join(map(str, named))}; choose one with --profile")
    return next(iter(named), None)


def read_job_here(path: Path, profile: Path) -> Job:
    """A user's job, on this machine by the same profile. Raises UserError if it is for another cluster."""
    job = read_job(path, [f'profile="{profile.absolute()}"'])
    if job.cluster.name != THIS_MACHINE or job.nodes != 1:
        raise UserError(
            f"job '{path}': cluster = '{job.cluster.name}' on {job.nodes} nodes cannot run here; "
            f'write cluster = "{THIS_MACHINE}" and nodes = 1'
        )
    return job


def _others(before: tuple[float, float], after: tuple[float, float], seconds: float) -> list[str]:
    """A warning where others used the processors while layouts were run."""
    from runtime.machine import processors
    from runtime.measure import BUSY

    used = (after[0] - before[0] - (after[1] - before[1])) / seconds
    if used <= BUSY * (count := processors()):
        return []
    return [f"Other work used {used:.1f} of the {count} processors meanwhile; run it again when nothing else runs."]
