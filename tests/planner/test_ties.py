"""Of layouts that nobody can tell apart the simplest is recommended, and the plan says so."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from planner.certainty import choice_lines, interval_sentence, warnings
from planner.plan import Plan, read_plan, shortest_first, write_plan
from planner.search import plan
from planner.space import candidates
from planner.ties import resolve, simpler
from simulator.error_bars import tie_share
from simulator.files import plain, write_json
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.risk import HIGH_RISK
from simulator.simplicity import complications
from simulator.simulate import simulate

SMALL = {"cp": [1], "tp": [1, 2, 8], "pp": [1, 2], "micro_batch_size": [1, 2], "virtual_stages": [1, 2]}


def job(model: str = "llama-3.1-8b", nodes: int = 1, search: Any = None, **training: Any) -> Job:
    data = {"model": model, "cluster": "dgx-h100", "nodes": nodes, "training": training, "search": search or {}}
    return build_job(data, "test")


@pytest.fixture(scope="module")
def small() -> tuple[Job, Plan]:
    task = job(search=SMALL, global_batch_size=32, seq_len=2048)
    return task, plan(task)


def test_the_best_is_proved_as_brute_force_finds_it(small: tuple[Job, Plan]) -> None:
    task, found = small
    everything = [simulate(task, layout) for layout in candidates(task) if not layout.problems(task)]
    likely = [p for p in everything if p.fits and p.out_of_memory_probability <= HIGH_RISK]
    best = min(likely, key=shortest_first)
    assert found.choice
    assert simulate(task, found.choice.best).step_seconds == best.step_seconds
    assert found.certificate.lower_bound_gap == 0
    # The best under the pessimistic end too: the high end is the same multiple of every step.
    assert best == min(likely, key=lambda p: (p.interval.high if p.interval else 0.0, p.layout.short()))


def test_the_recommended_one_ties_and_none_that_ties_is_simpler(small: tuple[Job, Plan]) -> None:
    task, found = small
    choice = found.choice
    assert choice
    least = choice.best_step_seconds
    assert found.best.step_seconds <= least * (1 + tie_share())
    for layout in choice.ties:
        assert simulate(task, layout).step_seconds <= least * (1 + tie_share())
        assert len(complications(layout)) >= len(complications(found.layout))
    assert found.layout not in choice.ties
    assert choice.fastest_step_seconds <= found.best.step_seconds


def test_a_hybrid_has_to_beat_plain_data_parallelism_by_more_than_the_error(small: tuple[Job, Plan]) -> None:
    """By less, plain data parallelism is recommended; [search] that leaves it out keeps the hybrid."""
    task, found = small
    assert found.choice
    least = found.choice.best_step_seconds
    assert found.baseline.step_seconds <= least * (1 + tie_share()), "the example is one where they tie"
    assert found.layout == found.baseline.layout or not complications(found.layout)
    pinned = plan(dataclasses.replace(task, search=SMALL | {"tp": [2]}))
    assert pinned.layout.tp == 2


def test_without_ties_the_fastest_is_recommended(small: tuple[Job, Plan]) -> None:
    task, found = small
    fastest = plan(task, ties=False)
    assert fastest.choice is None
    assert fastest.best.step_seconds <= found.best.step_seconds


def test_simpler_takes_one_complication_away() -> None:
    layout = Layout(
        tp=2, pp=4, dp_replicate=2, dp_shard=4, zero_stage=1, schedule="Interleaved1F1B", virtual_stages=2,
        recompute="full", sequence_parallel=True,
    )  # fmt: skip
    found = simpler(layout)
    for one in found:
        assert one.world_size == layout.world_size
        assert len(complications(one)) < len(complications(layout))
    assert dataclasses.replace(layout, recompute="none") in found
    assert dataclasses.replace(layout, virtual_stages=1, schedule="1F1B") in found
    assert dataclasses.replace(layout, dp_replicate=1, dp_shard=8) in found
    assert simpler(Layout(dp_replicate=8)) == []


def test_the_plan_says_what_ties_and_what_its_interval_rests_on(small: tuple[Job, Plan], tmp_path: Any) -> None:
    _, found = small
    lines = choice_lines(found)
    assert lines[0].startswith("why: ")
    assert "80%" in interval_sentence(found.best) and "published jobs" in interval_sentence(found.best)
    again = read_plan(write_plan(found, tmp_path / "plan.json"))
    assert again.choice == found.choice and again.best.interval == found.best.interval


def test_a_plan_from_before_intervals_gets_them(small: tuple[Job, Plan], tmp_path: Any) -> None:
    _, found = small
    document = plain(found)
    document.pop("choice")
    for one in (document["best"], document["baseline"], *document["runners_up"]):
        one.pop("interval")
    again = read_plan(write_json(tmp_path / "plan.json", document))
    assert again.best.interval == found.best.interval and again.choice is None


def test_a_claim_that_nobody_reached_is_a_warning(small: tuple[Job, Plan]) -> None:
    task, found = small
    assert warnings(task, dataclasses.replace(found.best, mfu=0.95))
    assert warnings(task, dataclasses.replace(found.best, mfu=0.1)) == []


def test_a_simpler_layout_that_is_likely_to_run_out_of_memory_is_no_choice(small: tuple[Job, Plan]) -> None:
    """Plain data parallelism ties with a hybrid, but its risk is above the limit: the hybrid stays, both are shown."""
    task, _ = small
    hybrid, plain_one = (simulate(task, Layout(dp_shard=4, tp=2, zero_stage=3)), simulate(task, Layout(dp_shard=8)))
    hybrid = dataclasses.replace(hybrid, out_of_memory_probability=0.01)
    seconds = hybrid.step_seconds * 1.01
    plain_one = dataclasses.replace(plain_one, step_seconds=seconds, out_of_memory_probability=HIGH_RISK + 0.01)
    pinned = dataclasses.replace(task, search={"tp": [2], "zero_stage": [3], "recompute": ["none"]})
    found, choice = resolve(pinned, [hybrid, plain_one], plain_one, hybrid)
    assert found == [hybrid, plain_one] and choice.ties == ()
    fine = dataclasses.replace(plain_one, out_of_memory_probability=HIGH_RISK)
    found, choice = resolve(pinned, [hybrid, fine], fine, hybrid)
    assert found == [fine, hybrid] and choice.ties == (hybrid.layout,)
