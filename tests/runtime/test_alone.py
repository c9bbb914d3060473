"""One rank without the others: memory and collectives counted by hand, from real tensors and from fake ones."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import call
from tiny_jobs import LLAMA, MOE, tiny_plan

from planner.plan import write_plan
from runtime.alone import needs_fake, run_alone
from simulator.errors import UserError
from simulator.layout import Layout
from simulator.results import Alone
from simulator.schedules import V_PLACEMENT

# Bytes of the whole model, and of what is not in its four blocks: embedding, final norm, head.
WHOLE = 4 * LLAMA.parameters()
ENDS = 4 * (2 * LLAMA.vocab_size + 1) * LLAMA.hidden_size
BLOCKS = WHOLE - ENDS
# A microbatch of one sample on the residual stream: 32 tokens of 64 numbers.
STREAM = 4 * 32 * 64


def moved(found: Alone) -> dict[tuple[str, str], tuple[int, float]]:
    return {(one.name, one.axis): (one.count, one.bytes) for one in found.collectives}


def alone(layout: Layout, text_folder: Path, rank: int = 0, fake: bool = False) -> Alone:
    return run_alone(tiny_plan(layout, data=str(text_folder)), rank, steps=2, warmup=1, fake=fake)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_one_process_holds_four_times_its_parameters(fake: bool, text_folder: Path) -> None:
    found = alone(Layout(micro_batch_size=4), text_folder, fake=fake)
    assert (found.memory.parameters, found.memory.gradients) == (WHOLE, WHOLE)
    # AdamW's two moments, and a step counter for each parameter.
    assert found.memory.optimizer == pytest.approx(2 * WHOLE, abs=200)
    # Logits of four samples, their logarithms and the gradient of those are the least that a loss takes.
    assert found.memory.activations + found.memory.temporary > 3 * 4 * 4 * 32 * 256
    assert (found.step_seconds is None) == fake
    assert sum(one.bytes for one in found.collectives) == 16


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_sharded_state_is_a_share_and_is_gathered_twice(fake: bool, text_folder: Path) -> None:
    """Two microbatches: every block is gathered before its forward and its backward, the ends once."""
    found = alone(Layout(dp_shard=4, zero_stage=3, micro_batch_size=1), text_folder, rank=3, fake=fake)
    assert found.coordinates["dp_shard"] == 3
    assert found.memory.parameters == WHOLE / 4
    assert found.memory.optimizer == pytest.approx(WHOLE / 2, abs=200)
    assert moved(found)["all_gather", "dp_shard"] == (2 * (4 + 4 + 1), 2 * (2 * BLOCKS + ENDS))
    assert moved(found)["reduce_scatter", "dp_shard"] == (2 * 5, 2 * WHOLE)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
def test_replicas_reduce_all_gradients_once(fake: bool, text_folder: Path) -> None:
    found = alone(Layout(dp_replicate=2, pp=2, micro_batch_size=1), text_folder, rank=3, fake=fake)
    stage = BLOCKS / 2 + ENDS / 2 + 4 * LLAMA.hidden_size / 2
    assert found.memory.parameters == stage
    assert moved(found)["all_reduce", "dp_replicate"][1] == stage
    # The last stage receives an activation and sends a gradient for each of four microbatches.
    assert moved(found)["recv", "pp"] == moved(found)["send", "pp"] == (4, 4 * STREAM)


def test_a_pipeline_of_a_thousand_ranks_runs_on_one(text_folder: Path) -> None:
    layout = Layout(dp_replicate=64, dp_shard=4, zero_stage=3, pp=2, tp=2, sequence_parallel=True)
    plan = tiny_plan(layout, data=str(text_folder), global_batch_size=512)
    found = run_alone(plan, 777, steps=1, warmup=0, fake=True)
    assert found.coordinates == {"tp": 1, "cp": 0, "dp_shard": 0, "dp_replicate": 33, "pp": 1}
    # A quarter of half of half of the model; norms are not cut by tensor parallelism.
    assert found.memory.parameters == pytest.approx(WHOLE / 16, rel=0.02)
    assert {"all_gather", "reduce_scatter"} <= {name for name, axis in moved(found) if axis == "tp"}


@pytest.mark.parametrize("schedule", ["InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"])
def test_a_split_backward_runs_alone(schedule: Any, text_folder: Path) -> None:
    layout = Layout(pp=2, dp_shard=2, zero_stage=2, schedule=schedule, virtual_stages=2, micro_batch_size=1)
    real, fake = (alone(layout, text_folder, rank=1, fake=fake) for fake in (False, True))
    # The first pipeline rank has the embedding, and in a V the head too; two ranks share each.
    ends = ENDS if schedule in V_PLACEMENT else 4 * LLAMA.vocab_size * LLAMA.hidden_size
    assert real.memory.parameters == fake.memory.parameters == BLOCKS / 4 + ends / 2
    assert real.collectives == fake.collectives


def test_fake_tensors_take_what_real_ones_do(text_folder: Path) -> None:
    """With a vocabulary so large that a tensor of its whole width would show: DTensor makes some to find shapes."""
    wide = dataclasses.replace(LLAMA, vocab_size=8192)
    plan = tiny_plan(Layout(tp=2, sequence_parallel=True, micro_batch_size=8), wide, data=str(text_folder))
    real, fake = (run_alone(plan, 0, steps=2, warmup=1, fake=fake).memory.peak for fake in (False, True))
    assert fake == pytest.approx(real, rel=0.02)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_the_gradient_of_a_cut_embedding_is_cut(sequence_parallel: bool, text_folder: Path) -> None:
    """One block and a vocabulary that is most of the model: with gradients of V/tp rows no step needs more than the
    rank's weights, gradients and moments, and 1 MiB of activations; a gradient of V rows alone is 16 MiB."""
    wide = dataclasses.replace(LLAMA, num_hidden_layers=2, vocab_size=2**16, num_key_value_heads=4)
    layout = Layout(pp=2, tp=4, sequence_parallel=sequence_parallel, micro_batch_size=1)
    memory = run_alone(tiny_plan(layout, wide, data=str(text_folder)), 0, steps=1, warmup=0, fake=True).memory
    rows = 4 * 2**16 // 4 * 64
    assert memory.parameters == pytest.approx(rows, rel=0.02)
    assert memory.peak < 5.1 * rows + 2**20


