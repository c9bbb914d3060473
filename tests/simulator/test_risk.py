"""How likely a layout runs out of memory: the normal distribution by hand, and what a shared machine holds."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import risk
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.memory import capacity
from simulator.results import MemoryBreakdown
from simulator.risk import LEAST_COUNT, MemoryResiduals, Residuals, memory_residuals, needed, out_of_memory_probability
from simulator.simulate import simulate

GB = 1e9


def job(**training: object) -> Job:
    recipe = {"global_batch_size": 64, "seq_len": 4096} | training
    return build_job({"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 1, "training": recipe}, "test")


def rank(peak: float) -> MemoryBreakdown:
    return MemoryBreakdown(0.0, 0.0, 0.0, peak, 0.0, 0.0, peak)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooled: no bias, 10 %. Of `own` 5 % too low by 10 %; `few` has too few runs to be judged by them."""
    found = MemoryResiduals(
        Residuals(100, 0.1, 0.0, "made up"),
        {"own": Residuals(LEAST_COUNT, 0.05, 0.1, "made up"), "few": Residuals(LEAST_COUNT - 1, 0.5, 0.5, "made up")},
    )
    monkeypatch.setattr(risk, "memory_residuals", lambda: found)


@pytest.mark.usefixtures("known")
def test_probability_is_that_of_the_normal_distribution() -> None:
    """At the limit a half; one standard deviation below it 1 - Phi(1) = 0.158655, one above 0.841345; two 0.022750."""
    assert out_of_memory_probability(80 * GB, 80 * GB, "any") == pytest.approx(0.5)
    assert out_of_memory_probability(80 * GB * math.exp(-0.1), 80 * GB, "any") == pytest.approx(0.158655, abs=1e-6)
    assert out_of_memory_probability(80 * GB * math.exp(0.1), 80 * GB, "any") == pytest.approx(0.841345, abs=1e-6)
    assert out_of_memory_probability(80 * GB * math.exp(-0.2), 80 * GB, "any") == pytest.approx(0.022750, abs=1e-6)
    assert out_of_memory_probability(0.0, 80 * GB, "any") == 0.0


@pytest.mark.usefixtures("known")
def test_a_stack_is_judged_by_its_own_runs_if_it_has_enough() -> None:
    """own: predictions are 10 % too low, so that the limit is reached at exp(-0.1) of it; few: as pooled."""
    assert out_of_memory_probability(80 * GB * math.exp(-0.1), 80 * GB, "own") == pytest.approx(0.5)
    assert out_of_memory_probability(80 * GB * math.exp(-0.15), 80 * GB, "own") == pytest.approx(0.158655, abs=1e-6)
    assert out_of_memory_probability(80 * GB, 80 * GB, "few") == pytest.approx(0.5)


def test_without_spread_it_is_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = MemoryResiduals(Residuals(100, 0.0, 0.0, "made up"))
    monkeypatch.setattr(risk, "memory_residuals", lambda: exact)
    assert out_of_memory_probability(79 * GB, 80 * GB, "any") == 0.0
    assert out_of_memory_probability(81 * GB, 80 * GB, "any") == 1.0


amounts = st.floats(1e6, 1e15)
stacks = st.sampled_from(["megatron-core", "torchtitan", "layoutwise-cpu", "unheard of"])


@given(need=amounts, more=st.floats(1.0, 100.0), room=amounts, stack=stacks)
def test_risk_rises_with_the_peak_and_falls_with_the_memory(need: float, more: float, room: float, stack: str) -> None:
    found = out_of_memory_probability(need, room, stack)
    assert 0.0 <= found <= 1.0
    assert out_of_memory_probability(need * more, room, stack) >= found
    assert out_of_memory_probability(need, room * more, stack) <= found


def test_residuals_that_ship_are_of_enough_runs() -> None:
    found = memory_residuals()
    for one in (found.pooled, *found.families.values()):
        assert one.count >= LEAST_COUNT and 0 < one.log_sigma < 1 and abs(one.log_bias) < 1 and one.source
    assert found.pooled.count >= max(one.count for one in found.families.values())


def test_a_prediction_carries_its_risk() -> None:
    task = job()
    small, large = (simulate(task, parse_layout(f"micro_batch_size={size}", task)) for size in (1, 8))
    for one in (small, large):
        limit = capacity(task, one.layout)
        expected = out_of_memory_probability(one.memory.peak, limit, task.stack.name)
        assert one.out_of_memory_probability == expected
    assert small.out_of_memory_probability < large.out_of_memory_probability


def test_a_gpu_has_its_own_memory() -> None:
    ranks = (rank(10 * GB), rank(2 * GB))
    assert needed(job(), Layout(pp=2, dp_replicate=4), ranks) == 10 * GB


def shared(processors: int, nodes: int = 1) -> Job:
    """A job on machines whose processors share 8 GB each of memory."""
    task = job()
    gpu = dataclasses.replace(task.cluster.gpu, kind="cpu", memory=8 * GB)
    cluster = dataclasses.replace(task.cluster, gpu=gpu, gpus_per_node=processors, oversubscribe=2.0)
    return dataclasses.replace(task, cluster=cluster, nodes=nodes)


def test_ranks_of_one_machine_run_out_together() -> None:
    """Two stages of 10 and 2 GB on a machine with 16 GB: 12 GB in all, 6 of the 8 GB that each of two ranks has."""
    task, layout = shared(2), Layout(pp=2)
    assert needed(task, layout, (rank(10 * GB), rank(2 * GB))) == 6 * GB
    assert capacity(task, layout) == 8 * GB
    # Four ranks, two of each stage: 24 GB in all, 6 of the 4 GB that each has.
    four = Layout(pp=2, dp_replicate=2)
    assert needed(task, four, (rank(10 * GB), rank(2 * GB))) == 6 * GB
    assert capacity(task, four) == 4 * GB


def test_the_fullest_machine_decides() -> None:
    """Two machines with a stage each: the first one's ranks hold 10 GB each, whatever the other has left."""
    assert needed(shared(2, nodes=2), Layout(pp=2, dp_replicate=2), (rank(10 * GB), rank(2 * GB))) == 10 * GB


def test_shortfall_names_the_largest_items() -> None:
    task = job()
    layout = Layout(dp_shard=8, zero_stage=1)
    limit = capacity(task, layout)
    full = MemoryBreakdown(10 * 2**30, 40 * 2**30, 20 * 2**30, 5 * 2**30, 0.0, 0.0, limit + 2**30)
    sentence = risk.shortfall(task, layout, (full,))
    assert "1.0 GiB too much (mostly gradients 40.0, optimizer 20.0 GiB)" in sentence
    assert f"{limit / 2**30:.1f}" in sentence
    assert risk.shortfall(task, layout, (dataclasses.replace(full, peak=limit),)) == ""
