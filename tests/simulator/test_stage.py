"""What a stage costs: the embedding and the head where they are, and the backward in its two parts."""

from __future__ import annotations

import dataclasses

import pytest

from simulator.compute import accumulation_seconds, kernel_time, matmul_seconds
from simulator.critical_path import rank_update
from simulator.job import Job, build_job
from simulator.kernels import Matmul, Pointwise
from simulator.layout import Layout
from simulator.program import stage_costs
from simulator.stack import Stack

V = {"schedule": "ZBVZeroBubble", "virtual_stages": 2}


def job(stack: str = "torchtitan", model: str = "llama-3.1-8b") -> Job:
    training = {"global_batch_size": 64, "seq_len": 4096, "stack": stack}
    return build_job({"model": model, "cluster": "dgx-h100", "nodes": 1, "training": training}, "test")


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("stack", ["torchtitan", "megatron-core", "layoutwise-cuda"])
def test_the_two_parts_of_a_backward_sum_to_it(stack: str, recompute: str) -> None:
    layout = Layout(pp=4, tp=2, sequence_parallel=True, recompute=recompute)  # type: ignore[arg-type]
    for stage in stage_costs(job(stack), layout)[1:]:
        whole = stage.backward_input + stage.backward_weight
        assert vars(whole) | {"total": whole.total} == pytest.approx(vars(stage.backward) | {"total": whole.total})
        assert min(vars(stage.backward_input).values()) >= 0 and min(vars(stage.backward_weight).values()) >= 0
        # Collectives of activations and recomputation come before the input gradient is known.
        assert stage.backward_weight.tp == stage.backward_weight.recompute == 0
        assert 0.3 < stage.backward_weight.compute / stage.backward.compute < 0.5


def test_weight_gradients_are_one_matmul_each() -> None:
    """(m, k) x (k, n) forward; (k, m) x (m, n) is the weight gradient. A memory-bound op has no part in it."""
    task = job()
    gpu, stack = task.cluster.gpu, task.stack
    times = kernel_time([Matmul("up", 4096, 14336, 4096), Pointwise("add", 1e6)], gpu, stack, "bf16", tp=1)
    assert times.weights == pytest.approx(matmul_seconds(gpu, "bf16", 4096, 14336, 4096) / gpu.clock("bf16"))
    assert times.host_weights == stack.host.backward


def test_gradients_are_added_up_with_the_weights() -> None:
    """16 microbatches on a stage of 8 blocks: 15 of 16 gradients are added to one that is there, in fp32."""
    task, layout = job(), Layout(pp=4, dp_replicate=2, micro_batch_size=2)
    fused = dataclasses.replace(task, stack=dataclasses.replace(task.stack, fused_accumulation=True))
    apart, within = stage_costs(task, layout)[1], stage_costs(fused, layout)[1]
    added = accumulation_seconds(task.cluster.gpu, apart.parameters) * 15 / 16
    assert apart.backward_weight.compute - within.backward_weight.compute == pytest.approx(added)
    assert apart.backward_input.compute == pytest.approx(within.backward_input.compute)


def test_the_first_stage_runs_its_backward_whole() -> None:
    """Its input is tokens: torch leaves everything to the weights' turn."""
    first = stage_costs(job(), Layout(pp=4))[0]
    assert first.backward_weight == first.backward and first.backward_input.total == 0


def test_embedding_and_head_are_counted_where_they_are() -> None:
    """Llama 3.1 8B, 32 blocks: 128256 · 4096 parameters of embedding on the first stage, as many and a norm of 4096 on
    the last. In the V placement both are on rank 0."""
    layout = Layout(pp=4, virtual_stages=2, schedule="ZBVZeroBubble", stage_layers=(3, 4, 4, 5, 5, 4, 4, 3))
    stages = stage_costs(job(), layout)
    block = stages[1].parameters / 4
    matrix = 128256 * 4096
    expected = [3 * block + matrix, *(n * block for n in (4, 4, 5, 5, 4, 4)), 3 * block + matrix + 4096]
    assert [stage.parameters for stage in stages] == pytest.approx(expected)
    assert layout.stages_of(0) == (0, 7)


def in_place(stack: Stack) -> Stack:
    return dataclasses.replace(stack, gather_copies=0.0, reduce_copies=0.0)


