"""A folder of text to train on, and the parity runs: one per world size, shared by all cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some text with structure: a model learns to count within ten steps."""
    folder = tmp_path_factory.mktemp("text")
    for part in range(3):
        lines = (f"{n} and {n + 1} make {2 * n + 1}\n" for n in range(part * 1000, part * 1000 + 500))
        (folder / f"sums-{part}.txt").write_text("".join(lines))
    return folder


@pytest.fixture(scope="session")
def parity_runs(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Losses and gradient norms of every case in parity_cases.CASES and of its reference, by name."""
    folder = tmp_path_factory.mktemp("parity")
    results: dict[str, dict[str, Any]] = {}
    for world_size in (1, 2, 4):
        output = folder / f"{world_size}.json"
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
        command = [sys.executable, *(torchrun if world_size > 1 else []), str(HERE / "parity_worker.py")]
        path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(
            [*command, str(text_folder), str(output)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr[-8000:]
        results |= json.loads(output.read_text())
    return results
