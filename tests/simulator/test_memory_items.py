"""The parts of a rank's memory: they sum to its items, and are what hand arithmetic says."""

from __future__ import annotations

import dataclasses

import pytest

from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.memory import memory_per_rank
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
