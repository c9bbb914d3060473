"""Start a plan on this machine: `torchrun -m runtime plan.json` as a child that is watched and cleaned up after.

Nothing here imports torch: a plan that cannot run is refused before the first process starts.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path

from planner.plan import Plan, read_plan
from runtime.data import check_data
from runtime.machine import CPU_RANK_ENVIRONMENT
from simulator.errors import UserError
from simulator.files import check_writable, read_json, to_dataclass
from simulator.results import Alone, Measurement

# Lines that ranks write on stderr (runtime/__main__.py) and the launcher reads.
STEP_LINE = re.compile(r"step (\d+)/(\d+) ")
ERROR_PREFIX = "error: "

DEFAULT_STEPS = 20
DEFAULT_WARMUP = 5
# torchrun passes the signal on to its ranks; then it has this long before it is killed.
GRACE_SECONDS = 10.0
# What is kept of stderr to look for the ranks' error, and what of it is shown.
_KEPT_LINES = 400
_SHOWN_LINES = 40
# Where torchrun begins to report that a rank has failed, below what the rank itself wrote.
_TORCHRUN_LINE = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/")


def check_plan(plan: Plan, world_size: int, steps: int, warmup: int) -> None:
    """Raises UserError if the runtime cannot train this plan on so many processes, or for so many steps."""
    layout = plan.layout
    check_layout(plan)
    if world_size != layout.world_size:
        raise UserError(f"the layout '{layout.short()}' needs {layout.world_size} processes, not {world_size}")
    check_steps(steps, warmup)
    check_data(plan.job)


def check_layout(plan: Plan) -> None:
    """Raises UserError if the runtime cannot execute the layout of this plan on any number of processes."""
    stack, layout = plan.job.stack, plan.layout
    if not stack.name.startswith("layoutwise"):
        raise UserError(
            f"stack = '{stack.name}' is simulated only; to run a plan, make it with training.stack = 'layoutwise-cpu' "
            "or 'layoutwise-cuda'"
        )
    problems = layout.problems(plan.job)
    if problems:
        raise UserError(f"the layout '{layout.short()}' cannot run: {problems[0]}")
    if plan.job.training.precision not in ("fp32", "bf16"):
        raise UserError(f"precision = '{plan.job.training.precision}' is simulated only; the runtime has fp32 and bf16")


def check_steps(steps: int, warmup: int) -> None:
    """Raises UserError if no step is left to measure."""
    if not 0 <= warmup < steps:
        raise UserError(f"warmup = {warmup} must be at least 0 and less than steps = {steps}")


def check_alone(plan: Plan, rank: int, steps: int, warmup: int) -> None:
    """Raises UserError if this plan has no such rank, or the runtime cannot execute it."""
    check_layout(plan)
    if not 0 <= rank < plan.layout.world_size:
        raise UserError(f"--rank {rank} must be one of the layout's ranks, 0 to {plan.layout.world_size - 1}")
    check_steps(steps, warmup)
    check_data(plan.job)


def check_profile(folder: Path | None, steps: int, warmup: int) -> None:
    """Raises UserError if the last step, which is profiled, would be the only one that counts."""
    if folder is not None and warmup + 1 >= steps:
        raise UserError(
            f"--profile takes the last step, which leaves none to measure: steps = {steps} must be at least "
            f"warmup({warmup}) + 2"
        )


def run_here(
    plan_path: Path | str,
    output: Path | str,
    *,
    steps: int = DEFAULT_STEPS,
    warmup: int = DEFAULT_WARMUP,
    nproc: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    timeout: float = 3600.0,
    profile: Path | None = None,
) -> Measurement:
    """Train a plan with torchrun on this machine and return what was measured, which is also written to `output`.

    Args:
        nproc: processes to start; None takes what the layout needs, and nothing else is right.
        progress: called with (steps done, steps) as the ranks report them.
        timeout: seconds until the run is given up.
        profile: a folder for traces and timeline.json of the last step.

    Raises:
        UserError: the plan cannot run, or the ranks found that out.
        RuntimeError: the ranks failed (with the end of what they wrote), or were too slow.
    """
    plan = read_plan(plan_path)
    nproc = plan.layout.world_size if nproc is None else nproc
    check_plan(plan, nproc, steps, warmup)
    check_profile(profile, steps, warmup)
    check_writable(output)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    command += ["-m", "runtime", str(plan_path), f"--steps={steps}", f"--warmup={warmup}", f"--output={output}"]
    command += [] if profile is None else [f"--profile={profile}"]
    # The environment in which the profile was measured, also when there is one rank, so that layouts compare.
    code, tail = _run(command, os.environ | CPU_RANK_ENVIRONMENT, progress, timeout)
    _raise_failure(code, tail, "training failed (torchrun's exit code")
    return to_dataclass(Measurement, read_json(output, "measurement"), f"measurement '{output}'")


def run_alone_here(
    plan_path: Path | str,
    output: Path | str,
    rank: int,
    *,
    steps: int = DEFAULT_STEPS,
    warmup: int = DEFAULT_WARMUP,
    fake: bool = False,
    timeout: float = 3600.0,
) -> Alone:
    """Run one rank of a plan by itself (runtime/alone.py); what was measured is also written to `output`.

    Args:
        fake: compute nothing, only count. The rank decides so itself where its share is too much for this machine.

    Raises:
        UserError: the plan cannot run, or has no such rank.
        RuntimeError: the rank failed, or was too slow.
    """
    plan = read_plan(plan_path)
    check_alone(plan, rank, steps, warmup)
    check_writable(output)
    command = [sys.executable, "-m", "runtime", str(plan_path), f"--alone={rank}", *(["--fake"] if fake else [])]
    command += [f"--steps={steps}", f"--warmup={warmup}", f"--output={output}"]
    code, tail = _run(command, os.environ | CPU_RANK_ENVIRONMENT, None, timeout)
    _raise_failure(code, tail, "the rank failed (exit code")
    return to_dataclass(Alone, read_json(output, "measurement"), f"measurement '{output}'")


def _raise_failure(code: int, tail: list[str], what: str) -> None:
    """A user's error that the ranks found is one sentence; any other failure shows what they wrote."""
    if code == 0:
        return
    sentence = next((line for line in tail if line.startswith(ERROR_PREFIX)), None)
    if sentence is not None:
        raise UserError(sentence.removeprefix(ERROR_PREFIX))
    raise RuntimeError(f"{what} {code}); the ranks wrote\n{_shown(tail)}")


