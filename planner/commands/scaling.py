"""`plan` over several numbers of nodes: the scaling curve, and what the objective chooses of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from planner.commands.terminal import print_json, progress
from simulator.errors import NothingFitsError, UserError

if TYPE_CHECKING:
    from planner.scaling import Row
    from simulator.job import Job


def plan_over_nodes(
    job: Job, nodes: str | None, scale_batch: bool, output: Path, top: tuple[int, int], gap: float, as_json: bool
) -> None:
    """The scaling curve: a plan for every number of nodes, and of them the one that the objective chooses.

    top: how many layouts to rank for each number, and for the one that is chosen: only the best of each is needed for
    the curve, and finding more takes as long again."""
    import dataclasses

    from planner import documents, show
    from planner.objectives import too_late
    from planner.other_nodes import node_counts, over_nodes
    from planner.plan import write_plan
    from planner.scaling import write_scaling
    from planner.scaling_table import heading, missing_sentence, notes, scaling_json, table
    from planner.search import plan as search
    from simulator.layout_text import spelt_out
    from simulator.units import show_nodes

    counts = node_counts(job, nodes)
    if nodes is None and not job.objective.nodes:
        counts = tuple(sorted({*counts, job.nodes}))
    if not counts:
        raise UserError("--nodes names no number of nodes; write it like 4,8,16")
    with progress("planning", quiet=as_json) as report:
        scaling, plans = over_nodes(job, counts, scale_batch, top=top[0], gap=gap, progress=report)
        chosen = next((plan for plan in plans if plan.job.nodes == scaling.chosen), None)
        if chosen is not None and top[1] > top[0]:
            chosen = search(chosen.job, top[1], report, gap)
    if not scaling.rows:
        raise NothingFitsError("; ".join(missing_sentence(one) for one in scaling.missing))
    names = {plan.job.nodes: f"plan-{plan.job.nodes}-nodes.json" for plan in plans}
    scaling = dataclasses.replace(
        scaling, rows=tuple(dataclasses.replace(row, plan=names[row.nodes]) for row in scaling.rows)
    )
    written = [write_plan(plan, output / names[plan.job.nodes]) for plan in plans]
    written.append(write_scaling(scaling, output / "scaling.json"))
    if chosen is not None:
        written.append(write_plan(chosen, output / "plan.json"))
    if not as_json:
        show.print_texts(heading(job), *table(scaling), last=True)
        for note in notes(scaling):
            typer.echo(note)
        if chosen is not None:
            typer.echo(f"recommended: {show_nodes(chosen.job.nodes)}, {spelt_out(chosen.layout, chosen.job)}")
        for path in written:
            typer.echo(f"written to {path}")
    if chosen is None:
        with progress("planning more nodes", quiet=as_json) as report:
            missed = too_late(scaling.rows, job, lambda count: _row_on(job, count, scale_batch, report))
        print(f"error: {missed}", file=sys.stderr)
        for remedy in missed.remedies if not as_json else []:
            print(f"  {remedy}", file=sys.stderr)
        if as_json:
            print_json({"problems": [str(missed)], "remedies": list(missed.remedies), "scaling": scaling_json(scaling)})
        sys.exit(missed.exit_code)
    if as_json:
        print_json(scaling_json(scaling) | {"plan": documents.plan_json(chosen)})


def _row_on(job: Job, nodes: int, scale_batch: bool, report: Callable[[str, float], None]) -> Row | None:
    """The row of one more number of nodes; None where there is none."""
    from planner.other_nodes import over_nodes
    from simulator.checks import MOST_DEVICES

    if nodes * job.cluster.gpus_per_node > MOST_DEVICES or (nodes > 1 and job.cluster.scale_out is None):
        return None
    scaling, _ = over_nodes(job, [nodes], scale_batch, top=1, progress=report)
    return scaling.row(nodes)
