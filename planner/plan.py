"""Plan: the chosen layout with everything that led to it, in one file that needs no other."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simulator.checks import check_job
from simulator.error_bars import step_interval
from simulator.errors import UserError
from simulator.files import STRICT, read_json, to_dataclass, write_json
from simulator.job import Job
from simulator.layout import Layout
from simulator.results import Prediction
from simulator.risk import HIGH_RISK, out_of_memory_probability

VERSION = 1


@dataclass(frozen=True)
class Certificate:
    """What the search did with the space of layouts; the counts add up to `space`.

    lower_bound_gap is how much better than the best simulated layout (Choice.best) a layout that was not simulated
    could be, as a fraction of its step; 0 is a proof that there is none.
    """

    space: int
    illegal: int
    out_of_memory: int
    bounded: int
    simulated: int
    lower_bound_gap: float
    seconds: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Choice:
    """How the recommended layout was chosen (planner/ties.py).

    best is the layout with the shortest step that the search proves, which is the shortest at the high end of its
    interval too; fastest the same of all that were simulated and may be recommended (with --gap it may be another);
    ties are other layouts whose step is within `tie` (a share) of the best's, best first; why is a sentence.
    """

    tie: float
    best: Layout
    best_step_seconds: float
    fastest: Layout
    fastest_step_seconds: float
    ties: tuple[Layout, ...]
    why: str

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Plan:
    """The recommendation: job, best layout with its prediction, the runners-up, the plain data-parallel baseline.

    riskier is the fastest layout that is predicted to fit, where it is too likely not to (risk.HIGH_RISK): the best one
    and the runners-up are then the fastest of those that are not. The certificate is that of the search for it.

    choice says what ties with the best one and why it is preferred; None in plans that were made without."""

    job: Job
    best: Prediction
    runners_up: tuple[Prediction, ...]
    baseline: Prediction
    certificate: Certificate
    provenance: dict[str, str]
    riskier: Prediction | None = None
    choice: Choice | None = None
    version: int = VERSION

    __pydantic_config__ = STRICT

    @property
    def layout(self) -> Layout:
        return self.best.layout

    @property
    def against_faster_baseline(self) -> str:
        """Why the baseline is not recommended where it is faster; empty where it is not, or does not fit."""
        best, plain = self.best, self.baseline
        if not plain.fits or plain.step_seconds >= best.step_seconds:
            return ""
        risk = plain.out_of_memory_probability
        if risk > HIGH_RISK >= best.out_of_memory_probability:
            return f"it runs out of memory with a probability of {risk:.0%}"
        if self.choice and plain.layout in self.choice.ties:
            return "the two tie"
        if plain.step_seconds >= best.step_seconds * (1 - self.certificate.lower_bound_gap):
            return "it is so by less than --gap lets the search stop at"
        return "[search] leaves it out"


def shortest_first(prediction: Prediction) -> tuple[float, str]:
    """Sorts predictions: the step, of equal ones the first by name. The high end of a step's interval is a multiple of
    it that all layouts of a job share, so the order under the pessimistic end is the same."""
    return prediction.step_seconds, prediction.layout.short()


def read_plan(path: Path | str) -> Plan:
    """The plan in a file that `layoutwise plan` wrote. Raises UserError if it is not one."""
    data = read_json(path, "plan")
    if data.get("version") != VERSION:
        raise UserError(f"plan '{path}': version = {data.get('version')!r} is not {VERSION}; plan again")
    plan = to_dataclass(Plan, _with_risks(data), f"plan '{path}'")
    check_job(plan.job, f"plan '{path}'")
    for name, prediction in (("best", plan.best), ("baseline", plan.baseline)):
        if len(prediction.memory_per_stage) != prediction.layout.pp:
            raise UserError(
                f"plan '{path}': {name}.memory_per_stage has {len(prediction.memory_per_stage)} entries, but "
                f"the layout '{prediction.layout.short()}' has pp = {prediction.layout.pp}"
            )
        if not 0 <= prediction.out_of_memory_probability <= 1:
            risk = prediction.out_of_memory_probability
            raise UserError(f"plan '{path}': {name}.out_of_memory_probability = {risk:g} must be from 0 to 1")
        for key in ("step_seconds", "tokens_per_second"):
            if getattr(prediction, key) <= 0:
                raise UserError(f"plan '{path}': {name}.{key} = {getattr(prediction, key):g} must be above zero")
        if not prediction.fits and not prediction.problems:
            raise UserError(f"plan '{path}': {name}.fits = false, but {name}.problems is empty")
    _check_sums(plan, f"plan '{path}'")
    problems = plan.layout.problems(plan.job)
    if problems:
        raise UserError(f"plan '{path}': the layout '{plan.layout.short()}' cannot run this job: {problems[0]}")
    return _with_intervals(plan)


def _check_sums(plan: Plan, where: str) -> None:
    """The parts of every step sum to it: tables and the page show both."""
    named = {"best": plan.best, "baseline": plan.baseline}
    named |= {f"runners_up.{number}": prediction for number, prediction in enumerate(plan.runners_up)}
    if plan.riskier:
        named["riskier"] = plan.riskier
    for name, prediction in named.items():
        whole = prediction.breakdown.total()
        if not math.isclose(whole, prediction.step_seconds, rel_tol=1e-6):
            raise UserError(
                f"{where}: the parts of {name}.breakdown sum to {whole:g} s, not to {name}.step_seconds = "
                f"{prediction.step_seconds:g}; plan again"
            )


def _with_intervals(plan: Plan) -> Plan:
    """The plan, also one that was written before predictions had an interval."""

    def known(p: Prediction) -> Prediction:
        return p if p.interval else replace(p, interval=step_interval(plan.job, p.step_seconds))

    return replace(
        plan, best=known(plan.best), baseline=known(plan.baseline), runners_up=tuple(map(known, plan.runners_up)),
        riskier=known(plan.riskier) if plan.riskier else None,
    )  # fmt: skip


def _with_risks(data: dict[str, Any]) -> dict[str, Any]:
    """The data of a plan, also of one that was written before predictions had a probability of running out of
    memory: what is held against the memory there is was then the peak of the fullest rank."""
    runners = data.get("runners_up")
    predictions = [data.get("best"), data.get("baseline"), *(runners if isinstance(runners, list) else [])]
    try:
        room, stack = data["job"]["cluster"]["gpu"]["memory"], data["job"]["stack"]["name"]
        for one in predictions:
            if "out_of_memory_probability" not in one:
                one["out_of_memory_probability"] = out_of_memory_probability(one["memory"]["peak"], room, stack)
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        # What is missing or wrong gets its sentence where the plan is checked.
        pass
    return data


def write_plan(plan: Plan, path: Path | str) -> Path:
    """Write a plan atomically."""
    return write_json(path, plan)
