"""Expert parallelism: experts spread over ranks, tokens sent to them and back."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from simulator.cluster import GroupShape
from simulator.collectives import collective_seconds
from simulator.expert_parallel import (
    ExpertGrid,
    copies_per_token,
    dispatch_bytes,
    expert_grid,
    expert_groups,
    expert_seconds,
    expert_tp,
    overlapped_share,
)
from simulator.job import Job, build_job
from simulator.kernels import Cut, Matmul, block_kernels
from simulator.layout import Layout
from simulator.memory import memory_per_rank
from simulator.model import ModelSpec
from simulator.presets import find_model, find_stack
from simulator.program import stage_costs
from simulator.simulate import simulate

NODE = GroupShape(ranks=8, domains=1, ranks_per_domain=8, bandwidth=450e9)
ALONE = GroupShape(ranks=1, domains=1, ranks_per_domain=1, bandwidth=450e9)


def job(model: str = "mixtral-8x7b", nodes: int = 1, **stack: Any) -> Job:
    recipe = {"global_batch_size": 64, "seq_len": 4096, "stack": "megatron-core"}
    task = build_job({"model": model, "cluster": "dgx-h100", "nodes": nodes, "training": recipe}, "test")
    return dataclasses.replace(task, stack=dataclasses.replace(task.stack, **stack))


def test_bytes_of_dispatch() -> None:
    """e·topk·T·h = 2·2·4,096·4,096 = 64 MiB for Mixtral; over tp = 2 each rank sends its half."""
    task = job()
    assert dispatch_bytes(task, Cut(1, 4096, 1, False, 1, 8, 1), NODE, 2) == 2**26
    assert dispatch_bytes(task, Cut(1, 4096, 2, True, 1, 8, 1), NODE, 2) == 2**25
    assert dispatch_bytes(task, Cut(1, 4096, 1, False, 2, 8, 1), NODE, 2) == 2**25


def test_seconds_of_dispatch_and_combine() -> None:
    """Two all-to-alls each way, ahead of them one of 8 bytes for each of 8 experts; in 8 bits the dispatch of the
    forward alone takes half."""
    task, cut = job(), Cut(1, 4096, 1, False, 1, 8, 1)
    one = collective_seconds("all_to_all", 2**26, NODE, task.cluster)
    counts = collective_seconds("all_to_all", 8 * task.model.num_experts, NODE, task.cluster)
    assert expert_seconds(task, cut, NODE, ALONE) == pytest.approx((counts + 2 * one, 2 * one))
    recipes = {"bf16": dataclasses.replace(task.stack.recipes["bf16"], dispatch=1.0)}
    eight = dataclasses.replace(task, stack=dataclasses.replace(task.stack, recipes=recipes))
    half = collective_seconds("all_to_all", 2**25, NODE, task.cluster)
    assert expert_seconds(eight, cut, NODE, ALONE) == pytest.approx((counts + one + half, 2 * one))


@pytest.mark.parametrize(("experts", "chosen", "groups"), [(8, 2, 4), (6, 3, 2), (8, 2, 8), (9, 4, 3)])
def test_copies_are_counted_over_all_choices(experts: int, chosen: int, groups: int) -> None:
    """Every way to choose `chosen` of `experts` experts, and in how many groups it lies."""
    import itertools

    choices = list(itertools.combinations(range(experts), chosen))
    counted = sum(len({e * groups // experts for e in choice}) for choice in choices) / len(choices)
    model = dataclasses.replace(find_model("mixtral-8x7b"), num_experts=experts, num_experts_per_tok=chosen)
    assert copies_per_token(model, groups) == pytest.approx(counted)


def test_a_token_goes_once_to_each_rank() -> None:
    """Qwen3-30B, 8 of 128 experts on 8 ranks: 8·(1 - C(112, 8) / C(128, 8)) = 5.34 copies instead of 8."""
    task, cut = job("qwen3-30b-a3b", expert_dispatch="deduplicated"), Cut(1, 4096, 1, False, 1, 8, 1)
    copies = 8 * (1 - math.comb(112, 8) / math.comb(128, 8))
    assert dispatch_bytes(task, cut, NODE, 2) == pytest.approx(2 * copies * 4096 * 2048)
    assert copies == pytest.approx(5.34, abs=0.01)


@pytest.mark.parametrize(
    ("experts", "parts"), [(16, 2), (16, 4), (16, 8), (16, 16), (20, 5), (20, 10), (24, 3), (24, 6), (24, 12)]
)
@pytest.mark.parametrize("left", [1, 2, 4])
def test_copies_with_groups_are_counted_over_all_choices(experts: int, parts: int, left: int) -> None:
    """Every way to choose `left` of 4 groups of experts, and then 2 experts in those; on 5 nodes of 4 experts out of
    groups of 5 most nodes have a part of two groups."""
    counts = []
    for groups in itertools.combinations(range(4), left):
        among = [e for e in range(experts) if e * 4 // experts in groups]
        counts += [len({e * parts // experts for e in two}) for two in itertools.combinations(among, 2)]
    mixtral = find_model("mixtral-8x7b")
    model = dataclasses.replace(mixtral, num_experts=experts, num_experts_per_tok=2, n_group=4, topk_group=left)
    assert copies_per_token(model, parts) == pytest.approx(sum(counts) / len(counts))


def test_a_token_of_deepseek_goes_to_four_nodes_at_most() -> None:
    """8 of 128 experts that are left in 4 of 8 groups, on 8 nodes 4·(1 - C(96, 8) / C(128, 8)) = 3.63, where all
    groups would make 8·(1 - C(224, 8) / C(256, 8)) = 5.29. On 4 nodes of two groups each C(6, 4) / C(8, 4) = 21 % have
    none."""
    model = find_model("deepseek-v3")
    assert (model.n_group, model.topk_group) == (8, 4)
    assert copies_per_token(model, 8) == pytest.approx(4 * (1 - math.comb(96, 8) / math.comb(128, 8)))
    assert copies_per_token(model, 8) == pytest.approx(3.63, abs=0.01)
    assert copies_per_token(dataclasses.replace(model, n_group=1, topk_group=1), 8) == pytest.approx(5.29, abs=0.01)
    assert copies_per_token(model, 4) <= 4 * (1 - 15 / 70)
    assert find_model("deepseek-v2").topk_group == 3
    assert find_model("deepseek-v2-lite").n_group == 1


@pytest.mark.parametrize(("nodes", "measured"), [(2, 90e9), (4, 58e9), (8, 51e9)])
def test_dispatch_between_nodes_against_deepep(nodes: int, measured: float) -> None:
    """DeepEP with 4,096 tokens of 7,168 elements in 8 bits, 8 experts in 4 groups, on cards of 50 GB/s: bytes to all
    nodes, the own one included, over seconds (deepseek-ai/DeepEP@0297fc80: docs/legacy.md for 32 and 64 ranks, README
    for 16). By the constants of NCCL's all-to-all it takes a fifth longer."""
    task, cut = job("deepseek-v3", expert_dispatch="forwarded"), Cut(1, 4096, 1, False, 1, 8 * nodes, 1)
    shape = GroupShape(ranks=8 * nodes, domains=nodes, ranks_per_domain=8, bandwidth=8 * 50e9)
    size = dispatch_bytes(task, cut, shape, 1)
    assert size == 4096 * 7168 * copies_per_token(task.model, nodes)
    bandwidth = size / collective_seconds("all_to_all", size, shape, task.cluster)
    assert 0.75 * measured < bandwidth < measured


