"""The training loop: batches in, steps done, what they took recorded."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from planner.plan import Plan
from runtime.checkpoint import Checkpointer
from runtime.data import Batches
from runtime.here import check_plan
from runtime.record import Recorder
from runtime.step import build_run
from simulator.errors import UserError
from simulator.results import Measurement

Progress = Callable[[int, int, float, float, float], None]


def find_device() -> torch.device:
    """This rank's GPU, or the processor where torch sees no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def train(
    plan: Plan, steps: int, warmup: int, progress: Progress | None = None, checkpointer: Checkpointer | None = None
) -> Measurement:
    """Train the plan's model with the plan's layout, and measure it.

    The process group must be initialised, with as many ranks as the layout has. Every rank returns the same
    measurement.

    Args:
        steps: optimizer steps in all; the first `warmup` of them are left out of the step times.
        progress: called after every step with (steps done, steps, loss, gradient norm, seconds).
        checkpointer: where to go on from, and when to save and stop. Its time is not in the step times.

    Raises:
        UserError: the layout cannot run, there is nothing to train on, or checkpoints cannot be read or written.
    """
    check_plan(plan, dist.get_world_size(), steps, warmup)
    training = plan.job.training
    device = find_device()
    batches = Batches(plan.job, plan.layout, dist.get_rank(), device)
    recorder = Recorder(device)
    run = build_run(plan.job, plan.layout, device)
    before = checkpointer.restore(plan, run, steps) if checkpointer else None
    if checkpointer and before:
        if before.steps >= steps:
            checkpointer.finish()
            return before
        recorder.go_on(before)
    for step in range(before.steps if before else 0, steps):
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
        if checkpointer and checkpointer.after_step(step + 1, steps, lambda: recorder.measurement(plan, warmup)):
            break
    if checkpointer:
        checkpointer.finish()
    return recorder.measurement(plan, warmup)
