"""The optimizer in host memory: what leaves the device, what the host needs for the update, and where it may."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from layout_columns import columns_of

from planner.search import lower_bound
from planner.space import space
from simulator.columns import legal
from simulator.critical_path import critical_path
from simulator.errors import UserError
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.memory import memory_per_rank, update_bytes
from simulator.memory_items import memory_parts
from simulator.passing import Sharding
from simulator.program import stage_costs
from simulator.screen import screen
from simulator.simplicity import complications
from simulator.simulate import simulate
from simulator.step_end import norm_seconds


def job(stack: str = "megatron-core", nodes: int = 1, search: Any = None, **training: Any) -> Job:
    recipe = {"global_batch_size": 64, "seq_len": 4096, "stack": stack} | training
    data = {"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": nodes, "training": recipe, "search": search or {}}
    return build_job(data, "test")


ON_DEVICE = Layout(dp_shard=8, zero_stage=1)
ON_HOST = dataclasses.replace(ON_DEVICE, offload="optimizer")


def test_main_weights_and_moments_leave_the_device() -> None:
    """12 of Megatron's bytes per parameter, an eighth of them on each of 8 ranks: 12 · 8.03e9 / 8 = 12.0e9. Weights (2)
    and gradients (4) stay, and so does what lies beside them."""
    task = job()
    stages = stage_costs(task, ON_DEVICE)
    device, host = (memory_per_rank(task, layout, stages)[0] for layout in (ON_DEVICE, ON_HOST))
    n = task.model.parameters()
    assert n == pytest.approx(8.03e9, rel=1e-3)
    assert host.optimizer == 0.0
    assert (host.parameters, host.gradients) == (pytest.approx(2 * n), pytest.approx(4 * n))
    assert device.peak - host.peak == pytest.approx(12 * n / 8)
    parts = memory_parts(task, ON_HOST, stages)[0]
    assert sum(part.bytes for part in parts) == pytest.approx(host.peak)
    assert "optimizer" not in {part.item for part in parts}


def test_fp16_gradients_reach_the_host_in_their_own_width() -> None:
    """On the device the update makes fp32 gradients of the rank's shard, 4 · n / 8 bytes; for the host it does not."""
    task = job(precision="fp16")
    n, sharding = task.model.parameters(), Sharding.of(task, ON_DEVICE)
    assert update_bytes(task, ON_DEVICE, sharding, n, 0.0) == 4 * n / 8
    assert update_bytes(task, ON_HOST, sharding, n, 0.0) == 0.0


@pytest.mark.parametrize("nodes", [1, 2])
def test_the_host_updates_what_the_ranks_of_its_node_hold(nodes: int) -> None:
    """28 bytes for each of 8.03e9 parameters at 115 GB/s: 1.955 s on one node, half of it on each of two."""
    task = job(nodes=nodes)
    layout = dataclasses.replace(ON_HOST, dp_shard=8 * nodes)
    found = simulate(task, layout)
    update = found.breakdown.optimizer - norm_seconds(task, layout)
    assert update == pytest.approx(28 * 8.03e9 / 115e9 / nodes, rel=1e-3)
    device = simulate(task, dataclasses.replace(layout, offload="none"))
    # On the device 34 bytes for each of 8.03e9 / 8n parameters take milliseconds.
    assert device.breakdown.optimizer < 0.02
    assert found.step_seconds - device.step_seconds == pytest.approx(
        found.breakdown.optimizer - device.breakdown.optimizer
    )


LAYOUTS = [
    *(dataclasses.replace(ON_HOST, dp_shard=16, micro_batch_size=size) for size in (1, 4)),
    Layout(dp_shard=2, tp=4, pp=2, zero_stage=1, sequence_parallel=True, offload="optimizer"),
    Layout(dp_shard=2, dp_replicate=2, pp=4, zero_stage=1, schedule="Interleaved1F1B", virtual_stages=2),
    Layout(dp_shard=2, dp_replicate=2, pp=4, zero_stage=1, recompute="full", offload="optimizer"),
    Layout(cp=2, dp_shard=4, tp=2, zero_stage=1, sequence_parallel=True, offload="optimizer"),
    dataclasses.replace(ON_DEVICE, dp_shard=16),
]


def test_bounds_stay_below_the_simulation_side_by_side() -> None:
    """Rows with and without offload in one table."""
    task = job(nodes=2)
    screened = screen(task, columns_of(LAYOUTS))
    for row, layout in enumerate(LAYOUTS):
        assert not layout.problems(task)
        stages, found = stage_costs(task, layout), simulate(task, layout)
        bounds = (screened.seconds[row], lower_bound(task, layout, stages), critical_path(task, layout, stages))
        assert max(bounds) <= found.step_seconds * (1 + 1e-9), layout.short()
        assert screened.memory[row] <= found.memory.peak * (1 + 1e-9), layout.short()
        # No bound forgets what the host takes: a table of one row says the same.
        alone = screen(task, columns_of([layout]))
        assert (alone.seconds[0], alone.memory[0]) == (screened.seconds[row], screened.memory[row])


REFUSED = [
    (
        "torchtitan",
        {},
        dataclasses.replace(ON_HOST, zero_stage=3),
        "stack torchtitan cannot keep the optimizer alone in host memory",
    ),
    ("layoutwise-cuda", {}, ON_HOST, "cannot keep the optimizer alone in host memory"),
    ("megatron-core", {}, Layout(dp_replicate=8, offload="optimizer"), "zero_stage in [1]"),
    ("megatron-core", {}, dataclasses.replace(ON_HOST, zero_stage=3), "zero_stage in [1]"),
    ("megatron-core", {"optimizer": "sgd"}, ON_HOST, "is for optimizer = 'adamw', not 'sgd'"),
    ("megatron-core", {"peft": "lora"}, ON_HOST, "peft = 'lora' has next to no optimizer state"),
]


@pytest.mark.parametrize(("stack", "training", "layout", "reason"), REFUSED)
def test_where_it_is_not_legal(stack: str, training: dict[str, Any], layout: Layout, reason: str) -> None:
    task = job(stack, **training)
    (problem,) = layout.problems(task)
    assert reason in problem
    assert not legal(task, columns_of([layout]))[0]
    assert not dataclasses.replace(layout, offload="none").problems(task)


def test_it_is_a_candidate_only_where_search_names_it() -> None:
    kept = {"tp": [2], "pp": [1], "cp": [1], "micro_batch_size": [1]}
    plain, named = (space(job(search=kept | more)) for more in ({}, {"offload": ["none", "optimizer"]}))
    assert not plain.is_named("offload", "optimizer").any()
    assert len(named) == 2 * len(plain) and named.is_named("offload", "optimizer").sum() == len(plain)
    task = job(search=kept)
    assert legal(task, named).tolist() == [not named.layout(row).problems(task) for row in range(len(named))]
    assert np.any(legal(task, named) & named.is_named("offload", "optimizer"))


def test_in_words() -> None:
    task = job()
    assert parse_layout("dp_shard=8 offload=optimizer", task) == ON_HOST
    assert ON_HOST.short() == "dp_shard=8 zero_stage=1 offload=optimizer"
    assert complications(ON_HOST) == (*complications(ON_DEVICE), "offload")
    with pytest.raises(UserError, match="offload = 'optimiser' is not valid; did you mean 'optimizer'"):
        parse_layout("offload=optimiser", task)
