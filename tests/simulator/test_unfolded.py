"""Folding is exact: one rank of each kind, or every rank, give the same step. And what only the unfolded run can do."""

from __future__ import annotations

import dataclasses
import random

import pytest

from simulator.cluster import ClusterSpec, CollectiveFit
from simulator.engine import Run, run_program
from simulator.errors import UserError
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.program import Program, build_program, with_communication
from simulator.results import Breakdown
from simulator.schedules import compute_order
from simulator.stage import StageCost
from simulator.work import Work

CASES = 240
STACKS = ("megatron-2021", "megatron-core", "torchtitan", "torchtitan-compile", "layoutwise-cuda")
CLUSTERS = ("dgx-a100", "dgx-h100", "mi300x")
FREE = {
    kind: (CollectiveFit(ranks=2, latency=0.0, efficiency=1.0),)
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
}


def sizes_of(total: int, draw: random.Random, parts: int) -> list[int]:
    """Powers of two whose product is `total`."""
    sizes = [1] * parts
    while total > 1:
        sizes[draw.randrange(parts)] *= 2
        total //= 2
    return sizes


def random_cluster(spec: ClusterSpec, draw: random.Random, per_node: int) -> ClusterSpec:
    """Small nodes with any number of cards, and cards of any speed, so that flows meet in all ways."""
    assert spec.scale_out is not None
    out = dataclasses.replace(spec.scale_out, bandwidth=spec.scale_out.bandwidth * draw.choice([0.01, 0.1, 1.0]))
    cards = draw.choice([cards for cards in (1, 2, 4, 8) if cards <= per_node])
    return dataclasses.replace(spec, gpus_per_node=per_node, scale_up_domain=0, nics_per_node=cards, scale_out=out)


def draw_case(draw: random.Random) -> tuple[Job, Layout]:
    """A legal layout of a small job on 2 to 16 ranks whose nodes hold a power of two of them."""
    while True:
        ranks = draw.choice([2, 4, 8, 16])
        per_node = draw.choice([n for n in (1, 2, 4, 8) if n <= ranks])
        batch = ranks * draw.choice([1, 2, 3, 4])
        training = {"global_batch_size": batch, "seq_len": draw.choice([128, 1024]), "stack": draw.choice(STACKS)}
        data = {"model": draw.choice(["gpt2", "llama-3.1-8b"]), "cluster": draw.choice(CLUSTERS), "nodes": 1}
        job = build_job(data | {"training": training}, "test")
        heads = draw.choice([4, 8])
        model = dataclasses.replace(
            job.model, num_hidden_layers=draw.randint(2, 9), hidden_size=128 * heads, num_attention_heads=heads,
            num_key_value_heads=heads, head_dim=128, intermediate_size=512 * heads, vocab_size=draw.choice([256, 4096]),
            tie_word_embeddings=False,
        )  # fmt: skip
        cluster = random_cluster(job.cluster, draw, per_node)
        job = dataclasses.replace(job, model=model, cluster=cluster, nodes=ranks // per_node)
        replicate, shard, tp, pp = sizes_of(ranks, draw, 4)
        chunks = draw.choice([1, 2])
        layout = Layout(
            dp_replicate=replicate, dp_shard=shard, tp=tp, pp=pp, zero_stage=draw.choice([0, 1, 2, 3]),
            micro_batch_size=draw.choice([1, 2]), virtual_stages=chunks,
            schedule="Interleaved1F1B" if chunks > 1 else draw.choice(["GPipe", "1F1B"]),
            recompute=draw.choice(["none", "full"]), sequence_parallel=tp > 1 and draw.random() < 0.7,
        )  # fmt: skip
        if not layout.problems(job):
            return job, layout


def run(job: Job, layout: Layout, unfold: bool, slowdown: dict[int, float] | None = None) -> Run:
    return run_program(job, layout, build_program(job, layout), unfold=unfold, slowdown=slowdown)


@pytest.mark.parametrize("seed", range(CASES))
def test_folded_is_unfolded(seed: int) -> None:
    job, layout = draw_case(random.Random(seed))
    folded, unfolded = run(job, layout, unfold=False), run(job, layout, unfold=True)
    assert unfolded.step_seconds == pytest.approx(folded.step_seconds, rel=1e-9)
    for field in dataclasses.fields(Breakdown):
        expected, found = getattr(folded.breakdown, field.name), getattr(unfolded.breakdown, field.name)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-9 * folded.step_seconds), field.name


@pytest.mark.parametrize("seed", range(80))
def test_folded_is_unfolded_in_every_rank_order(seed: int) -> None:
    """Pipeline ranks may be neighbours and tensor ranks far apart: messages then stay inside a node."""
    draw = random.Random(seed)
    job, layout = draw_case(draw)
    axes = ["tp", "cp", "ep", "dp", "pp"]
    draw.shuffle(axes)
    layout = dataclasses.replace(layout, rank_order="-".join(axes))
    folded, unfolded = run(job, layout, unfold=False), run(job, layout, unfold=True)
    assert unfolded.step_seconds == pytest.approx(folded.step_seconds, rel=1e-9)
    assert unfolded.breakdown.pp == pytest.approx(folded.breakdown.pp, abs=1e-9 * folded.step_seconds)


