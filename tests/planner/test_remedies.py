"""What would make a layout fit: every remedy is legal, fits when it is simulated, and is what its words say."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from planner.changes import changes, more_nodes
from planner.remedies import (
    Remedies,
    Remedy,
    advice,
    remedies,
    remedy_line,
    remedy_lines,
    risk_sentence,
    safer,
    show_risk,
    when_nothing_fits,
)
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import difference, parse_layout
from simulator.memory import capacity
from simulator.risk import HIGH_RISK
from simulator.simulate import simulate


def job(model: str = "llama-3.1-8b", nodes: int = 1, cluster: str = "dgx-h100", **training: object) -> Job:
    recipe = {"global_batch_size": 64, "seq_len": 4096} | training
    return build_job({"model": model, "cluster": cluster, "nodes": nodes, "training": recipe}, "test")


def found(task: Job, text: str) -> tuple[Remedies, Layout]:
    layout = parse_layout(text, task)
    assert not layout.problems(task)
    prediction = simulate(task, layout)
    assert not prediction.fits
    return remedies(task, prediction), layout


def as_text(layout: Layout) -> dict[str, str]:
    """Every field of a layout, as --layout takes it."""
    return dict(word.split("=") for word in difference(dataclasses.replace(layout, **IMPOSSIBLE), layout).split())


# Values that no layout of these tests has, so that all fields count as changed.
IMPOSSIBLE = {
    "dp_replicate": -1, "dp_shard": -1, "cp": -1, "tp": -1, "pp": -1, "ep": -1, "zero_stage": -1,
    "micro_batch_size": -1, "schedule": "", "virtual_stages": -1, "recompute": "", "rank_order": "",
}  # fmt: skip

jobs = st.builds(
    job,
    model=st.sampled_from(["llama-3.1-8b", "mixtral-8x7b", "llama-3.1-70b", "gpt3-175b"]),
    cluster=st.sampled_from(["dgx-h100", "dgx-a100-40g"]),
    nodes=st.sampled_from([1, 2]),
    global_batch_size=st.just(32),
    seq_len=st.just(2048),
    stack=st.sampled_from(["megatron-core", "torchtitan", "megatron-2021", "layoutwise-cuda"]),
)
layouts = st.fixed_dictionaries(
    {
        "tp": st.sampled_from([1, 2, 8]),
        "pp": st.sampled_from([1, 2, 8]),
        "micro_batch_size": st.sampled_from([1, 2, 8]),
        "recompute": st.sampled_from(["none", "none", "full"]),
        "schedule": st.sampled_from(["1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble"]),
    }
)


@given(task=jobs, fields=layouts)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
def test_remedies_are_legal_fit_and_say_what_they_are(task: Job, fields: dict[str, object]) -> None:
    layout = parse_layout(" ".join(f"{k}={v}" for k, v in fields.items()), task)
    assume(not layout.problems(task))
    refused = simulate(task, layout)
    assume(not refused.fits)
    answer = remedies(task, refused)
    here = [r for r in answer.found if r.nodes == task.nodes]
    assert [r.step_seconds for r in here] == sorted(r.step_seconds for r in here), "cheapest first"
    assert [r.nodes for r in answer.found] == sorted(r.nodes for r in answer.found), "more nodes last"
    for remedy in answer.found:
        larger = dataclasses.replace(task, nodes=remedy.nodes)
        assert not remedy.layout.problems(larger)
        again = simulate(larger, remedy.layout)
        assert again.fits and remedy.fits
        assert again.memory.peak == remedy.peak <= capacity(larger, remedy.layout)
        assert again.step_seconds == remedy.step_seconds
        assert again.out_of_memory_probability == remedy.out_of_memory_probability
        assert remedy.slowdown == pytest.approx(again.step_seconds / refused.step_seconds - 1)
        # Pasted over the refused layout's words its words are its layout.
        words = dict(word.split("=") for word in remedy.change.split())
        assert int(words.pop("nodes", task.nodes)) == remedy.nodes
        for typed in (fields, as_text(layout)):
            pasted = typed | words
            # What is left over goes to data; on more nodes that is more.
            if larger == task or typed is not fields:
                assert parse_layout(" ".join(f"{k}={v}" for k, v in pasted.items()), larger) == remedy.layout
    if here:
        assert answer.nearest is None
    elif answer.nearest is not None:
        assert not answer.nearest.fits and answer.short_by > 0


def test_every_change_is_legal_and_differs() -> None:
    task = job(nodes=2, stack="torchtitan")
    start = parse_layout("pp=2 micro_batch_size=4 schedule=Interleaved1F1B", task)
    seen = list(changes(task, start))
    assert len({layout for _, layout in seen}) == len(seen)
    for name, layout in seen:
        assert not layout.problems(task) and layout != start
        assert layout.world_size == task.world_size
        assert name in difference(start, layout) or name in ("schedule", "zero_stage")
    assert {"recompute", "micro_batch_size", "tp", "pp", "cp", "schedule"} <= {name for name, _ in seen}


def test_a_smaller_micro_batch_is_enough() -> None:
    """64 sequences over 8 ranks: micro-batch 8 keeps eight times what 1 keeps, about 28 GiB a sequence."""
    answer, _ = found(job(stack="torchtitan"), "micro_batch_size=8")
    assert any(remedy.change.startswith("micro_batch_size=") for remedy in answer.found)
    assert answer.nearest is None


def test_pairs_are_tried_where_no_single_change_suffices() -> None:
    """70 billion parameters with ZeRO-1 on 8 GPUs hold 6 bytes each on tp = 2: 212 GB; with tp = 8 and ZeRO-1 53 GB and
    12 bytes over one replica 106 GB. On 32 GPUs micro-batch 8 needs less of both."""
    answer, layout = found(job("llama-3.1-70b", nodes=4, seq_len=8192), "tp=2 micro_batch_size=2")
    here = [remedy for remedy in answer.found if remedy.nodes == 4]
    assert here and all(len(kinds(layout, remedy)) >= 2 for remedy in here)


def kinds(layout: Layout, remedy: Remedy) -> set[str]:
    """Fields that changed, but for the data ranks that give way."""
    words = {word.split("=")[0] for word in difference(layout, remedy.layout).split()}
    return words - {"dp_shard", "dp_replicate", "sequence_parallel"}


def test_where_nothing_helps_the_nearest_is_named_and_more_nodes() -> None:
    """405 billion parameters with 18 bytes each are 7.3 TB: on 8 GPUs of 86 GB nothing can help; 16 nodes have 11."""
    task = job("llama-3.1-405b", global_batch_size=128)
    answer, _ = found(task, "tp=8")
    assert all(remedy.nodes > 1 for remedy in answer.found) and len(answer.found) <= 1
    assert answer.nearest is not None and not answer.nearest.fits
    assert answer.short_by == pytest.approx(answer.nearest.peak - capacity(task, answer.nearest.layout))
    assert answer.nearest.peak > 7.3e12 / 8
    last = remedy_lines(answer)[-1]
    assert last.startswith("on these devices no single change and no two") and "GiB too much" in last


def test_more_nodes_are_not_offered_where_there_is_no_network() -> None:
    task = job()
    alone = dataclasses.replace(task, cluster=dataclasses.replace(task.cluster, scale_out=None))
    layout = parse_layout("tp=2", task)
    assert list(more_nodes(alone, layout)) == []
    nodes = [larger.nodes for larger, _ in more_nodes(task, layout)]
    assert nodes == sorted(nodes) and set(nodes) == {2, 4, 8, 16}


def test_lines_are_words_for_the_command_line() -> None:
    remedy = Remedy("recompute=selective", Layout(), 4, 71.2 * 2**30, 10.4, 0.04, 0.126, True)
    assert remedy_line(remedy) == "recompute=selective: 71.2 GiB, +4.0% step time, risk 13%"
    more = dataclasses.replace(remedy, change="nodes=8 dp_shard=16", nodes=8, slowdown=-0.48)
    assert remedy_line(more) == "--set nodes=8 dp_shard=16: 71.2 GiB, -48.0% step time, risk 13%"
    lines = remedy_lines(Remedies((remedy, more), None, 0.0))
    assert lines[0] == "what would make it fit, cheapest first:" and len(lines) == 3


def test_what_fits_barely_is_warned_of_and_made_safer() -> None:
    task = job("llama-3.1-70b", nodes=4, seq_len=8192, global_batch_size=64)
    barely = simulate(task, parse_layout("tp=8 pp=2", task))
    assert barely.fits and barely.out_of_memory_probability > HIGH_RISK
    change = safer(task, barely)
    assert change is not None and change.fits and change.out_of_memory_probability <= HIGH_RISK
    assert advice(task, barely).found == (change,)
    said = risk_sentence(barely, task, change)
    assert (
        said.startswith("warning:")
        and f"{change.change} lowers it to {show_risk(change.out_of_memory_probability)}" in said
    )


def test_what_is_safe_gets_no_advice() -> None:
    task = job()
    safe = simulate(task, parse_layout("tp=8", task))
    assert safe.out_of_memory_probability < HIGH_RISK
    assert advice(task, safe) == Remedies((), None, 0.0)
    assert risk_sentence(safe, task, None).startswith("risk of running out of memory: ")


def test_nothing_to_say_without_a_miss() -> None:
    assert when_nothing_fits(job(), ()) == Remedies((), None, 0.0)
