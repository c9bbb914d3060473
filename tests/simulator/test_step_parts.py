"""The parts of a step are those that the simulator adds up."""

from __future__ import annotations

from typing import Any

import pytest

from simulator.cluster import GroupShape
from simulator.collectives import bus_bytes
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.program import build_program
from simulator.results import Prediction
from simulator.simulate import simulate
from simulator.step_parts import StepParts, critical_rank, step_parts

LLAMA = {"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 2}
MIXTRAL = {"model": "mixtral-8x7b", "cluster": "dgx-h100", "nodes": 2}
CASES: list[tuple[dict[str, Any], str, str]] = [
    (LLAMA, "megatron-core", "tp=4 pp=2 micro_batch_size=2"),
    (LLAMA, "megatron-core", "tp=2 pp=4 virtual_stages=2 recompute=full"),
    (LLAMA, "megatron-core", "tp=2 cp=2 recompute=selective"),
    (LLAMA, "torchtitan", "zero_stage=3"),
    (LLAMA, "torchtitan", "tp=2 pp=2 zero_stage=2"),
    (LLAMA, "torchtitan", "pp=2 zero_stage=3 recompute=full"),
    (MIXTRAL, "megatron-core", "ep=8 pp=2"),
    (MIXTRAL, "megatron-core", "tp=2 ep=4 recompute=full"),
]


def parts(given: dict[str, Any], stack: str, text: str) -> tuple[Job, Layout, Prediction, StepParts]:
    training = {"global_batch_size": 64, "seq_len": 4096, "stack": stack}
    job = build_job(given | {"training": training}, "test")
    layout = parse_layout(text, job)
    assert layout.problems(job) == []
    found, program = simulate(job, layout), build_program(job, layout)
    rank = critical_rank(job, layout, program.stages, found.breakdown)
    return job, layout, found, step_parts(job, layout, program, rank)


@pytest.mark.parametrize(("given", "stack", "text"), CASES)
def test_parts_add_up_to_the_breakdown(given: dict[str, Any], stack: str, text: str) -> None:
    """Kernels are all of `compute`. What no stack hides, tensor parallelism here, is all of `tp`; what may be hidden is
    at least what is exposed, but for the slowdown of the kernels that hide it."""
    job, _, found, split = parts(given, stack, text)
    assert sum(k.seconds for k in split.kernels) + split.accumulation == pytest.approx(found.breakdown.compute)
    alone = {axis: sum(t.seconds for t in split.of(axis)) for axis in ("tp", "cp", "ep", "dp")}
    assert job.stack.overlap_tp == 0
    assert alone["tp"] == pytest.approx(found.breakdown.tp, rel=1e-6)
    for axis in ("cp", "ep", "dp"):
        exposed = float(getattr(found.breakdown, axis))
        assert exposed <= alone[axis] * (1 + job.cluster.gpu.overlap_slowdown) + 1e-9, axis
        assert (exposed > 0) <= (alone[axis] > 0)


def test_collectives_by_hand() -> None:
    """Llama 3.1 8B, tp = 8 with sequence parallelism, one sequence of 4,096 tokens, 64 / 2 = 32 microbatches: a block
    has two gathers forward (attention and feed-forward) and two backward, the embedding one backward and the head one
    forward: 32 · (32 · 4 + 2) = 4,160 of 4,096 · 4,096 · 2 bytes = 32 MiB."""
    _, _, _, split = parts(LLAMA, "megatron-core", "tp=8")
    gathers = [t for t in split.of("tp") if t.kind == "all_gather"]
    assert [(t.count, t.bytes) for t in gathers] == [(4160, 32 * 2**20)]
    (one,) = gathers
    assert (one.ranks, one.domains, one.link) == (8, 1, "NVLink 4, NVSwitch")
    assert one.bandwidth == pytest.approx(bus_bytes("all_gather", 8, one.bytes) * one.count / one.seconds)
    assert GroupShape(8, 1, 8, 450e9).slowest > one.bandwidth > 100e9


def test_fsdp_gathers_blocks_twice_in_every_microbatch() -> None:
    """ZeRO 3 over 16 ranks, 64 / 16 = 4 microbatches of one sequence: 32 blocks forward and backward, embedding and
    head forward alone: 4 · (2 · 32 + 2) = 264 gathers, and 4 · (32 + 2) = 136 scatters."""
    _, _, _, split = parts(LLAMA, "torchtitan", "zero_stage=3")
    counts = {kind: sum(t.count for t in split.of("dp") if t.kind == kind) for kind in ("all_gather", "reduce_scatter")}
    assert counts == {"all_gather": 264, "reduce_scatter": 136}
    assert all(t.domains == 2 for t in split.of("dp"))


def test_messages_of_an_inner_rank_go_both_ways() -> None:
    """pp = 4 on two nodes, one chunk, 64 / 4 = 16 microbatches of one sequence: an inner rank sends 16 activations and
    16 gradients, the first and the last rank 16 of one kind."""
    training = {"global_batch_size": 64, "seq_len": 4096}
    job = build_job(LLAMA | {"training": training}, "test")
    layout = parse_layout("pp=4 dp_replicate=4", job)
    program = build_program(job, layout)
    sent = [step_parts(job, layout, program, rank).of("pp")[0].count for rank in range(4)]
    assert sent == [16, 32, 32, 16]


def test_flops_are_those_of_the_model() -> None:
    """Without a cut the matmuls and the attention of a step are the model's FLOPs, but for how attention is counted."""
    _, _, found, split = parts(LLAMA, "torchtitan", "zero_stage=3")
    job = build_job(LLAMA | {"training": {"global_batch_size": 64, "seq_len": 4096}}, "test")
    per_rank = job.model.flops_per_token(4096) * job.tokens_per_step / job.world_size
    assert split.flops == pytest.approx(per_rank, rel=0.03)
    assert found.mfu > 0
