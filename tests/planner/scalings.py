"""Plans of one small job on several numbers of nodes, with times that a test chooses."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from planner.plan import Certificate, Plan
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.results import Breakdown, Prediction
from simulator.simulate import simulate

SMALL: dict[str, Any] = {
    "model": "gpt2",
    "cluster": "dgx-a100",
    "nodes": 1,
    "training": {"global_batch_size": 64, "seq_len": 1024},
}


def small_job(**keys: Any) -> Job:
    """GPT-2 on one node with 8 GPUs, 64 x 1024 tokens a step; words change keys of the job."""
    return build_job(SMALL | keys, "test")


@functools.cache
def _some_prediction() -> Prediction:
    return simulate(small_job(), Layout(dp_replicate=8))


def made_plan(job: Job, nodes: int, risk: float = 0.0, **items: float) -> Plan:
    """A plan on so many nodes whose step takes the sum of the items of its breakdown, in seconds."""
    own = dataclasses.replace(job, nodes=nodes)
    breakdown = Breakdown(**items)
    step = breakdown.total()
    tokens = own.tokens_per_step / step
    best = dataclasses.replace(
        _some_prediction(),
        layout=Layout(dp_replicate=own.world_size),
        fits=True,
        problems=(),
        step_seconds=step,
        breakdown=breakdown,
        tokens_per_second=tokens,
        tokens_per_second_per_gpu=tokens / own.world_size,
        out_of_memory_probability=risk,
    )
    return Plan(own, best, (), best, Certificate(1, 0, 0, 0, 1, 0.0, 1.0), {})
