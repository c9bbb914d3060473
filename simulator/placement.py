"""Where the groups of a layout lie on the cluster: the shapes that the seconds of their collectives follow from.

Shapes follow from sizes and distances alone, so they are kept beside the cluster's graph and found once for all
layouts of a job.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulator.cluster import GroupShape, group_shape
from simulator.expert_parallel import expert_grid, expert_groups
from simulator.layout import Layout

if TYPE_CHECKING:
    from simulator.job import Job


@dataclass(frozen=True)
class Groups:
    """Shapes on the cluster of the groups of one pipeline rank."""

    tp: GroupShape
    cp: GroupShape
    ep: GroupShape
    shard: GroupShape
    replicate: GroupShape
    expert_shard: GroupShape
    expert_replicate: GroupShape


def layout_groups(job: Job, layout: Layout) -> list[Groups]:
    """The groups of every pipeline rank. Layouts, and ranks of a layout, whose groups lie alike share them."""
    found = _distinct_groups(job, layout)
    stride, period = layout.rank(pp=1), cluster_period(job, layout)
    return [found[rank * stride % period] for rank in range(layout.pp)]


def distinct_groups(job: Job, layout: Layout) -> tuple[Groups, ...]:
    """The groups of the pipeline ranks whose groups lie in different ways: mostly all lie alike."""
    return tuple(dict.fromkeys(_distinct_groups(job, layout).values()))


def _distinct_groups(job: Job, layout: Layout) -> dict[int, Groups]:
    """Groups by how far the first rank of a pipeline rank lies behind the begin of a part of the cluster."""
    known = known_to(job, "groups")
    key = (tuple((axis, getattr(layout, axis)) for axis in layout.axes), layout.zero_stage > 0, layout.ep, layout.sync)
    if key not in known:
        stride, period = layout.rank(pp=1), cluster_period(job, layout)
        firsts: dict[int, int] = {}
        for rank in range(layout.pp):
            firsts.setdefault(rank * stride % period, rank)
        known[key] = {offset: _Placing(job, layout, rank, offset).groups() for offset, rank in firsts.items()}
    found: dict[int, Groups] = known[key]
    return found


def cluster_period(job: Job, layout: Layout) -> int:
    """Ranks that are so many apart lie alike in a node, a domain and a leaf."""
    spec = job.cluster
    return layout.world_size if spec.oversubscribe > 1 else math.lcm(spec.gpus_per_node, *spec.tiers)


def known_to(job: Job, what: str) -> dict[Any, Any]:
    """What was found for a job before. Jobs may share a cluster's graph, so it is not kept there."""
    found: dict[Any, Any] = job.known.setdefault(what, {})
    return found


class _Placing:
    """Where the groups of one pipeline rank of a layout lie."""

    def __init__(self, job: Job, layout: Layout, rank: int, offset: int) -> None:
        self.job, self.layout, self.rank, self.offset = job, layout, rank, offset
        self.sharing = job.cluster.sharing(layout.world_size)

    def groups(self) -> Groups:
        """cp shards state with dp_shard; where nothing is sharded, it reduces gradients with dp_replicate."""
        layout = self.layout
        shard, replicate = ["dp_shard"], [*layout.reducing_replicas]
        (shard if layout.zero_stage else replicate).append("cp")
        dense = [self._shape(*names) for names in (["tp"], ["cp"], shard, replicate)]
        if layout.ep == 1:
            # Nothing is sent, and experts have the groups of everything else.
            return Groups(dense[0], dense[1], self._shape(), *dense[2:], *dense[2:])
        return Groups(dense[0], dense[1], *self._expert_shapes(*dense[2:]))

    def _expert_shapes(self, shard: GroupShape, replicate: GroupShape) -> tuple[GroupShape, ...]:
        grid, axes = expert_grid(self.layout, self.job.stack), ("tp", "cp", "dp_shard", "dp_replicate")
        key = ("experts", self._key(axes), grid)
        known = known_to(self.job, "shapes")
        if key not in known:
            found = expert_groups(self.layout, grid, self.rank)
            known[key] = tuple(self._worst_shape(ranks) for ranks in found)
        ep, expert_shard, expert_replicate = known[key]
        return ep, shard, replicate, expert_shard, expert_replicate

    def _shape(self, *axes: str) -> GroupShape:
        known, key = known_to(self.job, "shapes"), self._key(axes)
        if key not in known:
            known[key] = self._worst_shape(self.layout.group(*axes, pp_rank=self.rank))
        return known[key]

    def _key(self, axes: tuple[str, ...]) -> tuple[object, ...]:
        """What the ranks of a group and of its siblings follow from: the first rank, distances and sizes."""
        layout, stride, steps = self.layout, 1, []
        for axis in layout.axes:
            size = getattr(layout, axis)
            if axis in axes and size > 1:
                steps.append((stride, size))
            stride *= size
        return self.offset, self.sharing, tuple(steps), stride // layout.pp if layout.axes[-1] == "pp" else stride

    def _worst_shape(self, ranks: tuple[int, ...]) -> GroupShape:
        """How a group and its siblings lie on the cluster; the step waits for the one that lies worst."""
        starts = {start for tier in self.job.cluster.tiers for start in self.layout.starts(ranks, tier)}
        shapes = (group_shape(self.job.graph, ranks, start, self.sharing) for start in sorted(starts))
        return max(shapes, key=lambda shape: (shape.domains, -shape.slowest))
