"""Context parallelism: a part of the sequence for each rank, and the keys and values that go round."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest

from simulator.activations import saved_bytes
from simulator.cluster import GroupShape
from simulator.compute import kernel_time
from simulator.context_parallel import context_seconds, key_value_bytes
from simulator.job import Job, build_job
from simulator.kernels import Attention, Cut, Matmul, block_kernels
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.memory import memory_per_rank, memory_timeline
from simulator.presets import find_cluster, find_model, find_stack
from simulator.program import stage_costs
from simulator.simulate import simulate
from simulator.stage import StageCosts

H100 = find_cluster("dgx-h100")
NODE = GroupShape(ranks=4, domains=1, ranks_per_domain=4, bandwidth=450e9)


def job(
    method: Literal["ring", "all_gather", "ulysses"] = "ring", stack: str = "megatron-core", **training: object
) -> Job:
    recipe = {"global_batch_size": 8, "seq_len": 65536, "stack": stack} | training
    task = build_job({"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 1, "training": recipe}, "test")
    return dataclasses.replace(task, stack=dataclasses.replace(task.stack, context_parallel=method))


def core(task: Job, cp: int) -> Attention:
    cut = Cut(1, task.training.seq_len, 1, False, cp)
    kernels = block_kernels(task.model, "dense", True, cut, task.stack)
    return next(k for k in kernels if isinstance(k, Attention))


def test_bytes_of_a_block_of_keys_and_values() -> None:
    """e·b·(s/c)·k·2d = 2·1·16,384·8·256 = 64 MiB for Llama-3-8B, 65,536 tokens over four ranks."""
    assert key_value_bytes(core(job(), 4), 2) == 2 * 16384 * 8 * 256 == 2**26


def test_a_ring_that_attention_hides_costs_only_the_hiding() -> None:
    """Three steps of 64 MiB beside a quarter of the attention each: 10 us + 64 MiB / (0.836 · 450 GB/s) = 188 us."""
    task = job()
    message = 10e-6 + 2**26 / (0.836 * 450e9)
    forward, backward = context_seconds(task, core(task, 4), NODE, 4.0, 4.0)
    assert forward == pytest.approx(3 * message * 0.189 / 1.189)
    assert backward == pytest.approx(3 * (2 * message - 10e-6) * 0.189 / 1.189)


def test_a_ring_beside_no_attention_is_exposed() -> None:
    """(c - 1) messages there, and twice the bytes back."""
    task = job()
    forward, backward = context_seconds(task, core(task, 4), NODE, 0.0, 0.0)
    assert forward == pytest.approx(3 * (10e-6 + 2**26 / (0.836 * 450e9)))
    assert backward == pytest.approx(3 * (10e-6 + 2**27 / (0.836 * 450e9)))


def test_a_stack_may_not_hide_its_ring() -> None:
    """On a processor that the messages need too, all of them count, however long the attention takes."""
    task = job()
    exposed = dataclasses.replace(task, stack=dataclasses.replace(task.stack, overlap_cp=False))
    beside, alone = context_seconds(task, core(task, 4), NODE, 0.0, 0.0), (4.0, 4.0)
    assert context_seconds(exposed, core(exposed, 4), NODE, *alone) == pytest.approx(beside)


def test_a_ring_between_nodes_has_one_ranks_cards() -> None:
    """Two nodes with four ranks each: a rank sends over one card of 50 GB/s, not over its group's four."""
    task = job()
    wide = GroupShape(ranks=8, domains=2, ranks_per_domain=4, bandwidth=200e9)
    forward, _ = context_seconds(task, core(task, 8), wide, 0.0, 0.0)
    assert forward == pytest.approx(7 * (15e-6 + 2**25 / (0.94 * 50e9)), rel=1e-3)


def test_all_gather_is_exposed_and_goes_back_by_reduce_scatter() -> None:
    """4 · 64 MiB gathered, 3/4 of it on the bus; in the backward gathered again and scattered."""
    task = job("all_gather")
    forward, backward = context_seconds(task, core(task, 4), NODE, 100.0, 100.0)
    x = 3 * 2**26
    assert forward == pytest.approx(12e-6 + x / (0.815 * 450e9) + 8.7e-9 * x**0.5)
    assert backward == pytest.approx(2 * forward, rel=0.01)


def test_ulysses_moves_queries_keys_values_and_output() -> None:
    """e·(s/c)·b·h·(2 + 2k/a) bytes each way: 2·16,384·4,096·2.5 = 320 MiB, 3/4 of it to others."""
    task = job("ulysses")
    forward, backward = context_seconds(task, core(task, 4), NODE, 0.0, 0.0)
    fit = H100.scale_up.collectives["all_to_all"][0]
    tensors = [2 * 16384 * 4096] * 2 + [2 * 16384 * 1024] * 2
    assert sum(tensors) == 320 * 2**20
    moved = [0.75 * size for size in tensors]
    expected = sum(fit.latency + x / (fit.efficiency * 450e9) + fit.ramp * x**0.5 for x in moved)
    assert forward == backward == pytest.approx(expected)


