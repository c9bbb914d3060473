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
from dataclasses import replace
from pathlib import Path

from planner.plan import Plan, read_plan
from runtime.checkpoint_folder import find_checkpoint
from runtime.data import check_data
from runtime.hf_config import check_exchanged, hf_config
from runtime.hosts import on_two_hosts
from runtime.machine import CPU_RANK_ENVIRONMENT, end_with_starter, processors
from runtime.settings import DEFAULT, Settings
from simulator.errors import UserError
from simulator.files import check_writable, read_json, to_dataclass
from simulator.hosts import HOSTS, Wire
from simulator.layout import Layout
from simulator.results import Alone, Measurement

# Lines that ranks write on stderr (runtime/__main__.py) and the launcher reads.
STEP_LINE = re.compile(r"step (\d+)/(\d+) ")
ERROR_PREFIX = "error: "
NOTE_PREFIX = "note: "

# torchrun, when it starts its ranks again, is to give them a new store: in the old one they find the addresses of ranks
# that are gone (pytorch/pytorch#135712). Only where it may start them again: the new store listens on a port that was
# free a moment before, torchrun's own store on one that is its own.
RESTART_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
# torchrun passes the signal on to its ranks, which then save and end; those that have not after 30 s it kills. It has
# this long itself.
GRACE_SECONDS = 35.0
MOST_RANKS_PER_PROCESSOR = 16
# What is kept of stderr to look for the ranks' error, and what of it is shown.
_KEPT_LINES = 400
_SHOWN_LINES = 40
# Where torchrun begins to report that a rank has failed, below what the rank itself wrote.
_TORCHRUN_LINE = re.compile(r"[WE]\d{4} .*torch/distributed/elastic/")


def processes(layout: Layout) -> int:
    """Ranks, and parameter servers beside them."""
    return layout.world_size + layout.servers


def check_plan(plan: Plan, world_size: int) -> None:
    """Raises UserError if the runtime cannot train this plan on so many processes."""
    layout = plan.layout
    check_layout(plan)
    if world_size != (needed := processes(layout)):
        raise UserError(f"the layout '{layout.short()}' needs {needed} processes, not {world_size}")
    check_data(plan.job)


def check_settings(plan: Plan, settings: Settings) -> None:
    """Raises UserError for settings that do not go with the plan's layout."""
    layout = plan.layout
    for rank in settings.slowdowns:
        if rank >= layout.world_size:
            raise UserError(f"slow-rank {rank} must be one of the layout's ranks, 0 to {layout.world_size - 1}")
    if layout.sync == "parameter_server" and layout.staleness != 0:
        for name in ("checkpoint", "profile"):
            if getattr(settings, name) is not None:
                raise UserError(
                    f"--{name} needs a step that ends on all replicas at once, but with staleness = "
                    f"{'none' if layout.staleness is None else layout.staleness} there is none; take staleness = 0"
                )


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
    if layout.sync != "all_reduce" and layout.cp > 1 and layout.dp_shard > 1:
        raise UserError(
            f"sync = '{layout.sync}' runs with cp = {layout.cp} or dp_shard = {layout.dp_shard} in a replica, "
            "not both; plan with search.cp = 1"
        )
    if plan.job.training.precision not in ("fp32", "bf16"):
        raise UserError(f"precision = '{plan.job.training.precision}' is simulated only; the runtime has fp32 and bf16")


def check_alone(plan: Plan, rank: int) -> None:
    """Raises UserError if this plan has no such rank, or the runtime cannot execute it."""
    check_layout(plan)
    if plan.layout.sync != "all_reduce":
        raise UserError(f"a rank runs alone with sync = 'all_reduce', not '{plan.layout.sync}'")
    if not 0 <= rank < plan.layout.world_size:
        raise UserError(f"--rank {rank} must be one of the layout's ranks, 0 to {plan.layout.world_size - 1}")
    check_data(plan.job)


