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
from runtime.asynchronous import train_asynchronously
from runtime.checkpoint import Checkpointer
from runtime.data import Batches
from runtime.here import check_plan, check_settings
from runtime.hf_config import hf_config
from runtime.host_allocator import counted_steps, give_back_freed, keep_freed, short_of_memory, trim
from runtime.link import Link
from runtime.metrics import MetricsFile
from runtime.profiler import StepProfiler
from runtime.record import Recorder
from runtime.server_client import ServerClient, Synchronous
from runtime.settings import Settings
from runtime.step import Run
from runtime.sync import Synchroniser, build_synchronised
from runtime.weights import export_model, load_safetensors
from simulator.errors import UserError
from simulator.results import Measurement, Sharding, Updates

Progress = Callable[[int, int, float, float, float], None]
Note = Callable[[str], None]


def find_device() -> torch.device:
    """This rank's GPU, or the processor where torch sees no GPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def train(
    plan: Plan,
    settings: Settings,
    progress: Progress | None = None,
    note: Note | None = None,
    link: Link | None = None,
) -> Measurement:
    """Train the plan's model with the plan's layout, and measure it.

    The process group must be initialised, with as many ranks as the layout has. Every rank returns the same
    measurement. The time of checkpoints is not in the step times.

    Args:
        progress: called after every step with (steps done, steps, loss, gradient norm, seconds).
        note: called with what a user should know, in a sentence: where a run goes on from, why it stops.
        link: to the parameter servers, where the layout has some.

    Raises:
        UserError: the layout cannot run, there is nothing to train on, or a folder cannot be read or written.
    """
    check_plan(plan, dist.get_world_size() + plan.layout.servers)
    settings.check()
    check_settings(plan, settings)
    if settings.export is not None:
        # What cannot be written is better known now than after the last step.
        hf_config(plan.job.model)
    device = find_device()
    asynchronous = plan.layout.sync == "parameter_server" and plan.layout.staleness != 0
    counted = 0 if device.type == "cuda" or asynchronous else counted_steps(settings.warmup)
    if counted and not give_back_freed():
        counted = 0
    batches = Batches(plan.job, plan.layout, dist.get_rank(), device)
    run, sync = build_synchronised(plan.job, plan.layout, device, link)
    run.slowdown = settings.slowdowns.get(dist.get_rank(), 1.0)
    recorder = Recorder(device)
    recorder.counted_steps = counted
    if isinstance(sync, ServerClient):
        if settings.weights is not None:
            load_safetensors(run.stages, settings.weights)
        recorder.sharding = _sharding(batches, note)
        train_asynchronously(run, sync, batches, recorder, settings.steps)
        if settings.export is not None:
            export_model(run.stages, plan.layout, settings.export)
        return recorder.measurement(plan, settings.warmup)
    checkpointer = None if settings.checkpoint is None else Checkpointer(settings.checkpoint, settings.every, note)
    before = checkpointer.restore(plan, run, sync, settings.steps) if checkpointer else None
    if checkpointer:
        batches.cut_anew(checkpointer.cuts)
    if before is None and settings.weights is not None:
        load_safetensors(run.stages, settings.weights)
    recorder.sharding = _sharding(batches, note)
    sync.begin(0 if before is None else before.steps)
    measured = before
    if before is None or before.steps < settings.steps:
        measured = _run_steps(plan, settings, run, sync, batches, recorder, before, checkpointer, progress)
    if checkpointer:
        checkpointer.finish()
    sync.finish()
    assert measured is not None
    if settings.export is not None and measured.steps >= settings.steps:
        export_model(run.stages, plan.layout, settings.export)
    return measured


def _sharding(batches: Batches, note: Note | None) -> Sharding | None:
    """How an epoch is cut; that it is uneven is said too."""
    shares = batches.shares()
    if shares is None:
        return None
    if note is not None and shares.imbalance > 1e-9:
        note(
            f"data.sharding = '{batches.training.sharding}': shares of {min(shares.sizes):.6g} to "
            f"{max(shares.sizes):.6g} samples, the largest {shares.imbalance:.1%} above the mean; of each epoch "
            f"{shares.dropped} samples are left out and {shares.repeated} seen twice"
        )
    return Sharding(shares.sizes, shares.imbalance, shares.dropped, shares.repeated)


def _run_steps(
    plan: Plan,
    settings: Settings,
    run: Run,
    sync: Synchroniser,
    batches: Batches,
    recorder: Recorder,
    before: Measurement | None,
    checkpointer: Checkpointer | None,
    progress: Progress | None,
) -> Measurement:
    """The steps that are left of a run that was measured `before` this, if it was."""
    begin, together = 0, isinstance(sync, Synchronous)
    # Servers that wait for all: no update is stale.
    more = {"staleness": [0] * plan.layout.dp_replicate} if together else {}
    if before is not None:
        recorder.go_on(before)
        begin = before.steps
    profiler = None if settings.profile is None else StepProfiler(settings.profile, settings.steps - 1, run.device)
    keeps = False
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
            if together:
                count = plan.layout.dp_replicate
                recorder.updates = Updates((count * (step + 1),), (count * (step + 1),), (step + 1,) * count)
            if file is not None:
                file.write(step + 1, loss, norm, seconds, data_seconds, **more)
            if progress is not None:
                progress(step + 1, settings.steps, loss, norm, seconds)
            if checkpointer and checkpointer.after_step(
                step + 1, settings.steps, lambda: recorder.measurement(plan, settings.warmup)
            ):
                break
            if step + 1 - begin == recorder.counted_steps:
                recorder.count_memory()
                keeps = keep_freed()
            if keeps and short_of_memory():
                # Slower, but alive.
                keeps = not give_back_freed()
                trim()
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
