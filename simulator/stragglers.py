"""Stragglers: ranks that are slow always, and ranks that are slow now and then, as `[stragglers]` of a job says.

A factor is how many times longer a rank computes than the prediction for its kind. What is drawn is drawn from the
seed, the rank or replica and the step alone, so that every layout and every way to synchronise meets the same luck.

What to expect (measured): a fleet of 3,079 jobs lost 10.4 % of its hours to stragglers, and the 90th percentile of a
job's steps was 1.06 of its mean (arXiv 2505.05713); about one host in 200 is 10 % slower than the others (arXiv
2402.15627).
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from statistics import NormalDist

from simulator.errors import UserError
from simulator.files import STRICT
from simulator.layout import Layout

_NORMAL = NormalDist()
_DISTRIBUTION = re.compile(r"(lognormal|normal) +([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%")
_RANKS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")
MOST_STEPS = 100_000


@dataclass(frozen=True)
class Stragglers:
    """What differs between ranks and between steps.

    factors are by rank or range of ranks ("3", "8-15"); spread is a factor that each rank keeps, jitter one for every
    step of a rank: "lognormal 5 %" or "normal 1.2 %", of mean 1 and this standard deviation. steps are simulated.
    """

    factors: dict[str, float] = field(default_factory=dict)
    spread: str = ""
    jitter: str = ""
    seed: int = 0
    steps: int = 200

    __pydantic_config__ = STRICT

    @property
    def none(self) -> bool:
        """Whether all ranks and all steps are alike."""
        return not (self.factors or self.spread or self.jitter)

    def check(self, world_size: int, where: str) -> None:
        """Raise UserError for what no cluster of this many ranks can be meant by."""
        for name in ("spread", "jitter"):
            text = getattr(self, name)
            if text and not _DISTRIBUTION.fullmatch(text):
                rule = 'must be a distribution with its standard deviation, like "lognormal 5 %" or "normal 1.2 %"'
                raise UserError(f"{where}: stragglers.{name} = '{text}' {rule}")
            if text and _deviation(text) > 1:
                raise UserError(f"{where}: stragglers.{name} = '{text}' deviates by more than 100 %")
        for ranks, factor in self.factors.items():
            match = _RANKS.fullmatch(ranks)
            if match is None or (match[2] and int(match[2]) < int(match[1])):
                raise UserError(f'{where}: stragglers.factors: \'{ranks}\' is no rank and no range, like "3" or "8-15"')
            if int(match[2] or match[1]) >= world_size:
                raise UserError(f"{where}: stragglers.factors names rank {match[2] or match[1]} of {world_size} ranks")
            if not 0.01 <= factor <= 1e6:
                raise UserError(f"{where}: stragglers.factors.{ranks} = {factor:g} must lie between 0.01 and 1e6")
        if not 1 <= self.steps <= MOST_STEPS:
            raise UserError(f"{where}: stragglers.steps = {self.steps} must lie between 1 and {MOST_STEPS}")

    def rank_factors(self, world_size: int) -> list[float]:
        """How many times longer each rank computes, always."""
        found = [1.0] * world_size
        if self.spread:
            found = [_draw(self.spread, random.Random(f"{self.seed} rank {rank}"), 1) for rank in range(world_size)]
        for ranks, factor in self.factors.items():
            first, _, last = ranks.partition("-")
            # A machine that may be oversubscribed also takes layouts of fewer ranks.
            for rank in range(int(first), min(int(last or first) + 1, world_size)):
                found[rank] *= factor
        return found

    def replica_factors(self, layout: Layout) -> list[float]:
        """How many times longer each replica computes: it goes at the pace of its slowest rank."""
        found = [0.0] * layout.dp_replicate
        for rank, factor in enumerate(self.rank_factors(layout.world_size)):
            replica = layout.coordinates(rank)["dp_replicate"]
            found[replica] = max(found[replica], factor)
        return found

    def least_factor(self, layout: Layout) -> float:
        """How many times as long as alone the fastest replica takes for `steps` steps of its own; at most 1."""
        if self.none:
            return 1.0
        return _least_factor(self.seed, self.jitter, self.steps, tuple(self.replica_factors(layout)), layout.world_size)

    def jitters(self, replica: int, ranks: int) -> Iterator[float]:
        """Factors of a replica's steps, one after another: the largest of its ranks' own."""
        if not self.jitter:
            while True:
                yield 1.0
        source = random.Random(f"{self.seed} replica {replica}")
        draw = _drawer(self.jitter, ranks)
        uniform = source.random
        while True:
            yield draw(uniform())


@functools.cache
def _least_factor(seed: int, jitter: str, steps: int, factors: tuple[float, ...], world_size: int) -> float:
    drawn = Stragglers(jitter=jitter, seed=seed)
    least = 1.0
    for replica, factor in enumerate(factors):
        jitters = drawn.jitters(replica, world_size // len(factors))
        least = min(least, factor * sum(itertools.islice(jitters, steps)) / steps)
    return least


def _deviation(text: str) -> float:
    match = _DISTRIBUTION.fullmatch(text)
    assert match is not None
    return float(match[2]) / 100


def _draw(text: str, source: random.Random, ranks: int) -> float:
    return _drawer(text, ranks)(source.random())


def _drawer(text: str, ranks: int) -> Callable[[float], float]:
    """From a uniform number to the largest of so many independent draws: F⁻¹(u^(1/n)). A normal factor is at least
    0.01."""
    deviation, power = _deviation(text), 1 / ranks
    if text.startswith("lognormal"):
        sigma = math.sqrt(math.log1p(deviation**2))
        mean = -(sigma**2) / 2
        return lambda u: math.exp(mean + sigma * _quantile(u**power))
    return lambda u: max(0.01, 1 + deviation * _quantile(u**power))


def _quantile(u: float) -> float:
    return _NORMAL.inv_cdf(min(max(u, 1e-300), 1 - 2**-53))
