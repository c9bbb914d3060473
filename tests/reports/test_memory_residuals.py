"""Probabilities of running out of memory, fitted to peaks and to which runs fitted."""

from __future__ import annotations

import math
import random
import tomllib

import pytest

from reports.memory_residuals import Run, Spread, calibration, families, fit, held_out, residuals_toml


def _run(residual: float | None, load: float = -1.0, ran: bool = True, stack: str = "s", job: str = "j") -> Run:
    return Run(job, stack, residual, load, ran)


def test_peaks_alone_give_their_mean_and_standard_deviation() -> None:
    # Residuals 0.1 and 0.3: mean 0.2, standard deviation sqrt((0.01 + 0.01) / 2) = 0.1.
    found = fit([_run(0.1), _run(0.3)])
    assert (found.bias, found.sigma) == (pytest.approx(0.2, abs=1e-3), pytest.approx(0.1, abs=1e-3))


def test_verdicts_alone_find_bias_and_sigma() -> None:
    chance = random.Random(1)
    loads = [chance.uniform(-0.6, 0.6) for _ in range(3000)]
    runs = [_run(None, load, load + chance.gauss(0.1, 0.15) <= 0) for load in loads]
    found = fit(runs)
    # The 2 % of slips that the likelihood allows for are not there, so that sigma is found a little small.
    assert found.bias == pytest.approx(0.1, abs=0.02)
    assert found.sigma == pytest.approx(0.15, abs=0.04)


def test_probability_is_half_where_the_unbiased_peak_is_the_memory() -> None:
    spread = Spread(10, bias=0.05, sigma=0.1)
    assert spread.out_of_memory(-0.05) == pytest.approx(0.5)
    # One sigma more: the normal distribution's 84.1 %.
    assert spread.out_of_memory(0.05) == pytest.approx(0.8413, abs=1e-4)


def test_a_stack_with_few_runs_has_none_of_its_own_and_one_with_ten_is_half_way_to_all() -> None:
    pooled = Spread(100, bias=0.0, sigma=0.1)
    runs = [_run(0.2, stack="ten") for _ in range(10)] + [_run(0.2, stack="nine") for _ in range(9)]
    found = families(runs, pooled)
    assert list(found) == ["ten"]
    # Ten peaks of 0.2 and ten of the prior, 0.0 with 0.1 around it: mean 0.1, variance 0.1^2 + 0.1^2 / 2.
    assert found["ten"].bias == pytest.approx(0.1, abs=1e-3)
    assert found["ten"].sigma == pytest.approx(math.sqrt(0.015), abs=1e-3)


def test_calibration_of_hand_made_probabilities() -> None:
    found = calibration([0.1, 0.1, 0.9, 0.9], [False, False, True, False])
    # ((0.1)^2 + (0.1)^2 + (0.1)^2 + (0.9)^2) / 4 = 0.84 / 4; always 0.25: 0.25 * 0.75.
    assert (found.brier, found.brier_of_mean) == (0.21, 0.1875)
    assert found.bins == ((2, pytest.approx(0.1), 0.0), (2, pytest.approx(0.9), 0.5))


def test_held_out_judges_every_run_once() -> None:
    runs = [_run(0.05 * i, -0.5, job=str(i)) for i in range(8)]
    assert held_out(runs).count == 8


def test_the_file_has_the_keys_that_readers_expect() -> None:
    written = tomllib.loads(residuals_toml(Spread(30, 0.01, 0.1), {"megatron-core": Spread(12, 0.02, 0.08)}))
    assert written["pooled"]["count"] == 30
    assert written["families"]["megatron-core"]["log_sigma"] == 0.08
    assert set(written["pooled"]) == {"count", "log_sigma", "log_bias", "source"}
