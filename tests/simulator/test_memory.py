"""Bytes of a rank: the papers' arithmetic, item by item."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.lifetimes import fullest_moments, lifetimes
from simulator.memory import capacity, fullest, memory_per_rank, memory_timeline
from simulator.program import stage_costs
from simulator.results import MemoryBreakdown, MemoryMoment
from simulator.schedules import MULTI_STAGE


def job(stack: str = "megatron-core", model: str = "llama-3.1-8b", nodes: int = 1, **training: object) -> Job:
    recipe = {"global_batch_size": 64, "seq_len": 4096, "stack": stack} | training
    return build_job({"model": model, "cluster": "dgx-h100", "nodes": nodes, "training": recipe}, "test")


def memory(task: Job, layout: Layout) -> tuple[MemoryBreakdown, ...]:
    assert not layout.problems(task)
    return memory_per_rank(task, layout, stage_costs(task, layout))


def curve(task: Job, layout: Layout, rank: int = 0) -> dict[str, MemoryMoment]:
    """The moments of a rank by op."""
    assert not layout.problems(task)
    return {moment.op: moment for moment in memory_timeline(task, layout, stage_costs(task, layout))[rank]}


def test_state_of_megatrons_distributed_optimizer() -> None:
    """2 bytes of weight and 4 of gradient on every rank, 12/d of optimizer (Megatron-LM docs, dist_optimizer.md)."""
    task = job()
    (rank,) = memory(task, Layout(dp_shard=8, zero_stage=1))
    n = task.model.parameters()
    assert rank.parameters == pytest.approx(2 * n)
    assert rank.gradients == pytest.approx(4 * n)
    assert rank.optimizer == pytest.approx(12 * n / 8)


def test_state_of_fsdp2() -> None:
    """16 bytes per parameter over d ranks (fp32 shards, fp32 gradients, AdamW), all of them once the first backward has
    made gradients, 12 before it."""
    task = job("layoutwise-cuda")
    moments = curve(task, Layout(dp_shard=8, zero_stage=3))
    for op, each in (("0F0", 12), ("0B0", 16), ("0B7", 16), ("OPTIMIZER", 12)):
        after = moments[op].after
        state = after.parameters + after.gradients + after.optimizer
        assert state == pytest.approx(each * task.model.parameters() / 8)


def test_what_torchtitan_reserves_has_gradients_all_the_time() -> None:
    """Its 8B runs reserve 15.0 GiB more on 8 GPUs than on 128 (pytorch/torchtitan@b5bcd76c, benchmarks):
    16 * 8.03e9 * (1/8 - 1/128) = 14.0 GiB, where 12 bytes per parameter would be 10.5 GiB."""
    task = job("torchtitan")
    (rank,) = memory(task, Layout(dp_shard=8, zero_stage=3))
    state = rank.parameters + rank.gradients + rank.optimizer
    assert state == pytest.approx(16 * task.model.parameters() / 8)


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
    0F3 0I0 0W0 3F2 ... keeps three of stage 0 besides what stage 3 works on, or three besides stage 0's own forward or
    backward. Nobody waits for an input gradient of stage 0, so that it defers nothing."""
    held: dict[tuple[str, int | None], list[tuple[int, ...]]] = {}
    known = fullest_moments("ZBVZeroBubble", 0, 2, 2, 16, 1)
    for running, stages_held in map(known.moment, range(len(known.counts))):
        kept_deferred = [number for one in stages_held for number in (one.kept, one.deferred)]
        held.setdefault((running.kind, running.stage), []).append(tuple(kept_deferred))
    assert max(held["I", 3]) == max(held["W", 3]) == max(held["B", 0]) == (3, 0, 0, 0)
    task = job("torchtitan")
    layout = Layout(dp_replicate=4, pp=2, virtual_stages=2, schedule="ZBVZeroBubble")
    stages = stage_costs(task, layout)
    logits = 2 * 4096 * 128256  # in bf16, held by torch's stage until its backward has ended
    stream = 2 * 4096 * 4096  # so is the output of stage 0; stage 3's first norm keeps what was received
    moments = curve(task, layout)
    kept = 2 * (stages[0].saved + stream)
    assert moments["0F1"].after.activations == pytest.approx(kept)
    kept += stages[0].saved + stream + stages[3].saved + logits - stream
    assert moments["3F0"].after.activations == pytest.approx(kept)
    assert moments["3I0"].after.activations == pytest.approx(kept + stages[3].deferred)


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


def test_zero_3_under_a_pipeline_drops_blocks_after_their_forward() -> None:
    """torch does not reshard after a backward under a pipeline, but after a forward it does: 2 bytes of 16 blocks come
    and go; the embedding, of the stage's own group, stays as with zero_stage 2."""
    task = job("torchtitan")
    two, three = (curve(task, Layout(dp_shard=4, pp=2, zero_stage=z)) for z in (2, 3))
    blocks = 2 * 16 * stage_costs(task, Layout(pp=32))[1].parameters
    assert two["0F0"].after.buffers - three["0F0"].after.buffers == pytest.approx(blocks)
    assert two["0B0"].after.buffers == pytest.approx(three["0B0"].after.buffers)


def test_ranks_on_a_cpu_share_its_memory() -> None:
    task = job()
    cpu = dataclasses.replace(task.cluster, gpu=dataclasses.replace(task.cluster.gpu, kind="cpu"), gpus_per_node=2)
    task = dataclasses.replace(task, cluster=cpu)
    assert capacity(task, Layout()) == 4 * capacity(task, Layout(dp_replicate=4))


