"""Checkpoints with torch.distributed.checkpoint: saved in the background, found again after a crash, loaded into any
layout.

A checkpoint is a flat dictionary of tensors under the names of the whole model, so it does not know how they were cut:

    model.layers.3.attention.wq.weight              a parameter, or a buffer that is kept
    optimizer.layers.3.attention.wq.weight.exp_avg  what the optimizer keeps for it, cut as the parameter is
    rng.cpu.5                                       the random state of rank 5
    replica.1.model ...  replica.1.optimizer ...    of the second replica, where replicas differ (local SGD)
    sync.outer.0  sync.outer_momentum.0             DiLoCo's, of rank 0 of every replica

Each rank writes and reads its own parts; torch finds out from DTensor's placements which parts these are, and a tensor
that several ranks hold is written once. When a checkpoint is complete, and what else is in it: checkpoint_folder.py.
"""

from __future__ import annotations

import datetime
import platform
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from planner.plan import Plan
from runtime import checkpoint_folder
from runtime.checkpoint_folder import Checkpoint, cuts_after, damaged, find_checkpoint, part_of
from runtime.local_sgd import LocalSgd
from runtime.model import canonical_name, named_weights
from runtime.replicas import place_of
from runtime.server_client import Synchronous
from runtime.sharding import Cut
from runtime.step import Run
from runtime.sync import Synchroniser
from simulator.errors import UserError
from simulator.results import Measurement

# A save of many gigabytes onto a slow disk is one collective for the ranks that are done before.
SAVE_TIMEOUT = datetime.timedelta(hours=2)
# Called with a sentence that the user should read.
Note = Callable[[str], None]


