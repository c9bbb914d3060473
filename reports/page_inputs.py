"""What a page is made of besides its plan: runs and profiles that lie beside it, the exam, plans for other sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.plan import Plan, read_plan
from planner.scaling import Scaling, read_scaling
from reports.here import read_sentences
from reports.scores import quantile
from reports.synchronisation import Ways, read_ways
from reports.tables import Comparison
from simulator.errors import UserError
from simulator.files import STRICT, read_json, to_dataclass
from simulator.layout import Layout
from simulator.results import MeasuredTimeline, Measurement, Prediction
from simulator.simulate import simulate

COUNTED = ("high", "medium")
# Published runs of one stack that are enough to say how far off it is; with fewer all stacks count together.
ENOUGH_RUNS = 20
_LOOSE = {**STRICT, "extra": "ignore"}


@dataclass(frozen=True)
class Throughput:
    """Tokens per second and GPU; None where there is no such number."""

    tokens_per_second_per_gpu: float | None = None

    __pydantic_config__ = _LOOSE


@dataclass(frozen=True)
class ExamRow:
    """A published run and its prediction, of what `validate published --json` prints."""

    id: str
    confidence: str
    gpu: str
    arch: str
    framework: str
    measured: Throughput
    predicted: Throughput
    error: float | None
    stack: str | None = None

    __pydantic_config__ = _LOOSE

    @property
    def compared(self) -> bool:
        """Whether it has an error and counts in the summary."""
        speeds = (self.measured.tokens_per_second_per_gpu, self.predicted.tokens_per_second_per_gpu)
        known = self.error is not None and self.error > -1 and all(speed is not None and speed > 0 for speed in speeds)
        return known and self.confidence in COUNTED


@dataclass(frozen=True)
class Exam:
    """All of them."""

    rows: tuple[ExamRow, ...]

    __pydantic_config__ = _LOOSE

    @property
    def compared(self) -> list[ExamRow]:
        return [row for row in self.rows if row.compared]


@dataclass(frozen=True)
class Inputs:
    """Everything besides the plan; a part that is not there leaves its section of the page out.

    `reasons` are sentences why the plan wins; `scaling` is the same job on several numbers of nodes; `notes` say what
    lay beside the plan and was left out; `validated` are sentences about how far all runs of the folder are off;
    `what_if` is a table of changes, each planned anew: its head and its rows; `ways` are those to keep replicas
    together, that were run.
    """

    comparisons: tuple[Comparison, ...] = ()
    measured: MeasuredTimeline | None = None
    exam: Exam | None = None
    scaling: Scaling | None = None
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    validated: tuple[str, ...] = ()
    what_if: tuple[Sequence[str], Sequence[Sequence[str]]] | None = None
    ways: tuple[Ways, ...] = ()

    def run_of(self, layout: Layout) -> Measurement | None:
        """The measurement of a layout, if it was run."""
        return next((c.measurement for c in self.comparisons if c.measurement.layout == layout), None)


def find_plan(given: Path) -> Path:
    """The plan.json that a user means by a file or a folder. Raises UserError where the folder has none."""
    if not given.is_dir():
        return given
    path = given / "plan.json"
    if not path.is_file():
        raise UserError(f"folder '{given}' has no plan.json; name a plan, or a folder that `layoutwise plan -o` wrote")
    return path


def find_inputs(plan: Plan, folder: Path, validation: Path | None = None) -> Inputs:
    """What lies in `folder` beside a plan: measurement.json, runs/*/measurement.json, profile/timeline.json,
    here.json, sync.json with its runs, scaling.json and validation.json, or another file with the output of `validate
    published --json`.

    Raises UserError if one of them is not what its name says.
    """
    notes: list[str] = []
    comparisons = _comparisons(plan, folder)
    measured = None
    if (path := folder / "profile" / "timeline.json").is_file():
        measured = to_dataclass(MeasuredTimeline, read_json(path, "timeline"), f"timeline '{path}'")
        if measured.layout != plan.layout:
            notes.append(f"profile/timeline.json is of another layout ({measured.layout.short()}) and is not shown.")
            measured = None
    exam_file = validation or folder / "validation.json"
    exam = read_exam(exam_file) if validation or exam_file.is_file() else None
    here = folder / "here.json"
    validated = read_sentences(here) if here.is_file() else []
    scaling = None
    if (path := folder / "scaling.json").is_file():
        scaling = read_scaling(path)
        if not _of_the_same_job(scaling, plan):
            notes.append("scaling.json is of another job and is not shown.")
            scaling = None
    return Inputs(
        tuple(comparisons), measured, exam, scaling, notes=tuple(notes), validated=tuple(validated),
        ways=read_ways(folder),
    )  # fmt: skip


def _of_the_same_job(scaling: Scaling, plan: Plan) -> bool:
    """Whether a scaling is that of a plan's job but for nodes, and the batch that goes with them."""
    training = dataclasses.replace(scaling.job.training, global_batch_size=plan.job.training.global_batch_size)
    batch = scaling.scale_batch or training == scaling.job.training
    return batch and dataclasses.replace(scaling.job, nodes=plan.job.nodes, training=training) == plan.job


def read_exam(path: Path) -> Exam:
    """What `validate published --json` printed. Raises UserError if the file is something else."""
    data = read_json(path, "validation")
    if "rows" not in data:
        raise UserError(f"validation '{path}' has no 'rows'; write it with `layoutwise validate published --json`")
    return to_dataclass(Exam, data, f"validation '{path}'")


def _comparisons(plan: Plan, folder: Path) -> list[Comparison]:
    """The run of this plan, then those in runs/, those of its model first and the fewest ranks first of these."""
    found: list[Comparison] = []
    if (path := folder / "measurement.json").is_file():
        found.append(_compare("this plan", plan, path))
    others: list[tuple[bool, Comparison]] = []
    for path in sorted(folder.glob("runs/*/measurement.json")):
        if (path.parent / "plan.json").is_file():
            own = read_plan(path.parent / "plan.json")
            others.append((own.job.model != plan.job.model, _compare(path.parent.name.replace("-", " "), own, path)))
    others.sort(key=lambda one: (one[0], one[1].measurement.world_size))
    return found + [one for _, one in others]


