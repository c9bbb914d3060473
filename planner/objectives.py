"""Which number of nodes a job's objective chooses, and what would make a deadline that none of them meets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.scaling import DEFAULT_TOKENS, Row
from simulator.errors import UserError
from simulator.job import Job
from simulator.price import hours_name
from simulator.risk import HIGH_RISK
from simulator.units import show_duration, show_nodes, show_tokens


@dataclass(frozen=True)
class Choice:
    """A number of nodes, and a sentence why."""

    nodes: int
    reason: str


class TooLateError(UserError):
    """No number of nodes meets the deadline. `remedies` are sentences on what would make it."""

    exit_code = 3

    def __init__(self, message: str, remedies: Sequence[str]) -> None:
        super().__init__(message)
        self.remedies = tuple(remedies)


def choose(rows: Sequence[Row], job: Job) -> Choice | None:
    """The row that the job's objective prefers among those that are unlikely to run out of memory, or where there are
    none among all; of equals the one with fewer GPUs. None where there is none, or none in time."""
    in_time = [row for row in rows if _meets(row, job)]
    safe = [row for row in in_time if row.prediction.out_of_memory_probability <= HIGH_RISK]
    if not in_time:
        return None
    best, riskier = min(safe or in_time, key=_value(job)), min(in_time, key=_value(job))
    reason = f"{_title(job)}: {show_nodes(best.nodes)}, {costs(best, job)}"
    if riskier is not best:
        risk = riskier.prediction.out_of_memory_probability
        reason += f"; better would be {show_nodes(riskier.nodes)}, but out of memory with a probability of {risk:.0%}"
    return Choice(best.nodes, reason)


def _meets(row: Row, job: Job) -> bool:
    deadline = job.objective.deadline
    return deadline is None or row.seconds <= deadline


def _value(job: Job) -> Callable[[Row], tuple[float, float]]:
    goal = job.objective
    if goal.goal == "fastest":
        return lambda row: (row.seconds, row.gpus)
    if goal.goal == "deadline" and goal.minimize == "gpus":
        return lambda row: (row.gpus, row.cost)
    return lambda row: (row.cost, row.gpus)


def _title(job: Job) -> str:
    goal, unit = job.objective, "dollars" if job.cluster.price_per_gpu_hour is not None else hours_name(job)
    if goal.goal == "fastest":
        return "fastest"
    if goal.goal == "cheapest":
        return "cheapest tokens"
    least = "fewest GPUs" if goal.minimize == "gpus" else f"fewest {unit}"
    assert goal.deadline is not None
    return f"{least} within {show_duration(goal.deadline)}"


def costs(row: Row, job: Job) -> str:
    """`1T tokens in 23.4 days, 143,700 GPU-hours, $573,000`"""
    tokens = job.objective.tokens or DEFAULT_TOKENS
    price = "" if row.dollars is None else f", ${row.dollars:,.0f}"
    hours = f"{show_hours(row.gpu_hours)} {hours_name(job)}"
    return f"{show_tokens(tokens)} tokens in {show_duration(row.seconds)}, {hours}{price}"


def show_hours(hours: float) -> str:
    """Whole hours, three digits below a hundred."""
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"


def allowance(job: Job) -> str:
    """What the times count for failures, in words."""
    goodput = job.objective.goodput
    if goodput is None:
        return "nothing is allowed for failures and restarts (objective.goodput): times are those of an undisturbed run"
    return f"goodput {goodput:g}: {1 - goodput:.0%} of the time is allowed for failures, restarts and checkpoints"


def too_late(rows: Sequence[Row], job: Job, larger: Callable[[int], Row | None]) -> TooLateError:
    """The error where no row meets the deadline: the nearest miss, and what would make it.

    Args:
        larger: plans the job on a number of nodes; None where it cannot be planned.
    """
    goal = job.objective
    assert goal.deadline is not None and goal.tokens is not None
    nearest = min(rows, key=lambda row: (row.seconds, row.gpus))
    on, listed = show_nodes(nearest.nodes), ", ".join(str(row.nodes) for row in rows)
    met = f"is met on none of {listed} nodes" if len(rows) > 1 else f"is not met on {on}"
    tokens, deadline, needs = show_tokens(goal.tokens), show_duration(goal.deadline), show_duration(nearest.seconds)
    message = f"objective.deadline = {deadline} for {tokens} tokens {met}: the nearest is {needs} on {on}"
    remedies = [f"a deadline of {needs} on {on}"]
    done = goal.tokens * goal.deadline / nearest.seconds
    remedies.append(f"{show_tokens(done)} tokens in {deadline} on {on}")
    if nearest.seconds * goal.share <= goal.deadline:
        undisturbed = show_duration(nearest.seconds * goal.share)
        remedies.append(f"no failures at all: without objective.goodput it is {undisturbed} on {on}")
    return TooLateError(message, [*_more_nodes(rows, job, larger), *remedies])


# How many times more nodes than the largest are tried.
MORE_NODES = (2, 4, 8, 16)


def _more_nodes(rows: Sequence[Row], job: Job, larger: Callable[[int], Row | None]) -> list[str]:
    """The fewest of a few times as many nodes that meet the deadline, or how far they come."""
    assert job.objective.deadline is not None
    most, fastest = max(row.nodes for row in rows), min(rows, key=lambda row: row.seconds)
    # Fewer are too few even if no GPU-hour more were needed than on the best of the rows.
    hours = min(row.gpu_hours for row in rows)
    least, tried = hours * 3600 / job.objective.deadline / job.cluster.gpus_per_node, 0
    if least > most * MORE_NODES[-1]:
        return [f"not more nodes: without any loss of efficiency it would take {math.ceil(least):,}"]
    for factor in MORE_NODES:
        nodes = most * factor
        if nodes < least:
            continue
        row = larger(nodes)
        if row is None or row.seconds >= fastest.seconds:
            break
        tried, fastest = nodes, row
        if row.seconds <= job.objective.deadline:
            return [f"--nodes {nodes}: {costs(row, job)}"]
    if not tried:
        return ["no number of nodes near these: more of them are not faster with this batch"]
    return [f"not more nodes alone: {fastest.nodes} of them take {show_duration(fastest.seconds)} with this batch"]
