"""Laws of the optimum: what a larger space, more memory and more devices can and cannot do to it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.plan import Plan
from planner.search import plan
from planner.space import candidates
from simulator.errors import NothingFitsError, UserError
from simulator.job import Job, build_job
from simulator.simulate import simulate

SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much]


def job(model: str = "gpt2", cluster: str = "dgx-a100", nodes: int = 1, search: Any = None, **training: Any) -> Job:
    data = {"model": model, "cluster": cluster, "nodes": nodes, "training": training, "search": search or {}}
    return build_job(data, "test")


# Narrow in one axis, wide in the others: experts, parts of sequences, cuts, sharding, recomputation, orders of ranks.
NARROW: dict[str, dict[str, Any]] = {
    "experts": {"tp": [1, 2], "pp": [1, 2], "cp": [1], "micro_batch_size": [1], "virtual_stages": [1, 2]},
    "sequences": {"tp": [1, 2], "pp": [1, 2], "cp": [1, 2, 4], "ep": [1], "virtual_stages": [1, 2]},
    "pipelines": {"tp": [1], "pp": [3, 4, 6], "cp": [1], "ep": [1], "virtual_stages": [1, 2, 3, 5]},
    "memory": {"tp": [1, 4], "pp": [1, 4], "cp": [1], "ep": [1], "virtual_stages": [1]},
}
LENGTHS = {"gpt2": 1024, "llama-3.1-8b": 4096, "mixtral-8x7b": 2048, "t5-large": 512, "gpt-oss-120b": 4096}
small = st.builds(
    lambda model, narrow, cluster, nodes, batch, stack: job(
        model, cluster, nodes, NARROW[narrow], global_batch_size=batch * nodes, seq_len=LENGTHS[model], stack=stack
    ),
    model=st.sampled_from(list(LENGTHS)),
    narrow=st.sampled_from(list(NARROW)),
    cluster=st.sampled_from(["dgx-a100", "dgx-h100", "workstation-4x4090"]),
    nodes=st.sampled_from([1, 2, 3]),
    batch=st.sampled_from([8, 24]),
    stack=st.sampled_from(["megatron-core", "torchtitan", "megatron-bridge", "layoutwise-cuda"]),
)


def by_seconds(task: Job, top: int = 1) -> Plan:
    """The layout with the shortest step, without regard to error bars."""
    return plan(task, top=top, ties=False)


def planned(task: Job, top: int = 1) -> Plan | None:
    try:
        return by_seconds(task, top)
    except (NothingFitsError, UserError):
        return None


def optimum_is_brute_force(task: Job) -> None:
    """Of every legal layout, simulated: the best three, and what the certificate counts."""
    every = list(candidates(task))
    legal = [layout for layout in every if not layout.problems(task)]
    assume(0 < len(legal) < 4000)
    everything = [simulate(task, layout) for layout in legal]
    fitting = sorted(p.step_seconds for p in everything if p.fits)
    found = planned(task, top=3)
    if found is None:
        assert not fitting
        return
    best = [found.best if found.riskier is None else found.riskier, *found.runners_up]
    assert best[0].step_seconds == pytest.approx(fitting[0], rel=1e-12)
    if found.riskier is None:
        assert [p.step_seconds for p in best] == pytest.approx(fitting[:3], rel=1e-12)
    c = found.certificate
    assert (c.space, c.illegal) == (len(every), len(every) - len(legal))
    assert c.space == c.illegal + c.out_of_memory + c.bounded + c.simulated
    # The bound of the memory is below it: no layout that fits is dismissed.
    assert c.out_of_memory <= sum(not p.fits for p in everything)


@given(task=small)
@settings(max_examples=2, deadline=None, suppress_health_check=SLOW)
def test_optimum_is_brute_force(task: Job) -> None:
    optimum_is_brute_force(task)


@pytest.mark.slow
@given(task=small)
@settings(max_examples=100, deadline=None, suppress_health_check=SLOW)
def test_optimum_is_brute_force_on_many_jobs(task: Job) -> None:
    """pytest -m slow tests/planner/test_search_laws.py, in about four minutes."""
    optimum_is_brute_force(task)


@given(task=small, axis=st.sampled_from(["tp", "pp", "cp", "ep", "virtual_stages"]))
@settings(max_examples=4, deadline=None, suppress_health_check=SLOW)
def test_a_larger_space_never_has_a_slower_optimum(task: Job, axis: str) -> None:
    """What [search] limits to the first value of an axis is part of what it limits to all of them."""
    values = task.search.get(axis)
    assume(values and len(values) > 1)
    less = planned(dataclasses.replace(task, search=task.search | {axis: task.search[axis][:1]}))
    assume(less is not None)
    more = planned(task)
    assert less is not None and more is not None
    assert fastest(more) <= fastest(less) * (1 + 1e-12)


@given(task=small, times=st.sampled_from([1.1, 2.0]))
@settings(max_examples=4, deadline=None, suppress_health_check=SLOW)
def test_more_memory_never_slows_the_optimum(task: Job, times: float) -> None:
    """Whatever fits still does, and nothing else about it changes."""
    less = planned(task)
    assume(less is not None)
    gpu = dataclasses.replace(task.cluster.gpu, memory=task.cluster.gpu.memory * times)
    more = planned(dataclasses.replace(task, cluster=dataclasses.replace(task.cluster, gpu=gpu)))
    assert less is not None and more is not None
    assert fastest(more) <= fastest(less) * (1 + 1e-12)


def fastest(found: Plan) -> float:
    """The optimum over all that fits, however likely that is."""
    return (found.riskier or found.best).step_seconds


@given(
    model=st.sampled_from(["gpt2", "llama-3.1-8b"]),
    nodes=st.sampled_from([1, 2, 3]),
    batch=st.sampled_from([16, 48]),
    stack=st.sampled_from(["megatron-core", "torchtitan"]),
)
@settings(max_examples=3, deadline=None, suppress_health_check=SLOW)
def test_twice_the_devices_can_use_every_layout_with_twice_the_replicas(
    model: str, nodes: int, batch: int, stack: str
) -> None:
    """Twice the nodes with twice the batch: the optimum is no slower than the smaller one's layout in two copies.
    That one takes longer by what its copies say to each other and no less, so neither does any pipeline get faster."""
    task = job(model, "dgx-h100", nodes, global_batch_size=batch * nodes, seq_len=1024, stack=stack)
    twice = job(model, "dgx-h100", 2 * nodes, global_batch_size=2 * batch * nodes, seq_len=1024, stack=stack)
    before = by_seconds(task).best
    layout = dataclasses.replace(before.layout, dp_replicate=2 * before.layout.dp_replicate)
    assert not layout.problems(twice)
    copied = simulate(twice, layout)
    assert copied.step_seconds >= before.step_seconds * (1 - 1e-9)
    if copied.fits:
        assert fastest(by_seconds(twice)) <= copied.step_seconds * (1 + 1e-12)


def test_more_devices_may_slow_the_optimum() -> None:
    """A plan uses every device, so that with the same batch a second machine behind a slow link can cost more than it
    brings: 2 x gpt2's gradients over 10 Gb/s take longer than computing a small batch alone."""
    seconds = [
        by_seconds(job(cluster="workstation-4x4090", nodes=n, global_batch_size=8, seq_len=256)).best.step_seconds
        for n in (1, 2)
    ]
    assert seconds[0] < seconds[1]


