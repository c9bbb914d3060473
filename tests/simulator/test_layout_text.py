"""Layouts as text: what is written is read as exactly the layout, whatever follows from what is not named."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.space import candidates
from simulator.errors import UserError
from simulator.job import Job, build_job
from simulator.layout import Layout, written
from simulator.layout_text import change_text, parse_layout, spelt_out


def job(stack: str, nodes: int = 1) -> Job:
    training = {"global_batch_size": 32, "seq_len": 2048, "stack": stack}
    search = {"micro_batch_size": [1, 2], "rank_order": ["tp-cp-ep-dp-pp"]}
    return build_job(
        {"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": nodes, "training": training, "search": search}, "test"
    )


STACKS = ("torchtitan", "megatron-core", "megatron-2021")
LAYOUTS = {name: [one for one in candidates(job(name)) if not one.problems(job(name))] for name in STACKS}


@given(name=st.sampled_from(STACKS), data=st.data())
@settings(max_examples=300, deadline=None)
def test_what_is_spelt_out_is_read_as_the_layout(name: str, data: st.DataObject) -> None:
    task, layout = job(name), data.draw(st.sampled_from(LAYOUTS[name]))
    text = spelt_out(layout, task)
    assert (layout if text == "one process" else parse_layout(text, task)) == layout


@given(name=st.sampled_from(STACKS), data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_change_is_read_as_the_layout_over_all_fields_or_those_typed(name: str, data: st.DataObject) -> None:
    task = job(name)
    before, after = (data.draw(st.sampled_from(LAYOUTS[name])) for _ in range(2))
    words = dict(word.split("=") for word in change_text(before, after, task).split())
    typed = dict(word.split("=") for word in spelt_out(before, task).split() if "=" in word)
    every = dict(word.split("=") for word in change_text(Layout(dp_shard=0, tp=0), before, task).split())
    for fields in (typed, every | typed):
        assert parse_layout(" ".join(f"{k}={v}" for k, v in (fields | words).items()), task) == after


@pytest.mark.parametrize(
    ("stack", "before", "after", "words"),
    [
        # cp shards by itself, and torchtitan shards all it can.
        ("torchtitan", "tp=8", {"cp": 2, "tp": 4}, "cp=2 tp=4 zero_stage=0"),
        # Where dp_shard is named as 1 nothing would be sharded, but cp shards.
        ("torchtitan", "", {"dp_shard": 1, "cp": 8}, "dp_shard=1 cp=8 zero_stage=3"),
        # It follows from tp where nobody named it, and would not where it was named as off.
        ("megatron-core", "", {"dp_shard": 4, "tp": 2, "sequence_parallel": True},
         "dp_shard=4 tp=2 sequence_parallel=true"),
    ],
)  # fmt: skip
def test_what_would_follow_otherwise_is_named(stack: str, before: str, after: dict[str, object], words: str) -> None:
    task = job(stack)
    layout = parse_layout(before, task)
    assert change_text(layout, dataclasses.replace(layout, **after), task) == words


def test_sequence_parallelism_that_is_off_is_spelt_out() -> None:
    off = Layout(dp_shard=4, tp=2, zero_stage=3)
    assert spelt_out(off, job("torchtitan")) == "dp_shard=4 tp=2 zero_stage=3 sequence_parallel=false"
    assert spelt_out(dataclasses.replace(off, sequence_parallel=True), job("torchtitan")).endswith("=true")


def test_layers_of_many_alike_stages_are_written_once() -> None:
    """62 stages of 2 between two of 1; three alike are written out."""
    task, layers = job("megatron-core"), (1, *[2] * 62, 1)
    assert written(layers) == "1,2*62,1" and written((3, 3, 3, 2)) == "3,3,3,2"
    assert parse_layout("pp=8 virtual_stages=8 stage_layers=1,2*62,1", task).stage_layers == layers
    assert parse_layout("pp=4 stage_layers=3,3,3,2", task).stage_layers == (3, 3, 3, 2)
    for wrong in ("1,a", "2*", "*3", "2*99999"):
        with pytest.raises(UserError, match=r"stage_layers = '.*' must be integers like 2,3,3,2"):
            parse_layout(f"pp=2 stage_layers={wrong}", task)