def test_a_token_is_forwarded_between_nodes_alone() -> None:
    """Inside of a node all 8 copies go their own ways."""
    task, cut = job("deepseek-v3", expert_dispatch="forwarded"), Cut(1, 4096, 1, False, 1, 8, 1)
    assert dispatch_bytes(task, cut, NODE, 2) == 2 * 8 * 4096 * 7168


@pytest.mark.parametrize(
    ("layout", "share"),
    [
        ({"dp_shard": 8, "zero_stage": 1}, 7 / 8),  # 64 / 8 microbatches: the last has no forward beside it
        ({"dp_shard": 8, "zero_stage": 1, "micro_batch_size": 8}, 0),  # the only one
        ({"dp_shard": 8, "zero_stage": 1, "recompute": "full"}, 0),
        ({"dp_shard": 2, "zero_stage": 1, "pp": 4}, 0),  # 1F1B without virtual stages
        (
            # 32 microbatches through 3 stages each; the first 2·4 + 1 forwards come ahead of the last rank's backwards.
            {"dp_shard": 2, "zero_stage": 1, "pp": 4, "schedule": "Interleaved1F1B", "virtual_stages": 3},
            (96 - 9) / 96,
        ),
    ],
)
def test_which_passes_hide_their_exchanges(layout: dict[str, Any], share: float) -> None:
    cut = Layout(ep=2, **layout)
    assert overlapped_share(job(overlap_ep=True), cut) == pytest.approx(share)
    assert overlapped_share(job(), cut) == 0
    assert overlapped_share(job(overlap_ep=True), dataclasses.replace(cut, ep=1)) == 0


