"""Variants of a job: what they change, what they refuse, and laws that their answers keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.search import plan
from planner.what_if import USUAL, asked, seconds_of, variants, what_if, what_if_json, what_if_rows
from simulator.error_bars import tie_share
from simulator.errors import UserError
from simulator.job import Job, build_job
from simulator.results import Prediction

SEARCH = {"tp": [1, 2, 8], "pp": [1, 2], "micro_batch_size": [1, 2], "cp": [1], "virtual_stages": [1, 2]}


def job(model: str = "llama-3.1-8b", cluster: str = "dgx-h100", nodes: int = 2, **training: Any) -> Job:
    recipe = {"global_batch_size": 32, "seq_len": 4096} | training
    data = {"model": model, "cluster": cluster, "nodes": nodes, "training": recipe, "search": SEARCH}
    return build_job(data, "test")


def changed(text: str, task: Job | None = None) -> Job:
    (found,) = variants(task or job(), [text])
    assert found.job is not None, found.problem
    return found.job


def test_variants_by_hand() -> None:
    task = job()
    spec = task.cluster
    assert spec.scale_out is not None
    faster = changed("inter-node=2x").cluster.scale_out
    assert faster is not None and faster.bandwidth == 2 * spec.scale_out.bandwidth == 100e9
    assert faster.latency == spec.scale_out.latency
    assert changed("intra-node=0.5x").cluster.scale_up.bandwidth == 225e9
    assert changed("memory=+10GiB").cluster.gpu.memory == spec.gpu.memory + 10 * 2**30
    assert changed("memory=141GB").cluster.gpu.memory == 141e9
    assert changed("memory=2x").cluster.gpu.memory == 2 * spec.gpu.memory
    assert changed("batch=2x").training.global_batch_size == 64
    assert changed("batch=0.5x").training.global_batch_size == 16
    assert changed("batch=48").training.global_batch_size == 48
    assert [changed(f"nodes={word}").nodes for word in ("+1", "-1", "4", "2.5x")] == [3, 1, 4, 5]


def test_without_nvlink_it_is_the_pcie_that_feeds_the_cards() -> None:
    """A card of 400 Gb/s = 50 GB/s needs more than PCIe 4.0 x16 (31.5 GB/s): 5.0, 63 GB/s. One of 200 Gb/s does not. A
    rack of 72 falls apart into its nodes."""
    for cluster, kind, bandwidth in (("dgx-h100", "PCIe 5.0 x16", 63e9), ("dgx-a100", "PCIe 4.0 x16", 31.5e9)):
        link = changed("nvlink=none", job(cluster=cluster)).cluster.scale_up
        assert (link.kind, link.bandwidth, link.topology) == (kind, bandwidth, "pcie")
        assert (link.devices_per_root, link.root_bandwidth) == (4, bandwidth)
    rack = job(cluster="gb200-nvl72", nodes=36, global_batch_size=288)
    assert (rack.cluster.domain, changed("nvlink=none", rack).cluster.domain) == (72, 4)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("inter-node", "is not of the form key=value"),
        ("internode=2x", "unknown key 'internode'; did you mean 'inter-node'?"),
        ("inter-node=2", "must be a factor above zero, like 2x"),
        ("inter-node=0x", "must be a factor above zero"),
        ("inter-node=1x", "changes nothing"),
        ("memory=ten", "write +10GiB, 141GB, 2x or unlimited"),
        ("memory=-90GB", "leaves nothing"),
        ("nvlink=off", "write nvlink=none"),
        ("batch=0.3x", "are no whole number"),
        ("nodes=-2", "must leave more than zero"),
        ("nodes=+1x", "write 2x, +1 or a number"),
    ],
)
def test_what_is_no_change_is_refused_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        variants(job(), [text])
    assert words in str(error.value) and "--what-if" in str(error.value)


def test_of_the_usual_changes_those_are_left_out_that_change_nothing() -> None:
    """One workstation without NVLink: nothing goes between nodes, and none can be taken away."""
    alone = job("gpt2", "workstation-4x4090", 1, seq_len=1024)
    assert [one.change for one in variants(alone)] == ["memory=+10GiB", "batch=2x", "batch=0.5x", "nodes=+1"]
    with pytest.raises(UserError, match="nothing of this job goes between nodes"):
        variants(alone, ["inter-node=2x"])


def test_the_usual_changes_are_planned_where_that_is_quick() -> None:
    read = plan(job())
    quick = dataclasses.replace(read, certificate=dataclasses.replace(read.certificate, seconds=0.1))
    slow = dataclasses.replace(read, certificate=dataclasses.replace(read.certificate, seconds=2.0))
    assert (asked(quick, None), asked(slow, None)) == (USUAL, ())
    assert asked(slow, ["all"]) == USUAL and asked(quick, ["none"]) == ()
    assert asked(slow, ["nodes=4", "batch=2x"]) == ("nodes=4", "batch=2x")
    assert seconds_of(slow) == pytest.approx(2.0 * (1 + len(USUAL)))


def test_outcomes_are_plans_of_their_own() -> None:
    read = plan(job())
    found = {one.change: one for one in what_if(read, ["batch=2x", "nodes=+1", "memory=10GB"])}
    double = found["batch=2x"]
    assert double.best is not None and double.speed is not None
    again = plan(changed("batch=2x"), top=1, ties=False).best
    # The layout that is there already where it ties with the best.
    assert double.best.step_seconds <= again.step_seconds * (1 + tie_share())
    assert double.best.layout in (again.layout, read.layout)
    assert double.speed == pytest.approx(double.best.tokens_per_second / read.best.tokens_per_second)
    # 24 ranks leave 24, 12, 3 and 6 replicas of these sizes, and none of them divides 32 sequences.
    assert found["nodes=+1"].best is None and "no layout" in found["nodes=+1"].problem
    assert found["memory=10GB"].best is None and "nearest miss" in found["memory=10GB"].problem
    rows = what_if_rows(list(found.values()))
    assert [len(row) for row in rows] == [6, 6, 6] and rows[2][2] == "does not fit"
    assert [one["change"] for one in what_if_json(list(found.values()))] == list(found)


def fastest(task: Job) -> Prediction:
    found = plan(task, top=1, ties=False)
    return found.riskier or found.best


jobs = st.builds(
    job,
    model=st.sampled_from(["gpt2", "llama-3.1-8b", "mixtral-8x7b"]),
    cluster=st.sampled_from(["dgx-h100", "dgx-a100", "pcie-8xa100"]),
    nodes=st.sampled_from([1, 2]),
    global_batch_size=st.sampled_from([16, 32]),
    seq_len=st.just(512),
    stack=st.sampled_from(["megatron-core", "torchtitan"]),
)


@given(task=jobs, factor=st.sampled_from(["1.1", "2", "8"]))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_more_bandwidth_or_memory_never_makes_the_fastest_slower(task: Job, factor: str) -> None:
    never_slower(task, factor)


@pytest.mark.slow
@given(task=jobs, factor=st.sampled_from(["1.1", "2", "8"]))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_more_never_makes_the_fastest_slower_in_many_jobs(task: Job, factor: str) -> None:
    """pytest -m slow tests/planner/test_what_if.py, in a few minutes."""
    never_slower(task, factor)


def never_slower(task: Job, factor: str) -> None:
    try:
        was = fastest(task)
    except UserError:
        return
    for key in ("memory", "intra-node", *(["inter-node"] if task.nodes > 1 else [])):
        assert fastest(changed(f"{key}={factor}x", task)).step_seconds <= was.step_seconds * (1 + 1e-9), key
