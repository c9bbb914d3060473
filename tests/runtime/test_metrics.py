"""metrics.jsonl: what a line says, and that lines survive what ends a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import LLAMA, tiny_plan

from planner.plan import write_plan
from runtime.here import run_here
from runtime.metrics import MetricsFile
from simulator.errors import UserError
from simulator.layout import Layout

CPU = torch.device("cpu")
PLAN = tiny_plan(Layout(dp_replicate=2, micro_batch_size=4))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_a_step(tmp_path: Path) -> None:
    path = tmp_path / "out" / "metrics.jsonl"
    with MetricsFile(path, PLAN, CPU) as file:
        file.write(3, loss=2.5, grad_norm=0.5, seconds=0.5, data_seconds=0.1)
        # On disk before the run ends.
        (line,) = lines(path)
    # 8 sequences of 32 tokens on two processors.
    assert line["throughput(tps)"] == 256
    flops = LLAMA.flops_per_token(32)
    assert line["tflops"] == pytest.approx(256 * flops / 1e12)
    assert line["mfu(%)"] == pytest.approx(100 * 256 * flops / 1e11)
    assert (line["step"], line["loss_metrics/global_avg_loss"], line["grad_norm"], line["lr"]) == (3, 2.5, 0.5, 1e-2)
    assert line["ntokens_seen"] == 3 * 256
    assert line["time_metrics/end_to_end(s)"] == 0.5
    assert (line["time_metrics/data_loading(s)"], line["time_metrics/data_loading(%)"]) == (0.1, 20.0)
    assert 0.05 < line["memory/max_active(GiB)"] <= line["memory/max_reserved(GiB)"] < 4


def test_a_run_that_goes_on_keeps_what_its_checkpoint_holds(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsFile(path, PLAN, CPU) as file:
        for step in range(1, 6):
            file.write(step, float(step), 1.0, 0.5, 0.1)
    path.write_text(path.read_text() + '{"step": 6, "loss_met')
    with MetricsFile(path, PLAN, CPU, done=3) as file:
        file.write(4, 40.0, 1.0, 0.5, 0.1)
    assert [(one["step"], one["loss_metrics/global_avg_loss"]) for one in lines(path)] == [
        (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)
    ]  # fmt: skip
    with MetricsFile(path, PLAN, CPU):
        pass
    assert lines(path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write '.*file/metrics.jsonl'"):
        MetricsFile(tmp_path / "file" / "metrics.jsonl", PLAN, CPU)


def test_a_run_that_diverges_leaves_the_steps_before(text_folder: Path, tmp_path: Path) -> None:
    wild = tiny_plan(Layout(), data=str(text_folder), learning_rate=1e30, optimizer="sgd")
    with pytest.raises(UserError, match="diverged at step 2"):
        run_here(write_plan(wild, tmp_path / "plan.json"), tmp_path / "m.json", timeout=120)
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line["step"] == 1 and line["loss_metrics/global_avg_loss"] == pytest.approx(5.5, abs=0.3)