def test_a_single_microbatch_hides_nothing() -> None:
    layout = Layout(dp_shard=8, ep=8, zero_stage=1, micro_batch_size=8)
    without, asked = (simulate(job(overlap_ep=o), layout) for o in (False, True))
    assert asked.step_seconds == without.step_seconds


sizes = st.sampled_from([1, 2, 4])


@given(sizes, sizes, sizes, sizes, sizes, st.sampled_from([0, 1, 3]), st.booleans())
def test_the_expert_grid_covers_the_stage(
    tp: int, cp: int, shard: int, replicate: int, ep: int, zero: int, split: bool
) -> None:
    stack = dataclasses.replace(find_stack("megatron-core"), expert_tensor_parallel=split)
    layout = Layout(tp=tp, cp=cp, dp_shard=shard if zero else 1, dp_replicate=replicate, ep=ep, zero_stage=zero)  # type: ignore[arg-type]
    inner = (layout.dp_shard if zero else replicate) * cp * tp
    assume(inner % (expert_tp(layout, stack) * ep) == 0)  # Layout.problems refuses the others.
    grid = expert_grid(layout, stack)
    assert grid.tp * grid.ep * grid.shards * grid.replicas == layout.world_size
    spread, shards, replicas = expert_groups(layout, grid, 0)
    assert (len(spread), len(shards), len(replicas)) == (ep, grid.shards, grid.replicas)


def test_experts_lie_side_by_side() -> None:
    """tp 2, whole experts: ep takes the tensor-parallel ranks too, so four ranks of a node; the next ones repeat."""
    layout = Layout(tp=2, dp_shard=8, ep=4, zero_stage=1, pp=2, sequence_parallel=True)
    grid = expert_grid(layout, find_stack("megatron-core"))
    assert grid == ExpertGrid(tp=1, ep=4, shards=4, replicas=1)
    assert expert_groups(layout, grid, 1) == ((16, 17, 18, 19), (16, 20, 24, 28), (16,))


@pytest.mark.parametrize("ep", [1, 2, 4, 8])
def test_experts_of_a_rank(ep: int) -> None:
    """Mixtral has 32 · 8 experts of 3·4,096·14,336 weights; a rank holds 1/ep of them and all of the rest."""
    task = job()
    stage = stage_costs(task, Layout(dp_shard=8, ep=ep, zero_stage=1))[0]
    routed = 32 * 8 * 3 * 4096 * 14336
    assert stage.parameters == pytest.approx(task.model.parameters() - routed + routed / ep)
    assert stage.experts == (routed / ep if ep > 1 else 0)


def test_state_of_spread_experts() -> None:
    """ep 4 on eight ranks: the rest of the optimizer state is sharded by 8, that of an expert by the 2 ranks that
    hold it; 2 bytes of weight, 4 of gradient, 12 of optimizer (Megatron-Core)."""
    task, layout = job(), Layout(dp_shard=8, ep=4, zero_stage=1)
    (rank,) = memory_per_rank(task, layout, stage_costs(task, layout))
    routed = 32 * 8 * 3 * 4096 * 14336
    rest = task.model.parameters() - routed
    assert rank.parameters == pytest.approx(2 * (rest + routed / 4))
    assert rank.gradients == pytest.approx(4 * (rest + routed / 4))
    assert rank.optimizer == pytest.approx(12 * (rest / 8 + routed / 4 / 2))


