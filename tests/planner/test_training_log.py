"""Logs of other software: lines as torchtitan and Megatron-LM print them become a measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cli import app
from planner.plan import Plan, write_plan
from planner.search import plan
from planner.training_log import measurement_of
from simulator.errors import UserError
from simulator.job import build_job

# As torchtitan/components/metrics.py colours and prints them, behind torchrun's rank and the logger's time; the first
# from before gradient norms and tflops were printed.
TITAN = """\
[rank0]:2024-09-12 20:01:03,101 - root - INFO - \x1b[36mstep:  1  \x1b[32mloss: 12.2482  \x1b[33mmemory: 41.80GiB(52.84%)  \x1b[34mtps: 400  \x1b[35mmfu: 3.11%\x1b[39m
[rank0]:[titan] 2025-06-01 10:00:10,000 - root - INFO - \x1b[31mstep: 10  \x1b[32mloss:  9.5000  \x1b[38;2;180;60;0mgrad_norm:  2.5000  \x1b[38;2;54;234;195mmemory: 60.15GiB(75.95%)  \x1b[34mtps: 4,096  \x1b[36mtflops: 210.10  \x1b[35mmfu: 21.24%\x1b[39m
[rank1]:[titan] 2025-06-01 10:00:10,000 - root - INFO - step: 10  loss:  9.5000  grad_norm:  2.5000  memory: 60.15GiB(75.95%)  tps: 4,096  tflops: 210.10  mfu: 21.24%
[rank0]:[titan] 2025-06-01 10:00:20,000 - root - INFO - step: 20  loss: 8.25000  grad_norm:  1.0000  memory: 60.25GiB(76.05%)  tps: 8,192  tflops: 420.20  mfu: N/A
[rank0]:[titan] 2025-06-01 10:00:30,000 - root - INFO - step: 30  loss: 7.0  grad_norm:  0.5  memory: 60.25GiB(76.05%)  tps: 8,192  tflops: 420.20  mfu: 42.49%
[rank0]:[titan] 2025-06-01 10:00:40,000 - root - INFO - step: 1,000  loss: 6.0  grad_norm:  0.5  memory: 60.25GiB(76.05%)  tps: 4,096  tflops: 210.20  mfu: 21.49%
[rank0]:[titan] 2025-06-01 10:00:41,000 - root - INFO - Saving the checkpoint (or staging if async is enabled).
"""  # noqa: E501
# megatron/training/training.py; without and with the time in front, the throughput and the skipped iterations.
MEGATRON = """\
[Rank 0] (after 1 iterations) memory (MB) | allocated: 1024.0 | max allocated: 2048.5 | reserved: 3000.0 | max reserved: 4096.0
[Rank 8] (after 1 iterations) memory (MB) | allocated: 1024.0 | max allocated: 1024.0 | reserved: 3000.0 | max reserved: 2048.0
 iteration        1/     100 | consumed samples:          256 | elapsed time per iteration (ms): 9000.5 | learning rate: 1.000E-05 | global batch size:   256 | lm loss: 1.071E+01 | loss scale: 1.0 | grad norm: 5.500 | number of skipped iterations:   0 | number of nan iterations:   0 |
 [2025-06-01 10:00:00] iteration       20/     100 | consumed samples:         5120 | elapsed time per iteration (ms): 1000.0 | throughput per GPU (TFLOP/s/GPU): 400.1 | learning rate: 1.000000E-05 | global batch size:   256 | lm loss: 9.0E+00 | loss scale: 1.0 | grad norm: 2.500 |
7: [2025-06-01 10:00:00] iteration       30/     100 | consumed samples:         7680 | elapsed time per iteration (ms): 1100.0 | throughput per GPU (TFLOP/s/GPU): 400.1 | learning rate: 1.000000E-05 | global batch size:   256 | lm loss: 8.0E+00 | loss scale: 1.0 | grad norm: 1.500 |
 [2025-06-01 10:00:00] iteration       40/     100 | consumed samples:        10240 | elapsed time per iteration (ms): 5000.0 | throughput per GPU (TFLOP/s/GPU): 80.1 | learning rate: 1.000000E-05 | global batch size:   256 | lm loss: 7.0E+00 | loss scale: 1.0 | grad norm: 1.000 |
"""  # noqa: E501


@pytest.fixture(scope="module")
def planned() -> Plan:
    """8 GPUs, 16 sequences of 4,096 tokens: 65,536 tokens a step."""
    job = {
        "model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 1,
        "training": {"global_batch_size": 16, "seq_len": 4096, "stack": "torchtitan"},
        "search": {"dp_shard": [8], "micro_batch_size": [1], "zero_stage": [3], "recompute": ["full"]},
    }  # fmt: skip
    return plan(build_job(job, "the test's job"), top=1)


def test_torchtitan(planned: Plan) -> None:
    found = measurement_of(TITAN.splitlines(), planned)
    # tps counts a device's tokens: 65,536 / (8,192 · 8) is 1 s, and half the speed 2 s. Steps 20, 30 and 1,000 count.
    assert found.step_seconds.median == pytest.approx(1.0)
    assert found.step_seconds.p90 == pytest.approx(1.8)
    assert found.tokens_per_second == pytest.approx(65536)
    assert found.peak_memory == found.reserved_memory == pytest.approx((60.25 * 2**30,))
    assert found.losses == (12.2482, 9.5, 8.25, 7.0, 6.0)
    assert found.grad_norms == (2.5, 1.0, 0.5, 0.5)
    assert (found.steps, found.warmup, found.layout) == (1000, 10, planned.layout)
    assert found.versions == {"software": "torchtitan"}


def test_megatron(planned: Plan) -> None:
    found = measurement_of(MEGATRON.splitlines(), planned)
    # The median of 1.0, 1.1 and 5.0 s.
    assert found.step_seconds.median == pytest.approx(1.1)
    assert found.tokens_per_second == pytest.approx(65536 / 1.1)
    assert found.peak_memory == pytest.approx((2048.5 * 2**20, 1024 * 2**20))
    assert found.reserved_memory == pytest.approx((4096 * 2**20, 2048 * 2**20))
    assert found.losses == (10.71, 9.0, 8.0, 7.0)
    assert found.grad_norms == (5.5, 2.5, 1.5, 1.0)
    assert found.versions == {"software": "Megatron-LM"}


@pytest.mark.parametrize("text", [TITAN, MEGATRON])
def test_a_log_shorter_than_its_warm_up_counts_its_last_step(text: str, planned: Plan) -> None:
    found = measurement_of(text.splitlines(), planned, warmup=5000)
    last = 2.0 if text is TITAN else 5.0
    assert (found.step_seconds.median, found.step_seconds.p10) == pytest.approx((last, last))


def test_another_log_is_refused(planned: Plan) -> None:
    with pytest.raises(UserError, match=r"log 'x.txt' has no step in it: neither a line of torchtitan"):
        measurement_of(["Epoch 1: loss 3.0", "tps: 5"], planned, name="x.txt")


def test_the_command_writes_beside_the_plan(planned: Plan, tmp_path: Path) -> None:
    file = write_plan(planned, tmp_path / "plan.json")
    log = tmp_path / "log.txt"
    log.write_text(TITAN)
    app(["import-log", str(log), "--plan", str(file)], standalone_mode=False)
    written = json.loads((tmp_path / "measurement.json").read_text())
    assert written["step_seconds"]["median"] == pytest.approx(1.0)
    with pytest.raises(UserError, match="is the log itself"):
        app(["import-log", str(log), "--plan", str(file), "-o", str(log)], standalone_mode=False)
