"""Starting a plan: what is refused before any process starts, and that nothing is left behind."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_jobs import LLAMA, tiny_plan

from planner.plan import write_plan
from runtime import here
from runtime.here import run_here
from runtime.settings import Settings
from simulator.errors import UserError
from simulator.layout import Layout


def test_importing_the_launcher_loads_no_torch() -> None:
    code = "import runtime.here, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_one_process_end_to_end(text_folder: Path, tmp_path: Path) -> None:
    plan = write_plan(tiny_plan(Layout(micro_batch_size=4), data=str(text_folder)), tmp_path / "plan.json")
    seen: list[tuple[int, int]] = []
    measured = run_here(
        plan, tmp_path / "m.json", Settings(6, 2), progress=lambda *step: seen.append(step), timeout=120
    )
    assert seen == [(step, 6) for step in range(1, 7)]
    assert measured.layout == Layout(micro_batch_size=4)
    assert (measured.world_size, measured.steps, measured.warmup, measured.device) == (1, 6, 2, "cpu")
    assert len(measured.losses) == len(measured.grad_norms) == 6
    assert measured.losses[-1] < measured.losses[0]
    spread = measured.step_seconds
    assert 0 < spread.p10 <= spread.median <= spread.p90
    assert measured.tokens_per_second == pytest.approx(8 * 32 / spread.median)
    (peak,) = measured.peak_memory
    # An interpreter with torch in it, and hardly more.
    assert 100e6 < peak < 2e9


def test_an_error_that_the_ranks_find_is_one_sentence(text_folder: Path, tmp_path: Path) -> None:
    """A run that diverges says at which step, and leaves no measurement."""
    wild = tiny_plan(Layout(), data=str(text_folder), learning_rate=1e30, optimizer="sgd")
    plan = write_plan(wild, tmp_path / "plan.json")
    with pytest.raises(UserError, match=r"^training diverged at step 2 .*; lower training.learning_rate = 1e\+30"):
        run_here(plan, tmp_path / "m.json", timeout=120)
    assert not (tmp_path / "m.json").exists()


@pytest.mark.parametrize(
    ("layout", "options", "words"),
    [
        (Layout(dp_replicate=2), {"nproc": 3}, "needs 2 processes, not 3"),
        (Layout(), {"settings": Settings(5, 5)}, "less than steps = 5"),
        (Layout(), {"settings": Settings(weights=Path("w"), export=Path("x/../w"))}, "would overwrite the --weights"),
        (Layout(tp=3), {}, "tp = 3 must divide"),
        (
            Layout(pp=2, dp_shard=2, zero_stage=3, schedule="ZBVZeroBubble", virtual_stages=2),
            {},
            r"no zero_stage 3 with ZBVZeroBubble, but \[1, 2\]: torch loses gradients",
        ),
    ],
)
def test_what_cannot_run_is_refused_at_once(
    layout: Layout, options: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "_run", lambda *_: pytest.fail("started processes"))
    with pytest.raises(UserError, match=words):
        run_here(write_plan(tiny_plan(layout), tmp_path / "plan.json"), tmp_path / "m.json", **options)


def test_a_plan_of_a_cluster_is_not_started_on_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(here, "_run", lambda *_: pytest.fail("started processes"))
    monkeypatch.setattr(here, "processors", lambda: 2)
    plan = write_plan(tiny_plan(Layout(dp_replicate=64), global_batch_size=64), tmp_path / "plan.json")
    with pytest.raises(UserError, match="needs 64 processes, but with 2 processors this machine takes 32 at most"):
        run_here(plan, tmp_path / "m.json")


def test_missing_data_is_refused_at_once(tmp_path: Path) -> None:
    plan = write_plan(tiny_plan(Layout(), data=str(tmp_path / "nowhere")), tmp_path / "plan.json")
    with pytest.raises(UserError, match=r"^training.data = '.*nowhere' is not a folder"):
        run_here(plan, tmp_path / "m.json")


def test_stacks_of_others_are_refused(tmp_path: Path) -> None:
    plan = write_plan(tiny_plan(Layout(), stack="megatron-core"), tmp_path / "plan.json")
    with pytest.raises(UserError, match="'megatron-core' is simulated only"):
        run_here(plan, tmp_path / "m.json")


def test_a_crash_of_a_rank_is_shown(text_folder: Path, tmp_path: Path) -> None:
    # An odd head cannot be rotated by halves.
    broken = dataclasses.replace(LLAMA, head_dim=15)
    plan = write_plan(tiny_plan(Layout(), broken, data=str(text_folder)), tmp_path / "plan.json")
    with pytest.raises(RuntimeError, match="must match the size of tensor"):
        run_here(plan, tmp_path / "m.json", timeout=120)


def test_torchruns_own_report_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["Traceback", "ValueError: boom", "E0101 00:00:00.0 1 torch/distributed/elastic/x.py:1] failed", "noise"]
    monkeypatch.setattr(here, "_run", lambda *_: (1, lines))
    plan = write_plan(tiny_plan(Layout()), tmp_path / "plan.json")
    with pytest.raises(RuntimeError, match=r"ValueError: boom$"):
        run_here(plan, tmp_path / "m.json")


CHILD = "import os, sys, time; print('step 1/2  pid', os.getpid(), file=sys.stderr, flush=True); time.sleep(60)"


def test_too_slow_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="took longer than 1 s"):
        here._run([sys.executable, "-c", CHILD], dict(os.environ), None, 1.0)
    assert time.monotonic() - begin < 10


def test_interrupting_leaves_no_process(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    child = f"import os; open({str(note)!r}, 'w').write(str(os.getpid())); {CHILD}"

    def interrupt(step: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here._run([sys.executable, "-c", child], dict(os.environ), interrupt, 30.0)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl(2)")
def test_nothing_outlives_a_command_that_is_killed(tmp_path: Path) -> None:
    """SIGKILL leaves nobody a turn to clean up: the kernel ends torchrun, and its ranks see that it is gone."""
    note = tmp_path / "pid"
    child = f"import os; open({str(note)!r}, 'w').write(f'{{os.getpid()}} '); {CHILD}"
    run = f"here._run([sys.executable, '-c', {child!r}], os.environ, None, 60)"
    script = f"import os, sys; from runtime import here; {run}"
    starter = subprocess.Popen([sys.executable, "-c", script])
    assert wait_until(lambda: note.exists() and note.read_text().endswith(" "))
    starter.kill()
    starter.wait()
    assert wait_until(lambda: not Path(f"/proc/{note.read_text().strip()}").exists())


def wait_until(true: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not (found := true()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found
