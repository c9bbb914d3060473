"""The training loop: batches in, steps done, what they took recorded."""

from __future__ import annotations

import contextlib
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
from runtime.hf_config import hf_config
from runtime.metrics import MetricsFile
from runtime.profiler import StepProfiler
from runtime.record import Recorder
from runtime.settings import Settings
from runtime.step import Run, build_run
from runtime.weights import export_model, load_safetensors
from simulator.errors import UserError
from simulator.results import Measurement

Progress = Callable[[int, int, float, float, float], None]
Note = Callable[[str], None]


def find_device() -> torch.device:
    """This rank's GPU, or the processor where torch sees no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def train(plan: Plan, settings: Settings, progress: Progress | None = None, note: Note | None = None) -> Measurement:
    """Train the plan's model with the plan's layout, and measure it.

    The process group must be initialised, with as many ranks as the layout has. Every rank returns the same
    measurement. The time of checkpoints is not in the step times.

    Args:
        progress: called after every step with (steps done, steps, loss, gradient norm, seconds).
        note: called with what a user should know, in a sentence: where a run goes on from, why it stops.

    Raises:
        UserError: the layout cannot run, there is nothing to train on, or a folder cannot be read or written.
    """
    check_plan(plan, dist.get_world_size())
    settings.check()
    if settings.export is not None:
        # What cannot be written is better known now than after the last step.
        hf_config(plan.job.model)
    device = find_device()
    batches = Batches(plan.job, plan.layout, dist.get_rank(), device)
    run = build_run(plan.job, plan.layout, device)
    checkpointer = None if settings.checkpoint is None else Checkpointer(settings.checkpoint, settings.every, note)
    before = checkpointer.restore(plan, run, settings.steps) if checkpointer else None
    if before is None and settings.weights is not None:
        load_safetensors(run.stages, settings.weights)
    measured = before
    if before is None or before.steps < settings.steps:
        measured = _run_steps(plan, settings, run, batches, before, checkpointer, progress)
    if checkpointer:
        checkpointer.finish()
    assert measured is not None
    if settings.export is not None and measured.steps >= settings.steps:
        export_model(run.stages, plan.layout, settings.export)
    return measured


def _run_steps(
    plan: Plan,
    settings: Settings,
    run: Run,
    batches: Batches,
    before: Measurement | None,
    checkpointer: Checkpointer | None,
    progress: Progress | None,
) -> Measurement:
    """The steps that are left of a run that was measured `before` this, if it was."""
    recorder, begin = Recorder(run.device), 0
    if before is not None:
        recorder.go_on(before)
        begin = before.steps
    profiler = None if settings.profile is None else StepProfiler(settings.profile, settings.steps - 1, run.device)
    with contextlib.ExitStack() as opened:
        file = None
        if settings.metrics is not None and dist.get_rank() == 0:
            file = opened.enter_context(MetricsFile(settings.metrics, plan, run.device, begin))
        for step in range(begin, settings.steps):
            with contextlib.nullcontext() if profiler is None else profiler.around(step):
                loss, norm, seconds, data_seconds = timed_step(run, batches, step)
            if not math.isfinite(loss) or not math.isfinite(norm):
                # On all ranks alike. The last save is what another learning rate can go on from.
                if checkpointer:
                    checkpointer.wait()
                raise _diverged(step, loss, norm, plan.job.training.learning_rate)
            recorder.add(seconds, loss, norm)
            if file is not None:
                file.write(step + 1, loss, norm, seconds, data_seconds)
            if progress is not None:
                progress(step + 1, settings.steps, loss, norm, seconds)
            if checkpointer and checkpointer.after_step(
                step + 1, settings.steps, lambda: recorder.measurement(plan, settings.warmup)
            ):
                break
        else:
            if profiler is not None:
                profiler.write_timeline(plan, recorder.seconds[-1])
    return recorder.measurement(plan, settings.warmup, profiled=profiler is not None)


def _diverged(step: int, loss: float, norm: float, learning_rate: float) -> UserError:
    return UserError(
        f"training diverged at step {step + 1} (loss {loss:g}, gradient norm {norm:g}); "
        f"lower training.learning_rate = {learning_rate:g}"
    )


def timed_step(run: Run, batches: Batches, step: int) -> tuple[float, float, float, float]:
    """Loss and gradient norm of one step, and its seconds: from end to end, and of loading the batch."""
    begin = time.perf_counter()
    batch = batches.load(step)
    loaded = time.perf_counter()
    loss, norm = run.step(batch)
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return loss, norm, time.perf_counter() - begin, loaded - begin