def run_here(
    plan_path: Path | str,
    output: Path | str,
    settings: Settings = DEFAULT,
    *,
    nproc: int | None = None,
    max_restarts: int = 0,
    progress: Callable[[int, int], None] | None = None,
    timeout: float = 3600.0,
    wire: Wire | None = None,
) -> Measurement:
    """Train a plan with torchrun on this machine and return what was measured, which is also written to `output`.

    Args:
        nproc: processes to start, parameter servers included; None takes what the layout needs, and nothing else is
        right. max_restarts: how often torchrun may start all ranks again when one has died.
        progress: called with (steps done, steps) as the ranks report them.
        timeout: seconds until the run is given up.
        wire: run on two hosts made of this machine with this link between them (runtime/hosts.py).

    Raises:
        UserError: the plan cannot run, or the ranks found that out.
        RuntimeError: the ranks failed (with the end of what they wrote), or were too slow.
    """
    plan = read_plan(plan_path)
    nproc = processes(plan.layout) if nproc is None else nproc
    check_plan(plan, nproc)
    check_settings(plan, settings)
    _check_processors(nproc)
    settings = replace(settings, output=Path(output))
    _check_folders(plan, settings)
    if max_restarts and settings.checkpoint is None:
        raise UserError(f"max-restarts = {max_restarts} needs --checkpoint DIR: there is nothing else to go on from")
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    program = [f"--max-restarts={max_restarts}", "-m", "runtime", str(plan_path), *settings.arguments()]
    command = [*torchrun, "--standalone", f"--nproc-per-node={nproc}", *program]
    if wire is not None:
        command = on_two_hosts(wire, [*torchrun, f"--nproc-per-node={nproc // HOSTS}", *program])
    # The environment in which the profile was measured, also when there is one rank, so that layouts compare.
    environment = os.environ | CPU_RANK_ENVIRONMENT | (RESTART_ENVIRONMENT if max_restarts else {})
    code, tail = _run(command, environment, progress, timeout)
    _raise_failure(code, tail, "training failed (torchrun's exit code")
    return to_dataclass(Measurement, read_json(output, "measurement"), f"measurement '{output}'")


def _check_processors(nproc: int) -> None:
    """Raises UserError before so many processes start that the machine would do nothing else."""
    count = processors()
    if nproc > (most := MOST_RANKS_PER_PROCESSOR * count):
        raise UserError(
            f"the layout needs {nproc} processes, but with {count} processors this machine takes {most} at most; "
            f"`layoutwise launch` starts it on a cluster, and `run --alone --rank R` runs one of its ranks here"
        )


def _check_folders(plan: Plan, settings: Settings) -> None:
    """Raises UserError for what would only be found out after the ranks have started, or at their end."""
    settings.check()
    folders = {settings.export: "config.json", settings.profile: "timeline.json"}
    for path in (settings.output, *(folder / name for folder, name in folders.items() if folder is not None)):
        if path is not None:
            check_writable(path)
    if settings.export is not None:
        hf_config(plan.job.model)
    if settings.weights is not None:
        check_exchanged(plan.job.model)
    if settings.weights is not None and not settings.weights.is_dir():
        raise UserError(
            f"weights '{settings.weights}' is not a folder; name one with safetensors and their config.json"
        )
    if settings.checkpoint is not None:
        find_checkpoint(settings.checkpoint, plan.job, plan.layout)


def run_alone_here(
    plan_path: Path | str,
    output: Path | str,
    rank: int,
    settings: Settings = DEFAULT,
    *,
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
    check_alone(plan, rank)
    settings.check()
    check_writable(output)
    command = [sys.executable, "-m", "runtime", str(plan_path), f"--alone={rank}", *(["--fake"] if fake else [])]
    command += replace(settings, output=Path(output)).arguments()
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

    However this function is left, by Ctrl-C too, no process of the command stays behind; nor where this process is
    killed (Linux).
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
        preexec_fn=end_with_starter,
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
        # At once, because the last note of a run that is being stopped comes when nobody waits for lines any more.
        if line.startswith(NOTE_PREFIX):
            sys.stderr.write(line)
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
