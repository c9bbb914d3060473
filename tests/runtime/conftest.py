"""A folder of text to train on, and the parity runs: one per world size, shared by all cases."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from runtime.here import RESTART_ENVIRONMENT

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some text with structure: a model learns to count within ten steps."""
    folder = tmp_path_factory.mktemp("text")
    for part in range(3):
        lines = (f"{n} and {n + 1} make {2 * n + 1}\n" for n in range(part * 1000, part * 1000 + 500))
        (folder / f"sums-{part}.txt").write_text("".join(lines))
    return folder


def start_worker(script: str, world_size: int, *arguments: str, restarts: int = 0) -> str:
    """Run a script of this folder under torchrun to its good end (one process needs no torchrun); its stderr."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    torchrun += [f"--max-restarts={restarts}"]
    alone = world_size == 1 and not restarts
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *([] if alone else torchrun), str(HERE / script), *arguments],
        env=os.environ | RESTART_ENVIRONMENT | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stderr


@pytest.fixture(scope="session")
def parity_runs(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Losses and gradient norms of every case in parity_cases.CASES and of its reference, by name."""
    folder = tmp_path_factory.mktemp("parity")
    results: dict[str, dict[str, Any]] = {}
    for world_size in (1, 2, 4):
        output = folder / f"{world_size}.json"
        start_worker("parity_worker.py", world_size, str(text_folder), str(output))
        results |= json.loads(output.read_text())
    return results
