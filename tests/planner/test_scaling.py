"""The scaling curve: costs by hand, the front, the choice against brute force, and a bend whose terms add up."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scalings import made_plan, small_job

from planner.bend import explained, sentence
from planner.objectives import choose, too_late
from planner.other_nodes import for_report, job_on, node_counts, over_nodes, scaling_of
from planner.scaling import Row, changes_of, pareto_front, read_scaling, rows_of, write_scaling
from planner.search import plan
from simulator.errors import UserError
from simulator.files import plain, write_json
from simulator.job import Job
from simulator.layout import Layout
from simulator.price import dollars, gpu_hours, training_seconds
from simulator.results import Breakdown
from simulator.risk import HIGH_RISK
from simulator.simulate import simulate

DEADLINE = {"tokens": "1T", "deadline": "30 days"}


# Cost


def test_costs_by_hand() -> None:
    """64 x 1024 tokens in 0.5 s are 131,072 tokens/s; 1e12 tokens take 7,629,394.5 s (88.3 days), on 16 GPUs 33,908.4
    GPU-hours; at 2.50 USD they cost 84,771 USD, and 94,190 USD where a tenth of the time is lost."""
    task = small_job(nodes=2, price_per_gpu_hour="2.50 USD")
    best = made_plan(task, 2, compute=0.5).best
    assert training_seconds(best, 1e12) == pytest.approx(7_629_394.53)
    assert gpu_hours(best, task, 1e12) == pytest.approx(33_908.42)
    assert dollars(best, task, 1e12) == pytest.approx(84_771.05)
    assert dollars(best, task, 1e12, goodput=0.9) == pytest.approx(94_190.06)
    assert dollars(best, small_job(nodes=2), 1e12) is None


@given(st.floats(0.01, 100), st.floats(0.1, 50), st.floats(0.3, 1), st.integers(1, 16), st.floats(1e6, 1e13))
@settings(max_examples=30, deadline=None)
def test_cost_is_price_times_gpus_times_time(step: float, price: float, goodput: float, n: int, tokens: float) -> None:
    task = small_job(price_per_gpu_hour=price, objective={"tokens": tokens, "goodput": goodput})
    (row,) = rows_of([made_plan(task, n, compute=step)], tokens)
    assert row.gpus == 8 * n
    assert row.dollars == pytest.approx(price * row.gpus * row.seconds / 3600)
    # Steps that count are made in a part of the time.
    assert row.seconds * goodput == pytest.approx(tokens / (64 * 1024 / step))


# The front and the choice

steps = st.lists(st.floats(0.1, 10), min_size=1, max_size=6)
risks = st.lists(st.sampled_from([0.0, 0.05, 0.3]), min_size=6, max_size=6)


def rows(task: Job, seconds: Sequence[float], risk: Sequence[float] = (0.0,) * 6) -> tuple[Row, ...]:
    """Rows of 1, 2, 3 ... nodes with these steps."""
    plans = [made_plan(task, n, compute=s, risk=r) for n, s, r in zip(itertools.count(1), seconds, risk, strict=False)]
    return rows_of(plans, task.objective.tokens or 1e9)


def test_pareto_by_hand() -> None:
    assert pareto_front([(1, 2), (2, 1), (2, 2), (1, 2), (0, 3)]) == [True, True, False, True, True]


@given(steps)
@settings(max_examples=40, deadline=None)
def test_who_is_on_the_front_is_beaten_by_nobody_and_who_is_not_is_beaten(seconds: list[float]) -> None:
    found = rows(small_job(), seconds)
    for names, on in ((("seconds", "cost", "gpus"), "on_front"), (("seconds", "cost"), "on_time_cost_front")):
        values = {row.nodes: [getattr(row, name) for name in names] for row in found}
        for row in found:
            others = [v for v in values.values() if v != values[row.nodes]]
            beaten = any(all(a <= b for a, b in zip(v, values[row.nodes], strict=True)) for v in others)
            assert getattr(row, on) == (not beaten)
    assert all(row.on_front for row in found if row.on_time_cost_front)


@given(steps, risks)
@settings(max_examples=40, deadline=None)
def test_fastest_and_cheapest(seconds: list[float], risk: list[float]) -> None:
    """At one price per GPU-hour the cheapest tokens are the most tokens/s/GPU. Who is likely to run out of memory is
    chosen only where all are."""
    for price in ({}, {"price_per_gpu_hour": 3.0}):
        task = small_job(**price, objective={"goal": "cheapest"})
        found = rows(task, seconds, risk)
        allowed = [row for row in found if row.prediction.out_of_memory_probability <= HIGH_RISK] or found
        choice = choose(found, task)
        assert choice is not None
        chosen = next(row for row in found if row.nodes == choice.nodes)
        best = max(row.prediction.tokens_per_second_per_gpu for row in allowed)
        assert chosen in allowed and chosen.prediction.tokens_per_second_per_gpu == pytest.approx(best)
        fast = choose(found, small_job(**price))
        assert fast is not None
        speeds = {row.nodes: row.prediction.tokens_per_second for row in found}
        assert speeds[fast.nodes] == pytest.approx(max(speeds[row.nodes] for row in allowed))


@given(steps, st.sampled_from(["gpus", "cost"]), st.floats(0.5, 30), st.sampled_from([None, 0.8]))
@settings(max_examples=60, deadline=None)
def test_the_deadline_is_brute_force(seconds: list[float], minimize: str, days: float, goodput: float | None) -> None:
    """1e11 tokens of 65,536 a step are 1,525,879 steps: at one second each 17.7 days."""
    goal = {"tokens": "100B", "deadline": days * 86400, "minimize": minimize}
    task = small_job(objective=goal | ({"goodput": goodput} if goodput else {}))
    found = rows(task, seconds)
    in_time = [
        (n * 8 * (s if minimize == "cost" else 1), n)
        for n, s in zip(itertools.count(1), seconds, strict=False)
        if 1e11 / 65536 * s / (goodput or 1) <= days * 86400
    ]
    choice = choose(found, task)
    assert (choice is None) == (not in_time)
    if choice is not None:
        least = min(value for value, _ in in_time)
        assert next(value for value, n in in_time if n == choice.nodes) == pytest.approx(least)


def test_a_riskier_number_of_nodes_is_named() -> None:
    task = small_job(objective={"goal": "cheapest"})
    choice = choose(rows(task, [1.0, 0.6], [0.4, 0.0]), task)
    assert choice is not None and choice.nodes == 2
    assert "better would be 1 node, but out of memory with a probability of 40%" in choice.reason


def test_a_missed_deadline_says_what_would_make_it() -> None:
    """100 days on two nodes at best: 30 days are met by 8 nodes if nothing is lost; the search asks for those only
    that could. 30 of 100 days train 300 of 1,000 B tokens."""
    task = small_job(objective=DEADLINE)
    step = 100 * 86400 / (1e12 / 65536)
    found = rows(task, [2 * step, step])
    assert choose(found, task) is None
    asked = []

    def larger(nodes: int) -> Row | None:
        asked.append(nodes)
        (row,) = rows_of([made_plan(task, nodes, compute=2 * step / nodes)], 1e12)
        return row

    error = too_late(found, task, larger)
    assert error.exit_code == 3 and "30.0 days for 1T tokens is met on none of 1, 2 nodes" in str(error)
    assert "the nearest is 100 days on 2 nodes" in str(error)
    assert asked == [8] and error.remedies[0].startswith("--nodes 8: 1T tokens in 25.0 days")
    assert error.remedies[1:] == ("a deadline of 100 days on 2 nodes", "300B tokens in 30.0 days on 2 nodes")
    # Where more nodes are no faster only the others are left.
    error = too_late(found, task, lambda nodes: found[0])
    assert error.remedies[0].startswith("no number of nodes near these")
    # A loss of three quarters is what makes 25 days 100.
    lossy = small_job(objective=DEADLINE | {"goodput": 0.25})
    error = too_late(rows(lossy, [step / 4]), lossy, lambda nodes: None)
    assert error.remedies[-1] == "no failures at all: without objective.goodput it is 25.0 days on 1 node"
    assert "is not met on 1 node: the nearest is 100 days" in str(error)


def test_a_deadline_that_no_number_of_nodes_near_could_meet_says_how_many_would() -> None:
    """100 days on two nodes, or 200 node-days, in one hour are 4,800 nodes; 32 are the most that are tried."""
    task = small_job(objective=DEADLINE | {"deadline": "1 h"})
    step = 100 * 86400 / (1e12 / 65536)

    def larger(nodes: int) -> Row | None:
        raise AssertionError("none of those that are tried could be enough")

    error = too_late(rows(task, [2 * step, step]), task, larger)
    assert error.remedies[0] == "not more nodes: without any loss of efficiency it would take 4,800"


# The bend


def test_the_terms_of_a_change_add_up_to_it() -> None:
    """GPU-hours per 1e9 tokens: 8 GPUs · 1 s / 65,536 tokens are 33.9 h, of 16 GPUs and 0.7 s 47.5 h."""
    task = small_job()
    plans = [made_plan(task, 1, compute=0.9, dp=0.1), made_plan(task, 2, compute=0.45, dp=0.13, bubble=0.12)]
    (change,) = changes_of(rows_of(plans, 1e9))
    assert change.gpu_hours == pytest.approx((33.908, 47.472), abs=1e-3)
    assert change.items.total() == pytest.approx(change.gpu_hours[1] - change.gpu_hours[0])
    assert change.items.compute == pytest.approx(0) and change.items.bubble == pytest.approx(8.138, abs=1e-3)
    # dp: 0.13 s on 16 GPUs are 8.82 h, 0.1 s on 8 are 3.39 h. What is shown adds up too: 8.1 + 5.4 + 0.1 = 13.6.
    assert sentence(change, task) == (
        "from 1 to 2 nodes efficiency falls from 100.0% to 71.4%: 1e9 tokens take 47.5 instead of 33.9 GPU-hours, "
        "+13.6: bubble +8.1, exposed gradient and parameter collectives +5.4, the rest +0.1"
    )


parts = st.fixed_dictionaries({
    name: st.floats(0, 1) for name in ("recompute", "tp", "cp", "pp", "dp", "bubble", "optimizer", "host")
} | {"compute": st.floats(0.01, 5)})  # fmt: skip


@given(parts, parts)
@settings(max_examples=60, deadline=None)
def test_the_numbers_of_a_sentence_add_up_as_they_stand(one: dict[str, float], two: dict[str, float]) -> None:
    task = small_job()
    (change,) = changes_of(rows_of([made_plan(task, 1, **one), made_plan(task, 3, **two)], 1e9))
    assert change.items.total() == pytest.approx(change.gpu_hours[1] - change.gpu_hours[0], abs=1e-9)
    whole, difference, words = re.fullmatch(r".*: (1e9 tokens take .*), ([-+][\d,.]+): (.*)", sentence(change, task)).groups()  # type: ignore[union-attr]  # fmt: skip # noqa: E501
    after, before = (float(text.replace(",", "")) for text in re.findall(r"([\d,.]+) (?:instead|GPU)", whole))
    shown = float(difference.replace(",", ""))
    assert after - before == pytest.approx(shown, abs=1e-6)
    terms = [float(text.replace(",", "")) for text in re.findall(r"[-+][\d,.]*\d", words)]
    assert sum(terms) == pytest.approx(shown, abs=1e-6)


def test_the_bend_is_the_largest_fall_for_each_doubling() -> None:
    """From 1 to 2 nodes 10 % are lost in one doubling, from 2 to 16 20 % in three."""
    task = small_job()
    speeds = {1: 1.0, 2: 0.9, 16: 0.72}
    plans = [made_plan(task, n, compute=1 / n, dp=(1 / e - 1) / n) for n, e in speeds.items()]
    changes, words = explained(plans, changes_of(rows_of(plans, 1e9)))
    assert words.startswith("The bend: from 1 to 2 nodes efficiency falls from 100.0% to 90.0%")
    assert "exposed gradient and parameter collectives" in words and "rises" not in words
    assert changes[0].because == "the gradients of a step are for 4,096 tokens of a GPU, where it was 8,192"
    flat = [made_plan(task, n, compute=1 / n) for n in (1, 2, 4)]
    assert explained(flat, changes_of(rows_of(flat, 1e9)))[1].startswith("No bend: ")
    assert explained(flat[:1], ()) == ((), "")


def test_why_a_layout_is_not_kept() -> None:
    """64 sequences have no more than 64 data-parallel ranks, so 16 nodes need another axis. A layout that is allowed is
    simulated; one with 12 stages is not to be had on 8 GPUs."""
    task = small_job()

    def bend(nodes: tuple[int, int], layouts: tuple[Layout, Layout], seconds: tuple[float, float]) -> str:
        plans = [made_plan(task, n, compute=s) for n, s in zip(nodes, seconds, strict=True)]
        plans = [
            dataclasses.replace(found, best=dataclasses.replace(found.best, layout=layout))
            for found, layout in zip(plans, layouts, strict=True)
        ]
        return explained(plans, changes_of(rows_of(plans, 1e9)))[1]

    wide = Layout(dp_replicate=64), Layout(dp_replicate=64, tp=2)
    words = bend((8, 16), wide, (1.0, 0.9))
    assert "(tp 2 instead of 1; dp_replicate=128 on 16 nodes cannot be: global_batch_size = 64 is not" in words
    kept = Layout(dp_replicate=8), Layout(dp_replicate=8, tp=2)
    words = bend((1, 2), kept, (1.0, 0.9))
    longer = simulate(dataclasses.replace(task, nodes=2), Layout(dp_replicate=16)).step_seconds / 0.9 - 1
    assert ("would take" in words) == (longer > 0)
    deep = Layout(dp_replicate=8), Layout(dp_replicate=2, pp=12)
    assert "No bend" in (words := bend((1, 3), deep, (1.0, 0.2)))
    assert "From 1 to 3 nodes efficiency rises" in words and "pp=12 needs a multiple of 12 GPUs, not 8" in words


# Planning


def test_every_row_is_the_plan_of_its_number_of_nodes() -> None:
    task = small_job(search={"tp": [1, 2], "pp": [1, 2], "recompute": ["none"]})
    scaling, plans = over_nodes(task, (4, 1, 2), top=1)
    assert [row.nodes for row in scaling.rows] == [1, 2, 4] == [found.job.nodes for found in plans]
    for row in scaling.rows:
        alone = plan(dataclasses.replace(task, nodes=row.nodes), top=1)
        assert row.prediction == alone.best and row.gpus == 8 * row.nodes
    first = scaling.rows[0].prediction.tokens_per_second_per_gpu
    assert [row.efficiency for row in scaling.rows] == pytest.approx(
        [row.prediction.tokens_per_second_per_gpu / first for row in scaling.rows]
    )
    assert scaling.job == task and scaling.missing == () and len(scaling.changes) == 2
    # Plans that are there are not made again.
    again, kept = over_nodes(task, (1, 2, 4), known=plans)
    assert again == scaling and all(a is b for a, b in zip(kept, plans, strict=True))


def test_a_number_that_cannot_be_laid_out_says_why() -> None:
    """64 sequences cannot be divided over 128 or 24 replicas, and [search] allows nothing else."""
    task = small_job(search={"tp": [1], "pp": [1], "cp": [1]})
    scaling, _ = over_nodes(task, (1, 3, 16), top=1)
    assert [row.nodes for row in scaling.rows] == [1]
    assert [one.nodes for one in scaling.missing] == [3, 16]
    assert all("no layout of gpt2 on" in one.reason for one in scaling.missing)


def test_the_batch_grows_where_it_shall() -> None:
    task = small_job(nodes=2)
    assert job_on(task, 4).training.global_batch_size == 64
    assert job_on(task, 3, scale_batch=True).training.global_batch_size == 96
    assert job_on(task, 2, scale_batch=True) == task
    with pytest.raises(UserError, match=r"63 sequences on 2 nodes are 31\.5 on 1, which is no whole number"):
        job_on(small_job(nodes=2, training={"global_batch_size": 63, "seq_len": 1024}), 1, scale_batch=True)
    scaling, _ = over_nodes(task, (1, 2), True, top=1)
    assert [row.global_batch_size for row in scaling.rows] == [32, 64] and scaling.scale_batch
    tokens = {row.prediction.tokens_per_second * row.prediction.step_seconds / row.gpus for row in scaling.rows}
    assert all(value == pytest.approx(4096) for value in tokens)


def test_numbers_of_nodes() -> None:
    task = small_job(nodes=2)
    assert node_counts(task) == (1, 4, 8)
    assert node_counts(task, "8, 4,4") == (4, 8) and node_counts(task, "none") == ()
    named = small_job(objective={"nodes": [8, 2]})
    assert node_counts(named) == (2, 8) and node_counts(named, "3") == (3,)
    for bad, rule in (("4,x", "'x' is not a number"), ("0", "at least 1"), ("99999999", "more than 131072 devices")):
        with pytest.raises(UserError, match=rule):
            node_counts(task, bad)
    alone = dataclasses.replace(task, cluster=dataclasses.replace(task.cluster, scale_out=None), nodes=1)
    assert node_counts(alone) == ()
    with pytest.raises(UserError, match="need a network"):
        node_counts(alone, "2")


def test_what_a_page_shows_without_a_word_takes_no_longer_than_its_patience() -> None:
    task = small_job(nodes=2, search={"tp": [1], "pp": [1], "recompute": ["none"]})
    own = plan(task, top=2)
    scaling, plans = over_nodes(task, (1, 4), known=[own], patience=0.0)
    assert plans == (own,) and [one.nodes for one in scaling.missing] == [1, 4]
    assert scaling.missing[0].reason == "takes longer to plan: --nodes 1 adds it"
    nearby = for_report(own, "1")
    assert nearby is not None and [row.nodes for row in nearby.rows] == [1, 2]
    # What lies beside the plan is shown where nothing else is asked for.
    assert for_report(own, None, scaling) is scaling and for_report(own, "none", scaling) is None


# The file


def test_a_scaling_comes_back_from_its_file(tmp_path: Path) -> None:
    task = small_job(objective={"tokens": "1T", "nodes": [1, 2]}, price_per_gpu_hour="1 USD")
    scaling = scaling_of(task, [made_plan(task, n, compute=1 / n, dp=0.1) for n in (1, 2)], (), False)
    path = write_scaling(scaling, tmp_path / "scaling.json")
    assert read_scaling(path) == scaling and scaling.row(2) == scaling.rows[1] and scaling.row(3) is None
    for change, rule in (({"version": 9}, "version = 9"), ({"rows": []}, "no rows"), ({"rws": 1}, "unknown key 'rws'")):
        write_json(tmp_path / "bad.json", plain(scaling) | change)
        with pytest.raises(UserError, match=rule):
            read_scaling(tmp_path / "bad.json")


def test_a_fall_is_a_logarithm() -> None:
    task = small_job()
    (change,) = changes_of(rows_of([made_plan(task, 1, compute=1.0), made_plan(task, 4, compute=1.0)], 1e9))
    # A quarter of the efficiency in two doublings: half in each.
    assert change.fall == pytest.approx(math.log(2) / math.log(2)) and change.items == Breakdown(
        compute=change.gpu_hours[1] - change.gpu_hours[0]
    )
