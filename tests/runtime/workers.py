"""Scripts of this folder as processes that speak to each other."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from runtime.here import RESTART_ENVIRONMENT

HERE = Path(__file__).parent


def start_worker(script: str, world_size: int, *arguments: str, restarts: int = 0, timeout: float = 900) -> str:
    """Run a script of this folder under torchrun to its good end (one process needs no torchrun); its stderr."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    torchrun += [f"--max-restarts={restarts}"]
    alone = world_size == 1 and not restarts
    restarting = RESTART_ENVIRONMENT if restarts else {}
    path = os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *([] if alone else torchrun), str(HERE / script), *arguments],
        env=os.environ | restarting | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return done.stderr
