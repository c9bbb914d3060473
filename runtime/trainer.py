"""The training loop: batches in, steps done, what they took recorded."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from planner.plan import Plan
from runtime.checkpoint import Checkpointer
from runtime.data import Batches
from runtime.here import check_plan, check_profile
from runtime.metrics import MetricsFile
from runtime.profiler import StepProfiler
from runtime.record import Recorder
from runtime.step import Run, build_run
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
    checkpointer: Checkpointer | None = None,
    *,
    metrics: Path | None = None,
    profile: Path | None = None,
) -> Measurement:
    """Train the plan's model with the plan's layout, and measure it.

    The process group must be initialised, with as many ranks as the layout has. Every rank returns the same
    measurement.

    Args:
        steps: optimizer steps in all; the first `warmup` of them are left out of the step times.
        progress: called after every step with (steps done, steps, loss, gradient norm, seconds).
        checkpointer: where to go on from, and when to save and stop. Its time is not in the step times.
        metrics: where rank 0 writes a line of metrics after every step.
        profile: a folder for traces of the last step, which then is left out of the step times too.

    Raises:
        UserError: the layout cannot run, there is nothing to train on, or checkpoints cannot be read or written.
    """
    check_plan(plan, dist.get_world_size(), steps, warmup)
    check_profile(profile, steps, warmup)
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
    profiler = None if profile is None else StepProfiler(profile, steps - 1, device)
    writes = dist.get_rank() == 0
    with MetricsFile(metrics, plan, device) if metrics is not None and writes else contextlib.nullcontext() as file:
        for step in range(before.steps if before else 0, steps):
            with contextlib.nullcontext() if profiler is None else profiler.around(step):
                loss, norm, seconds, data_seconds = timed_step(run, batches, step)
            if not math.isfinite(loss) or not math.isfinite(norm):
                raise UserError(
                    f"training diverged at step {step + 1} (loss {loss:g}, gradient norm {norm:g}); "
                    f"lower training.learning_rate = {training.learning_rate:g}"
                )
            recorder.add(seconds, loss, norm)
            if file is not None:
                file.write(step + 1, loss, norm, seconds, data_seconds)
            if progress is not None:
                progress(step + 1, steps, loss, norm, seconds)
            if checkpointer and checkpointer.after_step(step + 1, steps, lambda: recorder.measurement(plan, warmup)):
                break
    if checkpointer:
        checkpointer.finish()
    if profiler is not None:
        profiler.write_timeline(plan, recorder.seconds[-1])
    return recorder.measurement(plan, warmup, profiled=profiler is not None)


def timed_step(run: Run, batches: Batches, step: int) -> tuple[float, float, float, float]:
    """Loss and gradient norm of one step, and its seconds: from end to end, and of loading the batch."""
    begin = time.perf_counter()
    batch = batches.load(step)
    loaded = time.perf_counter()
    loss, norm = run.step(batch)
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return loss, norm, time.perf_counter() - begin, loaded - begin