def test_search_takes_several_splits() -> None:
    """A list of numbers is one cut into stages, a list of lists are several."""
    one = job("llama-3.1-8b", search={"stage_layers": [15, 17]}, global_batch_size=16)
    assert {layout.stage_layers for layout in candidates(one)} == {(15, 17)}
    two = job("llama-3.1-8b", search={"stage_layers": [[15, 17], [8, 8, 8, 8]]}, global_batch_size=16)
    assert {layout.stage_layers for layout in candidates(two)} == {(15, 17), (8, 8, 8, 8)}


def test_search_of_too_many_values_is_refused() -> None:
    with pytest.raises(UserError, match=r"search\.tp has 3000 values; name at most 256"):
        job(search={"tp": list(range(1, 3001))})
    many = {"micro_batch_size": list(range(1, 200)), "virtual_stages": list(range(1, 200))}
    with pytest.raises(UserError, match=r"\[search\] names more than 4,000,000 layouts; name fewer values"):
        plan(job("llama-3.1-8b", nodes=2, search=many, global_batch_size=64))


def test_search_pins_every_kind_of_field() -> None:
    search = {"sync": ["local_sgd"], "sync_interval": [4], "zero_stage": [0], "micro_batch_size": [2]}
    task = job("gpt2", search=search, global_batch_size=32, stack="layoutwise-cuda")
    found = by_seconds(task, top=2)
    for p in (found.best, *found.runners_up):
        assert (p.layout.sync, p.layout.sync_interval, p.layout.zero_stage) == ("local_sgd", 4, 0)
        assert p.layout.micro_batch_size == 2