def _run(
    command: list[str], environment: dict[str, str], progress: Callable[[int, int], None] | None, timeout: float
) -> tuple[int, list[str]]:
    """Run a command to its end: its exit code, and the last lines of its stderr that are no progress.

    However this function is left, by Ctrl-C too, no process of the command stays behind.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read_lines, args=(process, lines), daemon=True).start()
    tail: deque[str] = deque(maxlen=_KEPT_LINES)
    deadline = time.monotonic() + timeout
    try:
        while (line := lines.get(timeout=max(0.0, deadline - time.monotonic()))) is not None:
            step = STEP_LINE.match(line)
            if step is None:
                tail.append(line)
            elif progress is not None:
                progress(int(step[1]), int(step[2]))
        return process.wait(timeout=max(0.0, deadline - time.monotonic())), list(tail)
    except (queue.Empty, subprocess.TimeoutExpired):
        raise RuntimeError(f"training took longer than {timeout:.0f} s; the ranks wrote\n{_shown(tail)}") from None
    finally:
        _stop(process)


def _shown(tail: Iterable[str]) -> str:
    """The last lines of the ranks, without torchrun's own report of the failure."""
    lines = itertools.takewhile(lambda line: not _TORCHRUN_LINE.match(line), tail)
    return "\n".join(list(lines)[-_SHOWN_LINES:])


def _read_lines(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _stop(process: subprocess.Popen[str]) -> None:
    """End torchrun and its ranks. Ranks are no members of its process group, but end with it (see __main__)."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)