def _compare(name: str, plan: Plan, path: Path) -> Comparison:
    measurement = to_dataclass(Measurement, read_json(path, "measurement"), f"measurement '{path}'")
    if measurement.step_seconds.median <= 0 or not measurement.peak_memory or max(measurement.peak_memory) <= 0:
        raise UserError(f"measurement '{path}': step_seconds.median and peak_memory must be above zero")
    prediction = plan.best
    if measurement.layout != plan.layout:
        if problems := measurement.layout.problems(plan.job):
            raise UserError(f"measurement '{path}' is of a layout that cannot run the plan's job: {problems[0]}")
        prediction = simulate(plan.job, measurement.layout)
    return Comparison(name, prediction, measurement)


def step_interval(prediction: Prediction) -> tuple[float, float] | None:
    """The ends of the prediction's interval; None where it carries none."""
    return (prediction.interval.low, prediction.interval.high) if prediction.interval else None


def exam_groups(rows: Sequence[ExamRow]) -> list[tuple[str, list[ExamRow]]]:
    """The rows by GPU, stack and architecture: ("GPU: H100", rows), the largest group of a kind first."""
    found: list[tuple[str, list[ExamRow]]] = []
    for title, key in (("GPU", "gpu"), ("stack", "stack"), ("architecture", "arch")):
        groups: dict[str, list[ExamRow]] = {}
        for row in rows:
            groups.setdefault(str(getattr(row, key) or "not stated"), []).append(row)
        names = sorted(groups, key=lambda name: (-len(groups[name]), name))
        found += [(f"{title}: {name}", groups[name]) for name in names]
    return found


def error_figures(rows: Sequence[ExamRow]) -> dict[str, Any]:
    """count, median size of the error, and the error's 10th, 50th and 90th percentile with its sign."""
    signed = [_error(row) for row in rows]
    return {
        "count": len(signed),
        "median_abs": quantile([abs(e) for e in signed], 0.5),
        **{name: quantile(signed, q) for name, q in (("p10", 0.1), ("median", 0.5), ("p90", 0.9))},
    }


def _error(row: ExamRow) -> float:
    assert row.error is not None
    return row.error