@pytest.mark.parametrize("seed", range(60))
def test_folded_is_unfolded_on_shared_processors(seed: int) -> None:
    draw = random.Random(seed)
    job, layout = draw_case(draw)
    speeds = draw.choice([(1.0,), (1.0, 0.8), (1.0, 0.9, 0.5, 0.4)])
    job = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, concurrency=speeds))
    folded, unfolded = run(job, layout, unfold=False), run(job, layout, unfold=True)
    assert unfolded.step_seconds == pytest.approx(folded.step_seconds, rel=1e-9)
    assert unfolded.breakdown.compute == pytest.approx(folded.breakdown.compute, rel=1e-9)


@pytest.mark.parametrize("seed", range(0, CASES, 6))
def test_a_traced_run_is_no_other(seed: int) -> None:
    """A trace needs every op by itself; without one, runs of ops are merged."""
    job, layout = draw_case(random.Random(seed))
    program = build_program(job, layout)
    plain, traced = run_program(job, layout, program), run_program(job, layout, program, trace=True)
    assert traced.step_seconds == pytest.approx(plain.step_seconds, rel=1e-9)
    assert traced.breakdown.bubble == pytest.approx(plain.breakdown.bubble, abs=1e-9 * plain.step_seconds)


def ideal(layout: Layout, microbatches: int, reduce: float = 0.0) -> tuple[Job, Program]:
    """A forward takes 1 s and a backward 2 s on every rank; the network is free but for the reduction."""
    work = {"forward": Work(compute=1.0), "backward": Work(compute=2.0)}
    stage = StageCost(
        **work, parameters=0.0, saved=0.0, working=0.0, units=1, reduce=reduce, gather=0.0
    )  # fmt: skip
    stages = (stage,) * layout.stages
    orders = (compute_order(layout.schedule, rank, layout.pp, 1, microbatches) for rank in range(layout.pp))
    data = {"model": "gpt2", "cluster": "dgx-a100", "nodes": 1, "training": {"global_batch_size": 8}}
    job = build_job(data, "test")
    stack = dataclasses.replace(job.stack, overlap_grad_reduce=False)
    gpu = dataclasses.replace(job.cluster.gpu, overlap_slowdown=0.0)
    job = dataclasses.replace(job, stack=stack, cluster=dataclasses.replace(job.cluster, gpu=gpu))
    return job, Program(tuple(tuple(with_communication(order, layout, stages)) for order in orders), stages)


def test_the_slowest_rank_sets_the_step_of_data_parallelism() -> None:
    """Four ranks, three microbatches of 1 + 2 s, then a reduction of 0.5 s. Rank 2 takes 1.5 times as long: it is done
    after 3 · 3 · 1.5 = 13.5 s, the others wait for it from 9 s on; the reduction ends at 14 s."""
    layout = Layout(dp_replicate=4)
    job, program = ideal(layout, microbatches=3, reduce=0.5)
    alike, straggler = (run_program(job, layout, program, slowdown={2: factor}) for factor in (1.0, 1.5))
    optimizer = alike.breakdown.optimizer
    assert alike.step_seconds == pytest.approx(9.5 + optimizer)
    assert straggler.step_seconds == pytest.approx(14.0 + optimizer, abs=optimizer)
    # The breakdown is that of rank 0, which waits 4.5 s for the straggler.
    assert straggler.breakdown.compute == pytest.approx(9.0)
    assert straggler.breakdown.dp == pytest.approx(4.5 + 0.5)


def test_a_slow_tensor_rank_slows_its_group_in_every_op() -> None:
    """Ranks 0 and 1 share every op: what rank 1 takes longer, rank 0 waits for, 3 · 3 · 0.5 = 4.5 s."""
    layout = Layout(tp=2)
    job, program = ideal(layout, microbatches=3)
    run = run_program(job, layout, program, slowdown={1: 1.5})
    assert run.breakdown.compute == pytest.approx(9.0)
    assert run.breakdown.tp == pytest.approx(4.5)
    assert run.step_seconds == pytest.approx(13.5, abs=0.01)


def test_a_slow_stage_sets_the_pace_of_the_pipeline() -> None:
    """1F1B on two ranks, the second twice as slow: F0 (1 s), then the second rank works without a pause for
    4 · 2 · 3 = 24 s, then the first does its last backward (2 s)."""
    layout = Layout(pp=2)
    job, program = ideal(layout, microbatches=4)
    free = dataclasses.replace(job.cluster.scale_up, bandwidth=1e30, collectives=FREE)
    job = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, scale_up=free))
    run = run_program(job, layout, program, slowdown={1: 2.0})
    assert run.step_seconds - run.breakdown.optimizer == pytest.approx(1 + 24 + 2)


@pytest.mark.parametrize(("slowdown", "words"), [({8: 2.0}, "ranks 0 to 7"), ({0: 0.0}, "rank 0 = 0 must be above")])
def test_a_slowdown_names_ranks_and_factors_that_exist(slowdown: dict[int, float], words: str) -> None:
    job, program = ideal(Layout(dp_replicate=8), microbatches=1)
    with pytest.raises(UserError, match=words):
        run_program(job, Layout(dp_replicate=8), program, slowdown=slowdown)
