"""The training loop: batches in, steps done, what they took recorded."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from planner.plan import Plan
from runtime.data import Batches
from runtime.launchers import check_plan
from runtime.record import Recorder
from runtime.step import build_run
from runtime.weights import export_model, load_safetensors
from simulator.errors import UserError
from simulator.results import Measurement

Progress = Callable[[int, int, float, float, float], None]


def find_device() -> torch.device:
    """This rank's GPU, or the processor where torch sees no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def train(
    plan: Plan,
    steps: int,
    warmup: int,
    progress: Progress | None = None,
    weights: Path | None = None,
    export: Path | None = None,
) -> Measurement:
    """Train the plan's model with the plan's layout, and measure it.

    The process group must be initialised, with as many ranks as the layout has. Every rank returns the same
    measurement.

    Args:
        steps: optimizer steps in all; the first `warmup` of them are left out of the step times.
        weights: a folder of safetensors to begin with, instead of random weights.
        export: a folder to write the trained model to, as safetensors.
        progress: called after every step with (steps done, steps, loss, gradient norm, seconds).

    Raises:
        UserError: the layout cannot run, or there is nothing to train on.
    """
    check_plan(plan, dist.get_world_size(), steps, warmup)
    training = plan.job.training
    device = find_device()
    batches = Batches(plan.job, plan.layout, dist.get_rank(), device)
    recorder = Recorder(device)
    run = build_run(plan.job, plan.layout, device)
    if weights is not None:
        load_safetensors(run.stages, weights)
    for step in range(steps):
        begin = time.perf_counter()
        loss, norm = run.step(batches.load(step))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - begin
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise UserError(
                f"training diverged at step {step + 1} (loss {loss:g}, gradient norm {norm:g}); "
                f"lower training.learning_rate = {training.learning_rate:g}"
            )
        recorder.add(seconds, loss, norm)
        if progress is not None:
            progress(step + 1, steps, loss, norm, seconds)
    if export is not None:
        export_model(run.stages, plan.layout, export)
    return recorder.measurement(plan, warmup)
