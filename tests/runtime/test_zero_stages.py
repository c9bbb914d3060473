"""What each zero_stage gathers and reduces in a step of four microbatches is what the simulator says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Rank 0 of two, whose collectives go nowhere: what a step calls, and how often.
COUNT = """
import collections, json, sys
import torch, torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from tiny_jobs import tiny_plan
from runtime.data import Batches
from runtime.step import build_run
from simulator.layout import Layout

class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace in ("c10d", "_c10d_functional"):
            self.found[op._schema.name.split("::")[1].strip("_")] += 1
        return op(*args, **(kwargs or {}))

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
found = {}
for zero in (1, 2, 3):
    layout = Layout(dp_shard=2, zero_stage=zero, micro_batch_size=1)
    job = tiny_plan(layout, data=sys.argv[1]).job
    run = build_run(job, layout, torch.device("cpu"))
    batch = Batches(job, layout, 0, torch.device("cpu")).load(0)
    with Count() as count:
        run.step(batch)
    found[zero] = dict(count.found)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def counted(text_folder: Path) -> dict[str, dict[str, int]]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COUNT, str(text_folder)],
        cwd=HERE.parents[1], env={"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def calls(counted: dict[str, dict[str, int]], zero: int) -> tuple[int, int]:
    """All-gathers and reduce-scatters of a step."""
    kinds = counted[str(zero)]
    gathers = sum(n for name, n in kinds.items() if "allgather" in name or "all_gather" in name)
    return gathers, sum(n for name, n in kinds.items() if "reduce_scatter" in name)


def test_units_are_gathered_and_reduced_as_often_as_the_zero_stage_says(counted: dict[str, dict[str, int]]) -> None:
    """Five units: four blocks and the root. Of zero_stage 3 the root is not gathered again for the backward."""
    assert calls(counted, 1) == (5, 5)
    assert calls(counted, 2) == (5, 4 * 5)
    assert calls(counted, 3) == (4 * (5 + 4), 4 * 5)
