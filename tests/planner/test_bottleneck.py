"""What binds a plan: the fastest layout out of reach is that of brute force, and every cause is in the step."""

from __future__ import annotations

import dataclasses

import pytest

from planner.bottleneck import bubble_words, constraints, forced_by_memory, least_seconds, out_of_reach
from planner.plan import Plan
from planner.search import plan
from planner.space import candidates
from planner.step_report import kernel_rows, parts_of, transfer_rows
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.memory import capacity
from simulator.simulate import simulate

SEARCH = {"tp": [1, 2, 8], "pp": [1, 2], "micro_batch_size": [1, 2], "cp": [1], "virtual_stages": [1, 2]}


def job(model: str = "llama-3.1-8b", **training: object) -> Job:
    data = {"model": model, "cluster": "dgx-a100", "nodes": 1, "training": training, "search": SEARCH}
    return build_job(data, "test")


@pytest.fixture(scope="module")
def tight() -> Plan:
    """8 B parameters with 16 bytes each are 120 GiB over 8 GPUs, and sequences are long."""
    return plan(job(global_batch_size=32, seq_len=8192))


def test_out_of_reach_is_brute_force_without_memory(tight: Plan) -> None:
    legal = [layout for layout in candidates(tight.job) if not layout.problems(tight.job)]
    fastest = min((simulate(tight.job, layout) for layout in legal), key=lambda p: p.step_seconds)
    beyond = out_of_reach(tight)
    assert beyond is not None
    assert beyond.prediction.step_seconds == pytest.approx(fastest.step_seconds)
    assert beyond.prediction.step_seconds < tight.best.step_seconds
    assert beyond.short_by == pytest.approx(fastest.memory.peak - capacity(tight.job, fastest.layout))
    assert beyond.short_by > 0


def test_memory_that_costs_nothing_is_no_constraint() -> None:
    roomy = plan(job("gpt2", global_batch_size=64, seq_len=1024))
    assert out_of_reach(roomy) is None
    assert "memory" not in {one.name for one in constraints(roomy, parts_of(roomy.job, roomy.best), None)}


def test_constraints_are_sorted_and_come_from_the_step(tight: Plan) -> None:
    parts, beyond = parts_of(tight.job, tight.best), out_of_reach(tight)
    found = constraints(tight, parts, beyond)
    assert [one.seconds for one in found] == sorted((one.seconds for one in found), reverse=True)
    (memory,) = [one for one in found if one.name == "memory"]
    assert beyond is not None
    assert memory.seconds == pytest.approx(tight.best.step_seconds - beyond.prediction.step_seconds)
    assert "more than there is; so memory forces" in memory.reason
    (device,) = [one for one in found if one.name == "device"]
    assert device.seconds == pytest.approx(tight.best.breakdown.compute - least_seconds(tight.job))


def test_least_seconds_by_hand() -> None:
    """Model FLOPs of all tokens over 8 GPUs at the rate and the clock of the cluster's file."""
    task = job(global_batch_size=32, seq_len=8192)
    fit, gpu = task.cluster.gpu.matmul["bf16"], task.cluster.gpu
    flops = 32 * 8192 * task.model.flops_per_token(8192)
    assert least_seconds(task) == pytest.approx(flops / 8 / fit.rate / gpu.clock("bf16"))


def test_what_memory_forces_by_hand() -> None:
    fits = Layout(dp_replicate=4, tp=8, pp=4, micro_batch_size=1, recompute="full", sequence_parallel=True)
    free = Layout(dp_replicate=64, tp=2, micro_batch_size=4, sequence_parallel=True)
    assert forced_by_memory(fits, free) == [
        "recompute=full for none", "a micro-batch of 1 for 4", "a pipeline of 4 ranks for 1", "tp over 8 ranks for 2",
    ]  # fmt: skip
    assert forced_by_memory(fits, fits) == []


def test_bubble_by_hand() -> None:
    """32 sequences, dp 1, micro-batches of 2: 16; with 2 stages on each of 2 ranks 1 / (16 · 2) = 3.1 %."""
    task = job(global_batch_size=32, seq_len=1024)
    layout = Layout(tp=4, pp=2, micro_batch_size=2, schedule="Interleaved1F1B", virtual_stages=2)
    assert "(p-1)/(m v) = 1/(16 x 2) = 3.1% of the work" in bubble_words(layout, task)
    plain = dataclasses.replace(layout, schedule="1F1B", virtual_stages=1)
    assert "(p-1)/m = 1/16 = 6.2% of the work" in bubble_words(plain, task)


def test_rows_name_kernels_and_links(tight: Plan) -> None:
    parts = parts_of(tight.job, tight.best)
    rows = kernel_rows(parts, tight.best, tight.job)
    assert {"attention", "down"} <= {row[0] for row in rows}
    assert all("TFLOP/s" in row[3] or "GB/s" in row[3] or not row[3] for row in rows)
    for _, kind, _, over, _, rate, _ in transfer_rows(parts, tight.best):
        assert "NVLink 3" in over and rate.endswith("GB/s") and kind
