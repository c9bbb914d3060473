"""The same job on other numbers of nodes: what more of them would gain, and fewer would save."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

from planner.bend import explained
from planner.objectives import choose
from planner.plan import Plan
from planner.scaling import DEFAULT_TOKENS, Missing, Scaling, changes_of, rows_of
from planner.search import plan
from simulator.checks import MOST_DEVICES, check_job
from simulator.errors import NothingFitsError, UserError
from simulator.job import Job
from simulator.units import show_nodes

# What a reader waits for without having asked: seconds of planning for all the other sizes together.
PATIENCE = 10.0

Progress = Callable[[str, float], None]


def node_counts(job: Job, given: str | None = None) -> tuple[int, ...]:
    """The numbers of nodes that a user asked for as "4,8,16"; "none" for none. By default those that the objective
    names, or a quarter of the job's to four times it without the job's own, where the cluster has a network for more
    than one node.

    Raises:
        UserError: a word that is no number from 1, more than one node without a network, more devices than there are.
    """
    cluster, own = job.cluster, job.nodes
    if given is None and job.objective.nodes:
        return _checked(job, job.objective.nodes, "objective.nodes")
    if given is None:
        near = {max(1, own // 4), max(1, own // 2), 2 * own, 4 * own} - {own} if cluster.scale_out else set()
        return tuple(sorted(n for n in near if n * cluster.gpus_per_node <= MOST_DEVICES))
    if given.strip().lower() in ("", "none"):
        return ()
    counts = []
    for word in given.replace(",", " ").split():
        if not word.isascii() or not word.isdigit():
            raise UserError(f"--nodes: '{word}' is not a number of nodes; write them like 4,8,16")
        if int(word) < 1:
            raise UserError(f"--nodes {given.strip()}: a job needs at least 1 node; write them like 4,8,16")
        counts.append(int(word))
    return _checked(job, counts, "--nodes")


def _checked(job: Job, counts: Sequence[int], where: str) -> tuple[int, ...]:
    for count in counts:
        if count * job.cluster.gpus_per_node > MOST_DEVICES:
            raise UserError(f"{where}: {count} nodes have more than {MOST_DEVICES} devices")
        if count > 1 and job.cluster.scale_out is None:
            raise UserError(f"{where}: {count} nodes need a network, but cluster '{job.cluster.name}' has none; use 1")
    return tuple(sorted(set(counts)))


def job_on(job: Job, nodes: int, scale_batch: bool = False) -> Job:
    """The job on a number of nodes, with its own batch or with as many tokens per GPU.

    Raises:
        UserError: that batch is no whole number of sequences, or the job cannot be on so many nodes.
    """
    training = job.training
    if scale_batch:
        sequences = training.global_batch_size * nodes
        if sequences % job.nodes:
            raise UserError(
                f"{training.global_batch_size} sequences on {job.nodes} nodes are {sequences / job.nodes:g} on "
                f"{nodes}, which is no whole number"
            )
        training = dataclasses.replace(training, global_batch_size=sequences // job.nodes)
    if nodes == job.nodes:
        return job
    other = dataclasses.replace(job, nodes=nodes, training=training)
    check_job(other, show_nodes(nodes))
    return other


def over_nodes(
    job: Job,
    counts: Sequence[int],
    scale_batch: bool = False,
    *,
    top: int = 5,
    gap: float = 0.0,
    known: Sequence[Plan] = (),
    progress: Progress | None = None,
    patience: float = math.inf,
) -> tuple[Scaling, tuple[Plan, ...]]:
    """The job planned on each number of nodes, and the plans, the fewest nodes first.

    Args:
        known: plans that were made before, which count too.
        patience: a number whose planning would end later than so many seconds from now is left out. What it would take:
            the seconds of the plan nearest in size, times the square of the ratio of the nodes where it is larger
            (layouts and their steps both grow), which is an upper guess.
    """
    plans, missing = {plan.job.nodes: plan for plan in known}, []
    start = time.monotonic()
    report = progress or (lambda what, fraction: None)
    for place, count in enumerate(counts):
        report(f"{count} nodes", place / len(counts))
        if count in plans:
            continue
        if time.monotonic() - start + _guess(plans, count) > patience:
            missing.append(Missing(count, f"takes longer to plan: --nodes {count} adds it"))
            continue
        try:
            plans[count] = plan(job_on(job, count, scale_batch), top, gap=gap)
        except NothingFitsError as error:
            missing.append(Missing(count, str(error)))
        except UserError as error:
            missing.append(Missing(count, str(error).removeprefix(f"{show_nodes(count)}: ")))
    found = tuple(plans[count] for count in sorted(plans))
    return scaling_of(job, found, missing, scale_batch), found


def for_report(
    read: Plan, given: str | None, found: Scaling | None = None, progress: Progress | None = None
) -> Scaling | None:
    """What the page of a plan shows of other numbers of nodes: those that a user names; without a word those that
    `found` beside the plan has; without it, those nearby that PATIENCE allows. None where there are none."""
    if given is None and found is not None:
        return found
    counts = node_counts(read.job, given)
    patience = PATIENCE if given is None else math.inf
    top = 1 + len(read.runners_up)
    scaling, _ = over_nodes(read.job, counts, top=top, known=[read], progress=progress, patience=patience)
    return scaling if counts and (len(scaling.rows) > 1 or scaling.missing) else None


def _guess(plans: dict[int, Plan], count: int) -> float:
    if not plans:
        return 0.0
    near = min(plans, key=lambda nodes: abs(math.log(nodes / count)))
    return plans[near].certificate.seconds * max(1.0, count / near) ** 2


def scaling_of(job: Job, plans: Sequence[Plan], missing: Sequence[Missing], scale_batch: bool) -> Scaling:
    """What follows from plans of a job on several numbers of nodes."""
    tokens = job.objective.tokens or DEFAULT_TOKENS
    rows = rows_of(plans, tokens)
    changes, bend = explained(plans, changes_of(rows))
    choice = choose(rows, job)
    return Scaling(
        job, scale_batch, tokens, rows, tuple(missing), changes, bend,
        choice.nodes if choice else None, choice.reason if choice else "",
    )  # fmt: skip
