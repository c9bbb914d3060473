"""Rendezvous: where the ranks of a group wait for each other before they communicate.

In a folded run the one rank that is simulated stands for its whole group, which is always complete.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import simpy

from simulator.layout import Layout

Axes = tuple[str, ...]


class Group(NamedTuple):
    """The ranks that differ from each other in some axes only: the first and the last of them, and how many."""

    first: int
    last: int
    size: int


@dataclass(slots=True)
class _Meeting:
    complete: simpy.Event
    missing: int


class Rendezvous:
    """The meetings of a run. Groups are arithmetic: no list of their ranks is made."""

    def __init__(self, env: simpy.Environment, layout: Layout, unfold: bool) -> None:
        self.env, self.layout, self.unfold = env, layout, unfold
        self._groups: dict[tuple[int, Axes], Group] = {}
        self._meetings: dict[tuple[object, ...], _Meeting] = {}

    def group(self, rank: int, axes: Axes) -> Group:
        """The group of a global rank along these axes."""
        if (rank, axes) not in self._groups:
            first, reach, size = rank, 0, 1
            for axis, length, stride in self._strides(axes):
                first -= self.layout.coordinates(rank)[axis] * stride
                reach += (length - 1) * stride
                size *= length
            self._groups[rank, axes] = Group(first, first + reach, size)
        return self._groups[rank, axes]

    def members(self, rank: int, axes: Axes) -> list[int]:
        """All ranks of a group."""
        steps = [[stride * i for i in range(length)] for _, length, stride in self._strides(axes)]
        return [self.group(rank, axes).first + sum(offsets) for offsets in itertools.product(*steps)]

    def meet(self, rank: int, axes: Axes, *what: object) -> simpy.Event | None:
        """Arrive, once for every `what`: an event that fires when all ranks of the group have; None if none is
        missing because the rank stands for all."""
        first, _, size = self.group(rank, axes)
        if not self.unfold or size == 1:
            return None
        key = (first, axes, what)
        meeting = self._meetings.setdefault(key, _Meeting(self.env.event(), size))
        meeting.missing -= 1
        if not meeting.missing:
            del self._meetings[key]
            meeting.complete.succeed()
        return meeting.complete

    def _strides(self, axes: Axes) -> list[tuple[str, int, int]]:
        """(axis, size, distance of neighbours) of these axes."""
        order = self.layout.axes
        sizes = [getattr(self.layout, axis) for axis in order]
        return [(axis, sizes[i], math.prod(sizes[:i])) for i, axis in enumerate(order) if axis in axes]
