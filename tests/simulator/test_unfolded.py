"""Folding is exact: one rank of each kind, or every rank, give the same step. And what only the unfolded run can do."""

from __future__ import annotations

import dataclasses
import random

import pytest

from simulator.cluster import ClusterSpec
from simulator.engine import Run, run_program
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.program import build_program
from simulator.results import Breakdown

CASES = 240
STACKS = ("megatron-2021", "megatron-core", "torchtitan", "torchtitan-compile", "layoutwise-cuda")
CLUSTERS = ("dgx-a100", "dgx-h100", "mi300x")


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
