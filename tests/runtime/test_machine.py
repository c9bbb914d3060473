"""What a process may use of its machine, under control groups of both versions."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from runtime.machine import (
    KEEP_AWAKE,
    memory_bytes,
    own_processors,
    part_of,
    processor_name,
    processors,
    resident_bytes,
    take_processors,
)


def system(root: Path, files: dict[str, str]) -> Path:
    """A file tree with these files."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


@pytest.fixture
def four_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3}, raising=False)


VERSION_2 = {
    "proc/self/cgroup": "0::/jobs/mine",
    "sys/fs/cgroup/jobs/cpu.max": "250000 100000",
    "sys/fs/cgroup/jobs/memory.max": "max",
    "sys/fs/cgroup/jobs/mine/cpu.max": "max 100000",
    "sys/fs/cgroup/jobs/mine/memory.max": "1000000",
}
VERSION_1 = {
    "proc/self/cgroup": "4:memory:/mine\n2:cpu,cpuacct:/mine\n0::/",
    "sys/fs/cgroup/cpu/mine/cpu.cfs_quota_us": "50000",
    "sys/fs/cgroup/cpu/mine/cpu.cfs_period_us": "100000",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000",
    "sys/fs/cgroup/memory/mine/memory.limit_in_bytes": "9223372036854771712",
}
# In a container the group's path is the host's, and its files lie at the mount itself.
CONTAINER = {
    "proc/self/cgroup": "0::/../host/path",
    "sys/fs/cgroup/cpu.max": "300000 100000",
    "sys/fs/cgroup/memory.max": "3000000",
}


@pytest.mark.usefixtures("four_processors")
@pytest.mark.parametrize(
    ("files", "count", "memory"), [(VERSION_2, 2, 1000000), (VERSION_1, 1, 2000000), (CONTAINER, 3, 3000000)]
)
def test_the_least_limit_of_all_groups_holds(tmp_path: Path, files: dict[str, str], count: int, memory: int) -> None:
    root = system(tmp_path, files)
    assert (processors(root), memory_bytes(root)) == (count, memory)


@pytest.mark.usefixtures("four_processors")
def test_without_control_groups_the_affinity_and_the_machine_hold(tmp_path: Path) -> None:
    assert processors(tmp_path) == 4
    assert memory_bytes(tmp_path) == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_this_process_is_in_memory_and_its_processor_has_a_name() -> None:
    assert 1e6 < resident_bytes() < memory_bytes()
    assert processor_name()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_ranks_divide_the_processors(ranks: int) -> None:
    """Parts that do not meet, and of which none has two more than another."""
    parts = [part_of([0, 2, 4, 6, 8], rank, ranks) for rank in range(ranks)]
    assert sorted(one for part in parts for one in part) == [0, 2, 4, 6, 8]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_that_outnumber_the_processors_share_all_of_them() -> None:
    assert [part_of([0, 1], rank, 3) for rank in range(3)] == [[0, 1]] * 3


def test_a_rank_takes_its_part_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 1 of 2 gets the second half of what its parent may use. A rank that was bound to less stays where it is."""
    may_use = {os.getppid(): {0, 1, 2, 3}, 0: {0, 1, 2, 3}}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: may_use[pid], raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", may_use.__setitem__, raising=False)
    take_processors(1, 2)
    assert may_use[0] == [2, 3]
    may_use[0] = {1, 2}
    take_processors(1, 2)
    assert may_use[0] == {1, 2}
    may_use[0] = {0, 1, 2, 3}
    take_processors(1, 5)
    assert may_use[0] == [0, 1, 2, 3]


def test_a_thread_gives_its_processors_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four ranks compute: the second has the second half meanwhile, the third stays where it is."""
    now: dict[int, object] = {0: {0, 1}}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: now[pid], raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", now.__setitem__, raising=False)
    for rank, part in ((1, [1]), (2, {0, 1})):
        with own_processors(rank, 2):
            assert now[0] == part
        assert now[0] == {0, 1}


