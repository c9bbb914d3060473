"""Stragglers: what a job may say, the same luck for every layout, and what is drawn."""

from __future__ import annotations

import itertools
import math
from statistics import fmean, stdev
from typing import Any

import pytest

from simulator.errors import UserError
from simulator.job import build_job
from simulator.layout import Layout
from simulator.stragglers import Stragglers

BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"jitter": "5 %"}, ["stragglers.jitter = '5 %'", "lognormal 5 %"]),
    ({"jitter": "gamma 5 %"}, ["stragglers.jitter = 'gamma 5 %'"]),
    ({"spread": "normal 200 %"}, ["stragglers.spread", "more than 100 %"]),
    ({"factors": {"first": 2.0}}, ["'first' is no rank and no range"]),
    ({"factors": {"7-3": 2.0}}, ["'7-3' is no rank and no range"]),
    ({"factors": {"8-16": 2.0}}, ["names rank 16 of 16 ranks"]),
    ({"factors": {"3": 0.0}}, ["stragglers.factors.3 = 0", "between"]),
    ({"steps": 0}, ["stragglers.steps = 0"]),
    ({"jiter": "normal 1 %"}, ["unknown key 'jiter'", "jitter"]),
    ({"seed": 1.5}, ["seed = 1.5"]),
]


@pytest.mark.parametrize(("table", "words"), BAD)
def test_a_bad_table_is_one_sentence(table: dict[str, Any], words: list[str]) -> None:
    data = {"model": "gpt2", "cluster": "dgx-h100", "nodes": 2, "stragglers": table}
    with pytest.raises(UserError) as error:
        build_job(data, "job 'test'")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_factors_are_by_rank_and_range_and_multiply_with_the_spread() -> None:
    assert Stragglers(factors={"1": 2.0, "2-3": 1.5}).rank_factors(5) == [1.0, 2.0, 1.5, 1.5, 1.0]
    # Of a layout with fewer ranks the others are not asked.
    assert Stragglers(factors={"1-9": 2.0}).rank_factors(2) == [1.0, 2.0]
    alone = Stragglers(spread="normal 2 %").rank_factors(3)
    assert Stragglers(factors={"1": 2.0}, spread="normal 2 %").rank_factors(3) == [alone[0], 2 * alone[1], alone[2]]


def test_a_replica_goes_at_the_pace_of_its_slowest_rank() -> None:
    """Ranks 0 and 1 are the first replica's with tp = 2, ranks 0 and 2 with the stages outside of the replicas."""
    stragglers = Stragglers(factors={"1": 3.0, "2": 2.0})
    assert stragglers.replica_factors(Layout(dp_replicate=2, tp=2)) == [3.0, 2.0]
    assert stragglers.replica_factors(Layout(dp_replicate=2, pp=2)) == [2.0, 3.0]


@pytest.mark.parametrize("kind", ["lognormal", "normal"])
def test_draws_have_the_mean_and_deviation_that_they_are_named_by(kind: str) -> None:
    draws = list(itertools.islice(Stragglers(jitter=f"{kind} 10 %").jitters(0, 1), 20_000))
    assert fmean(draws) == pytest.approx(1.0, abs=0.005)
    assert stdev(draws) == pytest.approx(0.1, rel=0.05)


def test_the_largest_of_many_draws_is_drawn_at_once() -> None:
    """E[max of 2 normals] = 1 + σ/√π; of 1,000: 1 + 3.241 σ (order statistics)."""
    pairs = itertools.islice(Stragglers(jitter="normal 10 %").jitters(0, 2), 20_000)
    assert fmean(pairs) == pytest.approx(1 + 0.1 / math.sqrt(math.pi), abs=0.003)
    thousand = itertools.islice(Stragglers(jitter="normal 10 %").jitters(0, 1000), 20_000)
    assert fmean(thousand) == pytest.approx(1.3241, abs=0.003)


def test_luck_is_the_seeds() -> None:
    def first(seed: int, replica: int) -> list[float]:
        return list(itertools.islice(Stragglers(jitter="lognormal 5 %", seed=seed).jitters(replica, 1), 5))

    assert first(0, 3) == first(0, 3)
    assert first(0, 3) != first(1, 3) and first(0, 3) != first(0, 4)
