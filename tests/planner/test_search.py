"""The answer is the optimum of the simulator over the whole space, and the certificate accounts for every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.plan import read_plan, shortest_first, write_plan
from planner.search import lower_bound, plan
from planner.space import candidates, space, without_model_parallelism
from simulator.errors import NothingFitsError, UserError
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.program import stage_costs
from simulator.risk import HIGH_RISK
from simulator.simulate import simulate


def job(model: str = "gpt2", cluster: str = "dgx-a100", nodes: int = 1, search: Any = None, **training: Any) -> Job:
    data = {"model": model, "cluster": cluster, "nodes": nodes, "training": training, "search": search or {}}
    return build_job(data, "test")


jobs = st.builds(
    job,
    model=st.sampled_from(["gpt2", "llama-3.1-8b", "bert-large", "mixtral-8x7b"]),
    cluster=st.sampled_from(["dgx-a100", "dgx-h100", "workstation-4x4090"]),
    nodes=st.just(1),
    global_batch_size=st.sampled_from([8, 16, 32]),
    seq_len=st.sampled_from([256, 512]),
    stack=st.sampled_from(["megatron-core", "torchtitan", "torchtitan-compile", "megatron-2021"]),
    search=st.just({"micro_batch_size": [1, 2], "recompute": ["none"]}),
)
SMALL = {"cp": [1], "tp": [1, 4], "pp": [1, 2, 4], "micro_batch_size": [2], "virtual_stages": [1, 2, 3]}
small_spaces = jobs.map(lambda task: dataclasses.replace(task, search=task.search | SMALL))


@given(task=small_spaces)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_answer_equals_brute_force(task: Job) -> None:
    answer_is_brute_force(task)


@pytest.mark.slow
@given(task=jobs)
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_answer_equals_brute_force_on_many_jobs(task: Job) -> None:
    """pytest -m slow tests/planner/test_search.py, in about seven minutes."""
    answer_is_brute_force(task)


def answer_is_brute_force(task: Job) -> None:
    legal = [layout for layout in candidates(task) if not layout.problems(task)]
    everything = [simulate(task, layout) for layout in legal]
    fitting = sorted(p.step_seconds for p in everything if p.fits)
    if not fitting:
        with pytest.raises(NothingFitsError):
            plan(task)
        return
    found = plan(task, top=3, ties=False)
    assert [p.step_seconds for p in (found.best, *found.runners_up)] == pytest.approx(fitting[:3])


@given(task=jobs, pick=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_bound_is_admissible(task: Job, pick: int) -> None:
    legal = [layout for layout in candidates(task) if not layout.problems(task)]
    layout = legal[pick % len(legal)]
    bound = lower_bound(task, layout, stage_costs(task, layout))
    assert bound <= simulate(task, layout).step_seconds * (1 + 1e-9)


@pytest.mark.parametrize("name", ["LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_bound_is_admissible_for_every_schedule(name: str) -> None:
    """Free messages and many microbatches come closest to the bound; a stack that hides tensor parallelism in pairs
    must not undercut it."""
    search = {"schedule": [name], "pp": [2, 4], "micro_batch_size": [1], "virtual_stages": [2]}
    task = job("llama-3.1-8b", "dgx-h100", search=search, global_batch_size=64, stack="torchtitan")
    task = dataclasses.replace(task, stack=dataclasses.replace(task.stack, overlaps_in_pair=("tp",)))
    legal = [layout for layout in candidates(task) if not layout.problems(task)]
    assert legal and {layout.schedule for layout in legal} == {name}
    for layout in legal:
        bound, seconds = lower_bound(task, layout, stage_costs(task, layout)), simulate(task, layout).step_seconds
        assert 0.5 * seconds < bound <= seconds * (1 + 1e-9)


def test_a_gap_stops_the_search_earlier_and_is_kept() -> None:
    task = job("llama-3.1-70b", "dgx-h100", 8, global_batch_size=256, seq_len=8192)
    exact, rough = (plan(task, top=1, gap=gap, ties=False) for gap in (0.0, 0.05))
    assert exact.certificate.lower_bound_gap == 0
    assert 0 <= rough.certificate.lower_bound_gap <= 0.05
    assert rough.certificate.simulated <= exact.certificate.simulated
    assert exact.best.step_seconds >= rough.best.step_seconds * (1 - rough.certificate.lower_bound_gap)


def test_what_is_behind_a_risky_layout_are_the_best_of_those_that_are_not() -> None:
    """With hardly more memory than the fastest layout needs it is too likely to run out: it is named, with a
    certificate of its own, and those ranked are the fastest without that risk."""
    task = job("llama-3.1-8b", global_batch_size=32, search=SMALL)
    fastest = plan(task, top=1, ties=False).best
    gpu = dataclasses.replace(task.cluster.gpu, memory=fastest.memory.peak * 1.005)
    tight = dataclasses.replace(task, cluster=dataclasses.replace(task.cluster, gpu=gpu))
    everything = [simulate(tight, layout) for layout in candidates(tight) if not layout.problems(tight)]
    fitting = sorted((p for p in everything if p.fits), key=shortest_first)
    safe = [p for p in fitting if p.out_of_memory_probability <= HIGH_RISK]
    found = plan(tight, top=3, ties=False)
    assert len(safe) >= 3 and found.riskier == fitting[0] != safe[0]
    assert [found.best, *found.runners_up] == safe[:3]
    assert found.certificate.lower_bound_gap == 0 and found.certificate.simulated < len(fitting)


def test_certificate_accounts_for_every_layout() -> None:
    task = job(global_batch_size=64)
    c = plan(task).certificate
    assert c.space == len(list(candidates(task)))
    assert c.space == c.illegal + c.out_of_memory + c.bounded + c.simulated
    assert c.simulated < c.space / 4


def test_candidates_are_distinct() -> None:
    found = list(candidates(job("llama-3.1-8b", nodes=2, global_batch_size=64)))
    assert len(found) == len(set(found))
    assert {layout.pp for layout in found} >= {1, 2, 4, 8, 16}
    assert {layout.zero_stage for layout in found} == {0, 1, 3}


def test_baseline_is_plain_data_parallel() -> None:
    found = plan(job("llama-3.1-8b", nodes=1, global_batch_size=64, stack="torchtitan"))
    assert found.baseline.layout.tp == found.baseline.layout.pp == 1
    assert found.best.step_seconds <= found.baseline.step_seconds


def test_baseline_that_does_not_fit_is_shown_with_its_reason() -> None:
    found = plan(job("gpt3-175b", nodes=16, global_batch_size=128, stack="megatron-2021"))
    assert not found.baseline.fits and "too much" in found.baseline.problems[0]


def test_search_pins_fields() -> None:
    found = plan(job(global_batch_size=64, search={"tp": [2], "pp": [2], "schedule": ["1F1B"]}))
    for p in (found.best, *found.runners_up):
        assert (p.layout.tp, p.layout.pp, p.layout.schedule) == (2, 2, "1F1B")


def test_search_pins_only_what_is_so() -> None:
    """A pinned value is not dropped where it does not apply: those layouts are left out."""
    task = job(global_batch_size=64, search={"schedule": ["Interleaved1F1B"], "virtual_stages": [2, 3]})
    found = list(candidates(task))
    assert found and all(layout.pp > 1 and layout.virtual_stages in (2, 3) for layout in found)
    task = job(global_batch_size=64, search={"sequence_parallel": [True]})
    assert all(layout.tp > 1 for layout in candidates(task))
    task = job(global_batch_size=64, search={"cp": [2, 1]})
    assert {layout.cp for layout in candidates(task)} == {1, 2}


def test_baseline_of_a_batch_that_is_too_small() -> None:
    """Four samples over eight ranks: the baseline is shown as impossible, its idle ranks counted."""
    found = plan(job(global_batch_size=4))
    assert not found.baseline.fits
    assert found.baseline.problems[0] == "global_batch_size = 4 cannot be divided over 8 ranks; 4 would work"
    whole = found.baseline.tokens_per_second / 8
    assert found.baseline.tokens_per_second_per_gpu == pytest.approx(whole)


def test_baseline_is_the_best_plain_layout() -> None:
    """Replicas and ZeRO 1 to 3 over every number of shards, with every micro-batch and recomputation: the fastest that
    fits and is unlikely to run out of memory is the baseline, by brute force."""
    task = job("llama-3.1-8b", nodes=2, global_batch_size=64, seq_len=2048, stack="torchtitan")
    found = plan(task).baseline
    plain = dataclasses.replace(task, search=dict(without_model_parallelism(task)))
    legal = [layout for layout in candidates(plain) if not layout.problems(task)]
    assert {layout.zero_stage for layout in legal} == {0, *task.stack.zero_stages}
    fitting = [p for p in (simulate(task, layout) for layout in legal) if p.out_of_memory_probability <= HIGH_RISK]
    assert found.fits and found.step_seconds == pytest.approx(min(p.step_seconds for p in fitting))


def test_baseline_is_as_unlikely_to_run_out_of_memory_as_the_recommendation() -> None:
    """70B with fp8 on 64 B200: the fastest plain layout needs 175.5 of 178.4 GiB. By brute force over all that fit."""
    task = job("llama-3.1-70b", "dgx-b200", nodes=8, global_batch_size=128, seq_len=8192, precision="fp8",
               stack="megatron-bridge")  # fmt: skip
    found = plan(task).baseline
    plain = dataclasses.replace(task, search=dict(without_model_parallelism(task)))
    every = [simulate(task, layout) for layout in candidates(plain) if not layout.problems(task)]
    fitting = sorted((p for p in every if p.fits), key=lambda p: p.step_seconds)
    safe = [p for p in fitting if p.out_of_memory_probability <= HIGH_RISK]
    assert fitting[0].out_of_memory_probability > HIGH_RISK and safe
    assert found.step_seconds == safe[0].step_seconds and found.out_of_memory_probability <= HIGH_RISK


def test_baseline_that_is_impossible_is_the_best_on_as_many_nodes_as_the_batch_divides_over() -> None:
    """24 sequences over 2 nodes are 16 ranks, which do not divide them; 8 do. Half of the GPUs are idle."""
    task = job("gpt2", nodes=2, global_batch_size=24, seq_len=512, search={"micro_batch_size": [1, 3]})
    found, one = plan(task).baseline, plan(dataclasses.replace(task, nodes=1)).baseline
    assert found.problems[0] == "global_batch_size = 24 cannot be divided over 16 ranks; 8 would work"
    assert not found.fits and found.layout == one.layout and found.step_seconds == one.step_seconds
    assert found.tokens_per_second_per_gpu == pytest.approx(one.tokens_per_second_per_gpu / 2)


def test_nothing_fits_names_the_nearest_misses() -> None:
    with pytest.raises(NothingFitsError, match=r"nearest miss it: .* by .* GiB") as caught:
        plan(job("llama-3.1-405b", global_batch_size=8, seq_len=4096))
    assert caught.value.exit_code == 3


def test_nothing_legal_names_the_rule() -> None:
    with pytest.raises(NothingFitsError, match=r"tp = 8 must divide num_attention_heads = 12"):
        plan(job(global_batch_size=8, search={"tp": [8]}))


def test_more_nodes_never_slow_the_best() -> None:
    """The same batch on twice the machines: the optimum cannot get slower."""
    steps = [plan(job("llama-3.1-8b", "dgx-h100", n, global_batch_size=128)).best.step_seconds for n in (1, 2, 4)]
    assert steps == sorted(steps, reverse=True)


def test_plan_survives_its_file(tmp_path: Any) -> None:
    found = plan(job(global_batch_size=64))
    again = read_plan(write_plan(found, tmp_path / "plan.json"))
    assert again.layout == found.layout and again.certificate == found.certificate
    assert again.job == found.job
    # The file alone is enough to predict again.
    assert simulate(again.job, again.layout).step_seconds == pytest.approx(found.best.step_seconds)


def test_plan_of_another_version_is_refused(tmp_path: Any) -> None:
    path = write_plan(dataclasses.replace(plan(job(global_batch_size=8)), version=99), tmp_path / "plan.json")
    with pytest.raises(UserError, match="version = 99"):
        read_plan(path)


def test_uneven_layers_are_legal() -> None:
    """llama-3.1-405b has 126 layers: 16 stages hold 8 or 7."""
    task = job("llama-3.1-405b", "dgx-h100", 64, global_batch_size=128, seq_len=8192)
    layout = Layout(dp_shard=4, zero_stage=1, tp=8, pp=16, sequence_parallel=True)
    assert not layout.problems(task)
    assert sorted(set(layout.layers_per_stage(126))) == [7, 8]


def test_sequences_are_cut_from_a_length_on_and_experts_always() -> None:
    """A rank's part of a sequence has 1,024 tokens at least; the baseline cuts neither sequences nor experts."""
    assert {layout.cp for layout in candidates(job("llama-3.1-8b", seq_len=1024))} == {1}
    assert {layout.cp for layout in candidates(job("llama-3.1-8b", seq_len=8192))} == {1, 2, 4, 8}
    assert {layout.ep for layout in candidates(job("llama-3.1-8b", seq_len=8192))} == {1}
    mixture = job("mixtral-8x7b", seq_len=4096)
    assert {layout.ep for layout in candidates(mixture)} == {1, 2, 4, 8}
    plain = space(mixture, without_model_parallelism(mixture))
    assert set(plain["ep"].tolist()) == set(plain["cp"].tolist()) == {1}