class Checkpointer:
    """Saves a run at intervals, at its end and when a scheduler warns it with SIGTERM.

    Every rank has one and calls the same methods in the same order. The folder must be one that all ranks see.

    Args:
        every: steps between two checkpoints.
        note: told what the user should know.
    """

    def __init__(self, folder: Path, every: int, note: Note | None = None) -> None:
        self.folder, self.every = folder, every
        self.note: Note = note or (lambda _: None)
        # Of its own: torch writes in a thread, whose collectives must not mix with those of the training.
        self.group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT)
        self.warned = threading.Event()
        self.saved = 0
        self._pending: Future[Any] | None = None

    def restore(self, plan: Plan, run: Run, sync: Synchroniser, steps: int) -> Measurement | None:
        """Load the newest complete checkpoint into a run that was just built; None where there is none.

        Returns what was measured up to it; its number of steps is where to go on, if it is less than `steps`. From
        here on SIGTERM means to save and stop after the step.

        Raises:
            UserError: the folder cannot be used, or its checkpoint is damaged or another run's. On all ranks alike.
        """
        self.plan, self.run, self.sync = plan, run, sync
        self.cuts: tuple[Cut, ...] = (Cut(0, plan.layout.dp),)
        signal.signal(signal.SIGTERM, lambda *_: self.warned.set())
        self.tensors = named_tensors(run.stages)
        allocate_state(run.optimizer)
        found = self._agree(lambda: self._look(plan))
        if found is None:
            return None
        path, checkpoint, measured = found
        same = checkpoint.layout == plan.layout and checkpoint.device == run.device.type
        apart = checkpoint.layout.sync == "local_sgd"
        if isinstance(sync, LocalSgd):
            sync.resumed = apart
        state = self._state(with_rng=same, apart=apart)
        try:
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), process_group=self.group)
        except CheckpointException as error:
            raise damaged(path, _reason(error)) from None
        if same:
            self._set_rng(state)
        else:
            # Another layout has other ranks; so that a run that goes on twice does the same twice.
            torch.manual_seed(hash((plan.job.training.seed, checkpoint.step, dist.get_rank())))
        self.saved = checkpoint.step
        self.cuts = cuts_after(checkpoint, plan.layout.dp)
        changed = checkpoint_folder.changes(checkpoint, plan)
        if checkpoint.step >= steps:
            self.note(f"'{path}' has {checkpoint.step} steps already; raise --steps = {steps} to go on from there")
        else:
            self.note("; ".join((f"going on from '{path}', to begin anew name another folder", *changed)))
        return measured

    def after_step(self, step: int, steps: int, measure: Callable[[], Measurement]) -> bool:
        """Save if it is time to. Returns whether to stop here, because of SIGTERM.

        Args:
            step: steps done, of `steps` in all.
            measure: what was measured so far; called on all ranks or on none.
        """
        stop = self._anyone(self.warned.is_set() or self._failed())
        if stop or step == steps or step % self.every == 0:
            self.save(step, measure())
        if stop and step < steps:
            self.wait()
            self.note(f"stopped by SIGTERM; {step} of {steps} steps are saved, and the same command goes on from there")
        return stop

    def save(self, step: int, measured: Measurement) -> None:
        """Begin to save, when the save before this one is complete. Returns when the tensors have been copied.

        Raises:
            UserError: the save before this one failed. On all ranks alike.
        """
        self.wait()
        if step == self.saved:
            return
        job = self.plan.job
        versions = {"torch": torch.__version__, "python": platform.python_version()}
        info = Checkpoint(step, job.model, job.training, self.plan.layout, self.run.device.type, versions, self.cuts)
        if isinstance(self.sync, Synchronous):
            self.sync.client.load_optimizer()
        apart = isinstance(self.sync, LocalSgd)
        writer = _Writer(part_of(self.folder, step), info, measured)
        self._pending = dcp.async_save(
            self._state(with_rng=True, apart=apart), storage_writer=writer, process_group=self.group
        )
        self.saved = step

    def wait(self) -> None:
        """Wait until the save that was begun last is complete. Raises UserError if it failed, on all ranks alike."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except CheckpointException as error:
            raise UserError(f"checkpoint folder '{self.folder}' cannot be written: {_reason(error)}") from None

    def finish(self) -> None:
        """Wait until everything is on disk. From here on SIGTERM ends the process again."""
        self.wait()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _look(self, plan: Plan) -> tuple[Path, Checkpoint, Measurement] | None:
        found = find_checkpoint(self.folder, plan.job, plan.layout)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint_folder.remove_parts(self.folder)
        except OSError as error:
            raise UserError(f"checkpoint folder '{self.folder}' cannot be written: {error.strerror}") from None
        return found

    def _agree(self, look: Callable[[], Any]) -> Any:
        """What rank 0 finds, or the error that it meets, on all ranks."""
        said: list[Any] = [None, None]
        if dist.get_rank() == 0:
            try:
                said[0] = look()
            except UserError as error:
                said[1] = str(error)
        dist.broadcast_object_list(said, src=0, group=self.group)
        if said[1] is not None:
            raise UserError(said[1])
        return said[0]

    def _anyone(self, mine: bool) -> bool:
        """Whether it is so on any rank. Not over `group`, where a save may be under way."""
        flag = torch.tensor(float(mine), device=self.run.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    def _failed(self) -> bool:
        pending = self._pending
        return pending is not None and pending.done() and pending.exception() is not None

    def _state(self, with_rng: bool, apart: bool) -> dict[str, Tensor]:
        """The tensors of this rank, not copied. `apart`: replicas differ, so that each has names of its own."""
        layout, prefix = self.plan.layout, ""
        place = place_of(layout, dist.get_rank())
        if apart and place.replica:
            prefix = f"replica.{place.replica}."
        state = {f"{prefix}model.{name}": tensor.detach() for name, tensor in self.tensors.items()}
        kept = self.run.optimizer.state
        for name, tensor in self.tensors.items():
            for key, value in kept.get(tensor, {}).items():
                if isinstance(value, Tensor):
                    state[f"{prefix}optimizer.{name}.{key}"] = value
        if apart and isinstance(self.sync, LocalSgd):
            state |= {f"sync.{key}.{place.rank}": value for key, value in self.sync.state().items()}
        return state | (self._rng() if with_rng else {})

    def _rng(self) -> dict[str, Tensor]:
        found = {f"rng.cpu.{dist.get_rank()}": torch.get_rng_state()}
        if self.run.device.type == "cuda":
            found[f"rng.cuda.{dist.get_rank()}"] = torch.cuda.get_rng_state(self.run.device)
        return found

    def _set_rng(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state[f"rng.cpu.{dist.get_rank()}"])
        if self.run.device.type == "cuda":
            torch.cuda.set_rng_state(state[f"rng.cuda.{dist.get_rank()}"], self.run.device)


class _Writer(dcp.FileSystemWriter):
    """Torch's writer, which names the checkpoint when all ranks have written theirs."""

    def __init__(self, part: Path, info: Checkpoint, measured: Measurement) -> None:
        super().__init__(part, sync_files=True)
        self.part, self.info, self.measured = part, info, measured

    def write_data(self, plan: Any, planner: Any) -> Any:
        """A full disk shows as torch's complaint about its own archive; what the system said is what led to it."""
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from None

    def finish(self, metadata: Any, results: Any) -> None:
        """Called on rank 0 alone; what goes wrong here reaches all ranks."""
        super().finish(metadata, results)
        checkpoint_folder.complete(self.part, self.info, self.measured)


def named_tensors(stages: Iterable[nn.Module]) -> dict[str, Tensor]:
    """Parameters and the buffers that are kept, of all stages on this rank, by their names in the whole model.

    Before the first step, because FSDP shows its shards only between steps, and these are what the optimizer knows.
    """
    found: dict[str, Tensor] = {}
    for stage in stages:
        kept = {canonical_name(name) for name in stage.state_dict()}
        buffers = ((canonical_name(name), buffer) for name, buffer in stage.named_buffers())
        mine = dict(named_weights(stage)) | {name: buffer for name, buffer in buffers if name in kept}
        assert not mine.keys() & found.keys(), "two stages of a rank hold the same name"
        found |= mine
    return found


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Have the optimizer make its state, as it was before the first step, for a checkpoint to be loaded into.

    Optimizers make it in their first step: this is one at a learning rate of zero, where gradients are zero.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    rates = [group["lr"] for group in optimizer.param_groups]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def _reason(error: CheckpointException) -> str:
    """The first rank's problem in one line."""
    problem = next(iter(error.failures.values()))[0]
    if isinstance(problem, OSError) and problem.strerror:
        return problem.strerror
    lines = str(problem).strip().splitlines()
    return lines[0] if lines else type(problem).__name__
