"""Intervals of a step, claims that nobody has reached."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from simulator.error_bars import (
    LEVEL,
    log_bounds,
    model_family,
    step_interval,
    tie_share,
    time_residuals,
    unseen_mfu,
)
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.profile import Sample, timing_spread
from simulator.simulate import simulate


def job(model: str = "llama-3.1-8b", cluster: str = "dgx-h100", **training: Any) -> Job:
    return build_job({"model": model, "cluster": cluster, "nodes": 1, "training": training}, "test")


def test_an_interval_is_the_quantiles_of_all_and_the_widest_group() -> None:
    """low = pooled + the lowest of what GPU, family and stack add; high = pooled + the highest."""
    task, known = job(stack="torchtitan-compile"), time_residuals()
    groups = [known.gpu["H100-SXM5-80G"], known.family["dense"], known.stack["torchtitan-compile"]]
    low = known.pooled.q10 + min(0.0, *(group.q10 for group in groups))
    high = known.pooled.q90 + max(0.0, *(group.q90 for group in groups))
    assert log_bounds(task) == pytest.approx((low, high))
    found = step_interval(task, 2.0)
    assert (found.low, found.high, found.level) == (
        pytest.approx(2 * math.exp(low)), pytest.approx(2 * math.exp(high)), LEVEL,
    )  # fmt: skip


def test_every_prediction_carries_one_that_holds_it() -> None:
    predicted = simulate(job("gpt2", global_batch_size=16, seq_len=256), Layout(dp_replicate=8))
    found = predicted.interval
    assert found and found.low < predicted.step_seconds < found.high
    assert "published jobs" in found.source and "left out" in found.source


def test_groups_only_widen() -> None:
    known = time_residuals()
    for group in (*known.gpu.values(), *known.family.values(), *known.stack.values()):
        assert group.q10 <= 0 and group.q25 <= 0 and group.q75 >= 0 and group.q90 >= 0


def test_a_measured_machine_adds_its_own_spread_in_quadrature() -> None:
    """Repetitions 10 % around their middle: ln(p90 / p10) = 0.2, so hypot(q, 0.1) on each side, whatever the stack."""
    task, known = job("gpt2"), time_residuals()
    gpu = dataclasses.replace(task.cluster.gpu, timing_spread=0.2)
    measured = dataclasses.replace(task, cluster=dataclasses.replace(task.cluster, gpu=gpu))
    expected = (-math.hypot(known.pooled.q10, 0.1), math.hypot(known.pooled.q90, 0.1))
    assert log_bounds(measured) == pytest.approx(expected)
    assert "none of them on this machine" in step_interval(measured, 1.0).source


def test_timing_spread_is_the_median_of_the_samples() -> None:
    """ln(1.2 / 1.0), ln(1.1 / 1.0), ln(2.0 / 1.0): the middle one is ln 1.2."""
    samples = [Sample("memory", (1.0,), 1.0, 1.0, p90) for p90 in (1.2, 1.1, 2.0)]
    assert timing_spread(samples) == pytest.approx(math.log(1.2))
    assert timing_spread([]) == 0.0


def test_families_are_dense_moe_and_hybrid() -> None:
    assert [model_family(name) for name in ("llama", "gpt", "moe", "hybrid")] == ["dense", "dense", "moe", "hybrid"]


def test_sources_left_out_lie_inside_as_often_as_is_said() -> None:
    """What the shipped data says of itself: no level is promised that did not hold, by source and by job."""
    for held in time_residuals().held_out:
        assert min(held.by_source, held.by_job) >= held.level


def test_a_difference_errs_less_than_each_alone() -> None:
    """sqrt(2) sigma_layout is the error of a difference; sigma_layout and sigma_job together that of a layout."""
    known = time_residuals()
    total = math.hypot(known.difference.sigma_layout, known.difference.sigma_job)
    assert math.sqrt(2) * known.difference.sigma_layout < total
    assert tie_share() == pytest.approx(math.exp(known.difference.half) - 1)


def test_a_claim_above_what_was_published_is_named() -> None:
    task = job(precision="bf16")
    best = time_residuals().mfu["H100-SXM5-80G"]["bf16"]
    assert unseen_mfu(task, best.mfu) == ""
    said = unseen_mfu(task, best.mfu + 0.001)
    assert best.row in said and f"{best.mfu:.1%}" in said
    # Of devices of which nothing is published nothing is said; fp16 is held against bf16, whose rate it has.
    assert unseen_mfu(job(cluster="workstation-4x4090"), 0.9) == ""
    assert unseen_mfu(job(precision="fp16"), best.mfu + 0.001) == said