def test_a_mixture_in_fp32_is_not_faked(text_folder: Path) -> None:
    with pytest.raises(UserError, match="rank 0 of a mixture"):
        run_alone(tiny_plan(Layout(), MOE, data=str(text_folder)), 0, steps=1, warmup=0, fake=True)


def test_fake_tokens_choose_all_experts_alike(text_folder: Path) -> None:
    """Which experts real tokens choose changes nothing where one rank has them all; over two ranks of experts a half of
    what a rank routes comes back to it from either."""
    plan = tiny_plan(Layout(), MOE, data=str(text_folder), precision="bf16")
    real, fake = (run_alone(plan, 0, steps=1, warmup=0, fake=faked).memory for faked in (False, True))
    assert (fake.parameters, fake.optimizer) == (real.parameters, real.optimizer)
    assert fake.peak == pytest.approx(real.peak, rel=0.02)
    spread = tiny_plan(Layout(dp_shard=2, ep=2, zero_stage=3), MOE, data=str(text_folder), precision="bf16")
    assert run_alone(spread, 1, steps=1, warmup=0, fake=True).memory.peak < fake.peak


def test_the_command_shows_memory_beside_its_prediction(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tiny_plan(Layout(dp_shard=8, zero_stage=3), data=str(text_folder)), tmp_path / "plan.json")
    arguments = ["--alone", "--rank", 5, "--fake", "--steps", 2, "-o", tmp_path]
    assert call(monkeypatch, "run", plan, *arguments) == 0
    shown = capsys.readouterr().out
    assert "rank 5 of 8 (dp_shard=5)" in shown and "fake tensors: nothing was computed" in shown
    # Predicted, then counted.
    assert re.search(r"reduce_scatter +dp_shard +5 +5 +(\S+ \S+) +\1", shown), shown
    document = json.loads((tmp_path / "alone.json").read_text())
    assert document["communication"] == document["collectives"]


def test_ranks_that_there_are_not_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--rank 2 must be one of the layout's ranks, 0 to 1"):
        run_alone(tiny_plan(Layout(dp_replicate=2)), 2, 2, 1, fake=False)
    plan = write_plan(tiny_plan(Layout()), tmp_path / "plan.json")
    assert call(monkeypatch, "run", plan, "--rank", 0) == 2


def test_what_is_too_much_for_this_machine_is_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, device = tiny_plan(Layout()), torch.device("cpu")
    flops = LLAMA.flops_per_token(32) * 8 * 32
    monkeypatch.setattr("runtime.alone.memory_bytes", lambda: 1e9)
    monkeypatch.setattr("runtime.alone.MOST_FLOPS", flops)
    assert not needs_fake(plan, 0, device)
    monkeypatch.setattr("runtime.alone.MOST_FLOPS", 0.99 * flops)
    assert needs_fake(plan, 0, device)
    monkeypatch.setattr("runtime.alone.MOST_FLOPS", flops)
    # The prediction of tiny plans is a peak of 0 bytes.
    monkeypatch.setattr("runtime.alone.memory_bytes", lambda: -1.0)
    assert needs_fake(plan, 0, device)
