"""Model arithmetic against what others have published about the same models."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.model import ModelSpec, seen_keys
from simulator.presets import find_model, names

# Parameters, and who counted them: "hub" is the tensor count that huggingface.co shows for the model's safetensors.
PUBLISHED = {
    "gpt2": (124_439_808, "hub openai-community/gpt2, the output projection tied"),
    "llama-3.1-8b": (8_030_261_248, "hub meta-llama/Llama-3.1-8B"),
    "llama-3.1-70b": (70_553_706_496, "hub meta-llama/Llama-3.1-70B"),
    "llama-3.1-405b": (405_853_388_800, "hub meta-llama/Llama-3.1-405B"),
    "mixtral-8x7b": (46_702_792_704, "hub mistralai/Mixtral-8x7B-v0.1"),
    "qwen3-30b-a3b": (30_532_122_624, "hub Qwen/Qwen3-30B-A3B"),
    "qwen3-235b-a22b": (235_093_634_560, "hub Qwen/Qwen3-235B-A22B"),
    "nemotron-3-nano-30b-a3b": (31_577_940_288, "hub nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16"),
    "gpt-oss-120b": (116.83e9, "the model card, arXiv 2508.10925, table 1"),
    "deepseek-v2-lite": (15_706_484_224, "hub deepseek-ai/DeepSeek-V2-Lite"),
    "deepseek-v2": (235_741_434_880, "hub deepseek-ai/DeepSeek-V2"),
    "deepseek-v3": (671e9, "arXiv 2412.19437, section 4.2, without the multi-token prediction block"),
    "bert-large": (336_226_108, "hub google-bert/bert-large-uncased, with the pre-training heads"),
    "t5-large": (737_668_096, "hub google-t5/t5-large"),
    "bart-large": (406_291_456, "hub facebook/bart-large"),
    "gpt3-175b": (174.6e9, "arXiv 2104.04473, table 1"),
    "gpt-530b": (529.6e9, "arXiv 2104.04473, table 1"),
    "gpt-1t": (1008.0e9, "arXiv 2104.04473, table 1"),
}


ROUNDED = {"kimi-k2": (1.04e12, "arXiv 2507.20534, table 2; its sizes add up to 1.026")}


def test_every_preset_is_published_or_our_own() -> None:
    """Small models over bytes are for trying things out; nobody has counted them."""
    known = {*PUBLISHED, *ROUNDED}
    assert all(name in known or name.startswith("llama-bytes-") for name in names("models"))


def test_a_rounded_count_is_met_to_its_rounding() -> None:
    for name, (published, source) in ROUNDED.items():
        assert find_model(name).parameters() == pytest.approx(published, rel=0.015), source


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_its_published_number_of_parameters(name: str) -> None:
    published, source = PUBLISHED[name]
    assert find_model(name).parameters() == pytest.approx(published, rel=1e-3), source


@pytest.mark.parametrize("name", [n for n, (count, _) in PUBLISHED.items() if isinstance(count, int)])
def test_counts_published_to_the_last_digit_are_met_exactly(name: str) -> None:
    assert find_model(name).parameters() == PUBLISHED[name][0]


def test_flops_per_token_are_those_that_megatron_counts() -> None:
    """NVIDIA-NeMo/Megatron-Bridge@067f987d docs/performance-summary.md: Llama 3 8B, 14,079 tokens/s, 725 TFLOP/s."""
    assert find_model("llama-3.1-8b").flops_per_token(8192) == pytest.approx(51.5e9, rel=0.002)


def test_flops_per_token_of_gpt3_match_the_formula_of_its_paper() -> None:
    """arXiv 2104.04473, eq. 3: 96·B·s·l·h²(1 + s/6h + V/16lh) with recomputation, so three quarters without; the
    paper does not halve the masked attention."""
    model, s = find_model("gpt3-175b"), 2048
    h, layers, vocabulary = model.hidden_size, model.num_hidden_layers, model.vocab_size
    formula = 72 * layers * h**2 * (1 + s / (6 * h) + vocabulary / (12 * layers * h))
    assert model.flops_per_token(s) == pytest.approx(formula, rel=0.015)
    assert model.flops_per_token(s) == pytest.approx(formula - 6 * layers * s * h, rel=1e-6)


def test_a_mixture_computes_with_its_chosen_experts_alone() -> None:
    """Mixtral has 12.9B active parameters (arXiv 2401.04088, section 1), DeepSeek-V3 37B (arXiv 2412.19437)."""
    mixtral = find_model("mixtral-8x7b")
    embedding = mixtral.vocab_size * mixtral.hidden_size
    assert mixtral.active_matmul_parameters() + embedding == pytest.approx(12.9e9, rel=0.005)
    assert find_model("deepseek-v3").active_matmul_parameters() == pytest.approx(37e9, rel=0.02)


def test_active_parameters_of_the_newer_mixtures() -> None:
    """GPT-OSS counts its output but not its embedding: 5.13B (arXiv 2508.10925, table 1); Kimi K2 32.6B
    (arXiv 2507.20534), Qwen3-235B 22B (arXiv 2505.09388)."""
    assert find_model("gpt-oss-120b").active_matmul_parameters() == pytest.approx(5.13e9, rel=0.01)
    assert find_model("kimi-k2").active_matmul_parameters() == pytest.approx(32.6e9, rel=0.03)
    assert find_model("qwen3-235b-a22b").active_matmul_parameters() == pytest.approx(22e9, rel=0.03)


def test_a_hybrid_has_one_mixer_a_block() -> None:
    """23 Mamba-2, 23 mixtures and 6 attentions; 3.6B active parameters with the embedding, 3.2B without
    (arXiv 2512.20848)."""
    model = find_model("nemotron-3-nano-30b-a3b")
    kinds = [model.block_kind(i) for i in range(52)]
    assert [kinds.count(kind) for kind in ("mamba", "experts", "attention")] == [23, 23, 6]
    embedding = model.vocab_size * model.hidden_size
    assert model.active_matmul_parameters() + embedding == pytest.approx(3.6e9, rel=0.01)
    # Attention in 6 blocks grows with the context, the scans of 23 do not: 6·2·s·32·(128 + 128)/2 each forward.
    grown = model.flops_per_token(8192) - model.flops_per_token(4096)
    assert grown == pytest.approx(3 * 6 * 2 * 4096 * 32 * 256 / 2)


def test_every_other_block_of_gpt_oss_sees_a_window() -> None:
    model = find_model("gpt-oss-120b")
    assert [model.block_window(i) for i in range(4)] == [128, 0, 128, 0]
    assert find_model("llama-3.1-8b").block_window(0) == 0


@given(st.integers(1, 64), st.integers(1, 64))
def test_keys_under_a_window_are_counted_one_by_one(keys: int, window: int) -> None:
    """Query i of s sees min(i, w) keys; the average over queries is w(1 - w/2s) but for the diagonal's half key."""
    seen = sum(min(i + 1, window) for i in range(keys)) / keys
    assert seen_keys(keys, True, window) == pytest.approx(seen, abs=0.5)
    assert seen_keys(keys, True, 0) == keys / 2


