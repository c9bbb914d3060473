"""The processors of a machine without GPUs, as ranks share them."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import simpy


class Processors:
    """The processors of a node, shared by ranks that compute at the same time.

    With k ranks active each works at `speeds[k - 1]` of its speed alone; beyond the measured counts the total stays.
    """

    def __init__(self, env: simpy.Environment, speeds: tuple[float, ...]) -> None:
        self.env, self.speeds = env, speeds
        self.jobs: dict[simpy.Event, list[float]] = {}  # done event -> [seconds of work left, ranks]
        self.updated, self.version = 0.0, 0

    def speed(self) -> float:
        """Speed of each active rank now, relative to one alone."""
        return self.speed_of(sum(ranks for _, ranks in self.jobs.values()))

    def speed_of(self, active: float) -> float:
        """Speed of each of so many active ranks, relative to one alone.

        >>> Processors(simpy.Environment(), (1.0, 0.9, 0.6, 0.45)).speed_of(4)
        0.45
        """
        if active <= 0:
            return 1.0
        known = len(self.speeds)
        index = min(max(round(active), 1), known)
        return self.speeds[index - 1] * min(1.0, known / active)

    def work(self, seconds: float, ranks: int) -> simpy.Event:
        """An event that fires when `ranks` ranks have each done this much work."""
        self._advance()
        done = self.env.event()
        self.jobs[done] = [seconds, ranks]
        self._schedule()
        return done

    def _advance(self) -> None:
        elapsed, speed = self.env.now - self.updated, self.speed()
        for entry in self.jobs.values():
            entry[0] -= elapsed * speed
        self.updated = self.env.now

    def _schedule(self) -> None:
        """Wake up when the job with the least work is done; a later change makes this waking stale."""
        self.version += 1
        if self.jobs:
            left = min(entry[0] for entry in self.jobs.values())
            self.env.process(self._wake(max(0.0, left) / self.speed(), left, self.version))

    def _wake(self, delay: float, left: float, version: int) -> Generator[simpy.Event, Any, None]:
        """Finish the jobs that had the least work left, `left` seconds of it, when this waking was set.

        They are known by that, not by having nothing left now: late in a long step the clock is too coarse for it.
        """
        ending = [event for event, entry in self.jobs.items() if entry[0] <= left + 1e-12]
        yield self.env.timeout(delay)
        if version != self.version:
            return
        self._advance()
        for done in ending:
            del self.jobs[done]
            done.succeed()
        self._schedule()
