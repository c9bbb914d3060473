"""Rank: what a simulated rank carries with it, and how it books its seconds."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import simpy

from simulator.messages import Channel
from simulator.network import Route
from simulator.processors import Processors
from simulator.rendezvous import Axes
from simulator.work import Work

Process = Generator[simpy.Event, Any, None]


@dataclass(eq=False)
class Rank:
    """A simulated rank: its pipeline rank (`index`), the first of the global ranks that it stands for (`number`), and
    how many of those share its processors (`replicas`).

    `computing` says whether it is in the middle of an op. It computes `factor` times longer than the others of its
    kind, and the slowest of those that it communicates with in every op `slowest` times. `spent` sums seconds by the
    fields of Breakdown.
    """

    index: int
    number: int
    processors: Processors | None
    replicas: int
    dp_stream: simpy.Resource
    factor: float = 1.0
    slowest: float = 1.0
    computing: bool = False
    spent: dict[str, float] = field(default_factory=dict)
    reducing: list[simpy.Event] = field(default_factory=list)
    gathering: dict[int, list[simpy.Event]] = field(default_factory=dict)
    channels: dict[int, Channel] = field(default_factory=dict)
    rings: dict[Axes, Route | None] = field(default_factory=dict)

    def spend(self, what: str, seconds: float) -> None:
        """Book seconds."""
        self.spent[what] = self.spent.get(what, 0.0) + seconds

    def spend_work(self, spent: Mapping[str, float], times: float) -> None:
        """Book an op's seconds on what they are made of; on shared processors they last longer than the work's own."""
        for name, seconds in spent.items():
            if seconds and name != "total":
                self.spend(name, times * seconds)

    def wait(self, event: simpy.Event | None, what: str) -> Process:
        """Wait for an event, if there is one, and book it."""
        if event is not None:
            start = event.env.now
            yield event
            self.spend(what, event.env.now - start)

    def seconds_of(self, work: Work, waiting: str) -> dict[str, float]:
        """The seconds of an op by what they are spent on, and their total, at this rank's speed. In a group that
        communicates within the op all wait for its slowest; that is booked on `waiting`."""
        spent = {"total": work.total} | vars(work)
        if self.slowest != 1:
            device = work.compute + work.recompute + work.host
            for name in ("compute", "recompute", "host"):
                spent[name] *= self.factor
            spent[waiting] += device * (self.slowest - self.factor)
            spent["total"] = work.total + device * (self.slowest - 1)
        return spent
