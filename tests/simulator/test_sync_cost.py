"""Ways to keep replicas together, for a job and a layout: bytes, links, and the prediction of a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from simulator.cluster import CollectiveFit
from simulator.engine import run_program
from simulator.job import Job, build_job
from simulator.layout_text import parse_layout
from simulator.memory import capacity
from simulator.program import build_program
from simulator.results import Prediction
from simulator.simulate import simulate
from simulator.stragglers import Stragglers
from simulator.sync_cost import averaging_seconds, exchange_bound, link_rates
from simulator.sync_rules import changes_mathematics, server_nodes


def job(cluster: str = "workstation-4x4090", nodes: int = 4, stragglers: Stragglers | None = None, **more: Any) -> Job:
    training = {"stack": "layoutwise-cuda", "global_batch_size": 256, "seq_len": 1024} | more
    data = {"model": "gpt2", "cluster": cluster, "nodes": nodes, "training": training}
    built = build_job(data, "job 'test'")
    return dataclasses.replace(built, stragglers=stragglers or Stragglers(steps=20))


def predict(where: Job, text: str) -> Prediction:
    layout = parse_layout(text, where)
    assert layout.problems(where) == []
    return simulate(where, layout)


HYBRID = "dp_replicate=4 dp_shard=4 zero_stage=2"
WAYS = (
    "", "sync=reduce_broadcast", "sync=parameter_server servers=4", "sync=parameter_server servers=1 staleness=3",
    "sync=parameter_server servers=2 staleness=none", "sync=local_sgd sync_interval=5",
)  # fmt: skip


def test_without_stragglers_an_all_reduce_is_what_it_was() -> None:
    found = predict(job(), HYBRID)
    assert found.synchronisation is None
    # Many steps of alike replicas are one step many times.
    drawn = predict(job(stragglers=Stragglers(factors={"0": 1.0}, steps=7)), HYBRID)
    assert drawn.step_seconds == pytest.approx(found.step_seconds)
    assert drawn.synchronisation is not None and drawn.synchronisation.p95 == pytest.approx(found.step_seconds)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("jitter", ["", "lognormal 20 %"])
def test_a_breakdown_sums_to_the_mean_step(way: str, jitter: str) -> None:
    found = predict(job(stragglers=Stragglers(jitter=jitter, steps=20)), f"{HYBRID} {way}")
    assert found.breakdown.total() == pytest.approx(found.step_seconds)
    assert found.tokens_per_second == pytest.approx(256 * 1024 / found.step_seconds)
    assert min(vars(found.breakdown).values()) >= 0


@pytest.mark.parametrize("text", ["dp_replicate=4", "dp_replicate=2 tp=2"])
def test_slow_ranks_are_those_of_the_engine(text: str, make_profiled: Job) -> None:
    """Where nothing is hidden an all-reduce of replicas of which one is slow takes what the unfolded engine says."""
    layout = parse_layout(text, make_profiled)
    slow = dataclasses.replace(make_profiled, stragglers=Stragglers(factors={"1": 1.7}, steps=3))
    run = run_program(slow, layout, build_program(slow, layout), slowdown={1: 1.7})
    assert simulate(slow, layout).step_seconds == pytest.approx(run.step_seconds, rel=0.02)


@pytest.fixture
def make_profiled() -> Job:
    """Four GPUs whose stack hides no reduction."""
    found = job(nodes=1, global_batch_size=16)
    gpu = dataclasses.replace(found.cluster.gpu, overlap_slowdown=0.0)
    stack = dataclasses.replace(found.stack, overlap_grad_reduce=False, pads_vocabulary=True)
    return dataclasses.replace(found, stack=stack, cluster=dataclasses.replace(found.cluster, gpu=gpu))


def test_messages_of_servers_reach_what_messages_of_their_size_do() -> None:
    """4 MB at 2 GB/s and 1e-6 s for the root of a byte: 2 + 2 ms, 1 GB/s; among four ranks that share the processors,
    which they do here, the latter is twice as much: 2 + 4 ms."""
    found = job()
    fits = (CollectiveFit(2, 0.0, 0.5, 1e-6, active=2), CollectiveFit(2, 0.0, 0.5, 2e-6, active=4))
    link = dataclasses.replace(found.cluster.scale_up, bandwidth=4e9, collectives={"send_recv": fits})
    where = dataclasses.replace(found, cluster=dataclasses.replace(found.cluster, scale_up=link))
    assert link_rates(where, 4e6, 2)[0] == pytest.approx(1e9)
    assert link_rates(where, 4e6, 4)[0] == pytest.approx(4e6 / 6e-3)
    assert link_rates(where, sharing=4)[0] == pytest.approx(2e9)


def test_servers_reach_their_bound_when_they_are_all_that_binds() -> None:
    """124.4e6 parameters, fp32 both ways, four replicas of four GPUs on 10 Gb/s at 90 %: a server on every node sends
    and receives 3/4 of 498 MB twice: 0.66 s, and nothing can hide it."""
    where = job()
    layout = parse_layout(f"{HYBRID} sync=parameter_server servers=4", where)
    size = where.model.parameters() * 4
    rate = 10e9 / 8 * 0.9
    assert link_rates(where)[1] == pytest.approx(rate)
    bound = exchange_bound(where, layout)
    assert bound == pytest.approx(2 * 3 / 4 * size / rate)
    found = predict(where, layout.short())
    assert found.synchronisation is not None
    # 60 us of latency each way, 120 us a step.
    assert found.synchronisation.communicating == pytest.approx(bound + 120e-6, rel=1e-6)


def test_one_server_is_an_incast() -> None:
    """Three of four replicas push over one card and pull over it: 2 · 3 · 498 MB / 1.125 GB/s; the fourth is at home
    over PCIe."""
    where = job()
    found = predict(where, f"{HYBRID} sync=parameter_server servers=1")
    expected = 2 * 3 * where.model.parameters() * 4 / (10e9 / 8 * 0.9)
    replica = predict(where, f"{HYBRID} sync=parameter_server servers=4")
    assert replica.synchronisation is not None
    assert found.step_seconds == pytest.approx(expected + replica.synchronisation.computing + 120e-6, rel=1e-3)
    halved = dataclasses.replace(where, stack=dataclasses.replace(where.stack, server_piece_bytes=10e6))
    # In 16 pieces the way back is beside the way out, but for a piece.
    pieces = predict(halved, f"{HYBRID} sync=parameter_server servers=1")
    saved = expected / 2 * (1 - 1 / 16)
    assert pieces.step_seconds == pytest.approx(found.step_seconds - saved, rel=1e-3)


@pytest.mark.parametrize("text", [HYBRID, "dp_replicate=16", "dp_replicate=8 tp=2"])
def test_local_sgd_tends_to_the_step_of_a_replica_alone(text: str) -> None:
    where = job()
    where = dataclasses.replace(where, stack=dataclasses.replace(where.stack, pads_vocabulary=True))
    steps = [predict(where, f"{text} sync=local_sgd sync_interval={h}") for h in (1, 10, 1000)]
    once = averaging_seconds(where, steps[0].layout)
    alone = steps[0].step_seconds - once
    assert steps[1].step_seconds == pytest.approx(alone + once / 10)
    assert steps[2].step_seconds == pytest.approx(alone, rel=2e-2)
    assert steps[0].synchronisation is not None and steps[0].synchronisation.changes_mathematics


def test_asynchronous_replicas_do_not_wait_for_a_slow_one() -> None:
    slow = job(stragglers=Stragglers(factors={"12-15": 3.0}, steps=100), global_batch_size=2048)
    text = f"{HYBRID} sync=parameter_server servers=4"
    steps = [predict(slow, f"{text} staleness={k}").step_seconds for k in ("none", 4, 0)]
    assert steps[0] < 0.75 * steps[1] and steps[1] <= steps[2] * (1 + 1e-9)


@pytest.mark.parametrize("text", ["dp_replicate=2 dp_shard=8 zero_stage=3", "dp_replicate=4 pp=4 micro_batch_size=4"])
def test_any_model_parallel_replica_goes_with_any_way(text: str) -> None:
    where = dataclasses.replace(job(), stack=dataclasses.replace(job().stack, ties_across_stages=True))
    for way in WAYS:
        assert predict(where, f"{text} {way}").step_seconds > 0


def test_servers_hold_what_workers_do_not() -> None:
    """AdamW keeps 8 bytes per parameter in fp32 beside the weights; local SGD 4 more for the
    vector that is exchanged, and DiLoCo 12 for the anchor, its gradient and its momentum."""
    where = job()
    state = where.stack.recipes["bf16"].optimizer["adamw"] * where.model.parameters()
    reduced = predict(where, "dp_replicate=16").memory.optimizer
    assert reduced == pytest.approx(state)
    assert predict(where, "sync=parameter_server").memory.optimizer == 0
    outer = predict(where, "sync=local_sgd outer_optimizer=nesterov").memory.optimizer
    assert outer == pytest.approx(state + 16 * where.model.parameters())


def test_servers_share_the_memory_of_a_machine_without_gpus() -> None:
    where = job(nodes=1)
    spec = dataclasses.replace(where.cluster, gpu=dataclasses.replace(where.cluster.gpu, kind="cpu"))
    machine = dataclasses.replace(where, cluster=spec)
    workers = parse_layout("dp_replicate=4", machine)
    served = parse_layout("dp_replicate=4 sync=parameter_server", machine)
    recipe = machine.stack.recipes["bf16"]
    # A gradient of every replica, and their mean.
    each = recipe.parameters + (4 + 1) * recipe.gradients + recipe.optimizer["adamw"]
    held = machine.model.parameters() * each
    assert capacity(machine, workers) - capacity(machine, served) == pytest.approx(held / 4)


def test_servers_go_round_the_nodes() -> None:
    assert server_nodes(5, 3) == (0, 1, 2, 0, 1)
    # The node with two of three servers has two thirds of the traffic: as slow as one server of two thirds.
    three = predict(job(nodes=2), "dp_replicate=2 dp_shard=4 zero_stage=2 sync=parameter_server servers=3")
    two = predict(job(nodes=2), "dp_replicate=2 dp_shard=4 zero_stage=2 sync=parameter_server servers=2")
    assert three.step_seconds > two.step_seconds


def test_what_changes_the_mathematics_says_so() -> None:
    where = job()
    changing = {way: changes_mathematics(parse_layout(f"{HYBRID} {way}", where)) for way in WAYS}
    assert list(changing.values()) == [False, False, False, True, True, True]
