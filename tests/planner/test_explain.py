"""What `explain` says adds up and names the cause."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.differences import summary, term_lines, terms
from planner.explain import Explanation, explain, memory_rows, sentences, time_rows, why_lines
from planner.other_layout import comparable, nearest_legal
from planner.plan import Plan
from planner.search import plan
from planner.space import candidates
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.simulate import simulate


@pytest.fixture(scope="module")
def found() -> Plan:
    data = {"model": "llama-3.1-70b", "cluster": "dgx-h100", "nodes": 8, "training": {"global_batch_size": 128}}
    return plan(build_job(data, "test"))


def against(found: Plan, text: str) -> Explanation:
    return explain(found, parse_layout(text, found.job))


def test_rows_sum_to_step_and_peak(found: Plan) -> None:
    columns = against(found, "tp=8 pp=2").columns
    names = ["recommended", "data parallel", "yours"]
    if found.baseline.layout == found.layout:
        names.remove("data parallel")
    assert [name for name, _ in columns] == names
    for place, (_, prediction) in enumerate(columns):
        assert sum(row[2][place] for row in time_rows(columns)) == pytest.approx(prediction.step_seconds)
        assert sum(row[2][place] for row in memory_rows(columns)) == pytest.approx(prediction.memory.peak)


def small(model: str) -> Job:
    training = {"global_batch_size": 32, "seq_len": 1024, "stack": "torchtitan"}
    search = {"micro_batch_size": [1, 2], "virtual_stages": [1, 2]}
    return build_job(
        {"model": model, "cluster": "dgx-a100", "nodes": 2, "training": training, "search": search}, "test"
    )


JOBS = {name: small(name) for name in ("llama-3.1-8b", "mixtral-8x7b")}
LEGAL = {name: [one for one in candidates(job) if not one.problems(job)] for name, job in JOBS.items()}


@given(name=st.sampled_from(sorted(JOBS)), picks=st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_terms_add_up_to_the_difference_of_the_steps(name: str, picks: tuple[int, int]) -> None:
    job, legal = JOBS[name], LEGAL[name]
    first, other = (simulate(job, legal[pick % len(legal)]) for pick in picks)
    total = sum(term.seconds for term in terms(job, first, other))
    difference = other.step_seconds - first.step_seconds
    assert total == pytest.approx(difference, rel=1e-9, abs=1e-9 * max(first.step_seconds, other.step_seconds))
    back = {term.name: term.seconds for term in terms(job, other, first)}
    assert back == {term.name: -term.seconds for term in terms(job, first, other)}


def test_a_layout_that_talks_too_much_is_told_so(found: Plan) -> None:
    explanation = against(found, "tp=8 pp=4")
    (*_, sentence) = sentences(explanation)
    assert sentence.startswith("yours (") and "tp +" in sentence and "%" in sentence
    (line,) = [line for line in why_lines(explanation) if line.startswith("  tp +")]
    assert "tp=8:" in line and "all-gathers of" in line and "GB/s over NVLink 4, NVSwitch (8 ranks)" in line


def test_a_bubble_is_told_with_its_formula(found: Plan) -> None:
    """pp = 16, dp = 4: 128 / 4 = 32 microbatches, so 15 / 32 = 46.9 % of the work is waiting."""
    lines = why_lines(against(found, "pp=16 dp_replicate=4 zero_stage=0"))
    (line,) = [line for line in lines if line.startswith("  bubble +")]
    assert "32 microbatches for 16 stages in a row: (p-1)/m = 15/32 = 46.9% of the work" in line


def test_terms_are_told_by_size_and_small_ones_together(found: Plan) -> None:
    other = simulate(found.job, parse_layout("tp=8 pp=4", found.job))
    lost = terms(found.job, found.best, other)
    assert [abs(term.seconds) for term in lost] == sorted((abs(term.seconds) for term in lost), reverse=True)
    lines = term_lines(lost, found.best)
    small_ones = [term for term in lost if abs(term.seconds) < 0.005 * found.best.step_seconds]
    assert len(lines) == len(lost) - len(small_ones) + 1
    assert lines[-1].startswith("everything else")
    assert summary(lost, "yours", found.best, other).startswith(f"yours ({other.layout.short()}) takes ")


def test_where_a_tensor_group_leaves_its_node_the_link_is_named() -> None:
    training = {"global_batch_size": 16, "seq_len": 2048}
    job = build_job({"model": "gpt3-175b", "cluster": "dgx-h100", "nodes": 2, "training": training}, "test")
    inside, across = (simulate(job, parse_layout(text, job)) for text in ("tp=8 pp=2", "tp=16"))
    (cause,) = [term.cause for term in terms(job, inside, across) if term.name == "tp"]
    # A gather reaches 0.815 · 450 = 367 GB/s of NVLink, and 0.953 · 8 · 50 = 381 GB/s of the cards of a node.
    assert "over InfiniBand NDR (16 ranks, 2 nodes or racks; limited by NVLink 4, NVSwitch)" in cause
    assert "instead of tp=8" in cause and "over NVLink 4, NVSwitch (8 ranks)" in cause


def test_an_illegal_layout_is_refused_with_the_rule_and_the_nearest_legal_one_compared(found: Plan) -> None:
    explanation = against(found, "tp=3 pp=4")
    assert "must divide num_attention_heads" in " ".join(explanation.problems)
    name, nearest = explanation.columns[-1]
    assert name == "nearest to yours" and nearest.layout.problems(found.job) == []
    assert nearest.layout.pp == 4 and nearest.layout.tp in (2, 4)
    assert any(said.startswith("yours (") and "cannot run this job" in said for said in sentences(explanation))
    assert any(line.startswith("nearest to yours with ") for line in why_lines(explanation))


def test_what_only_the_software_cannot_do_is_compared_as_if_it_could(found: Plan) -> None:
    """Without ZeRO 3 in the stack the layout is predicted all the same, and does not count as one that runs."""
    stack = dataclasses.replace(found.job.stack, zero_stages=(1,), pipeline_zero_stages=(1,))
    job = dataclasses.replace(found.job, stack=stack)
    layout = parse_layout("tp=8 zero_stage=3", job)
    other = comparable(job, layout)
    assert "has no zero_stage 3" in other.problems[0] and not other.nearest
    assert other.prediction is not None and not other.prediction.fits
    assert other.prediction.layout == layout
    assert other.prediction.step_seconds == pytest.approx(simulate(found.job, layout).step_seconds)


def test_a_layout_that_does_not_fit_is_compared(found: Plan) -> None:
    explanation = against(found, "tp=1 dp_replicate=64 zero_stage=0")
    assert any("does not fit: needs" in said for said in sentences(explanation))
    assert "yours" in explanation.differences or "data parallel" in explanation.differences


def test_the_nearest_legal_layout_of_a_legal_one_is_itself(found: Plan) -> None:
    assert nearest_legal(found.job, found.layout) == found.layout
    assert nearest_legal(found.job, Layout(dp_shard=8, tp=8, zero_stage=1, sequence_parallel=True)) is not None
