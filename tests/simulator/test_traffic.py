"""What a rank sends in a step, by hand; that it is what the runtime sends is shown in tests/runtime."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.model import ModelSpec
from simulator.presets import find_model
from simulator.program import stage_costs
from simulator.traffic import communication, group_name
from simulator.weights import Cutting, Weight, block_weights, elements, embedding_weights, expert_weights, head_weights

# Two blocks of Llama-3.1-8B: a block has 218,112,000 parameters, embedding and head with the final norm
# 2 · 128,256 · 4,096 + 4,096 = 1,050,677,248.
BLOCK, ENDS = 218_112_000, 1_050_677_248
# One sequence of 512 tokens of 4,096 numbers in two bytes.
STREAM = 512 * 4096 * 2


def job(model: str = "llama-3.1-8b", layers: int = 2, **training: Any) -> Job:
    recipe = {"global_batch_size": 16, "seq_len": 512, "precision": "bf16", "stack": "layoutwise-cuda"} | training
    found = build_job({"model": model, "cluster": "dgx-h100", "nodes": 1, "training": recipe}, "test")
    return dataclasses.replace(found, model=dataclasses.replace(found.model, num_hidden_layers=layers))


def moved(task: Job, layout: Layout, rank: int = 0) -> dict[tuple[str, str], tuple[int, float]]:
    return {(one.name, one.axis): (one.count, one.bytes) for one in communication(task, layout, rank)}


def test_zero_3_gathers_blocks_twice_and_the_root_once() -> None:
    """Two microbatches: (2 + 2 + 1) gathers in two bytes each, three reductions in four."""
    assert moved(job(), Layout(dp_shard=8, zero_stage=3)) == {
        ("all_gather", "dp_shard"): (10, 2 * 2 * (2 * 2 * BLOCK + ENDS)),
        ("reduce_scatter", "dp_shard"): (6, 2 * 4 * (2 * BLOCK + ENDS)),
        ("all_reduce", "dp_shard"): (1, 16),
    }


@pytest.mark.parametrize(("zero", "reductions"), [(1, 1), (2, 2)])
def test_zero_1_and_2_gather_once(zero: Any, reductions: int) -> None:
    """ZeRO-1 reduces once a step, ZeRO-2 behind each of two microbatches."""
    found = moved(job(), Layout(dp_shard=8, zero_stage=zero))
    assert found["all_gather", "dp_shard"] == (3, 2 * (2 * BLOCK + ENDS))
    assert found["reduce_scatter", "dp_shard"] == (3 * reductions, reductions * 4 * (2 * BLOCK + ENDS))


def test_replicas_of_shards_reduce_an_eighth_once() -> None:
    found = moved(job(), Layout(dp_replicate=2, dp_shard=8, zero_stage=3))
    assert found["all_reduce", "dp_replicate"] == (3, 4 * (2 * BLOCK + ENDS) / 8)


def test_sequence_parallelism_gathers_and_scatters_the_stream() -> None:
    """A microbatch: forward a gather for each of two blocks' two parts and the head, and a scatter behind each part and
    the embedding; backward the same the other way round. The loss reduces three numbers a token in fp32; five norms
    have summands of their 4,096 gradients, added up over the 16 microbatches in fp32."""
    assert moved(job(), Layout(tp=8, sequence_parallel=True)) == {
        ("all_gather", "tp"): (16 * 10, 16 * 10 * STREAM),
        ("reduce_scatter", "tp"): (16 * 10, 16 * 10 * STREAM),
        ("all_reduce", "tp"): (16 * 3 + 5 + 1, 16 * 3 * 4 * 512 + 5 * 4 * 4096 + 16),
    }


def test_full_recomputation_repeats_all_but_the_last_reduction() -> None:
    """A block's forward again: two gathers, and the scatter behind attention; that behind the feed-forward is not
    needed."""
    layout = Layout(tp=8, sequence_parallel=True)
    plain, again = moved(job(), layout), moved(job(), dataclasses.replace(layout, recompute="full"))
    assert again["all_gather", "tp"][0] - plain["all_gather", "tp"][0] == 16 * 2 * 2
    assert again["reduce_scatter", "tp"][0] - plain["reduce_scatter", "tp"][0] == 16 * 2


def test_a_ring_sends_keys_and_values_and_brings_gradients_home() -> None:
    """Of 128 tokens with 8 heads of 128: 524,288 bytes in bf16, three steps each way, and four with the gradients,
    which are twice as wide."""
    block = 2 * 2 * 128 * 8 * 128
    assert block == 524_288
    found = moved(job(), Layout(cp=4, dp_shard=2, zero_stage=3))
    each = 8 * 2
    assert found["all_to_all", "cp"] == (each * (3 + 3 + 4), each * (3 * block + 3 * block + 4 * 2 * block))


def test_one_forward_one_backward_keeps_what_a_backward_gathered() -> None:
    """Second of four stages, eight microbatches: three forwards gather, then every backward behind a forward until the
    forwards end with the eighth: six of them. Two messages come and two go for each microbatch."""
    task = job(layers=4)
    found = moved(task, Layout(pp=4, dp_shard=2, zero_stage=3), rank=2)
    assert found["all_gather", "dp_shard"] == (9, 9 * 2 * BLOCK)
    assert found["send", "pp"] == found["recv", "pp"] == (16, 16 * STREAM)
    assert found["reduce_scatter", "dp_shard"] == (1, 4 * BLOCK)


def test_a_v_hands_over_on_its_rank() -> None:
    """The last rank holds both stages at the turn: each microbatch comes, goes back, and so do its gradients."""
    task = job(layers=4)
    found = moved(task, Layout(pp=2, dp_replicate=4, schedule="ZBVZeroBubble", virtual_stages=2), rank=7)
    assert found["send", "pp"] == found["recv", "pp"] == (2 * 4, 2 * 4 * STREAM)


def test_experts_exchange_counts_tokens_and_results() -> None:
    """Mixtral: 8 counts of 8 bytes, then 512 tokens to two experts each, there and back, forward and backward."""
    task = job("mixtral-8x7b")
    found = moved(task, Layout(dp_shard=8, zero_stage=3, ep=8))
    assert found["all_to_all", "ep"] == (2 * 2 * 5, 2 * 2 * (64 + 4 * 2 * STREAM))


def test_shards_are_filled_up() -> None:
    """GPT-2's 50,257 rows over 8 ranks are 50,264."""
    assert Weight(50257, 768).padded(8) == 50264 * 768
    assert Weight(8, 4096).padded(64) == 64 * 4096


