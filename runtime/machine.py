"""The machine that ranks run on: processors and memory that this process may use, and the environment of a rank."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

# What a rank without a GPU runs with. One thread, because each rank stands for one processor. The others keep
# freed memory in the process (glibc, mallopt(3): never mmap, never trim, one heap for all threads, because what is too
# large for those of other threads is mapped all the same): otherwise each step takes its large activations as fresh
# pages, whose faults cost more than the kernels that fill them. Other C libraries ignore them.
CPU_RANK_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",
}


# "0" in the environment leaves processors alone that ranks wait on.
KEEP_AWAKE = "LAYOUTWISE_KEEP_AWAKE"
# Processes that keep processors awake (keep_awake), and their program.
_FILLERS: list[subprocess.Popen[bytes]] = []
_FILL = """
import os, sys
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == int(sys.argv[1]):
    for _ in range(1_000_000):
        pass
"""

# Looked up here, because between fork and exec nothing should be loaded.
_PRCTL = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG, linux/prctl.h


def end_with_starter(number: signal.Signals = signal.SIGKILL) -> None:
    """For `preexec_fn`: the new process gets this signal when the thread that starts it ends, killed or not. Linux only
    (prctl(2)); elsewhere the processes of a command that was killed go on to their end."""
    if _PRCTL is not None:
        _PRCTL(_SET_DEATH_SIGNAL, int(number))


def leave(exit_code: int = 0) -> NoReturn:
    """End this process now; what it had to write is on disk.

    The ordinary way out takes torch's threads and process groups down in an order that now and then (once in some
    hundred runs on gloo) ends in std::terminate, and a finished run would count as failed.
    """
    while _FILLERS:
        # Waited for, so that what it used counts as this process's own.
        filler = _FILLERS.pop()
        filler.kill()
        filler.wait()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def processors(root: Path = Path("/")) -> int:
    """Processors that this process may use: its affinity, or the quota of its control groups if that is less.

    Args:
        root: where `proc` and `sys` lie.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, int(min(allowed, _quota(root))))


def _quota(root: Path) -> float:
    """Processors' worth of time that the control groups of this process allow; infinite without a limit."""
    quota = math.inf
    for folder in _cgroup_folders(root, "cpu"):
        text = _read(folder / "cpu.max") or " ".join(
            (_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
        )
        limit, _, period = text.strip().partition(" ")
        if limit.isdigit() and period.isdigit():
            quota = min(quota, int(limit) / int(period))
    return quota


def part_of(allowed: Sequence[int], local_rank: int, local_ranks: int) -> list[int]:
    """The processors of one of a machine's ranks: an equal part of them, or all where there is less than one for each.

    >>> part_of([0, 1, 2, 3, 4], 1, 2), part_of([0, 1], 3, 4)
    ([2, 3, 4], [0, 1])
    """
    first, last = (place * len(allowed) // local_ranks for place in (local_rank, local_rank + 1))
    return list(allowed[first:last] if local_ranks <= len(allowed) else allowed)


def take_processors(local_rank: int, local_ranks: int) -> None:
    """Keep this rank on its part of the processors, unless whoever started it gave it a part already. Left to
    themselves, ranks may share one while another idles for a whole run: a scheduler that packs tasks sees no reason to
    part them. Ranks that outnumber the processors share all of them: dealt out, four on two took up to a quarter
    longer, because one that waits leaves its processor to nobody else. Nothing where the system knows no affinity
    (macOS).
    """
    with contextlib.suppress(OSError, AttributeError):
        allowed = os.sched_getaffinity(0)
        if allowed == os.sched_getaffinity(os.getppid()):
            os.sched_setaffinity(0, part_of(sorted(allowed), local_rank, local_ranks))


def keep_awake(local_ranks: int, root: Path = Path("/")) -> None:
    """Where this rank has a processor of a virtual machine to itself, give that something to do whenever the rank has
    nothing for it: a process that gives way to it at once (SCHED_IDLE, sched(7)) and ends with it. Call it once the
    rank has its processors.

    A hypervisor places a processor that was idle anew, and now and then two of them on one core, where for seconds
    either is half as fast: 20 of 308 seconds where they computed 20 ms and rested 5 ms in turn, none of 500 kept awake.

    Towards other sessions (autogroup) and control groups it counts as ordinary work, which they wait for by
    milliseconds: four ranks on two took a third longer. So nothing where processors are shared or left over, where they
    are threads of a core or may be, which would slow each other, where a quota would count the time, and where the
    environment has LAYOUTWISE_KEEP_AWAKE=0.

    Args:
        root: where `proc` and `sys` lie.
    """
    if not hasattr(os, "SCHED_IDLE") or " hypervisor" not in _read(root / "proc/cpuinfo") or os.cpu_count() == 1:
        return
    if os.environ.get(KEEP_AWAKE) == "0" or _quota(root) < math.inf:
        return
    # A help that a run does without where processes or rights are short.
    with contextlib.suppress(OSError):
        mine = os.sched_getaffinity(0)
        (processor, *more), shared = sorted(mine), local_ranks > 1 and mine == os.sched_getaffinity(os.getppid())
        siblings = _read(root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list")
        if more or shared or siblings != str(processor):
            return
        command, none = [sys.executable, "-I", "-S", "-c", _FILL, str(os.getpid())], subprocess.DEVNULL
        _FILLERS.append(subprocess.Popen(command, stdin=none, stdout=none, stderr=none))


@contextlib.contextmanager
def own_processors(local_rank: int, local_ranks: int) -> Iterator[None]:
    """The calling thread on its part of the processors that it may use, for as long as so few ranks compute."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set[int]()
    try:
        if allowed and local_rank < local_ranks:
            os.sched_setaffinity(0, part_of(sorted(allowed), local_rank, local_ranks))
        yield
    finally:
        if allowed:
            os.sched_setaffinity(0, allowed)


def memory_bytes(root: Path = Path("/")) -> int:
    """Bytes of memory that this process may use: the machine's, or the limit of its control groups if that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for folder in _cgroup_folders(root, "memory"):
        limit = _read(folder / "memory.max") or _read(folder / "memory.limit_in_bytes")
        if limit.isdigit():
            total = min(total, int(limit))
    return total


def resident_bytes() -> int:
    """Bytes of this process that are in memory now."""
    statm = _read(Path("/proc/self/statm"))
    if statm:
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    # Without /proc (macOS) only the peak is known, and in bytes there.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def processor_name() -> str:
    """The processor's name as the kernel shows it."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control groups, outermost last, for version 2 and for a controller of version 1.

    Inside a container /proc names the group as the host sees it, so folders that do not exist are only skipped.
    """
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        group = mount / path.lstrip("/")
        yield group
        yield from (parent for parent in group.parents if parent.is_relative_to(mount))


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
