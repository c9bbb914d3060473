"""The checkpoints in a folder: which are complete, what they hold, and whether a plan can go on with one.

    DIR/step-00000020/        complete: it got this name by a rename when everything in it was on disk
    DIR/step-00000030.part/   being written, or what a crash left of it; never read, removed by the next run

Nothing here imports torch: the launcher looks at the folder before it starts a process.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from planner.plan import Plan
from runtime.sharding import Cut
from simulator.errors import UserError
from simulator.files import STRICT, plain, read_json, to_dataclass
from simulator.job import Job, Training
from simulator.layout import Layout
from simulator.model import ModelSpec
from simulator.results import Measurement

T = TypeVar("T")

VERSION = 1
INFO, MEASUREMENT = "checkpoint.json", "measurement.json"
# Complete checkpoints that are kept: the newest, and its predecessor.
KEPT = 2
_COMPLETE = re.compile(r"step-(\d{8,})")
_PART = ".part"
# What must stay for a run to be the same run. The others may change: a lower learning_rate after a divergence, another
# precision, data that has moved.
_FIXED = ("optimizer", "global_batch_size", "seq_len", "seed", "peft", "sharding", "remainder")
# A file system's own folder, on a disk that holds nothing else.
_NOBODYS = ("lost+found",)


@dataclass(frozen=True)
class Checkpoint:
    """checkpoint.json: what was trained, for how many steps, and the layout and device that it was saved with; `cuts`
    are the numbers of replicas among which samples were cut on the way."""

    step: int
    model: ModelSpec
    training: Training
    layout: Layout
    device: str
    versions: dict[str, str]
    cuts: tuple[Cut, ...] = ()
    version: int = VERSION

    __pydantic_config__ = STRICT


def complete_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest first; none where there is no such folder."""
    found = [path for path in folder.iterdir() if _COMPLETE.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def find_checkpoint(
    folder: Path, job: Job, layout: Layout | None = None
) -> tuple[Path, Checkpoint, Measurement] | None:
    """The newest complete checkpoint with what was measured up to it; None where training is to begin.

    Raises:
        UserError: the folder holds something else, its newest checkpoint is damaged, or it is another run's.
    """
    try:
        found = complete_checkpoints(folder)
        if not found:
            check_unused(folder)
            return None
    except OSError as error:
        raise UserError(f"checkpoint folder '{folder}' cannot be read: {error.strerror}") from None
    path = found[-1]
    try:
        checkpoint = _read(Checkpoint, path / INFO)
        measured = _read(Measurement, path / MEASUREMENT)
    except UserError as error:
        raise damaged(path, str(error)) from None
    if not checkpoint.step == _step(path) == measured.steps == len(measured.losses) == len(measured.grad_norms):
        raise damaged(path, f"step = {checkpoint.step} and {measured.steps} measured steps are not its name's")
    _check_same_run(path, checkpoint, job)
    if layout is not None:
        _check_same_replicas(path, checkpoint.layout, layout)
    return path, checkpoint, measured


def _read(kind: type[T], path: Path) -> T:
    data = read_json(path, "file")
    if data.get("version") != VERSION:
        raise UserError(f"'{path.name}' has version = {data.get('version')!r}, not {VERSION}")
    return to_dataclass(kind, data, f"file '{path.name}'")


def damaged(path: Path, reason: str) -> UserError:
    """What to say of a complete checkpoint that cannot be read."""
    older = [other for other in complete_checkpoints(path.parent) if other.name < path.name]
    advice = f"; remove it to go on from '{older[-1].name}'" if older else "; name another folder"
    return UserError(f"checkpoint '{path}' is no checkpoint of layoutwise or is damaged: {reason}{advice}")


def check_unused(folder: Path) -> None:
    """Raises UserError where a folder without checkpoints is not empty, is no folder, or cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"checkpoint folder '{folder}' is a file; name a folder")
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in names if not _is_part(name) and not name.startswith(".") and name not in _NOBODYS]
    if others:
        raise UserError(f"checkpoint folder '{folder}' holds other things, like '{others[0]}'; name a new folder")
    check_can_write(folder)


def check_can_write(folder: Path) -> None:
    """Raises UserError where checkpoints cannot be made."""
    existing = next((p for p in (folder.absolute(), *folder.absolute().parents) if p.exists()), Path("/"))
    if not existing.is_dir():
        raise UserError(f"checkpoint folder '{folder}' cannot be made: '{existing}' is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"checkpoint folder '{folder}' cannot be written: no permission in '{existing}'")


def _check_same_run(path: Path, saved: Checkpoint, job: Job) -> None:
    pairs = [
        (f"model.{f.name}", getattr(saved.model, f.name), getattr(job.model, f.name))
        for f in dataclasses.fields(ModelSpec)
        if f.name != "name"
    ]
    pairs += [(f"training.{name}", getattr(saved.training, name), getattr(job.training, name)) for name in _FIXED]
    for key, before, now in pairs:
        if before != now:
            raise UserError(
                f"checkpoint '{path}' was trained with {key} = {before!r}, but the plan has {now!r}; "
                "name another folder, or plan with what it was trained with"
            )


def _check_same_replicas(path: Path, saved: Layout, now: Layout) -> None:
    """Local SGD leaves every replica with parameters and a state of its own, which nobody else can go on from."""
    if saved.sync == "local_sgd" and saved != now:
        raise UserError(
            f"checkpoint '{path}' holds {saved.dp_replicate} replicas of local SGD, which differ; go on with its "
            f"layout '{saved.short()}', or begin with --weights from what it exports"
        )


def cuts_after(saved: Checkpoint, replicas: int) -> tuple[Cut, ...]:
    """The cuts of a run that goes on with so many replicas."""
    cuts = saved.cuts or (Cut(0, saved.layout.dp),)
    if cuts[-1].replicas == replicas:
        return cuts
    return (*(cut for cut in cuts if cut.step < saved.step), Cut(saved.step, replicas))


def changes(saved: Checkpoint, plan: Plan) -> list[str]:
    """What is not as it was when the checkpoint was saved, and need not be."""
    found = []
    if saved.layout != plan.layout:
        found.append(f"the layout was '{saved.layout.short()}'")
    for field in dataclasses.fields(Training):
        before, now = getattr(saved.training, field.name), getattr(plan.job.training, field.name)
        if before != now:
            found.append(f"{field.name} was {before!r} and is {now!r}")
    return found


def part_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is written before it is complete."""
    return folder / f"step-{step:08d}{_PART}"


def complete(part: Path, checkpoint: Checkpoint, measured: Measurement, kept: int = KEPT) -> Path:
    """Make what was written the newest checkpoint, and remove the oldest beyond `kept`.

    Everything is on disk before it gets its name, and nothing is removed before the name is. Raises OSError.
    """
    for name, data in ((INFO, checkpoint), (MEASUREMENT, measured)):
        (part / name).write_text(json.dumps(plain(data), indent=2) + "\n", encoding="utf-8")
    for path in (*part.iterdir(), part):
        _sync(path)
    path = part.with_suffix("")
    part.rename(path)
    _sync(path.parent)
    for old in complete_checkpoints(path.parent)[:-kept]:
        # Under its own name a half-removed checkpoint would look complete.
        # What cannot be removed now (a network file system holds open files) the next run removes.
        shutil.rmtree(old.rename(old.with_name(old.name + _PART)), ignore_errors=True)
    return path


def remove_parts(folder: Path) -> None:
    """Remove what crashes left behind. Raises OSError."""
    for path in folder.iterdir():
        if _is_part(path.name):
            shutil.rmtree(path)


def _is_part(name: str) -> bool:
    return name.endswith(_PART) and _COMPLETE.fullmatch(name.removesuffix(_PART)) is not None


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, on disk when this returns (fsync(2))."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
