"""Freed memory leaves the process or stays in it, as it was told; replicas hold their gradients once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from runtime.host_allocator import short_of_memory

# Resident bytes after 64 blocks of 1 MiB were filled and freed again, beyond those before.
FREED = """
import torch
from runtime.host_allocator import give_back_freed, keep_freed
from runtime.machine import resident_bytes
assert {function}()
before = resident_bytes()
blocks = [torch.ones(2**18) for _ in range(64)]
assert resident_bytes() - before > 60 * 2**20
blocks.clear()
print(resident_bytes() - before)
"""


def left(function: str) -> float:
    done = subprocess.run(
        [sys.executable, "-c", FREED.format(function=function)], capture_output=True, text=True, check=True
    )
    return float(done.stdout) / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="settings of glibc")
def test_freed_blocks_leave_or_stay() -> None:
    assert left("give_back_freed") < 2
    assert left("keep_freed") > 60


def test_a_machine_is_short_below_a_tenth(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    for available, short in ((99, True), (100, False)):
        meminfo.write_text(f"MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable:  {available} kB\n")
        assert short_of_memory(meminfo) == short
    assert not short_of_memory(tmp_path / "absent")
