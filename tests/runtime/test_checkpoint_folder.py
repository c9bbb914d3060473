"""Folders that no run can go on from are refused in one sentence; a checkpoint is there as a whole or not at all."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_jobs import GPT, LLAMA, tiny_plan
from torch import nn

from planner.plan import Plan, write_plan
from runtime import checkpoint_folder, here
from runtime.checkpoint import allocate_state, named_tensors
from runtime.checkpoint_folder import Checkpoint, complete, complete_checkpoints, find_checkpoint, part_of, remove_parts
from runtime.here import run_here
from runtime.model import canonical_name
from runtime.settings import Settings
from simulator.errors import UserError
from simulator.layout import Layout
from simulator.results import Measurement, Quantiles

PLAN = tiny_plan(Layout(micro_batch_size=4))


def save(folder: Path, step: int, plan: Plan = PLAN) -> Path:
    """A complete checkpoint without tensors."""
    part = part_of(folder, step)
    part.mkdir(parents=True)
    (part / "__0_0.distcp").write_bytes(b"tensors")
    info = Checkpoint(step, plan.job.model, plan.job.training, plan.layout, "cpu", {"torch": "2.13.0"})
    losses = tuple(1.0 / n for n in range(1, step + 1))
    spread = Quantiles(1.0, 1.0, 1.0)
    return complete(part, info, Measurement(plan.layout, 1, step, 0, spread, 1.0, (1.0,), losses, losses, "cpu", {}))


def refusal(folder: Path, plan: Plan = PLAN) -> str:
    with pytest.raises(UserError) as caught:
        find_checkpoint(folder, plan.job)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_newest_complete_one_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "new", PLAN.job) is None
    save(tmp_path, 9)
    newest = save(tmp_path, 10)
    part_of(tmp_path, 11).mkdir()
    found = find_checkpoint(tmp_path, PLAN.job)
    assert found is not None
    path, checkpoint, measured = found
    assert (path, checkpoint.step, checkpoint.model) == (newest, 10, PLAN.job.model)
    assert measured.losses == tuple(1.0 / n for n in range(1, 11))
    remove_parts(tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.suffix] == []


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (3, 6, 9, 12):
        save(tmp_path, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000009", "step-00000012"]


def test_nothing_goes_before_the_next_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is removed, two complete ones are there when it is."""
    seen = []

    def look(path: Path, **_: Any) -> None:
        seen.append([p.name for p in complete_checkpoints(tmp_path)])

    monkeypatch.setattr(checkpoint_folder.shutil, "rmtree", look)
    for step in (3, 6, 9):
        save(tmp_path, step)
    assert seen == [["step-00000006", "step-00000009"]]


