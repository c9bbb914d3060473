"""The same job on other numbers of nodes: what more of them would gain, and fewer would save."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from planner.plan import Plan
from planner.search import plan
from simulator.checks import MOST_DEVICES
from simulator.errors import NothingFitsError, UserError

# What a reader waits for without having asked: seconds of planning for all the other sizes together.
PATIENCE = 10.0

Progress = Callable[[str, float], None]


def node_counts(read: Plan, given: str | None = None) -> tuple[int, ...]:
    """The numbers of nodes that a user asked for as "4,8,16"; "none" for none.

    By default a quarter of the plan's to four times it, where planning them takes no more than PATIENCE, as far as the
    plan's own search tells, and the cluster has a network for more than one node.

    Raises:
        UserError: a word that is no number from 1, more than one node without a network, more devices than there are.
    """
    cluster = read.job.cluster
    if given is None:
        own, slow = read.job.nodes, 4 * read.certificate.seconds > PATIENCE
        if slow or cluster.scale_out is None:
            return ()
        return tuple(sorted({max(1, own // 4), max(1, own // 2), 2 * own, 4 * own} - {own}))
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
            raise UserError(f"--nodes: {count} nodes need a network, but cluster '{cluster.name}' has no scale_out; use 1")
        counts.append(count)
    return tuple(sorted(set(counts)))


def plans_for(
    read: Plan, counts: Sequence[int], progress: Progress | None = None
) -> tuple[tuple[Plan, ...], tuple[str, ...]]:
    """The job planned on each number of nodes, with the plan's own batch, and a sentence for each that cannot be."""
    found, notes = [], []
    report = progress or (lambda what, fraction: None)
    for place, count in enumerate(counts):
        report(f"{count} nodes", place / len(counts))
        if count == read.job.nodes:
            continue
        try:
            found.append(plan(dataclasses.replace(read.job, nodes=count), top=1 + len(read.runners_up)))
        except NothingFitsError as error:
            notes.append(f"{count} nodes: {error}.")
    return tuple(found), tuple(notes)
