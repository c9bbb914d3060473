"""Bytes of a rank: the papers' arithmetic, item by item."""

from __future__ import annotations

import dataclasses

import pytest

from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.memory import capacity, fullest, memory_per_rank
from simulator.program import stage_costs
from simulator.results import MemoryBreakdown
from simulator.schedules import peak_in_flight


def job(stack: str = "megatron-core", model: str = "llama-3.1-8b", nodes: int = 1, **training: object) -> Job:
    recipe = {"global_batch_size": 64, "seq_len": 4096, "stack": stack} | training
    return build_job({"model": model, "cluster": "dgx-h100", "nodes": nodes, "training": recipe}, "test")


def memory(task: Job, layout: Layout) -> tuple[MemoryBreakdown, ...]:
    assert not layout.problems(task)
    return memory_per_rank(task, layout, stage_costs(task, layout))


def test_state_of_megatrons_distributed_optimizer() -> None:
    """2 bytes of weight and 4 of gradient on every rank, 12/d of optimizer (Megatron-LM docs, dist_optimizer.md)."""
    task = job()
    (rank,) = memory(task, Layout(dp_shard=8, zero_stage=1))
    n = task.model.parameters()
    assert rank.parameters == pytest.approx(2 * n)
    assert rank.gradients == pytest.approx(4 * n)
    assert rank.optimizer == pytest.approx(12 * n / 8)


def test_state_of_fsdp2() -> None:
    """16 bytes per parameter over d ranks (torchtitan: fp32 shards, fp32 gradients, AdamW)."""
    task = job("torchtitan")
    (rank,) = memory(task, Layout(dp_shard=8, zero_stage=3))
    assert rank.parameters + rank.gradients + rank.optimizer == pytest.approx(16 * task.model.parameters() / 8)


def test_zero_2_keeps_gathered_weights() -> None:
    task = job("torchtitan")
    (two,), (three,) = (memory(task, Layout(dp_shard=8, zero_stage=z)) for z in (2, 3))
    assert two.buffers - three.buffers > 0.8 * 2 * task.model.parameters()


def test_1f1b_keeps_fewer_microbatches_than_gpipe() -> None:
    """32 microbatches over 4 ranks: GPipe keeps all, 1F1B at most 4 - r."""
    task = job("torchtitan", nodes=1)
    one = memory(task, Layout(dp_replicate=2, pp=4, micro_batch_size=1))
    gpipe = memory(task, Layout(dp_replicate=2, pp=4, micro_batch_size=1, schedule="GPipe"))
    saved = stage_costs(task, Layout(dp_replicate=2, pp=4))[1].saved
    assert gpipe[1].activations - one[1].activations == pytest.approx((32 - 3) * saved)
    # The last rank keeps one microbatch of its blocks, but its logits besides.
    assert one[0].activations > one[2].activations


def test_a_v_keeps_its_fullest_moment_of_both_chunks() -> None:
    """ZBV on two ranks, 16 microbatches. Rank 0 holds the first and the last stage: 0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1
    0F3 0I0 0W0 3F2 ... keeps three of stage 0 and one of stage 3, or four of stage 0, each with one whose weight
    gradient is due. Stage 3 has the logits, so the first is the peak; stage 0 defers its whole backward."""
    task = job("torchtitan")
    layout = Layout(dp_replicate=4, pp=2, virtual_stages=2, schedule="ZBVZeroBubble")
    stages = stage_costs(task, layout)
    moments = peak_in_flight("ZBVZeroBubble", 0, 2, 2, 16)
    assert set(moments) == {((0, 3, 0), (3, 1, 1)), ((0, 4, 1), (3, 0, 0))}
    assert stages[3].saved > stages[0].saved
    rank = memory(task, layout)[0]
    expected = 3 * stages[0].saved + stages[3].saved + stages[3].deferred + max(stages[0].working, stages[3].working)
    assert rank.activations == pytest.approx(expected)


def test_more_than_three_stages_of_a_rank_are_not_all_gathered() -> None:
    """Eight blocks on each of four ranks, as two stages of four or as four of two: torch keeps three of the four."""
    task = job("torchtitan")
    two, four = (
        memory(task, Layout(dp_shard=2, pp=4, zero_stage=2, schedule="Interleaved1F1B", virtual_stages=v))[1]
        for v in (2, 4)
    )
    block = stage_costs(task, Layout(pp=32))[1].parameters
    received = 2 * 2 * 32 * 4096 * 4096 * 2  # of two more stages, from both sides: 32 microbatches in bf16
    assert two.buffers - four.buffers == pytest.approx(2 * block * 2 - received)


