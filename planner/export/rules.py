"""Rules that several targets share, each as problems in the knob names that the target's module hands in."""

from __future__ import annotations

from collections.abc import Iterable

from planner.plan import Plan
from simulator.axes import AXES
from simulator.layout import Layout


def same_order(layout: Layout, axes: tuple[str, ...]) -> bool:
    """Whether ranks lie in this order of axes, innermost first; axes of one rank lie anywhere."""
    return [a for a in layout.axes if getattr(layout, a) > 1] == [a for a in axes if getattr(layout, a) > 1]


def rank_order(layout: Layout, mesh: str, axes: tuple[str, ...] = AXES) -> list[str]:
    """A problem if the target's mesh lies in another order; `mesh` is its order in its own words."""
    if same_order(layout, axes):
        return []
    return [f"the mesh is always {mesh}, outermost first: rank_order = '{layout.rank_order}' is another"]


def synchronisation(layout: Layout) -> list[str]:
    """A problem if replicas keep together in a way that no target has: all of them all-reduce."""
    if layout.sync == "all_reduce":
        return []
    return [f"sync = '{layout.sync}': its replicas all-reduce their gradients in every step"]


def offload(layout: Layout, instead: str) -> list[str]:
    """A problem if the optimizer lies in host memory and the target cannot put it there alone; `instead` is what it
    says of its own."""
    return [] if layout.offload == "none" else [f"offload = '{layout.offload}': {instead}"]


def missing(layout: Layout, knobs: dict[str, str]) -> list[str]:
    """Axes that the target does not have at all: {"pp": "what it says instead"}."""
    return [f"{axis} = {getattr(layout, axis)}: {why}" for axis, why in knobs.items() if getattr(layout, axis) > 1]


def precision(plan: Plan, known: Iterable[str], knob: str) -> list[str]:
    """A problem if the target's knob has no word for the plan's precision."""
    wanted = plan.job.training.precision
    return [] if wanted in known else [f"{knob} has no {wanted}; it has {', '.join(known)}"]


def decoder_stages(plan: Plan, knob: str) -> list[str]:
    """A problem if a pipeline would have to cut an encoder."""
    if plan.layout.pp == 1 or plan.job.model.causal:
        return []
    return [f"{knob} = {plan.layout.pp} cuts a row of decoder layers, not the {plan.job.model.family} family"]
