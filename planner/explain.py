"""Where the time and the memory of a plan go, and why other layouts lose."""

from __future__ import annotations

from dataclasses import dataclass, fields

from planner.differences import Term, summary, term_lines, terms
from planner.other_layout import comparable
from planner.plan import Plan
from planner.remedies import show_risk
from simulator.job import Job
from simulator.layout import Layout
from simulator.layout_text import difference
from simulator.results import MEMORY_MEANING, TIME_MEANING, Breakdown, MemoryBreakdown, Prediction
from simulator.simulate import simulate
from simulator.sync_rules import changes_mathematics

Columns = list[tuple[str, Prediction]]


@dataclass(frozen=True)
class Explanation:
    """Predictions to put side by side, the recommended one first, and for each of the others why it is slower. What the
    user named and what is wrong with it is in `against` and `problems`; where it cannot run at all the nearest layout
    that can stands for it."""

    columns: Columns
    differences: dict[str, list[Term]]
    against: Layout | None = None
    problems: tuple[str, ...] = ()


def explain(plan: Plan, against: Layout | None = None) -> Explanation:
    """The winner beside the plain data-parallel baseline and a layout of the user's. The winner's and the user's are
    predicted now, with their timelines."""
    job = plan.job
    columns = [("recommended", simulate(job, plan.best.layout, trace=True))]
    if plan.baseline.layout != plan.best.layout:
        columns.append(("data parallel", plan.baseline))
    problems: tuple[str, ...] = ()
    if against is not None:
        other = comparable(job, against, trace=True)
        problems = other.problems
        if other.prediction is not None:
            columns.append(("nearest to yours" if other.nearest else "yours", other.prediction))
    (_, best), *others = columns
    differences = {name: terms(job, best, p) for name, p in others if _same_work(job, p)}
    return Explanation(columns, differences, against, problems)


def _same_work(job: Job, prediction: Prediction) -> bool:
    """Whether a prediction is of all the job's ranks; plain data parallelism may leave some idle."""
    spread = job.cluster.oversubscribe > 1
    return spread or prediction.layout.world_size == job.world_size


def time_rows(columns: Columns) -> list[tuple[str, str, list[float]]]:
    """(item, meaning, seconds per column) for every item of the step that any column spends time on."""
    rows = []
    for field in fields(Breakdown):
        values = [float(getattr(p.breakdown, field.name)) for _, p in columns]
        if any(values):
            rows.append((field.name, TIME_MEANING[field.name], values))
    return rows


def memory_rows(columns: Columns) -> list[tuple[str, str, list[float]]]:
    """(item, meaning, bytes per column) on the fullest rank of each column."""
    rows = []
    for field in fields(MemoryBreakdown):
        if field.name == "peak":
            continue
        name = "optimizer state" if field.name == "optimizer" else field.name
        values = [float(getattr(p.memory, field.name)) for _, p in columns]
        rows.append((name, MEMORY_MEANING[field.name], values))
    return rows


def mathematics(prediction: Prediction) -> str:
    """A sentence where a layout trains something else than one gradient of the whole batch; empty where it does not."""
    layout = prediction.layout
    if not changes_mathematics(layout):
        return ""
    if layout.sync == "local_sgd":
        how = f"replicas agree every {layout.sync_interval} steps only"
    elif layout.staleness is None:
        how = "gradients are of parameters that others have changed since, without a bound"
    else:
        how = f"gradients are of parameters of up to {layout.staleness} steps ago"
    return (
        f"sync = '{layout.sync}' changes the mathematics: {how}. Its step is fast, but may be worth less than one of "
        f"an all-reduce; only a training run says how much."
    )


def sentences(found: Explanation) -> list[str]:
    """For every column after the first: why it cannot run, how much slower it is, and the items that cost it most."""
    (_, best), *others = found.columns
    return remarks(found) + [
        f"{summary(found.differences[name], name, best, other)}."
        for name, other in others
        if other.layout != best.layout and name in found.differences
    ]


def remarks(found: Explanation) -> list[str]:
    """What is to be said of layouts besides their seconds."""
    columns = found.columns
    said = [f"{name}: {words}" for name, p in columns if (words := mathematics(p))]
    if found.problems and found.against is not None:
        said.append(f"yours ({found.against.short()}) cannot run this job: {'; '.join(found.problems)}.")
    (_, best), *others = columns
    for name, other in others:
        if other.layout == best.layout:
            said.append(f"{name} is the recommended layout.")
            continue
        if not other.fits and other.problems[0] not in found.problems:
            what = "does not fit" if "too much" in other.problems[0] else "is impossible"
            said.append(f"{name} ({other.layout.short()}) {what}: {'; '.join(other.problems)}.")
    return said


def why_lines(found: Explanation) -> list[str]:
    """For every other layout: its terms, a line each, which add up to the difference of the steps."""
    (_, best), *others = found.columns
    lines = []
    for name, other in others:
        if other.layout == best.layout or name not in found.differences:
            continue
        title = name
        if name == "nearest to yours" and found.against is not None:
            title = f"nearest to yours with {difference(found.against, other.layout)}"
        lines.append(f"{summary(found.differences[name], title, best, other, most=0)}:")
        lines += [f"  {line}" for line in term_lines(found.differences[name], best)]
        if other.fits and other.out_of_memory_probability > best.out_of_memory_probability + 0.01:
            lines.append(f"  and its risk of running out of memory is {show_risk(other.out_of_memory_probability)}")
    return lines