def test_fsdp_copies_what_it_gathers_and_what_it_reduces() -> None:
    """In bf16 a weight is read and written in 2 bytes behind each gather, its gradient read in 2 and written in 4 ahead
    of its reduction. Embedding and head, 128256 · 4096 weights each and a norm, are not gathered again."""
    task, layout = job(), Layout(dp_shard=8, zero_stage=3)
    (copied,) = stage_costs(task, layout)
    (place,) = stage_costs(dataclasses.replace(task, stack=in_place(task.stack)), layout)
    gpu, everything = task.cluster.gpu, task.model.parameters()
    again = everything - 2 * 128256 * 4096 - 4096
    speed = gpu.memory_bandwidth * gpu.memory_efficiency
    assert copied.forward.compute - place.forward.compute == pytest.approx(4 * everything / speed)
    assert copied.backward.compute - place.backward.compute == pytest.approx((4 * again + 6 * everything) / speed)
    assert copied.forward.dp == place.forward.dp


@pytest.mark.parametrize(("ranks", "copies"), [(1, 0), (8, 1)])
def test_ddp_copies_gradients_into_its_buckets(ranks: int, copies: int) -> None:
    """4 bytes read and 4 written, of every gradient once a step of 8 microbatches; a single rank reduces nothing."""
    data = {"model": "gpt2", "cluster": "dgx-a100", "nodes": 1}
    training = {"global_batch_size": 8 * ranks, "seq_len": 1024, "precision": "fp32", "stack": "layoutwise-cuda"}
    task, layout = build_job(data | {"training": training}, "test"), Layout(dp_replicate=ranks)
    (copied,) = stage_costs(task, layout)
    (place,) = stage_costs(dataclasses.replace(task, stack=in_place(task.stack)), layout)
    gpu = task.cluster.gpu
    seconds = 8 * copied.parameters / (gpu.memory_bandwidth * gpu.memory_efficiency)
    assert 8 * (copied.backward.compute - place.backward.compute) == pytest.approx(copies * seconds)
    assert copied.reduce == place.reduce


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
@pytest.mark.parametrize("microbatches", [1, 4])
def test_what_is_gathered_and_reduced_once_is_copied_once(zero_stage: int, microbatches: int) -> None:
    """FSDP gathers once a step but for ZeRO 3, which gathers twice a microbatch, and reduces once a step under ZeRO 1,
    else every microbatch: 4 and 6 bytes a weight. GPT-2's embedding, 50257 + 1024 rows of 768, and its last norm of
    2 · 768 stay gathered."""
    data = {"model": "gpt2", "cluster": "dgx-a100", "nodes": 1}
    training = {"global_batch_size": 8 * microbatches, "seq_len": 1024, "stack": "layoutwise-cuda"}
    task, layout = build_job(data | {"training": training}, "test"), Layout(dp_shard=8, zero_stage=zero_stage)  # type: ignore[arg-type]
    (copied,) = stage_costs(task, layout)
    (place,) = stage_costs(dataclasses.replace(task, stack=in_place(task.stack)), layout)
    gpu, weights = task.cluster.gpu, task.model.parameters()
    again = weights - (50257 + 1024) * 768 - 2 * 768
    gathered = microbatches * (weights + again) if zero_stage == 3 else weights
    reduced = weights if zero_stage == 1 else microbatches * weights
    seconds = (4 * gathered + 6 * reduced) / (gpu.memory_bandwidth * gpu.memory_efficiency)
    found = (copied.forward + copied.backward).compute - (place.forward + place.backward).compute
    assert microbatches * found == pytest.approx(seconds)


def test_ranks_that_share_a_memory_copy_and_update_more_slowly() -> None:
    """Two ranks that compute at 0.9 and stream at 0.5 of one's speed: what streams takes 1.8 times as long as sharing
    processors alone would have it."""
    task = job("layoutwise-cuda")
    shared = dataclasses.replace(task.cluster, concurrency=(1.0, 0.9), streaming=(1.0, 0.5), gpus_per_node=2)
    layout = Layout(dp_shard=2, zero_stage=2, micro_batch_size=8)
    updates, copies = [], []
    for spec in (dataclasses.replace(shared, streaming=()), shared):
        one = dataclasses.replace(task, cluster=spec)
        (copied,), stack = stage_costs(one, layout), in_place(one.stack)
        (place,) = stage_costs(dataclasses.replace(one, stack=stack), layout)
        copies.append(copied.backward.compute - place.backward.compute)
        updates.append(rank_update(one, layout, (copied,), 0))
    assert copies[1] / copies[0] == pytest.approx(1.8)
    assert updates[1] / updates[0] == pytest.approx(1.8)