KEPT_AWAKE = """
    import os, sys, time
    from pathlib import Path
    from runtime.machine import keep_awake, leave

    keep_awake(int(sys.argv[2]), Path(sys.argv[1]))
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for child in map(int, children):
        until = time.monotonic() + 10
        while os.sched_getscheduler(child) != os.SCHED_IDLE and time.monotonic() < until:
            time.sleep(0.01)
        ticks = [int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11])]
        until = time.monotonic() + 10
        while ticks[-1] <= ticks[0] and time.monotonic() < until:
            time.sleep(0.01)
            ticks.append(int(Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[11]))
        idle, session = os.sched_getscheduler(child) == os.SCHED_IDLE, os.getsid(child) == os.getsid(0)
        print(child, idle, session, ticks[-1] > ticks[0], flush=True)
    if sys.argv[3] == "killed":
        os.kill(os.getpid(), 9)
    leave()
"""
FIRST = min(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
SIBLINGS = f"sys/devices/system/cpu/cpu{FIRST}/topology/thread_siblings_list"
VIRTUAL = {"proc/cpuinfo": "flags: fpu hypervisor lahf_lm", SIBLINGS: f"{FIRST}", "proc/self/cgroup": "0::/"}


def fillers(root: Path, processors: set[int], local_ranks: int, end: str = "leaves") -> list[tuple[int, list[str]]]:
    """The processes that a rank on these processors was given, and of each whether it gives way, is in the rank's
    session and works."""
    command = [sys.executable, "-c", textwrap.dedent(KEPT_AWAKE), str(root), str(local_ranks), end]
    run = subprocess.run(
        command, capture_output=True, text=True, timeout=60, preexec_fn=lambda: os.sched_setaffinity(0, processors)
    )
    assert run.stderr == ""
    assert run.returncode == (-9 if end == "killed" else 0)
    lines = [line.split() for line in run.stdout.splitlines()]
    return [(int(child), said) for child, *said in lines]


def gone(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] in "ZX"
    except OSError:
        return True


linux = pytest.mark.skipif(
    not Path(f"/proc/self/task/{os.getpid()}/children").exists() or os.cpu_count() == 1,
    reason="Linux with more than one processor, which lists a process's children",
)


@linux
@pytest.mark.parametrize("end", ["leaves", "killed"])
def test_a_processor_of_a_virtual_machine_is_kept_awake_until_its_rank_ends(tmp_path: Path, end: str) -> None:
    """One process that gives way, in the rank's session; gone when the rank is, killed or not."""
    found = fillers(system(tmp_path, VIRTUAL), {FIRST}, 1, end)
    assert [said for _, said in found] == [["True", "True", "True"]]
    until = time.monotonic() + 10
    while not all(gone(child) for child, _ in found) and time.monotonic() < until:
        time.sleep(0.02)
    assert all(gone(child) for child, _ in found)


@linux
@pytest.mark.parametrize(
    "files",
    [
        {"proc/cpuinfo": "flags: fpu lahf_lm"},
        {SIBLINGS: f"{FIRST},{FIRST + 8}"},
        {SIBLINGS: ""},
        {"sys/fs/cgroup/cpu.max": "800000 100000"},
    ],
    ids=["no virtual machine", "threads of a core", "perhaps threads of a core", "quota"],
)
def test_where_processors_are_not_kept_awake(tmp_path: Path, files: dict[str, str]) -> None:
    assert fillers(system(tmp_path, VIRTUAL | files), {FIRST}, 1) == []


@linux
def test_the_environment_may_say_no(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEEP_AWAKE, "0")
    assert fillers(system(tmp_path, VIRTUAL), {FIRST}, 1) == []


@linux
def test_processors_that_ranks_share_or_leave_over_are_not_kept_awake(tmp_path: Path) -> None:
    """A rank beside others where its parent is has its processor not to itself; with two it leaves one over."""
    root, allowed = system(tmp_path, VIRTUAL), os.sched_getaffinity(0)
    if len(allowed) > 1:
        assert fillers(root, allowed, 1) == []
        assert len(fillers(root, {FIRST}, 2)) == 1
    os.sched_setaffinity(0, {FIRST})
    try:
        assert fillers(root, {FIRST}, 2) == []
    finally:
        os.sched_setaffinity(0, allowed)
