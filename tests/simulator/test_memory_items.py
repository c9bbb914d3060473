"""The parts of a rank's memory: they sum to its items, and are what hand arithmetic says."""

from __future__ import annotations

import dataclasses

import pytest

from simulator.activations import context_buffers
from simulator.job import Job, build_job
from simulator.kernels import Attention
from simulator.layout import Layout
from simulator.memory import memory_per_rank, memory_timeline
from simulator.memory_items import MemoryPart, memory_parts
from simulator.program import stage_costs
from simulator.results import MemoryBreakdown


def job(stack: str = "megatron-core", model: str = "llama-3.1-8b", **training: object) -> Job:
    recipe = {"global_batch_size": 64, "seq_len": 4096, "stack": stack} | training
    return build_job({"model": model, "cluster": "dgx-h100", "nodes": 1, "training": recipe}, "test")


def parts(task: Job, layout: Layout) -> tuple[tuple[MemoryPart, ...], ...]:
    assert not layout.problems(task)
    return memory_parts(task, layout, stage_costs(task, layout))


def named(found: tuple[MemoryPart, ...]) -> dict[tuple[str, str], MemoryPart]:
    return {(part.item, part.name): part for part in found}


LAYOUTS = (
    ("megatron-core", "llama-3.1-8b", Layout(dp_shard=8, zero_stage=1)),
    ("megatron-core", "llama-3.1-8b", Layout(tp=2, sequence_parallel=True, pp=4, recompute="selective")),
    ("megatron-core", "llama-3.1-8b", Layout(dp_replicate=2, pp=4, schedule="Interleaved1F1B", virtual_stages=2)),
    ("megatron-core", "mixtral-8x7b", Layout(dp_shard=8, ep=8, zero_stage=1, recompute="full")),
    ("torchtitan", "llama-3.1-8b", Layout(dp_shard=8, zero_stage=3, recompute="selective")),
    ("torchtitan", "llama-3.1-8b", Layout(dp_shard=2, pp=4, zero_stage=2, schedule="ZBVZeroBubble", virtual_stages=2)),
    ("layoutwise-cuda", "llama-3.1-8b", Layout(dp_shard=2, tp=2, pp=2, zero_stage=3)),
    ("layoutwise-cuda", "gpt2", Layout(dp_replicate=8)),
    ("layoutwise-cuda", "gpt2", Layout(dp_replicate=8, sync="local_sgd", sync_interval=4, outer_optimizer="nesterov")),
)


@pytest.mark.parametrize(("stack", "model", "layout"), LAYOUTS, ids=lambda value: str(value)[:40])
def test_parts_sum_to_their_items(stack: str, model: str, layout: Layout) -> None:
    task = job(stack, model, **({"seq_len": 1024} if model == "gpt2" else {}))
    ranks = memory_per_rank(task, layout, stage_costs(task, layout))
    for memory, found in zip(ranks, parts(task, layout), strict=True):
        for field in dataclasses.fields(MemoryBreakdown):
            if field.name != "peak":
                total = sum(part.bytes for part in found if part.item == field.name)
                assert total == pytest.approx(getattr(memory, field.name), rel=1e-9, abs=1.0), field.name


def test_microbatches_alive_and_what_each_keeps() -> None:
    """1F1B over 4 ranks: the first is fullest in the backward of its first microbatch, beside which 3 are kept whole.
    With full recomputation each keeps the input of its 8 blocks: 2·s·b·h = 2 · 4096 · 4096 bytes each, and the
    embedding nothing."""
    found = named(parts(job(), Layout(dp_replicate=2, pp=4, recompute="full"))[0])
    kept = found["activations", "inputs of blocks"]
    assert kept.count == 3
    assert kept.bytes == pytest.approx(3 * 8 * 2 * 4096 * 4096)


def test_parameters_by_where_they_are() -> None:
    """Llama-3.1-8B on one rank of Megatron, 2 bytes each: 2 · 128256 · 4096 in embedding and head and the final norm's
    4096, the rest in blocks."""
    task = job()
    found = named(parts(task, Layout(dp_shard=8, zero_stage=1))[0])
    ends = 2 * 128256 * 4096 + 4096
    assert found["parameters", "embedding and head"].bytes == pytest.approx(2 * ends)
    assert found["parameters", "blocks"].bytes == pytest.approx(2 * (task.model.parameters() - ends))


def test_a_communicator_for_each_axis_in_use() -> None:
    task = job()
    found = named(parts(task, Layout(dp_replicate=2, tp=2, sequence_parallel=True, pp=2))[0])
    communicators = found["overhead", "communicators"]
    assert communicators.count == 3
    assert communicators.bytes == pytest.approx(3 * task.cluster.gpu.communicator_memory)


def activations(task: Job, layout: Layout) -> float:
    assert not layout.problems(task)
    return memory_per_rank(task, layout, stage_costs(task, layout))[0].activations


def test_the_fullest_rank_of_a_mixture_holds_more_tokens() -> None:
    """Mixtral over 8 expert ranks, a microbatch of 4096 tokens with 2 experts each: what routed experts keep grows by
    expert_load, in 32 blocks and 2 bytes: inputs 2·T·h, and per expert width gate, up and their product 3·2·T·f (the
    fused activation keeps both inputs, the matmul behind it the product)."""
    layout, grown = Layout(dp_shard=8, ep=8, zero_stage=1), 0.25
    even, uneven = (activations(job(model="mixtral-8x7b", expert_load=load), layout) for load in (1.0, 1.0 + grown))
    kept = 32 * 2 * (2 * 4096) * (4096 + 3 * 14336)
    assert uneven - even == pytest.approx(grown * kept, rel=0.02)