def test_block_kinds_follow_the_architecture() -> None:
    t5, deepseek = find_model("t5-large"), find_model("deepseek-v3")
    assert [t5.block_kind(i) for i in (0, 23, 24, 47)] == ["dense", "dense", "cross", "cross"]
    assert [t5.block_is_causal(i) for i in (23, 24)] == [False, True]
    assert [deepseek.block_kind(i) for i in (0, 2, 3, 60)] == ["dense", "dense", "moe", "moe"]
    assert {find_model("bert-large").block_kind(i) for i in range(24)} == {"dense"}


def test_only_decoders_are_causal() -> None:
    causal = {name for name in names("models") if find_model(name).causal}
    assert set(names("models")) - causal == {"bert-large", "t5-large", "bart-large"}


@pytest.mark.parametrize("name", names("models"))
def test_the_parts_sum_to_the_whole(name: str) -> None:
    model = find_model(name)
    one_less = dataclasses.replace(model, num_hidden_layers=model.num_hidden_layers - 1)
    last = model.block_parameters(model.block_kind(model.num_hidden_layers - 1))
    assert model.parameters() - one_less.parameters() == last


@given(st.integers(1, 64), st.integers(1, 16), st.sampled_from([1024, 4096, 131072]))
def test_flops_grow_with_the_context_and_by_six_per_weight(layers: int, heads: int, seq_len: int) -> None:
    model = ModelSpec("x", "llama", layers, 64 * heads, heads, heads, 64, 256 * heads, 1000, 8192)
    short, long = model.flops_per_token(seq_len), model.flops_per_token(2 * seq_len)
    assert short > 6 * model.active_matmul_parameters()
    assert long - short == pytest.approx(short - 6 * model.active_matmul_parameters())