def test_all_state_is_kept_once() -> None:
    """With zero_stage 1 the optimizer state of all ranks together is 12 bytes per parameter, whatever ep is."""
    task = job()
    for ep in (1, 2, 4, 8):
        layout = Layout(dp_shard=8, ep=ep, zero_stage=1)
        (rank,) = memory_per_rank(task, layout, stage_costs(task, layout))
        assert 8 * rank.optimizer == pytest.approx(12 * task.model.parameters())


def expert_flops(model: ModelSpec, cut: Cut) -> float:
    kernels = block_kernels(model, "moe", True, cut, find_stack("megatron-core"))
    return sum(2 * k.m * k.n * k.k * k.copies for k in kernels if isinstance(k, Matmul) and k.copies > 1)


def test_no_token_is_lost() -> None:
    """The experts of a rank multiply T·topk tokens whatever ep is; whole experts under tp get their part of them."""
    model = find_model("qwen3-30b-a3b")
    alone = 2 * 4096 * 8 * 3 * 2048 * 768
    assert expert_flops(model, Cut(1, 4096, 1, False)) == alone
    for ep in (2, 8, 64):
        assert expert_flops(model, Cut(1, 4096, 1, False, 1, ep, 1)) == pytest.approx(alone)
    assert expert_flops(model, Cut(1, 4096, 4, True, 1, 8, 1)) == pytest.approx(alone / 4)
    assert expert_flops(model, Cut(1, 4096, 4, True, 1, 8, 4)) == pytest.approx(alone / 4)


def test_larger_matmuls_for_fewer_experts() -> None:
    """ep ranks send each expert ep times the tokens: the matmul of one expert grows from 256 to 2,048 rows."""
    model = find_model("qwen3-30b-a3b")
    rows = {
        ep: next(
            k.m
            for k in block_kernels(model, "moe", True, Cut(1, 4096, 1, False, 1, ep, 1), find_stack("megatron-core"))
            if k.name == "gate_up" and isinstance(k, Matmul)
        )
        for ep in (1, 8)
    }
    assert rows == {1: 256, 8: 2048}


def test_the_breakdown_shows_ep_and_overlap_hides_it() -> None:
    """An eighth of the passes has no partner; hiding the rest costs 0.189 / 1.189 of it."""
    layout = Layout(dp_shard=8, ep=8, zero_stage=1)
    exposed, hidden = (simulate(job(overlap_ep=o), layout).breakdown.ep for o in (False, True))
    assert 0 < hidden < exposed / 3
    assert simulate(job(), Layout(dp_shard=8, zero_stage=1)).breakdown.ep == 0


def test_split_experts_gather_over_tp() -> None:
    """With tp 2 inside an expert, T·topk tokens are gathered over tp before it and scattered behind."""
    task, cut = job(), Cut(1, 4096, 2, True, 1, 4, 2)
    four, two = dataclasses.replace(NODE, ranks=4, ranks_per_domain=4), dataclasses.replace(NODE, ranks=2)
    whole = expert_seconds(task, dataclasses.replace(cut, expert_tp=1), four, two)
    split = expert_seconds(task, cut, four, two)
    size = 2 * 4096 * 2 * 4096
    added = sum(collective_seconds(kind, size, two, task.cluster) for kind in ("all_gather", "reduce_scatter"))
    assert split == pytest.approx([seconds + added for seconds in whole])


def test_a_call_per_expert_costs_the_host() -> None:
    """Transformer Engine calls cuBLAS for each of Qwen3's 16 local experts: two matmuls more 15 times forward."""
    from simulator.compute import kernel_time

    task, cut = job("qwen3-30b-a3b"), Cut(1, 4096, 1, False, 1, 8, 1)
    grouped = dataclasses.replace(task.stack, grouped_experts=True)
    kernels = block_kernels(task.model, "moe", True, cut, task.stack)
    one, each = (kernel_time(kernels, task.cluster.gpu, s, "bf16", 1).host_forward for s in (grouped, task.stack))
    assert each - one == pytest.approx(2 * 15 * task.stack.host.forward)
