"""Freed memory leaves the process or stays in it, as it was told; replicas hold their gradients once."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from planner.plan import write_plan
from runtime.host_allocator import short_of_memory
from runtime.machine import CPU_RANK_ENVIRONMENT
from simulator.layout import Layout

# Resident bytes after 64 blocks of 1 MiB were filled and freed again, beyond those before.
FREED = """
import torch
from runtime.host_allocator import give_back_freed, keep_freed
from runtime.machine import resident_bytes
assert {function}()
# The first tensors load the code that fills them.
torch.ones(2**18).add_(1)
before = resident_bytes()
blocks = [torch.ones(2**18) for _ in range(64)]
assert resident_bytes() - before > 60 * 2**20
blocks.clear()
print(resident_bytes() - before)
"""


# Page faults of a thread that fills 128 MiB where another one has given as much back.
THREADS = """
import resource, threading, torch
def fill():
    thread = threading.Thread(target=lambda: torch.ones(2**25))
    thread.start()
    thread.join()
fill()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
fill()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def left(function: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", FREED.format(function=function)], capture_output=True, text=True, check=True
    )
    return float(done.stdout) / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_freed_blocks_leave_or_stay() -> None:
    assert left("give_back_freed") < 16
    assert left("keep_freed") > 60


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
@pytest.mark.skipif(HUGE.is_file() and "[always]" in HUGE.read_text(), reason="pages of 2 MiB are few")
@pytest.mark.parametrize("shared", [True, False])
def test_threads_take_what_others_gave_back(shared: bool) -> None:
    """128 MiB are 32,768 pages of 4 KiB; a thread's own heap ends at 64 MiB, and beyond it all are fresh."""
    environment = os.environ | CPU_RANK_ENVIRONMENT
    if not shared:
        del environment["MALLOC_ARENA_MAX"]
    command = [sys.executable, "-c", THREADS]
    faults = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert faults < 1000 if shared else faults > 30000


def test_a_machine_is_short_below_a_tenth(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    for available, short in ((99, True), (100, False)):
        meminfo.write_text(f"MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  {available} kB\n")
        assert short_of_memory(meminfo) == short
    assert not short_of_memory(tmp_path / "absent")


@pytest.mark.slow
def test_replicas_hold_gradients_once(text_folder: Path, tmp_path: Path) -> None:
    """Under DDP four microbatches add up where they are reduced: a rank of two needs what one alone needs, within a
    third of the 25 MB of its gradients; held twice they would be 25 MB more."""
    from runtime.here import run_here
    from runtime.settings import Settings
    from tests.runtime.tiny_jobs import LLAMA, tiny_plan

    wide = replace(LLAMA, hidden_size=512, head_dim=128, intermediate_size=1024)
    gradients = 4 * wide.parameters()
    assert gradients > 25e6
    needs = []
    for ranks in (1, 2):
        layout = Layout(dp_replicate=ranks)
        plan = write_plan(tiny_plan(layout, model=wide, data=str(text_folder)), tmp_path / f"{ranks}.json")
        measured = run_here(plan, tmp_path / "m.json", Settings(6, 3), timeout=200)
        assert max(measured.reserved_memory) >= max(measured.peak_memory)
        needs.append(max(measured.peak_memory))
    assert needs[1] - needs[0] < gradients / 3
