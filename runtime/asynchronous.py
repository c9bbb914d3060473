"""Training without steps: replicas that push gradients to parameter servers, each at its own pace.

A run of n steps is n updates for each replica on average: n times the global batch in all, however many of them a
replica does. A replica goes through its own share of the data, so that a fast one begins its next epoch sooner.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from planner.plan import Plan
from runtime.data import Batches
from runtime.metrics import MetricsFile
from runtime.optimizer import clip_gradients
from runtime.parameter_server import Update
from runtime.record import Recorder
from runtime.server_client import ServerClient
from runtime.step import Run
from simulator.errors import UserError
from simulator.results import Updates


def train_asynchronously(run: Run, client: ServerClient, batches: Batches, recorder: Recorder, steps: int) -> None:
    """Compute gradients until the servers have enough; losses, times and staleness go to the recorder of every rank.

    Raises:
        UserError: a loss or a gradient norm is no number.
    """
    client.begin()
    # The first replica's parameters are everybody's before anybody changes them.
    dist.barrier()
    clock = 0
    while client.may_go_on():
        client.pull()
        loss = run.forward_backward(batches.load(clock))
        run.complete_gradients()
        total, norm = run.reduce(loss)
        clip_gradients(run.parameters(), norm, run.training.max_grad_norm)
        client.push(total.item(), norm.item())
        run.optimizer.zero_grad(set_to_none=True)
        clock += 1
    # Once to know that the servers have applied what this rank pushed, and again when that holds for all.
    client.pull()
    dist.barrier()
    client.pull()
    updates = _log(client, run.device)
    client.end()
    replicas = client.place.replicas
    for update in updates:
        if not math.isfinite(update.loss) or not math.isfinite(update.norm):
            raise UserError(
                f"training diverged at step {(len(updates) - 1) // replicas + 1} (loss {update.loss:g}, gradient norm "
                f"{update.norm:g}); lower training.learning_rate = {run.training.learning_rate:g}"
            )
    for step in range(steps):
        recorder.add(*whole_step(updates, replicas, step))
    recorder.updates = distribution(updates, replicas)


def _log(client: ServerClient, device: torch.device) -> list[Update]:
    """The first server's log, which rank 0 asks for, on all ranks."""
    rows: list[list[list[float]]] = [[]]
    if dist.get_rank() == 0:
        rows = [client.read_log().tolist()]
    dist.broadcast_object_list(rows, src=0, device=device)
    return [Update(int(r), loss, norm, int(x), int(s), seconds) for r, loss, norm, x, s, seconds in rows[0]]


def whole_step(updates: list[Update], replicas: int, step: int) -> tuple[float, float, float]:
    """Seconds, mean loss and root of the mean squared norm of a step: of as many updates as there are replicas."""
    mine = updates[step * replicas : (step + 1) * replicas]
    begin = updates[step * replicas - 1].seconds if step else 0.0
    loss = sum(update.loss for update in mine) / replicas
    norm = math.sqrt(sum(update.norm**2 for update in mine) / replicas)
    return mine[-1].seconds - begin, loss, norm


def distribution(updates: list[Update], replicas: int) -> Updates:
    """How stale updates were, and how many each replica did."""
    stale, lead = (Counter(getattr(update, name) for update in updates) for name in ("staleness", "lead"))
    done = Counter(update.replica for update in updates)
    return Updates(
        staleness=tuple(stale[n] for n in range(max(stale, default=-1) + 1)),
        lead=tuple(lead[n] for n in range(max(lead, default=-1) + 1)),
        by_replica=tuple(done[replica] for replica in range(replicas)),
    )


class UpdateNotes:
    """What the first server writes while replicas come and go: a line of metrics for every step, and progress."""

    def __init__(
        self, plan: Plan, path: Path | None, steps: int, progress: Callable[[int, int, float, float, float], None]
    ) -> None:
        self.replicas, self.steps, self.progress = plan.layout.dp_replicate, steps, progress
        self.file = None if path is None else MetricsFile(path, plan, torch.device("cpu"))

    def __call__(self, updates: list[Update]) -> None:
        step, left = divmod(len(updates), self.replicas)
        if left:
            return
        seconds, loss, norm = whole_step(updates, self.replicas, step - 1)
        if self.file is not None:
            last = updates[-self.replicas :]
            more = {name: [int(getattr(u, name)) for u in last] for name in ("replica", "staleness", "lead")}
            self.file.write(step, loss, norm, seconds, 0.0, **more)
        self.progress(step, self.steps, loss, norm, seconds)