def test_groups_are_named_by_their_axes() -> None:
    layout = Layout(dp_replicate=2, dp_shard=2, cp=2, tp=2, zero_stage=3)
    assert group_name(layout, (0, 1)) == "tp"
    assert group_name(layout, (0, 2, 4, 6)) == "dp_shard_cp"
    assert group_name(layout, tuple(range(16))) == "world"
    assert group_name(Layout(tp=4), (0, 1, 2, 3)) == "tp"


MODELS = ["llama-3.1-8b", "gpt2", "gpt3-175b", "mixtral-8x7b", "qwen3-30b-a3b", "t5-large", "bart-large", "bert-large"]


@pytest.mark.parametrize("name", MODELS)
def test_weights_add_up_to_the_parameters(name: str) -> None:
    """BERT's pooler and its head for the next sentence, h² + h + 2h + 2, are counted as parameters and not trained."""
    model = find_model(name, None)
    cut = Cutting()
    for index in (0, model.num_hidden_layers - 1):
        kind = model.block_kind(index)
        assert elements(block_weights(model, kind, cut)) == model.block_parameters(kind)
    assert elements(embedding_weights(model, cut)) == model.embedding_parameters()
    untrained = model.hidden_size**2 + 3 * model.hidden_size + 2 if model.family == "bert" else 0
    assert elements(head_weights(model, cut, model.tie_word_embeddings)) == model.head_parameters() - untrained


@pytest.mark.parametrize(
    "layout", [Layout(tp=8), Layout(tp=8, sequence_parallel=True), Layout(dp_shard=8, zero_stage=3, ep=8)]
)
def test_a_ranks_weights_are_what_is_priced(layout: Layout) -> None:
    model: ModelSpec = job("mixtral-8x7b").model
    spread = layout.ep > 1
    cut = Cutting(layout.tp, layout.sequence_parallel, layout.ep, 1 if spread else layout.tp)
    found = 2 * elements(block_weights(model, "moe", cut)) + elements(embedding_weights(model, cut))
    found += elements(head_weights(model, cut, False)) + spread * 2 * elements(expert_weights(model, cut))
    (stage,) = stage_costs(job("mixtral-8x7b"), layout)
    # Norms of the ends are counted as cut.
    assert found == pytest.approx(stage.parameters, rel=1e-5)