def test_a_mixture_is_planned_with_its_experts_spread() -> None:
    """Mixtral on four nodes: whole experts on eight ranks beat experts that tp or fsdp has to bring together."""
    found = plan(job("mixtral-8x7b", nodes=4, global_batch_size=512, search={"pp": [1, 2], "micro_batch_size": [1]}))
    assert found.best.layout.ep > 1
    assert found.best.breakdown.ep > 0


def test_a_runtime_without_the_axes_is_not_asked_for_them() -> None:
    task = job("llama-3.1-8b", seq_len=65536, stack="megatron-2021")
    assert {layout.cp for layout in candidates(task)} == {1}
    ours = job("llama-3.1-8b", seq_len=65536, stack="layoutwise-cuda")
    assert {layout.cp for layout in candidates(ours)} == {1, 2, 4, 8}


def test_a_named_rank_order_is_searched() -> None:
    """[search] pins any field of the layout; without it the two orders that Megatron-LM has switches for are tried."""
    named = {layout.rank_order for layout in candidates(job(search={"rank_order": ["tp-cp-ep-pp-dp"]}))}
    assert named == {"tp-cp-ep-pp-dp"}
    assert {layout.rank_order for layout in candidates(job())} == {Layout.rank_order, "tp-cp-ep-pp-dp"}
    assert {layout.rank_order for layout in candidates(job(stack="torchtitan"))} == {Layout.rank_order}


def test_more_gpus_never_slow_the_best_where_some_may_idle() -> None:
    """A law where a space includes the use of fewer nodes: the optimum over at most n nodes cannot grow with n. With
    all nodes in use it is none: the batch may not divide, and collectives grow."""
    steps = [
        plan(job("llama-3.1-8b", "dgx-h100", n, global_batch_size=96, seq_len=2048), top=1).best.step_seconds
        for n in (1, 2, 3, 4)
    ]
    with_idle = [min(steps[: i + 1]) for i in range(len(steps))]
    assert with_idle == sorted(with_idle, reverse=True)
    # Here every doubling of the nodes is a gain in itself.
    assert steps[3] < steps[1] < steps[0]
