"""Compiled blocks train as eager ones do, with whatever else is around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulator.layout import Layout
from simulator.presets import find_stack
from simulator.schedules import SPLIT_BACKWARD

HERE = Path(__file__).parent
TRAIN = """
import json, os, sys
import torch, torch.distributed as dist
from tiny_jobs import tiny_plan
from runtime.machine import leave
from runtime.settings import Settings
from runtime.trainer import train
from simulator.layout import Layout

torch.set_num_threads(1)
alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
dist.init_process_group("gloo", **alone)
layouts = [Layout(micro_batch_size=4, recompute=recompute) for recompute in ("none", "selective")]
if dist.get_world_size() == 2:
    layouts = [
        Layout(dp_shard=2, zero_stage=3, micro_batch_size=4),
        Layout(pp=2, micro_batch_size=4),
        Layout(tp=2, sequence_parallel=True, micro_batch_size=8),
    ]
found = []
for layout in layouts:
    for stack in ("layoutwise-cuda", "layoutwise-cuda-compile"):
        found.append(train(tiny_plan(layout, stack=stack, data=sys.argv[1]), Settings(5, 1)).losses)
if dist.get_rank() == 0:
    open(sys.argv[2], "w").write(json.dumps(found))
dist.barrier()
leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_compiled_blocks_train_as_eager_ones(ranks: int, text_folder: Path, tmp_path: Path) -> None:
    script, output = tmp_path / "train.py", tmp_path / "losses.json"
    script.write_text(TRAIN)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [sys.executable, *(torchrun if ranks > 1 else []), str(script), str(text_folder), str(output)],
        env=os.environ | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    losses = json.loads(output.read_text())
    for eager, compiled in zip(losses[::2], losses[1::2], strict=True):
        assert compiled == pytest.approx(eager, rel=1e-5)
        assert compiled != eager, "the same to the last digit: was anything compiled?"


def test_a_split_backward_is_refused_where_blocks_are_compiled() -> None:
    stack = find_stack("layoutwise-cuda-compile")
    assert stack.compile and not find_stack("layoutwise-cuda").compile
    assert set(stack.schedules).isdisjoint(SPLIT_BACKWARD)
    assert Layout().schedule in stack.schedules
