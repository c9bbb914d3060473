"""Offload as a remedy, and in the words of other frameworks."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from planner.changes import changes
from planner.export import TARGETS, export
from planner.imports import read_layout
from planner.plan import Certificate, Plan
from planner.remedies import remedies, remedy_line
from simulator.errors import UserError
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.simulate import simulate

ON_HOST = Layout(dp_shard=16, zero_stage=1, offload="optimizer")


def job(stack: str = "megatron-core", model: str = "llama-3.1-8b", nodes: int = 2, **training: Any) -> Job:
    recipe = {"global_batch_size": 96, "seq_len": 4096, "stack": stack} | training
    return build_job({"model": model, "cluster": "dgx-h100", "nodes": nodes, "training": recipe}, "test")


def plan_of(task: Job, layout: Layout) -> Plan:
    best = simulate(task, layout)
    return Plan(task, best, (), best, Certificate(1, 0, 0, 0, 1, 0.0, 0.0), {})


def test_a_refusal_offers_it_with_its_price() -> None:
    """70.6e9 parameters over tp = 8 are 8.82e9 on a rank. Weights and gradients take 6 bytes each, 49.3 GiB, main
    weights and moments 12 / 4 more, 24.6 GiB, which the host can have: 28 bytes for each of 8 · 8.82e9 / 4 parameters
    of a node at 115 GB/s are 4.30 s."""
    task = job(model="llama-3.1-70b", nodes=4, global_batch_size=512, seq_len=8192)
    layout = parse_layout("tp=8", task)
    refused = simulate(task, layout)
    found = remedies(task, refused).found
    assert not refused.fits
    (offered,) = [remedy for remedy in found if remedy.change == "offload=optimizer"]
    n = task.model.parameters() / 8
    assert refused.memory.peak - offered.peak == pytest.approx(12 * n / 4, rel=1e-3)
    added = offered.step_seconds - refused.step_seconds
    assert added + refused.breakdown.optimizer == pytest.approx(28 * 8 * n / 4 / 115e9, rel=1e-2)
    assert offered.fits and not offered.layout.problems(task)
    here = [remedy.step_seconds for remedy in found if remedy.nodes == 4]
    assert here == sorted(here)
    assert remedy_line(offered).startswith("offload=optimizer: 74.6 GiB, +")


@pytest.mark.parametrize(("stack", "legal"), [("megatron-core", True), ("torchtitan", False), ("megatron-2021", False)])
def test_it_is_tried_only_where_it_is_legal(stack: str, legal: bool) -> None:
    task = job(stack, precision="bf16")
    start = Layout(dp_shard=16, zero_stage=1) if legal else parse_layout("micro_batch_size=2", task)
    tried = [layout for name, layout in changes(task, start) if name == "offload"]
    assert tried == ([dataclasses.replace(start, offload="optimizer")] if legal else [])


@pytest.mark.parametrize("target", ["megatron", "megatron-bridge", "deepspeed"])
@pytest.mark.parametrize("offload", ["none", "optimizer"])
def test_what_is_exported_is_read_back(target: str, offload: Any) -> None:
    task = job("megatron-bridge" if target == "megatron-bridge" else "megatron-core")
    layout = dataclasses.replace(ON_HOST, offload=offload)
    texts = export(plan_of(task, layout), target)
    text = next(text for name, text in texts.items() if name != "deepspeed.sh")
    read = read_layout(text, task)
    assert read.layout == layout and not read.ignored
    assert not [note for note in read.notes if "offload" in note]


def test_what_each_target_writes() -> None:
    task = job()
    plan = plan_of(task, ON_HOST)
    lines = [line.strip() for line in export(plan, "megatron")["megatron.sh"].splitlines()]
    assert {
        "--optimizer-cpu-offload", "--optimizer-offload-fraction 1.0", "--use-precision-aware-optimizer",
        "--overlap-cpu-optimizer-d2h-h2d", "--use-distributed-optimizer",
    } <= set(lines)  # fmt: skip
    assert "cfg.optimizer.optimizer_cpu_offload = True" in "".join(export(plan, "megatron-bridge").values())
    written = json.loads(export(plan, "deepspeed")["ds_config.json"])["zero_optimization"]
    assert written["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    for target in ("torchtitan", "torchtitan-main", "transformers", "accelerate"):
        with pytest.raises(UserError, match=r"offload = 'optimizer': .*moves parameters and gradients to the host"):
            export(plan, target)
        assert len(TARGETS[target].problems(plan)) >= 1


FLAGS = "--tensor-model-parallel-size 1 --use-distributed-optimizer --optimizer-cpu-offload"
DEEPSPEED = '{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 1, "offload_optimizer": %s}}'
PASTED = [
    # The flag's own default of the fraction is 1.
    (FLAGS, "megatron-core", "optimizer", ""),
    (f"{FLAGS} --optimizer-offload-fraction 1", "megatron-core", "optimizer", ""),
    (f"{FLAGS} --optimizer-offload-fraction 0.5", "megatron-core", "none", "optimizer-offload-fraction = 0.5"),
    (FLAGS, "torchtitan", "none", "the stack torchtitan cannot"),
    (DEEPSPEED % '{"device": "cpu"}', "megatron-core", "optimizer", ""),
    (DEEPSPEED % '{"device": "none"}', "megatron-core", "none", ""),
    (DEEPSPEED % '{"device": "nvme"}', "megatron-core", "none", "a layout keeps this on the device"),
    (DEEPSPEED % '{"device": "cpu"}', "layoutwise-cuda", "none", "a layout keeps this on the device"),
]


@pytest.mark.parametrize(("text", "stack", "offload", "note"), PASTED)
def test_pasted_words(text: str, stack: str, offload: str, note: str) -> None:
    read = read_layout(text, job(stack))
    assert read.layout.offload == offload
    said = [one for one in read.notes if "offload" in one]
    assert len(said) == bool(note) and all(note in one for one in said)


def test_a_fraction_that_is_no_number_is_refused() -> None:
    with pytest.raises(UserError, match="optimizer-offload-fraction = 'half' must be a number from 0 to 1"):
        read_layout(f"{FLAGS} --optimizer-offload-fraction half", job())
