"""A scaling as a table for a terminal, and what there is to say about it; and as the document of `--json`."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.objectives import allowance, costs, show_hours
from planner.plan import Plan
from planner.remedies import show_risk
from planner.scaling import DEFAULT_TOKENS, Missing, Row, Scaling, rows_of
from simulator.files import plain
from simulator.job import Job
from simulator.layout_text import spelt_out
from simulator.price import hours_name
from simulator.units import show_duration, show_nodes, show_seconds, show_tokens

FRONTS = (
    "* no other number is better in one of time, cost and GPUs and as good in the others; ** nor in time and cost alone"
)
Table = tuple[list[str], list[list[str]]]


def heading(job: Job) -> str:
    """`llama-3.1-70b on dgx-h100, bf16, megatron-core`"""
    return f"{job.model.name} on {job.cluster.name}, {job.training.precision}, {job.stack.name}"


def cost_sentence(plan: Plan) -> str:
    """What the tokens of one plan take and cost."""
    (row,) = rows_of([plan], plan.job.objective.tokens or DEFAULT_TOKENS)
    allowed = f"; {allowance(plan.job)}" if plan.job.objective.tokens else ""
    return f"{costs(row, plan.job)}; {price_sentence(plan.job)}{allowed}"


def table(scaling: Scaling) -> Table:
    """Columns and a row for each number of nodes that has a layout."""
    tokens, priced = show_tokens(scaling.tokens), any(row.dollars is not None for row in scaling.rows)
    gpus = "processors" if scaling.job.cluster.gpu.kind == "cpu" else "GPUs"
    columns = [
        "nodes", gpus, *(["batch"] if scaling.scale_batch else []), "step", "tokens/s", "tok/s/GPU", "MFU",
        "efficiency", f"{tokens} tokens", hours_name(scaling.job), *(["$"] if priced else []), "OOM risk", "layout",
    ]  # fmt: skip
    return columns, [_cells(row, scaling, priced) for row in scaling.rows]


def _cells(row: Row, scaling: Scaling, priced: bool) -> list[str]:
    p = row.prediction
    return [
        f"{row.nodes}{mark(row, scaling)}",
        str(row.gpus),
        *([str(row.global_batch_size)] if scaling.scale_batch else []),
        show_seconds(p.step_seconds),
        f"{p.tokens_per_second:,.0f}",
        f"{p.tokens_per_second_per_gpu:,.0f}",
        f"{p.mfu:.1%}",
        f"{row.efficiency:.1%}",
        show_duration(row.seconds),
        show_hours(row.gpu_hours),
        *([f"{row.dollars:,.0f}"] if priced and row.dollars is not None else []),
        show_risk(p.out_of_memory_probability),
        spelt_out(p.layout, dataclasses.replace(scaling.job, nodes=row.nodes)),
    ]


def mark(row: Row, scaling: Scaling) -> str:
    """` ** <`: on the fronts, and what the objective chooses."""
    front = " **" if row.on_time_cost_front else " *" if row.on_front else ""
    return front + (" <" if row.nodes == scaling.chosen else "")


def notes(scaling: Scaling) -> list[str]:
    """Sentences below the table: what has no layout, what is held constant, the bend, what the objective chooses."""
    job = scaling.job
    found = [missing_sentence(one) for one in scaling.missing]
    found.append(FRONTS)
    found += [batch_sentence(scaling), f"{price_sentence(job)}; {allowance(job)}"]
    if scaling.bend:
        found.append(scaling.bend)
    if scaling.reason:
        found.append(f"< {scaling.reason}")
    return found


def missing_sentence(missing: Missing) -> str:
    return f"{show_nodes(missing.nodes)}: {missing.reason}"


def batch_sentence(scaling: Scaling) -> str:
    """What batch the numbers of nodes have."""
    training = scaling.job.training
    if scaling.scale_batch:
        each = training.global_batch_size * training.seq_len / scaling.job.world_size
        return (
            f"the batch grows with the nodes, {each:,.0f} tokens a step for each GPU; that a larger batch may need "
            "more tokens for the same loss is not counted"
        )
    return f"the batch is the same everywhere, {training.global_batch_size} x {training.seq_len} tokens a step"


def price_sentence(job: Job) -> str:
    price = job.cluster.price_per_gpu_hour
    if price is None:
        return f"cost is in {hours_name(job)}: neither the cluster nor the job has a price_per_gpu_hour"
    return f"cost is at {price:,.2f} USD per GPU-hour"


def scaling_json(scaling: Scaling) -> dict[str, Any]:
    """scaling.json without what every prediction has for its timeline."""
    document: dict[str, Any] = plain(scaling)
    for row in document["rows"]:
        row["prediction"].pop("timeline")
    return document
