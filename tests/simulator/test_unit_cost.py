"""What a unit costs is found once for all layouts that agree in what it depends on."""

from __future__ import annotations

import dataclasses
import itertools

from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.placement import layout_groups
from simulator.program import stage_costs
from simulator.unit_cost import UnitCosts
from simulator.unit_table import UnitTable
from tests.simulator.layout_columns import columns_of


def mixture(stack: str = "megatron-core") -> Job:
    training = {"global_batch_size": 64, "seq_len": 2048, "stack": stack}
    return build_job({"model": "deepseek-v2-lite", "cluster": "dgx-h100", "nodes": 1, "training": training}, "test")


LAYOUTS = [
    Layout(dp_shard=8 // tp, tp=tp, ep=ep, zero_stage=zero, recompute=recompute, sequence_parallel=tp > 1)
    for recompute, ep, tp, zero in itertools.product(("none", "selective", "full"), (1, 2, 8), (1, 2), (1, 3))
]


def test_layouts_share_no_costs_that_differ() -> None:
    """Each layout of a mixture costed by a job that knows no other, and all of them by one."""
    for stack in ("megatron-core", "torchtitan"):
        together = mixture(stack)
        legal = [layout for layout in LAYOUTS if not layout.problems(together)]
        assert len({(layout.ep, layout.recompute) for layout in legal}) > 4
        for layout in legal[::-1]:
            assert stage_costs(together, layout) == stage_costs(mixture(stack), layout), layout.short()


def test_embedding_and_head_are_costed_once_for_all_recomputation_and_experts() -> None:
    task = mixture()
    groups = {layout.tp: layout_groups(task, layout)[0] for layout in LAYOUTS if layout.ep == 1}
    for tp in (1, 2):
        costs = [UnitCosts(task, layout) for layout in LAYOUTS if layout.tp == tp]
        for unit in ("embedding", "head"):
            assert len({id(getattr(one, unit)(groups[tp])) for one in costs}) == 1


def test_a_second_table_says_what_the_first_did() -> None:
    """Also in another order, and of some of the layouts."""
    task = mixture()
    legal = [layout for layout in LAYOUTS if not layout.problems(task)]
    first = UnitTable(task, columns_of(legal))
    for again in (UnitTable(task, columns_of(legal[::-2])), UnitTable(mixture(), columns_of(legal[::-2]))):
        for field in first.table:
            assert (again[field][again.code] == first[field][first.code][::-2]).all()
    other = dataclasses.replace(task, training=dataclasses.replace(task.training, seq_len=4096))
    assert (UnitTable(other, columns_of(legal))["forward"] != first["forward"]).any()