def test_everything_is_on_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that stops after the rename must not find an empty file under the name."""
    events: list[str] = []
    rename = Path.rename
    monkeypatch.setattr(checkpoint_folder, "_sync", lambda path: events.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda old, new: (events.append("rename"), rename(old, new))[1])
    save(tmp_path, 3)
    at = events.index("rename")
    part = "step-00000003.part"
    assert set(events[:at]) == {"__0_0.distcp", "checkpoint.json", "measurement.json", part} and events[at - 1] == part
    assert events[at + 1 :] == [tmp_path.name]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"seed": 2}, "training.seed = 1, but the plan has 2"),
        ({"optimizer": "sgd"}, "training.optimizer = 'adamw', but the plan has 'sgd'"),
        ({"global_batch_size": 16}, "training.global_batch_size = 8, but the plan has 16"),
        ({"seq_len": 16}, "training.seq_len = 32, but the plan has 16"),
    ],
)
def test_another_run_is_refused(changed: dict[str, Any], words: str, tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert words in refusal(tmp_path, tiny_plan(Layout(micro_batch_size=4), **changed))


def test_another_model_is_refused_and_another_name_is_not(tmp_path: Path) -> None:
    save(tmp_path, 3)
    assert "model.family = 'llama', but the plan has 'gpt'" in refusal(tmp_path, tiny_plan(Layout(), GPT))
    renamed = tiny_plan(Layout(), dataclasses.replace(LLAMA, name="mine"))
    assert find_checkpoint(tmp_path, renamed.job) is not None


def test_what_may_change_is_said(tmp_path: Path) -> None:
    path = save(tmp_path, 3)
    plan = tiny_plan(Layout(tp=2), learning_rate=1e-3)
    found = find_checkpoint(path.parent, plan.job)
    assert found is not None
    said = ["the layout was 'micro_batch_size=4'", "learning_rate was 0.01 and is 0.001"]
    assert checkpoint_folder.changes(found[1], plan) == said


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("checkpoint.json", None, "does not exist"),
        ("checkpoint.json", '{"version": 1, "st', "is not valid JSON"),
        ("checkpoint.json", '{"version": 7}', "has version = 7, not 1"),
        ("checkpoint.json", '{"version": 1, "step": 6}', "the key 'model' is missing"),
        ("measurement.json", "[]", "holds a JSON list"),
        ("measurement.json", None, "does not exist"),
    ],
)
def test_damaged_ones_are_named_with_the_one_before(name: str, text: str | None, words: str, tmp_path: Path) -> None:
    save(tmp_path, 3)
    path = save(tmp_path, 6)
    (path / name).unlink() if text is None else (path / name).write_text(text)
    said = refusal(tmp_path)
    assert words in said and f"'{path}'" in said and said.endswith("remove it to go on from 'step-00000003'")


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    assert "holds other things, like 'thesis.tex'; name a new folder" in refusal(tmp_path)
    assert "is a file; name a folder" in refusal(tmp_path / "thesis.tex")
    assert "is not a folder" in refusal(tmp_path / "thesis.tex" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folders_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert "no permission" in refusal(tmp_path / "below")


def test_the_launcher_looks_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "_run", lambda *_: pytest.fail("started processes"))
    save(tmp_path / "saved", 3)
    other = write_plan(tiny_plan(Layout(), seed=2), tmp_path / "plan.json")
    with pytest.raises(UserError, match=r"training\.seed = 1"):
        run_here(other, tmp_path / "m.json", Settings(checkpoint=tmp_path / "saved"))
    with pytest.raises(UserError, match="max-restarts = 2 needs --checkpoint DIR"):
        run_here(other, tmp_path / "m.json", max_restarts=2)
    with pytest.raises(UserError, match="checkpoint-every = 0 must be at least 1"):
        run_here(other, tmp_path / "m.json", Settings(checkpoint=tmp_path / "new", checkpoint_every=0))


def test_names_do_not_know_what_is_wrapped() -> None:
    for wrapped in ("module.{}", "_orig_mod.module.{}", "{}"):
        inner = "layers.3._orig_mod._checkpoint_wrapped_module.attention.wq.weight"
        assert canonical_name(wrapped.format(inner)) == "layers.3.attention.wq.weight"


def test_buffers_that_are_kept_are_saved() -> None:
    stage = nn.ModuleDict({"a": nn.BatchNorm1d(2)})
    stage["a"].register_buffer("table", torch.ones(2), persistent=False)
    names = ["a.weight", "a.bias", "a.running_mean", "a.running_var", "a.num_batches_tracked"]
    assert list(named_tensors([stage])) == names


@pytest.mark.parametrize("fused", [True, False])
def test_allocated_state_is_that_before_the_first_step(fused: bool) -> None:
    """Training on from it is training from nothing; a rate that was changed comes back."""
    ends = []
    for allocate in (True, False):
        weight = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.1, fused=fused)
        if allocate:
            allocate_state(optimizer)
            assert torch.equal(weight, torch.tensor([1.0, -2.0])) and weight.grad is None
            assert all(not value.any() for value in optimizer.state[weight].values())
        weight.grad = torch.tensor([0.3, 0.4])
        optimizer.step()
        ends.append(weight.detach().clone())
    assert torch.equal(*ends)


def test_a_warning_saves_and_the_next_run_goes_on(text_folder: Path, tmp_path: Path) -> None:
    """SIGTERM after the second step, then tensors that are cut off, then the checkpoint as it was."""
    plan = write_plan(tiny_plan(Layout(micro_batch_size=4), data=str(text_folder)), tmp_path / "plan.json")
    folder = tmp_path / "saved"
    command = [sys.executable, "-m", "runtime", str(plan), "--warmup=0", f"--checkpoint={folder}", "--steps"]
    running = subprocess.Popen([*command, "1000000"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert running.stderr is not None
    assert next(line for line in running.stderr if line.startswith("step 2/"))
    running.send_signal(signal.SIGTERM)
    said = running.stderr.read()
    assert running.wait(timeout=60) == 0, said
    path = complete_checkpoints(folder)[-1]
    steps = int(path.name.removeprefix("step-"))
    assert f"note: stopped by SIGTERM; {steps} of 1000000 steps are saved" in said
    (tensors,) = path.glob("*.distcp")
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    cut = subprocess.run([*command, str(steps)], capture_output=True, text=True, timeout=120)
    assert cut.returncode == 2
    (sentence,) = cut.stderr.strip().splitlines()
    assert sentence.startswith(f"error: checkpoint '{path}' is no checkpoint of layoutwise or is damaged: ")
    tensors.write_bytes(whole)
    done = subprocess.run([*command, str(steps)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert f"has {steps} steps already; raise --steps = {steps}" in done.stderr
    assert f'"steps": {steps},' in done.stdout