def test_gpipe_keeps_the_logits_of_every_microbatch() -> None:
    """4 bytes per logit for the loss's backward, 32 microbatches alive on the last rank against one."""
    task = job("torchtitan")
    logits = 4 * 4096 * 128256
    one, gpipe = (
        memory(task, Layout(dp_replicate=2, pp=4, schedule=s, recompute="full"))[-1]  # type: ignore[arg-type]
        for s in ("1F1B", "GPipe")
    )
    assert gpipe.activations - one.activations > 31 * logits


def test_zero_3_under_a_pipeline_holds_the_whole_stage() -> None:
    """torch does not reshard after a backward under a pipeline: the gathered weights are those of zero_stage 2."""
    task = job("torchtitan")
    two, three = (memory(task, Layout(dp_shard=4, pp=2, zero_stage=z))[0] for z in (2, 3))
    assert three.buffers == pytest.approx(two.buffers)


def test_ranks_on_a_cpu_share_its_memory() -> None:
    task = job()
    cpu = dataclasses.replace(task.cluster, gpu=dataclasses.replace(task.cluster.gpu, kind="cpu"), gpus_per_node=2)
    task = dataclasses.replace(task, cluster=cpu)
    assert capacity(task, Layout()) == 4 * capacity(task, Layout(dp_replicate=4))


def test_full_recompute_keeps_the_input_of_each_block() -> None:
    """2·s·b·h bytes per block and one block's working set."""
    task = job()
    none, full = (memory(task, Layout(dp_shard=8, zero_stage=1, recompute=r))[0] for r in ("none", "full"))
    boundary = 32 * 2 * 4096 * 4096
    assert full.activations < none.activations / 3
    assert full.activations > boundary


def test_selective_recompute_drops_the_scores() -> None:
    """5·a·s²·b/t bytes per block (arXiv 2205.05198)."""
    task = job("megatron-2021", "gpt3-175b", nodes=8, seq_len=2048)
    kept, dropped = (
        fullest(memory(task, parse_layout(f"tp=8 pp=8 dp_replicate=1 recompute={r}", task)))
        for r in ("none", "selective")
    )
    scores = 5 * 96 * 2048**2 / 8
    # 96 layers over 8 ranks, 8 microbatches alive on the first; one block's scores come back while it works.
    assert kept.activations - dropped.activations == pytest.approx(scores * (12 * 8 - 1), rel=0.02)


def test_tensor_parallelism_divides_weights_but_not_norms() -> None:
    task = job()
    (rank,) = memory(task, parse_layout("tp=8", task))
    norms = 2 * 32 * 4096
    n = task.model.parameters()
    assert rank.parameters == pytest.approx(2 * ((n - norms) / 8 + norms), rel=1e-4)


def test_peak_is_the_sum_of_its_items() -> None:
    (rank,) = memory(job(), Layout(dp_shard=8, zero_stage=1))
    items = [getattr(rank, f.name) for f in dataclasses.fields(rank) if f.name != "peak"]
    assert rank.peak == pytest.approx(sum(items))


def test_zero_stage_1_of_fsdp_shards_parameters_and_holds_a_gathered_copy() -> None:
    """4 + 8 bytes of weights and moments on one of 8 ranks, 2 gathered and 4 of gradients whole (bf16)."""
    task = job("layoutwise-cuda")
    (rank,) = memory(task, Layout(dp_shard=8, zero_stage=1))
    n = task.model.parameters()
    assert rank.parameters == pytest.approx(4 * n / 8)
    assert rank.optimizer == pytest.approx(8 * n / 8)
    assert rank.gradients == pytest.approx(4 * n)
    # And the largest unit's gradient on its way: the embedding's or the head's.
    assert rank.buffers == pytest.approx(2 * n + 4 * task.model.vocab_size * task.model.hidden_size, rel=1e-3)


def test_replicas_of_a_split_backward_are_fsdps() -> None:
    """Without sharding, DDP holds no copy in fp32; a split backward is replicated by FSDP, which does."""
    task = job("layoutwise-cuda", precision="fp32")
    chunks = {"pp": 2, "virtual_stages": 2, "dp_replicate": 4}
    ddp, fsdp = (
        memory(task, Layout(schedule=name, **chunks))[0] for name in ("Interleaved1F1B", "InterleavedZeroBubble")
    )
    assert fsdp.buffers - ddp.buffers == pytest.approx(fsdp.parameters)
