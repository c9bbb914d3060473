"""Calibration: measurements change the constants that they determine, and leave every other bit as it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest

from simulator.calibrate import Outcome, Run, constants, recalibrate, run_of, scaled
from simulator.cluster import CollectiveFit
from simulator.errors import UserError
from simulator.job import Job, Training
from simulator.layout import Layout
from simulator.presets import find_model, find_stack
from simulator.profile import Profile, calibrate, cluster_of
from simulator.results import MeasuredTimeline, Measurement, Quantiles, Span
from simulator.simulate import simulate
from tests.simulator.test_profile import synthetic

# Ways to cut the work on 1, 2 and 4 ranks without tensor parallelism.
USUAL = Training(8, 128, "fp32")
LAYOUTS = (
    Layout(),
    Layout(micro_batch_size=4),
    Layout(recompute="full"),
    Layout(dp_replicate=2),
    Layout(dp_replicate=2, micro_batch_size=4),
    Layout(dp_replicate=4),
    Layout(pp=2),
    Layout(dp_replicate=2, pp=2),
)


def profile() -> Profile:
    return Profile(
        name="test-cpu", created="2026-01-31", versions={}, kind="cpu", devices=2, memory=16e9, process_memory=2e8,
        samples=(), **calibrate(synthetic(), "cpu", 2),
    )  # fmt: skip


def job_on(known: Profile, training: Training = USUAL) -> Job:
    return Job(find_model("llama-bytes-12m"), cluster_of(known), 1, training, find_stack("layoutwise-cpu"))


def one_run(true: Profile, layout: Layout, training: Training = USUAL, spread: float = 0.005) -> Run:
    """A run on a machine with these constants, planned with the profile that has others."""
    seconds = simulate(job_on(true, training), layout).step_seconds
    return Run(layout.short(), job_on(profile(), training), layout, seconds, spread)


def measured(true: Profile, layouts: Sequence[Layout] = LAYOUTS) -> list[Run]:
    return [one_run(true, layout) for layout in layouts]


def measured_widely(true: Profile) -> list[Run]:
    """All layouts, and on one rank steps that are mostly update, attention and products."""
    others = (Training(1, 16, "fp32"), Training(2, 2048, "fp32"), Training(1, 2048, "fp32"), Training(128, 16, "fp32"))
    alone = [one_run(true, Layout(), training) for training in others]
    return [*measured(true), *alone, one_run(true, Layout(micro_batch_size=128), others[-1])]


def changed(factors: dict[str, float], layouts: Sequence[Layout] = LAYOUTS) -> Outcome:
    return recalibrate(profile(), measured(scaled(profile(), factors), layouts), "2026-02-01")


def unchanged_apart_from(outcome: Outcome, names: set[str]) -> None:
    before, after = constants(profile()), constants(outcome.profile)
    assert {name for name in before if before[name] != after[name]} == names


@pytest.mark.parametrize(
    ("name", "factor"), [("matmul.fp32.rate", 0.8), ("matmul.fp32.rate", 1.3), ("concurrency.2", 0.85)]
)
def test_a_changed_constant_is_found_and_no_other_bit_changes(name: str, factor: float) -> None:
    outcome = recalibrate(profile(), measured_widely(scaled(profile(), {name: factor})), "2026-02-01")
    unchanged_apart_from(outcome, {name})
    assert constants(outcome.profile)[name] == pytest.approx(factor * constants(profile())[name], rel=0.02)
    # Each predicted without the run itself: what the change made of the steps is gone.
    assert max(abs(one.before) for one in outcome.checked) > 0.1
    assert max(abs(one.after) for one in outcome.checked) < 0.03
    assert not outcome.worse


def test_two_changed_constants_are_found_together() -> None:
    factors = {"matmul.fp32.rate": 0.8, "concurrency.2": 0.8}
    outcome = recalibrate(profile(), measured_widely(scaled(profile(), factors)), "")
    unchanged_apart_from(outcome, set(factors))
    for name, factor in factors.items():
        assert constants(outcome.profile)[name] == pytest.approx(factor * constants(profile())[name], rel=0.03)


def test_measurements_that_agree_change_nothing() -> None:
    outcome = changed({})
    assert outcome.profile == profile()
    assert outcome.changed == ()
    assert "matmul.fp32.rate" in outcome.agreed


def test_what_no_layout_uses_is_refused_in_words() -> None:
    refused = changed({"host.dtensor": 3.0}).refused
    assert refused["host.dtensor"] == "no measured layout has tensor parallelism"
    assert refused["collectives.all_gather.4.latency"] == "no measured layout waits for an all-gather among 4 ranks"


def test_constants_of_pairs_among_others_are_named_so_and_changed_alone() -> None:
    fits = (CollectiveFit(2, 1e-3, 0.5, active=2), CollectiveFit(2, 4e-3, 0.2, active=4))
    known = dataclasses.replace(profile(), collectives={"all_reduce": fits})
    changed_one = scaled(known, {"collectives.all_reduce.2-of-4.latency": 2.0})
    assert [fit.latency for fit in changed_one.collectives["all_reduce"]] == [1e-3, 8e-3]
    assert "collectives.all_reduce.2.latency" in constants(known)


def test_ranks_that_never_compute_at_once_say_nothing_of_sharing() -> None:
    outcome = changed({"concurrency.2": 0.5}, LAYOUTS[:3])
    assert outcome.refused["concurrency.2"] == "in no measured layout 2 ranks compute at once"
    assert outcome.profile == profile()


def test_two_constants_in_one_number_are_not_told_apart() -> None:
    """Steps of one micro-batch size on one rank: whether products or memory are slow cannot be seen."""
    layouts = (Layout(micro_batch_size=4), Layout(micro_batch_size=8))
    outcome = changed({"memory_bandwidth": 0.5}, layouts)
    unchanged_apart_from(outcome, {c.name for c in outcome.changed})
    assert "memory_bandwidth" in outcome.refused


def test_a_fit_that_makes_it_worse_is_said_and_not_taken() -> None:
    """Of five runs one that shares processors took 1.6 times as long, which the two others that share contradict: they
    are predicted right now, and wrong by what the first says."""
    shared = [Layout(dp_replicate=2, micro_batch_size=size) for size in (1, 2, 4)]
    runs = measured(profile(), (Layout(), Layout(micro_batch_size=4), *shared))
    runs[2] = dataclasses.replace(runs[2], seconds=1.6 * runs[2].seconds)
    outcome = recalibrate(profile(), runs, "2026-02-01")
    assert [one.name for one in outcome.changed] == ["concurrency.2"]
    assert outcome.before == pytest.approx(0.0)
    assert outcome.after > 0.05
    assert outcome.worse
    assert outcome.profile == profile()


def test_the_new_profile_says_what_changed() -> None:
    outcome = changed({"concurrency.2": 0.7})
    (note,) = outcome.profile.calibrations
    assert (note.created, note.runs, note.changed) == ("2026-02-01", len(LAYOUTS), outcome.changed)
    assert (note.error_before, note.error_after) == (outcome.before, outcome.after)


def test_another_machine_is_refused() -> None:
    runs = measured(profile(), LAYOUTS[:2])
    with pytest.raises(UserError, match=r"of a plan for this-machine \(test-cpu\), but the profile is of other-cpu"):
        recalibrate(dataclasses.replace(profile(), name="other-cpu"), runs, "")


def test_a_change_that_no_calibration_explains_is_refused() -> None:
    with pytest.raises(UserError, match="would have to change by a factor of"):
        changed({"concurrency.4": 0.2})


def test_one_layout_leaves_nothing_to_check_with() -> None:
    with pytest.raises(UserError, match="2 measurements of one layout: none is left to check the fit with"):
        recalibrate(profile(), measured(profile(), (Layout(), Layout())), "")


def test_every_constant_scales_and_scales_back() -> None:
    known = profile()
    for name, value in constants(known).items():
        # Ranks that share have at most the speed of one alone: downwards there is no bound.
        assert constants(scaled(known, {name: 0.5}))[name] == pytest.approx(value / 2)
        assert scaled(scaled(known, {name: 0.5}), {name: 2.0}) == known


def test_a_profiled_step_tells_constants_apart_that_steps_do_not() -> None:
    """The update is bound by memory: its share of the step says which of two constants made the step slow."""
    true = scaled(profile(), {"memory_bandwidth": 0.6})
    layouts = (Layout(micro_batch_size=4), Layout(micro_batch_size=8), Layout(micro_batch_size=2))
    steps = measured(true, layouts)
    runs = []
    for run in steps:
        found = simulate(job_on(true), run.layout, trace=True)
        timeline = MeasuredTimeline(run.layout, 5, found.step_seconds, "cpu", found.timeline.spans)
        step = Quantiles(run.seconds, run.seconds, run.seconds)
        one = Measurement(run.layout, 1, 10, 5, step, 1.0, (1.0,), (1.0,), (1.0,), "cpu", {})
        runs.append(run_of(run.name, run.job, one, timeline))
    outcome = recalibrate(profile(), runs, "")
    assert "memory_bandwidth" in recalibrate(profile(), steps, "").refused
    assert "memory_bandwidth" not in outcome.refused
    assert constants(outcome.profile)["memory_bandwidth"] == pytest.approx(0.6 * profile().memory_bandwidth, rel=0.1)


def test_the_spread_of_a_run_is_that_of_its_steps() -> None:
    """10th and 90th percentile of a normal distribution lie 2.563 standard deviations apart."""
    step = Quantiles(1.0, math.exp(-0.1), math.exp(0.1))
    one = Measurement(Layout(), 1, 10, 5, step, 1.0, (1.0,), (1.0,), (1.0,), "cpu", {})
    spans = (Span(0, "compute", "PP:0F0", 0.0, 0.5), Span(1, "compute", "PP:1F0", 0.0, 0.3))
    run = run_of("one", job_on(profile()), one, MeasuredTimeline(Layout(), 5, 2.0, "cpu", spans))
    assert run.spread == pytest.approx(0.2 / 2.563)
    # Half a second and 0.3 s of two, mean over both ranks.
    assert run.ops == {"F": pytest.approx(0.2)}