@pytest.mark.parametrize("method", ["ring", "all_gather", "ulysses"])
@pytest.mark.parametrize("cp", [1, 2, 4, 8])
def test_no_flop_is_lost_or_done_twice(method: Literal["ring", "all_gather", "ulysses"], cp: int) -> None:
    """c ranks do together what one does alone: s²/2 scores for each head."""
    task = job(method)
    assert cp * core(task, cp).flops == core(task, 1).flops

    def matmuls(ranks: int) -> float:
        kernels = block_kernels(task.model, "dense", True, Cut(1, 65536, 1, False, ranks), task.stack)
        return sum(k.m * k.n * k.k for k in kernels if isinstance(k, Matmul))

    assert cp * matmuls(cp) == matmuls(1)


@pytest.mark.parametrize("method", ["ring", "ulysses"])
def test_half_the_sequence_keeps_half_the_activations(method: Literal["ring", "ulysses"]) -> None:
    task = job(method)

    def saved(cp: int) -> float:
        kernels = block_kernels(task.model, "dense", True, Cut(1, 65536, 1, False, cp), task.stack)
        return saved_bytes(kernels, task.stack, "bf16")

    assert saved(2) == pytest.approx(saved(1) / 2)
    one, two = (
        memory_per_rank(task, layout, stage_costs(task, layout))[0]
        for layout in (parse_layout("dp_shard=8", task), parse_layout("dp_shard=4 cp=2", task))
    )
    assert two.activations == pytest.approx(one.activations / 2)
    # The ranks of cp shard the optimizer with those of dp_shard.
    assert two.optimizer == one.optimizer


def test_short_blocks_of_a_ring_are_slower() -> None:
    """A kernel over s/c keys does not reach the rate of one over s keys."""
    task = job(seq_len=8192)
    gpu = task.cluster.gpu
    one, eight = (kernel_time([core(task, cp)], gpu, task.stack, "bf16", 1).forward for cp in (1, 8))
    assert eight > 1.2 * one / 8


def test_fsdp_shards_over_cp_alone() -> None:
    """torchtitan runs Llama-3-8B with 262,144 tokens on dp_shard 1, cp 8 (benchmarks/llama3_h100_202412)."""
    task = job("all_gather", "torchtitan", global_batch_size=1, seq_len=262144)
    layout = parse_layout("cp=8 recompute=full", task)
    assert (layout.dp_shard, layout.zero_stage, layout.problems(task)) == (1, 3, [])
    moments = memory_timeline(task, layout, stage_costs(task, layout))[0]
    memory = next(moment.after for moment in moments if moment.op == "0B0")
    assert memory.parameters + memory.gradients + memory.optimizer == pytest.approx(16 * task.model.parameters() / 8)


def test_gradients_are_reduced_over_cp_where_nothing_is_sharded() -> None:
    """dp_replicate 4 · cp 2 reduce what dp_replicate 8 do: the same bytes over the same eight ranks."""
    task = job(seq_len=8192)
    layouts = (Layout(dp_replicate=8), Layout(dp_replicate=4, cp=2))
    plain, cut = (stage_costs(task, layout)[0].reduce for layout in layouts)
    assert cut == plain > 0


def test_the_breakdown_shows_cp() -> None:
    task = job("all_gather")
    found = simulate(task, parse_layout("dp_shard=2 cp=4", task)).breakdown
    assert found.cp > 0
    assert simulate(task, parse_layout("dp_shard=8", task)).breakdown.cp == 0


def test_a_runtime_that_cannot_cut_sequences_says_so() -> None:
    stack = find_stack("megatron-2021")
    task = dataclasses.replace(job(), stack=stack)
    assert any("megatron-2021 has no context parallelism" in p for p in Layout(dp_replicate=4, cp=2).problems(task))
    assert find_model("llama-3.1-8b").causal


def test_recomputation_that_keeps_attention_repeats_its_messages() -> None:
    """Outputs of kernels are kept, and messages are none: three steps of a ring in each of 32 blocks again, which no
    attention hides. Without recomputation, and where stacks run attention again, nothing is added to that."""
    task = job(stack="layoutwise-cuda")
    message = 10e-6 + 2**26 / (0.836 * 450e9)

    def ring(recompute: Literal["none", "selective"]) -> float:
        layout = Layout(dp_replicate=2, cp=4, recompute=recompute)
        assert layout.problems(task) == []
        return StageCosts(task, layout).stage(0).backward.cp

    assert ring("selective") - ring("none") == pytest.approx(32 * 3 * message)
