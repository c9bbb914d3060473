"""Predictions and plans as the JSON documents of `--json`."""

from __future__ import annotations

from typing import Any

from planner.certainty import warnings
from planner.memory_parts_report import parts_json
from planner.memory_report import binding, fullest_samples
from planner.plan import Plan
from planner.remedies import Remedies
from simulator.errors import NothingFitsError
from simulator.files import plain
from simulator.job import Job
from simulator.results import Prediction


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """A prediction without its timeline, which is a file of its own (`--trace`)."""
    document: dict[str, Any] = plain(prediction)
    document.pop("timeline")
    if prediction.synchronisation is None:
        document.pop("synchronisation")
    return document


def warnings_json(job: Job, prediction: Prediction) -> dict[str, Any]:
    """Claims of a prediction that nobody has reached, in the documents of `--json`."""
    return {"warnings": warnings(job, prediction)}


def remedies_json(found: Remedies) -> dict[str, Any]:
    """What would make a layout fit, or lower its risk, in the documents of `--json`; `nearest` where nothing does."""
    document: dict[str, Any] = {"remedies": plain(found.found)}
    return document | ({"nearest": plain(found.nearest), "short_by": found.short_by} if found.nearest else {})


def nothing_fits_json(error: NothingFitsError, found: Remedies) -> dict[str, Any]:
    """What `layoutwise plan --json` prints where nothing fits."""
    misses = [{"layout": plain(layout), "short_by": over} for over, layout in error.misses]
    return {"problems": [str(error)], "misses": misses, **remedies_json(found)}


def memory_json(prediction: Prediction, job: Job) -> dict[str, Any]:
    """What `explain --json` says of the memory of a prediction with its timeline: what decides, and the fullest rank
    over the step."""
    samples = [{"seconds": s.seconds, "op": s.op, "memory": plain(s.memory)} for s in fullest_samples(prediction)]
    return {"binding": plain(binding(job, prediction)), "memory_timeline": samples} | parts_json(job, prediction)


def plan_json(plan: Plan) -> dict[str, Any]:
    """What `layoutwise plan --json` prints."""
    return {
        "job": plain(plan.job),
        "best": prediction_json(plan.best),
        "runners_up": [prediction_json(p) for p in plan.runners_up],
        "baseline": prediction_json(plan.baseline),
        "certificate": plain(plan.certificate),
        "riskier": prediction_json(plan.riskier) if plan.riskier else None,
        "choice": plain(plan.choice) if plan.choice else None,
        "warnings": warnings(plan.job, plan.best),
    }