@pytest.mark.parametrize(("staleness", "gradients"), [(0, 5), (4, 4), (None, 4)])
def test_servers_hold_a_gradient_of_every_replica(staleness: int | None, gradients: int) -> None:
    """4 replicas of fp32: 4 bytes of weights and 8 of AdamW on the servers, and 4 of gradients for each replica, with
    one more where they are applied together, as their mean."""
    task = job("layoutwise-cpu", precision="fp32")
    cpu = dataclasses.replace(task.cluster, gpu=dataclasses.replace(task.cluster.gpu, kind="cpu"), gpus_per_node=4)
    task = dataclasses.replace(task, cluster=cpu)
    plain = Layout(dp_replicate=4)
    served = dataclasses.replace(plain, sync="parameter_server", servers=1, staleness=staleness)
    held = 4 * (capacity(task, plain) - capacity(task, served))
    assert held == pytest.approx((4 + 8 + 4 * gradients) * task.model.parameters())


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
    after = curve(task, Layout(dp_shard=8, zero_stage=1))["0B0"].after
    n = task.model.parameters()
    assert after.parameters == pytest.approx(4 * n / 8)
    assert after.optimizer == pytest.approx(8 * n / 8)
    assert after.gradients == pytest.approx(4 * n)
    assert after.buffers == pytest.approx(2 * n)


def test_replicas_of_a_split_backward_are_fsdps() -> None:
    """Without sharding, DDP holds no copy in fp32; a split backward is replicated by FSDP, which does."""
    task = job("layoutwise-cuda", precision="fp32")
    chunks = {"pp": 2, "virtual_stages": 2, "dp_replicate": 4}
    # The rank that has embedding and head is another in a V: look at the loop placement of both.
    ddp, fsdp = (
        curve(task, Layout(schedule=name, **chunks), 1)["1F0"].after
        for name in ("Interleaved1F1B", "InterleavedZeroBubble")
    )
    first = 8 * 4 * stage_costs(task, Layout(pp=32))[1].parameters  # of stage 1 alone, whose forward is the first
    assert fsdp.buffers - ddp.buffers == pytest.approx(first)


LAYOUTS = [
    {"dp_shard": 8, "zero_stage": 1},
    {"dp_shard": 8, "zero_stage": 2},
    {"dp_shard": 8, "zero_stage": 3},
    {"dp_replicate": 2, "dp_shard": 4, "zero_stage": 3, "recompute": "full"},
    {"dp_replicate": 8},
    {"tp": 8, "sequence_parallel": True},
    {"pp": 4, "dp_shard": 2, "zero_stage": 3},
    {"pp": 4, "dp_replicate": 2, "schedule": "GPipe"},
    *({"pp": 4, "dp_shard": 2, "zero_stage": 2, "virtual_stages": 2, "schedule": name} for name in MULTI_STAGE),
]


@pytest.mark.parametrize("stack", ["layoutwise-cpu", "layoutwise-cuda", "torchtitan"])
@pytest.mark.parametrize("axes", LAYOUTS, ids=str)
def test_the_curve(axes: dict[str, Any], stack: str) -> None:
    """Its largest moment is the peak; nothing is negative; what is born dies, state alone stays."""
    task, layout = job(stack, seq_len=2048), Layout(**axes)
    if stack == "layoutwise-cpu":
        # Its attention has no rate on a GPU, and none is needed for bytes.
        task = dataclasses.replace(task, stack=dataclasses.replace(task.stack, attention=("flash2",)))
    if layout.problems(task):
        pytest.skip(layout.problems(task)[0])
    stages = stage_costs(task, layout)
    peaks = memory_per_rank(task, layout, stages)
    for peak, moments in zip(peaks, memory_timeline(task, layout, stages), strict=True):
        assert max(moment.during.peak for moment in moments) == pytest.approx(peak.peak)
        for moment in moments:
            # Within an op there is at least what there was before or is after it of what lives on.
            assert moment.during.peak >= moment.after.parameters + moment.after.optimizer
            for memory in (moment.during, moment.after):
                assert min(dataclasses.astuple(memory)) >= -1.0
        begin, end = moments[0].during, moments[-1].after
        assert end.activations == pytest.approx(0, abs=1)
        # DDP's buckets are there all the time.
        assert end.gradients == pytest.approx(begin.gradients, abs=1)
        assert (end.parameters, end.optimizer) == (begin.parameters, begin.optimizer)


@pytest.mark.parametrize("axes", [{"dp_shard": 8, "zero_stage": 3}, {"tp": 2, "pp": 4}], ids=str)
def test_recomputing_more_keeps_less(axes: dict[str, Any]) -> None:
    task = job("layoutwise-cuda")
    none, selective, full = (
        fullest(memory(task, Layout(**axes, recompute=kind))).peak for kind in ("none", "selective", "full")
    )
    assert none > selective > full


def test_more_shards_hold_less() -> None:
    peaks = [
        fullest(memory(job("layoutwise-cuda", nodes=n), Layout(dp_shard=8 * n, zero_stage=3))).peak for n in (1, 2, 4)
    ]
    assert peaks[0] > peaks[1] > peaks[2]


@pytest.mark.parametrize("schedule", ["1F1B", "GPipe"])
def test_every_microbatch_is_kept_and_freed(schedule: Any) -> None:
    steps = lifetimes(schedule, 1, 4, 1, 8, 1)
    kept = [step.after[0].kept for step in steps]
    assert max(kept) == (8 if schedule == "GPipe" else 3) and kept[-1] == 0
