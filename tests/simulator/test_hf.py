"""Hugging Face's config.json: both spellings, the families, and what is said about a bad one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simulator.errors import UserError
from simulator.hf import read_config
from simulator.model import RopeScaling
from simulator.presets import DATA, find_model, names

LLAMA: dict[str, Any] = json.loads((DATA / "models" / "llama-3.1-8b.json").read_text())
QWEN2_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "rope_theta": 1000000.0, "rms_norm_eps": 1e-06, "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936, "max_position_embeddings": 40960,
    "attention_bias": False, "tie_word_embeddings": False,
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 32768,
}  # fmt: skip


def without(config: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in keys}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(QWEN2_7B, 7_615_616_512), (QWEN3_8B, 8_190_735_360), (MISTRAL_7B, 7_241_732_096)],
    ids=["Qwen/Qwen2-7B", "Qwen/Qwen3-8B", "mistralai/Mistral-7B-v0.1"],
)
def test_relatives_of_llama_have_the_parameters_of_their_model_card(config: dict[str, Any], parameters: int) -> None:
    assert read_config(config, "x").parameters() == parameters


def test_qwen2_has_query_biases_and_qwen3_has_query_norms() -> None:
    two, three = read_config(QWEN2_7B, "x"), read_config(QWEN3_8B, "x")
    assert (two.qkv_bias, two.attention_out_bias, two.qk_norm) == (True, False, False)
    assert (three.qkv_bias, three.attention_out_bias, three.qk_norm) == (False, False, True)
    assert three.head_dim == 128


def test_transformers_4_and_5_spell_the_same_model() -> None:
    five = without(LLAMA, "rope_theta", "rope_scaling", "torch_dtype")
    five |= {"rope_parameters": LLAMA["rope_scaling"] | {"rope_theta": LLAMA["rope_theta"]}, "dtype": "bfloat16"}
    assert read_config(five, "x") == read_config(LLAMA, "x")
    assert read_config(five, "x").rope_theta == 500000.0

    mixtral = json.loads((DATA / "models" / "mixtral-8x7b.json").read_text())
    renamed = without(mixtral, "num_local_experts") | {"num_experts": mixtral["num_local_experts"]}
    assert read_config(renamed, "x") == read_config(mixtral, "x")


def test_null_means_the_default() -> None:
    spec = read_config(LLAMA | {"head_dim": None, "num_key_value_heads": None}, "x")
    assert (spec.head_dim, spec.num_key_value_heads) == (128, 32)


def test_unknown_keys_of_the_configuration_are_ignored() -> None:
    assert read_config(LLAMA | {"my_own_note": [1, 2]}, "x") == read_config(LLAMA, "x")


def test_a_gated_t5_has_three_matrices() -> None:
    t5 = json.loads((DATA / "models" / "t5-large.json").read_text())
    gated = read_config(t5 | {"feed_forward_proj": "gated-gelu"}, "x")
    assert (gated.gated_mlp, gated.activation) == (True, "gelu_tanh")
    assert read_config(t5, "x").activation == "relu"


def test_encoders_come_before_decoders() -> None:
    bart = find_model("bart-large")
    assert (bart.num_hidden_layers, bart.num_encoder_layers, bart.encoder_decoder) == (24, 12, True)


PYTHIA_6_9B = {
    "model_type": "gpt_neox", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
    "intermediate_size": 16384, "vocab_size": 50432, "max_position_embeddings": 2048, "hidden_act": "gelu",
    "tie_word_embeddings": False, "rotary_pct": 0.25,
}  # fmt: skip
OPT_6_7B = {
    "model_type": "opt", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "ffn_dim": 16384,
    "vocab_size": 50272, "max_position_embeddings": 2048, "activation_function": "relu", "word_embed_proj_dim": 4096,
}  # fmt: skip
BLOOM_176B = {
    "model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880, "seq_length": 2048,
}  # fmt: skip
MPT_7B = {
    "model_type": "mpt", "d_model": 4096, "n_layers": 32, "n_heads": 32, "vocab_size": 50432, "max_seq_len": 2048,
    "no_bias": True, "attn_config": {"alibi": True},
}  # fmt: skip
QWEN3_MOE = json.loads((DATA / "models" / "qwen3-30b-a3b.json").read_text())


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (PYTHIA_6_9B, 6_857_302_016),
        (OPT_6_7B, 6_658_473_984 - 2 * 4096),  # two positions that are never used
        (BLOOM_176B, 176_247_271_424),
        (MPT_7B, 6_649_286_656),
    ],
    ids=["EleutherAI/pythia-6.9b", "facebook/opt-6.7b", "bigscience/bloom", "mosaicml/mpt-7b"],
)
def test_older_decoders_have_the_parameters_of_their_model_card(config: dict[str, Any], parameters: int) -> None:
    assert read_config(config, "x").parameters() == parameters


NEMOTRON: dict[str, Any] = json.loads((DATA / "models" / "nemotron-3-nano-30b-a3b.json").read_text())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hybrid_override_pattern": "ME?"}, ["'ME?'", "M * - E", "52 layers"]),
        ({"hybrid_override_pattern": "MEM"}, ["'MEM'", "52 layers"]),
        ({"moe_shared_expert_intermediate_size": 2000}, ["multiple of moe_intermediate_size = 1856"]),
        ({"moe_latent_size": 1024}, ["moe_latent_size", "not supported"]),
    ],
)
def test_a_hybrid_that_is_not_understood_is_refused(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_config(NEMOTRON | changes, "x")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_hybrid_names_its_layers_by_letters_or_in_a_list() -> None:
    names = {"M": "mamba", "E": "moe", "*": "attention"}
    listed = without(NEMOTRON, "hybrid_override_pattern") | {
        "layers_block_type": [names[letter] for letter in NEMOTRON["hybrid_override_pattern"]]
    }
    assert read_config(listed, "x") == read_config(NEMOTRON, "x")


def test_older_decoders_keep_their_positions() -> None:
    found = {config["model_type"]: read_config(config, "x").position for config in (PYTHIA_6_9B, OPT_6_7B, MPT_7B)}
    assert found == {"gpt_neox": "rope", "opt": "learned", "mpt": "alibi"}
    assert read_config(MPT_7B | {"attn_config": {"alibi": False}}, "x").position == "learned"


def test_layers_without_experts_among_layers_with_them_are_refused() -> None:
    with pytest.raises(UserError, match="decoder_sparse_step and mlp_only_layers"):
        read_config(QWEN3_MOE | {"mlp_only_layers": [0]}, "x")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (without(LLAMA, "model_type"), ["model 'x'", "'model_type' is missing", "config.json"]),
        (LLAMA | {"model_type": "lama"}, ["'lama'", "did you mean 'llama'"]),
        (LLAMA | {"model_type": "mamba"}, ["'mamba'", "is not supported"]),
        (LLAMA | {"model_type": ["llama"]}, ["['llama']", "is not supported"]),
        (LLAMA | {"hidden_act": ["silu"]}, ["hidden_act", "['silu']"]),
        (without(LLAMA, "hidden_size"), ["'hidden_size' is missing"]),
        (without(LLAMA, "hidden_size") | {"hiden_size": 4096}, ["did you mean 'hiden_size'"]),
        (LLAMA | {"hidden_size": "4096"}, ["hidden_size", "'4096'", "integer"]),
        (LLAMA | {"hidden_size": 4096.0}, ["hidden_size", "4096.0", "integer"]),
        (LLAMA | {"num_hidden_layers": 0}, ["num_hidden_layers", "0", "at least 1"]),
        (LLAMA | {"num_hidden_layers": True}, ["num_hidden_layers", "True", "integer"]),
        (LLAMA | {"num_key_value_heads": 5}, ["num_key_value_heads = 5", "must divide num_attention_heads = 32"]),
        (without(LLAMA, "head_dim") | {"num_attention_heads": 33}, ["33", "must divide hidden_size = 4096"]),
        (LLAMA | {"hidden_act": "swiglu"}, ["hidden_act", "'swiglu'"]),
        (LLAMA | {"rms_norm_eps": -1}, ["rms_norm_eps", "positive"]),
        (LLAMA | {"tie_word_embeddings": "no"}, ["tie_word_embeddings", "true or false"]),
    ],
)
def test_a_bad_configuration_is_the_users_error(config: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_config(config, "x")
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_more_experts_per_token_than_experts_is_refused() -> None:
    mixtral = json.loads((DATA / "models" / "mixtral-8x7b.json").read_text())
    with pytest.raises(UserError, match="num_experts_per_tok = 9 is more than num_experts = 8"):
        read_config(mixtral | {"num_experts_per_tok": 9}, "x")
    deepseek = json.loads((DATA / "models" / "deepseek-v2.json").read_text())
    with pytest.raises(UserError, match="= 6 is more than the 4 of num_experts = 160 that are in topk_g"):
        read_config(deepseek | {"n_group": 40, "topk_group": 1}, "x")


def test_a_model_is_found_by_preset_and_by_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(LLAMA))
    assert find_model(str(path)).parameters() == find_model("llama-3.1-8b").parameters()
    assert find_model("mine.json", tmp_path).name == "mine"


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"model 'llama-3\.1-8' is not known; did you mean 'llama-3\.1-8b'"):
        find_model("llama-3.1-8")


def test_every_preset_is_a_configuration_that_transformers_would_read() -> None:
    for name in names("models"):
        assert "model_type" in json.loads((DATA / "models" / f"{name}.json").read_text())
        assert find_model(name).name == name


def test_what_changes_the_arithmetic_is_read() -> None:
    neox, bloom, mpt = (read_config(config, "x") for config in (PYTHIA_6_9B, BLOOM_176B, MPT_7B))
    assert (neox.partial_rotary_factor, neox.parallel_residual) == (0.25, True)
    assert (bloom.embedding_norm, bloom.activation) == (True, "gelu_tanh")
    assert (mpt.norm, mpt.norm_bias, mpt.norm_parameters()) == ("layernorm", False, 4096)
    assert read_config(MISTRAL_7B | {"sliding_window": 4096}, "x").sliding_window == 4096
    assert read_config(QWEN2_7B | {"sliding_window": 131072, "use_sliding_window": False}, "x").sliding_window == 0
    scaling = find_model("llama-3.1-8b").rope_scaling
    assert scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
    assert read_config(LLAMA | {"rope_scaling": None}, "x").rope_scaling is None


BART: dict[str, Any] = json.loads((DATA / "models" / "bart-large.json").read_text())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (BART | {"normalize_before": True}, "normalize_before = True is not supported"),
        (MPT_7B | {"attn_config": {"alibi": True, "clip_qkv": 6}}, "clip_qkv = 6 is not supported"),
        (OPT_6_7B | {"do_layer_norm_before": False}, "do_layer_norm_before = False is not supported"),
        (QWEN2_7B | {"use_sliding_window": True, "max_window_layers": 28}, "with max_window_layers = 0 only"),
        (LLAMA | {"rope_scaling": {"rope_type": "lama3"}}, "'lama3' is not known; did you mean 'llama3'"),
    ],
)
def test_switches_that_nothing_honours_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_config(config, "x")
    assert words in str(caught.value)
