"""Every way to keep replicas together learns the same text, also with a straggler.

`layoutwise validate sync` runs the same with a larger model on a measured machine; there its times mean something.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from tiny_jobs import tiny_plan

from planner.sync_trial import WAYS, Trial, layouts, run_trial
from simulator.cluster import AttentionFit, AttentionKernel
from simulator.errors import UserError
from simulator.job import Job
from simulator.layout import Layout


def with_attention(job: Job) -> Job:
    """The same job, which can be predicted too."""
    rate = AttentionFit(1e10, 0.0, 1e10, 0.0)
    gpu = dataclasses.replace(job.cluster.gpu, attention={"sdpa": (AttentionKernel(16, rate, rate),)})
    return dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, gpu=gpu))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_every_way_converges(workers: int, text_folder: Path, tmp_path: Path) -> None:
    """30 steps of 8 samples; from 5.5, the logarithm of 256, all come below 3. The last worker is twice as slow."""
    job = with_attention(tiny_plan(Layout(dp_replicate=workers), data=str(text_folder), sharding="random").job)
    run_trial(job, Trial((workers,), 2.0, 30, 2), tmp_path, lambda *_: None)
    found = json.loads((tmp_path / "sync.json").read_text())["workers"][str(workers)]
    assert [row["name"] for row in found] == list(WAYS)
    assert all(row["equal_samples"] < 3.0 for row in found), found
    by_name = {row["name"]: row for row in found}
    assert by_name["servers, synchronous"]["most_staleness"] == 0
    assert by_name["servers, bounded by 2"]["most_lead"] <= 2
    # The same mathematics, and the same samples.
    same = [by_name[name]["equal_samples"] for name in ("servers, synchronous", "all-reduce", "reduce and broadcast")]
    assert same == pytest.approx([same[0]] * 3, rel=1e-4)
    assert (tmp_path / f"sync-{workers}-workers.png").exists()


def test_workers_that_do_not_divide_a_batch_are_refused() -> None:
    job = tiny_plan(Layout(dp_replicate=3)).job
    with pytest.raises(UserError, match=r"on 3 workers: global_batch_size = 8 is not a multiple"):
        layouts(job, 3)
