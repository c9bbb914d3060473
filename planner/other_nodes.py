"""The same job on other numbers of nodes: what more of them would gain, and fewer would save."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

from planner.plan import Plan
from planner.search import plan
from simulator.checks import MOST_DEVICES
from simulator.errors import NothingFitsError, UserError

# What a reader waits for without having asked: seconds of planning for all the other sizes together.
PATIENCE = 10.0

Progress = Callable[[str, float], None]


def node_counts(read: Plan, given: str | None = None) -> tuple[int, ...]:
    """The numbers of nodes that a user asked for as "4,8,16"; "none" for none. By default a quarter of the plan's to
    four times it, where the cluster has a network for more than one node.

    Raises:
        UserError: a word that is no number from 1, more than one node without a network, more devices than there are.
    """
    cluster, own = read.job.cluster, read.job.nodes
    if given is None:
        near = {max(1, own // 4), max(1, own // 2), 2 * own, 4 * own} if cluster.scale_out else set()
        return tuple(sorted(n for n in near if n * cluster.gpus_per_node <= MOST_DEVICES))
    if given.strip().lower() in ("", "none"):
        return ()
    counts = []
    for word in given.replace(",", " ").split():
        if not word.isascii() or not word.isdigit() or int(word) < 1:
            raise UserError(f"--nodes: '{word}' is not a number of nodes from 1; write it like 4,8,16, or none")
        count = int(word)
        if count * cluster.gpus_per_node > MOST_DEVICES:
            raise UserError(f"--nodes: {count} nodes have more than {MOST_DEVICES} devices")
        if count > 1 and cluster.scale_out is None:
            raise UserError(f"--nodes: {count} nodes need a network, but cluster '{cluster.name}' has none; use 1")
        counts.append(count)
    return tuple(sorted(set(counts)))


def plans_for(
    read: Plan, counts: Sequence[int], progress: Progress | None = None, patience: float = math.inf
) -> tuple[tuple[Plan, ...], tuple[str, ...]]:
    """The job planned on each number of nodes, with the plan's own batch, and sentences on those that are not.

    A number whose planning would end later than `patience` seconds from now is left out. What it would take: the
    seconds of the plan nearest in size, times the square of the ratio of the nodes (layouts and their steps both
    grow), which is an upper guess.
    """
    found, notes, left_out = [], [], []
    took = {read.job.nodes: read.certificate.seconds}
    start = time.monotonic()
    report = progress or (lambda what, fraction: None)
    for place, count in enumerate(counts):
        report(f"{count} nodes", place / len(counts))
        if count == read.job.nodes:
            continue
        near = min(took, key=lambda nodes: abs(math.log(nodes / count)))
        if time.monotonic() - start + took[near] * max(1.0, count / near) ** 2 > patience:
            left_out.append(str(count))
            continue
        try:
            other = plan(dataclasses.replace(read.job, nodes=count), top=1 + len(read.runners_up))
        except NothingFitsError as error:
            notes.append(f"{count} nodes: {error}.")
            continue
        found.append(other)
        took[count] = other.certificate.seconds
    if left_out:
        notes.append(f"Other numbers of nodes take longer to plan: --nodes {','.join(left_out)} adds them.")
    return tuple(found), tuple(notes)