def test_without_expert_parallelism_every_rank_has_its_own_tokens() -> None:
    layout = Layout(dp_shard=8, zero_stage=1)
    one, two = (activations(job(model="mixtral-8x7b", expert_load=load), layout) for load in (1.0, 2.0))
    assert one == two


def test_relu_keeps_one_tensor_that_two_need() -> None:
    """T5's blocks, 512 tokens and 4 of them in a microbatch: ReLU's output is the input of the matmul behind it, 2
    bytes of T · 4096 in each of 48 blocks less than GELU, which keeps its input too."""
    task = job("layoutwise-cuda", "t5-large", seq_len=512)
    gelu = dataclasses.replace(task, model=dataclasses.replace(task.model, activation="gelu"))
    assert task.model.activation == "relu" and not task.model.gated_mlp
    layout = Layout(dp_shard=8, zero_stage=3, micro_batch_size=4)
    saved = [stage_costs(each, layout)[0].saved for each in (task, gelu)]
    assert saved[1] - saved[0] == pytest.approx(48 * 2 * 4 * 512 * 4096)


def test_buffers_of_context_parallelism() -> None:
    """Llama-3.1-8B, 65,536 tokens over 4 ranks: keys and values of a rank are B = 2 · 2 · 16,384 · 8 · 128 bytes."""
    core = Attention("attention", 1, 32, 8, 16384, 16384, 128, 128, True, 4)
    block, stack = 2 * 2 * 16384 * 8 * 128, job().stack
    assert context_buffers(core, stack, 2.0, 1) == 0
    # A block that comes, its gradients sent and received.
    assert context_buffers(core, stack, 2.0, 4) == 3 * block
    # The same with gradients in fp32.
    apart = job("layoutwise-cuda").stack
    assert context_buffers(core, apart, 2.0, 4) == (1 + 2 * 2) * block
    # Three blocks of others, four of gradients.
    assert context_buffers(core, job("torchtitan").stack, 2.0, 4) == 7 * block
    # Keys, values, queries (as wide as 4 times the keys) and the output's gradient.
    ulysses = dataclasses.replace(stack, context_parallel="ulysses")
    assert context_buffers(core, ulysses, 2.0, 4) == block + 4 * block


def test_late_gradients_and_buckets() -> None:
    """Gradients in bf16 stay until a backward ends, 2 bytes each beside 4 in fp32: it is fullest when that of the
    embedding, the last, is being made. DDP's buckets are another 2 all the time, where there are replicas."""
    plain = job()
    late = dataclasses.replace(plain, stack=dataclasses.replace(plain.stack, adds_after_backward=True))
    apart = dataclasses.replace(plain, stack=dataclasses.replace(plain.stack, buckets_apart=True))
    layout = Layout(dp_replicate=8, recompute="full")
    costs = stage_costs(plain, layout)
    n = plain.model.parameters()
    ends = [memory_timeline(one, layout, costs)[0] for one in (plain, late, apart)]
    backward = [next(moment for moment in moments if moment.op == "0B0") for moments in ends]
    assert backward[1].during.gradients == pytest.approx(4 * n + 2 * (n - 128256 * 4096), rel=1e-3)
    assert backward[2].after.buffers - backward[0].after.buffers == pytest.approx(2 * n)


def test_ends_of_a_pipeline_may_be_bare() -> None:
    """Megatron cuts the embedding and the head off: 2 stages more than blocks, and no other stage without one."""
    task = job("megatron-core")
    fields = {"dp_replicate": 2, "pp": 4, "schedule": "Interleaved1F1B", "virtual_stages": 4}
    layers = (0, 4, 2, 2, 2, 3, 3, *[2] * 8, 0)
    bare = Layout(**fields, stage_layers=layers)
    assert not bare.problems(task)
    costs = stage_costs(task, bare)
    assert costs[0].parameters == 128256 * 4096
    assert costs[-1].parameters == 128256 * 4096 + 4096
    inner = Layout(**fields, stage_layers=(4, 0, *layers[2:]))
    assert any("every stage but the first and the last" in problem for problem in inner.problems(task))
    assert any("every stage needs" in problem for problem in bare.problems(job("torchtitan")))


def test_an_fp16_recipe_is_fullest_in_its_update() -> None:
    """20 bytes per parameter (2 of weights, 2 of gradients, 4 of gradients in fp32, 12 of AdamW: Megatron-LM's
    dist_optimizer.md), where a short step keeps little; with a distributed optimizer 4 + 16/d."""
    task = job("megatron-2021", "gpt2", seq_len=64, global_batch_size=8, precision="fp16")
    n = task.model.parameters()
    (rank,) = memory_per_rank(task, Layout(dp_replicate=8), stage_costs(task, Layout(dp_replicate=8)))
    assert rank.parameters + rank.gradients + rank.optimizer == pytest.approx(20 * n)
    assert rank.activations == 0
    task = job("megatron-core", "gpt2", seq_len=64, global_batch_size=8, precision="fp16")
    sharded = Layout(dp_shard=8, zero_stage=1)
    moments = memory_timeline(task, sharded, stage_costs(task, sharded))[0]
    update = moments[-1].during
    assert update.parameters + update.gradients + update.optimizer == pytest.approx((4 + 16 / 8) * n)
    assert moments[-1].after.gradients == pytest.approx(2 * n)
