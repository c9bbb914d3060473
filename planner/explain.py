"""Where the time and the memory of a plan go, and where those of other layouts go instead."""

from __future__ import annotations

from dataclasses import fields

from planner.imports import read_layout
from planner.plan import Plan
from simulator.errors import UserError
from simulator.results import Breakdown, MemoryBreakdown, Prediction
from simulator.simulate import simulate
from simulator.sync_rules import changes_mathematics

_MEANING = {
    "compute": "kernels",
    "recompute": "forward again, to save memory",
    "tp": "tensor-parallel collectives that nothing hides",
    "cp": "context-parallel exchange that nothing hides",
    "ep": "expert exchange that nothing hides",
    "pp": "waiting for a tensor on a link",
    "dp": "gradients and parameters that nothing hides",
    "bubble": "waiting for another stage or replica",
    "optimizer": "update and gradient norm",
    "host": "launching kernels that the device outruns",
    "parameters": "weights",
    "gradients": "summed over the microbatches",
    "optimizer state": "moments, and fp32 weights where the others are narrower",
    "activations": "kept for the backward, times the microbatches alive",
    "buffers": "gathered weights, tensors on the way",
    "overhead": "device context, communicators, fragmentation",
}


def explain(plan: Plan, against: str | None = None) -> list[tuple[str, Prediction]]:
    """The predictions to put side by side: the winner, the plain data-parallel baseline, and a layout of the user's.
    The winner's and the user's are made now, with their timelines.

    Raises:
        UserError: `against` is no layout, or one that cannot run this job; the reasons are its `problems`.
    """
    columns = [("recommended", simulate(plan.job, plan.best.layout, trace=True))]
    if plan.baseline.layout != plan.best.layout:
        columns.append(("data parallel", plan.baseline))
    if against is not None:
        layout = read_layout(against, plan.job).layout
        problems = layout.problems(plan.job)
        if problems:
            raise UserError(f"layout '{layout.short()}' cannot run this job: {'; '.join(problems)}")
        columns.append(("yours", simulate(plan.job, layout, trace=True)))
    return columns


def time_rows(columns: list[tuple[str, Prediction]]) -> list[tuple[str, str, list[float]]]:
    """(item, meaning, seconds per column) for every item of the step that any column spends time on."""
    rows = []
    for field in fields(Breakdown):
        values = [float(getattr(p.breakdown, field.name)) for _, p in columns]
        if any(values):
            rows.append((field.name, _MEANING[field.name], values))
    return rows


def memory_rows(columns: list[tuple[str, Prediction]]) -> list[tuple[str, str, list[float]]]:
    """(item, meaning, bytes per column) on the fullest rank of each column."""
    rows = []
    for field in fields(MemoryBreakdown):
        if field.name == "peak":
            continue
        name = "optimizer state" if field.name == "optimizer" else field.name
        rows.append((name, _MEANING[name], [float(getattr(p.memory, field.name)) for _, p in columns]))
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


def sentences(columns: list[tuple[str, Prediction]]) -> list[str]:
    """For every column after the first: how much slower it is, and the item that costs it most."""
    (_, best), *others = columns
    found = [f"{name}: {words}" for name, p in columns if (words := mathematics(p))]
    for name, other in others:
        if not other.fits:
            found.append(f"{name} ({other.layout.short()}) does not fit: {other.problems[0]}.")
            continue
        if other.layout == best.layout:
            found.append(f"{name} is the recommended layout.")
            continue
        gaps = {row[0]: row[2][1] - row[2][0] for row in time_rows([("", best), ("", other)])}
        worst = max(gaps, key=lambda item: gaps[item])
        slower = other.step_seconds / best.step_seconds - 1
        found.append(
            f"{name} ({other.layout.short()}) is {slower:+.1%} in step time; "
            f"most of it is {worst} ({gaps[worst]:+.3g} s: {_MEANING[worst]})."
        )
    return found
