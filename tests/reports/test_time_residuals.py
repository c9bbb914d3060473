"""Quantiles of how far steps are off: weights, pooling, what is left out, and the optimizer's curse."""

from __future__ import annotations

import math
import random
import tomllib

import pytest

from reports.choices import choices
from reports.published import published_rows
from reports.time_residuals import (
    PRIOR_JOBS,
    Run,
    coverage,
    differences,
    fit,
    held_out,
    quantiles,
    residuals_toml,
    runs,
    stretch,
    time_residuals_of,
)
from reports.validation import validate
from simulator.error_bars import Difference, Spread, TimeResiduals, time_residuals
from simulator.files import to_dataclass
from simulator.layout import Layout


def run(residual: float, source: str = "s", job: str = "j", step: float = 1.0, **layout: int) -> Run:
    return Run(source, job, "gpu", "dense", "stack", Layout(**layout), step, residual)  # type: ignore[arg-type]


def test_sources_and_jobs_count_the_same_whatever_their_rows() -> None:
    """Nine layouts at 0 of one source weigh as much as one at 1 of another: the middle lies between, at 0.5."""
    many = [run(0.0, "a", "1", dp_replicate=n) for n in range(1, 10)]
    found = quantiles([*many, run(1.0, "b", "2")])
    # Weights 9 x 1/9 and 1: midpoints of the ranks at 1/36 ... 17/36 and 3/4, so 25 % is 0 and 75 % is 1.
    assert found[1] == 0.0 and found[2] == pytest.approx(1.0)


def test_a_group_counts_in_proportion_to_its_jobs() -> None:
    """Twenty jobs on a GPU, all 0.5 slower than the rest: half of what its quantiles add, as PRIOR_JOBS is 20."""
    assert PRIOR_JOBS == 20
    rest = [Run(f"r{i}", f"r{i}", "other", "dense", "s", Layout(), 1.0, 0.0) for i in range(60)]
    group = [Run(f"g{i}", f"g{i}", "slow", "dense", "s", Layout(), 1.0, 0.5) for i in range(20)]
    found = fit([*rest, *group])
    overall = quantiles([*rest, *group])
    assert found.added["gpu", "slow"][2:].tolist() == pytest.approx(((0.5 - overall[2:]) / 2).tolist())
    # Its low end would be higher than all runs': groups never narrow.
    assert found.added["gpu", "slow"][:2].tolist() == [0.0, 0.0]


def test_intervals_hold_for_sources_left_out_of_a_known_distribution() -> None:
    """Normal residuals without anything that sources share: 80 % inside, up to the noise of 300 jobs."""
    chance = random.Random(3)
    found = [run(chance.gauss(0, 0.1), f"s{i % 20}", str(i)) for i in range(300)]
    judged = held_out(found)
    assert len(judged) == 300
    assert coverage(judged, 0.8, by_source=True) == pytest.approx(0.8, abs=0.05)
    factor = stretch(judged, 0.8)
    assert coverage(judged, 0.8, by_source=True, stretch=factor) >= 0.8


def test_sources_that_differ_are_what_makes_intervals_wide() -> None:
    """Ten rows of each source are the same number: split by row nothing would be left to err; left out, it does."""
    chance = random.Random(4)
    shifts = [chance.gauss(0, 0.2) for _ in range(30)]
    found = [run(shifts[i], f"s{i}", f"{i}-{j}") for i in range(30) for j in range(10)]
    judged = held_out(found)
    assert coverage(judged, 0.8, by_source=True, stretch=stretch(judged, 0.8)) >= 0.8
    low, high = judged[0].quantiles[0], judged[0].quantiles[3]
    assert high - low > 0.3


def test_what_layouts_of_a_job_share_is_not_in_their_difference() -> None:
    """Two layouts of each job: a shift of the job of sigma 0.3 and one of the layout of sigma 0.1."""
    chance = random.Random(5)
    found = []
    for i in range(2000):
        shift = chance.gauss(0, 0.3)
        found += [run(shift + chance.gauss(0, 0.1), f"s{i % 10}", str(i), tp=tp) for tp in (1, 2)]
    d = differences(found)
    # |difference| has sigma 0.1 sqrt(2): half below 0.6745 of it, 80 % below 1.2816.
    assert d.half == pytest.approx(0.6745 * 0.1 * math.sqrt(2), rel=0.06)
    assert d.four_fifths == pytest.approx(1.2816 * 0.1 * math.sqrt(2), rel=0.06)
    assert (d.sigma_layout, d.sigma_job) == (pytest.approx(0.1, rel=0.06), pytest.approx(0.3, rel=0.06))
    assert (d.pairs, d.jobs, d.sources) == (2000, 2000, 10)
    assert d.held_out_half == pytest.approx(0.5, abs=0.03)


def known(half: float) -> TimeResiduals:
    flat = Spread(-0.1, -0.05, 0.05, 0.1, 1, 1, 1)
    return TimeResiduals(flat, Difference(half, 0.2, 0.0, 0.0, 1, 1, 1, 0.5, 0.8), ())


def test_choices_by_hand() -> None:
    """tp = 2 is predicted 2 % faster and took e^0.2 longer; tp = 1 took what was predicted."""
    found = [run(0.2, step=1.0, tp=2, dp_replicate=4), run(0.0, step=1.02, dp_replicate=8)]
    (fast,) = choices(found, known(half=0.05), careful=False, least=2)
    assert (fast.chosen, fast.others) == (0.2, 0.0)
    assert fast.regret == pytest.approx(1 - 1.02 / math.exp(0.2))
    (careful,) = choices(found, known(half=0.05), careful=True, least=2)
    assert (careful.chosen, careful.others, careful.regret) == (0.0, 0.2, 0.0)


def test_the_shipped_file_is_read_as_it_is_written() -> None:
    shipped = time_residuals()
    assert to_dataclass(TimeResiduals, tomllib.loads(residuals_toml(shipped)), "test") == shipped


@pytest.mark.slow
def test_the_claim_for_the_chosen_layout_is_no_more_optimistic_than_those_for_the_others() -> None:
    """The optimizer's curse on published jobs; pytest -m slow tests/reports/test_time_residuals.py, in a minute."""
    results = validate(published_rows()).results
    found, shipped = runs(results), time_residuals()
    picked = choices(found, shipped, careful=True)
    assert len(picked) >= 16
    more = [choice.chosen - choice.others for choice in picked]
    assert sum(more) / len(more) <= 0
    # With the high end of its interval a claim is on average not too fast.
    assert sum(choice.chosen - shipped.pooled.q90 for choice in picked) / len(picked) <= 0
    # And being careful costs nothing: what is lost on the best measured layout does not grow.
    plain = choices(found, shipped, careful=False)
    assert sum(c.regret for c in picked) <= sum(c.regret for c in plain)
    again = time_residuals_of(results)
    assert again == shipped, "the residuals are of other predictions: make residuals"
