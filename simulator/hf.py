"""Hugging Face `config.json` -> ModelSpec. Both spellings of transformers 4 and 5 are read; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simulator.checks import check_model
from simulator.config_json import ACTIVATIONS
from simulator.config_json import Config as _Config
from simulator.errors import UserError, nearest
from simulator.model import PATTERN, ModelSpec


def read_config(data: dict[str, Any], name: str) -> ModelSpec:
    """The ModelSpec of a Hugging Face configuration.

    Args:
        data: the object in `config.json`, unchanged.
        name: what the model is called in tables and messages.

    Raises:
        UserError: an unknown `model_type`, a missing or impossible value.
    """
    kind = data.get("model_type")
    config = _Config(data, f"model '{name}'")
    if kind is None:
        raise UserError(f"{config.where}: the key 'model_type' is missing; is this a Hugging Face config.json?")
    if str(kind) not in _READERS:
        raise UserError(f"{config.where}: model_type = {kind!r} is not supported{nearest(str(kind), _READERS)}")
    spec = ModelSpec(name=name, **_READERS[kind](config))
    check_model(spec, config.where)
    return spec


def _head_dim(c: _Config, heads: int, hidden: int) -> int:
    if c.data.get("head_dim") is None and hidden % heads:
        raise UserError(f"{c.where}: num_attention_heads = {heads} must divide hidden_size = {hidden}")
    return c.integer("head_dim", default=max(1, hidden // heads))


def _llama(c: _Config) -> dict[str, Any]:
    heads, hidden = c.integer("num_attention_heads"), c.integer("hidden_size")
    qwen = c.data["model_type"] in ("qwen2", "qwen2_moe")
    attention_bias = c.flag("attention_bias", False)
    return {
        "family": "llama",
        "num_hidden_layers": c.integer("num_hidden_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": c.integer("num_key_value_heads", default=heads),
        "head_dim": _head_dim(c, heads, hidden),
        "intermediate_size": c.integer("intermediate_size"),
        "vocab_size": c.integer("vocab_size"),
        "max_position_embeddings": c.integer("max_position_embeddings", default=2048),
        "tie_word_embeddings": c.flag("tie_word_embeddings", False),
        "norm_eps": c.number("rms_norm_eps", default=1e-6),
        "activation": c.activation("hidden_act", default="silu"),
        "rope_theta": c.rope_theta(),
        "rope_scaling": c.rope_scaling(),
        "sliding_window": _sliding_window(c),
        "qkv_bias": attention_bias or qwen,
        "attention_out_bias": attention_bias and not qwen,
        "mlp_bias": c.flag("mlp_bias", False),
        "qk_norm": c.data["model_type"] in ("qwen3", "qwen3_moe"),
    }


def _sliding_window(c: _Config) -> int:
    """Mistral's window holds in every layer, Qwen's behind the first `max_window_layers` and only if it is used."""
    kind = c.data["model_type"]
    if kind == "mistral":
        return c.integer("sliding_window", default=0, least=0)
    if kind in ("qwen2", "qwen3") and c.flag("use_sliding_window", False):
        if c.integer("max_window_layers", default=28, least=0) > 0:
            raise UserError(f"{c.where}: use_sliding_window = true is supported with max_window_layers = 0 only")
        return c.integer("sliding_window", default=4096, least=0)
    return 0


def _qwen3_moe(c: _Config) -> dict[str, Any]:
    if c.data.get("decoder_sparse_step", 1) != 1 or c.data.get("mlp_only_layers"):
        raise UserError(f"{c.where}: decoder_sparse_step and mlp_only_layers must leave every layer its experts")
    return _mixtral(c)


def _gpt_oss(c: _Config) -> dict[str, Any]:
    """Every layer has experts with biases; one in two sees a window (`layer_types`), all have sinks."""
    return _mixtral(c) | {
        "mlp_bias": True,
        "router_bias": True,
        "attention_sinks": True,
        "sliding_window": c.integer("sliding_window", default=0, least=0),
        "full_attention_interval": 2,
    }


def _mixtral(c: _Config) -> dict[str, Any]:
    base = _llama(c)
    return base | {
        "family": "moe",
        "num_experts": c.integer("num_local_experts", "num_experts"),
        "num_experts_per_tok": c.integer("num_experts_per_tok"),
        "moe_intermediate_size": c.integer("moe_intermediate_size", default=base["intermediate_size"]),
    }


def _router_groups(c: _Config) -> dict[str, int]:
    """Groups that limit the choice of experts: all of them where the method is plain greedy."""
    if c.data.get("topk_method") == "greedy":
        return {}
    groups = c.integer("n_group", default=1)
    return {"n_group": groups, "topk_group": c.integer("topk_group", default=groups)}


def _deepseek(c: _Config) -> dict[str, Any]:
    heads = c.integer("num_attention_heads")
    nope, rope = c.integer("qk_nope_head_dim"), c.integer("qk_rope_head_dim")
    return _llama(_Config(c.data | {"head_dim": nope + rope}, c.where)) | {
        "family": "moe",
        "num_key_value_heads": heads,
        "head_dim": nope + rope,
        "num_experts": c.integer("n_routed_experts"),
        "num_experts_per_tok": c.integer("num_experts_per_tok"),
        "moe_intermediate_size": c.integer("moe_intermediate_size"),
        "num_shared_experts": c.integer("n_shared_experts", default=0, least=0),
        **_router_groups(c),
        "first_k_dense_replace": c.integer("first_k_dense_replace", default=0, least=0),
        "router_bias": c.data.get("topk_method") == "noaux_tc",
        "q_lora_rank": c.integer("q_lora_rank", default=0, least=0),
        "kv_lora_rank": c.integer("kv_lora_rank"),
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": c.integer("v_head_dim"),
    }


def _gpt2(c: _Config) -> dict[str, Any]:
    heads, hidden = c.integer("n_head"), c.integer("n_embd")
    c.refuse("scale_attn_weights", True, "attention is scaled by the length of a head")
    c.refuse("scale_attn_by_inverse_layer_idx", False, "every layer has the same scale")
    return {
        "family": "gpt",
        "num_hidden_layers": c.integer("n_layer"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _head_dim(c, heads, hidden),
        "intermediate_size": c.integer("n_inner", default=4 * hidden),
        "vocab_size": c.integer("vocab_size"),
        "max_position_embeddings": c.integer("n_positions", "n_ctx", default=1024),
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
        "norm": "layernorm",
        "norm_eps": c.number("layer_norm_epsilon", default=1e-5),
        "activation": c.activation("activation_function", default="gelu_new"),
        "gated_mlp": False,
        "position": "learned",
        **_all_biases(),
    }


def _bert(c: _Config) -> dict[str, Any]:
    heads, hidden, layers = c.integer("num_attention_heads"), c.integer("hidden_size"), c.integer("num_hidden_layers")
    c.refuse("position_embedding_type", "absolute", "positions are learned")
    c.refuse("is_decoder", False, "it is an encoder")
    return {
        "family": "bert",
        "num_hidden_layers": layers,
        "num_encoder_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _head_dim(c, heads, hidden),
        "intermediate_size": c.integer("intermediate_size"),
        "vocab_size": c.integer("vocab_size"),
        "max_position_embeddings": c.integer("max_position_embeddings", default=512),
        "type_vocab_size": c.integer("type_vocab_size", default=2),
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
        "norm": "layernorm",
        "norm_eps": c.number("layer_norm_eps", default=1e-12),
        "activation": c.activation("hidden_act", default="gelu"),
        "gated_mlp": False,
        "position": "learned",
        **_all_biases(),
    }


def _t5(c: _Config) -> dict[str, Any]:
    heads, encoder = c.integer("num_heads"), c.integer("num_layers")
    projection = c.data.get("feed_forward_proj") or "relu"
    gated = str(projection).startswith("gated-")
    # transformers reads this one spelling as the GELU by tanh that T5 v1.1 was trained with.
    activation = "gelu_new" if projection == "gated-gelu" else str(projection).removeprefix("gated-")
    if activation not in ACTIVATIONS:
        raise UserError(f"{c.where}: feed_forward_proj = {projection!r} is not known{nearest(activation, ACTIVATIONS)}")
    return {
        "family": "t5",
        "num_hidden_layers": encoder + c.integer("num_decoder_layers", default=encoder),
        "num_encoder_layers": encoder,
        "hidden_size": c.integer("d_model"),
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": c.integer("d_kv"),
        "intermediate_size": c.integer("d_ff"),
        "vocab_size": c.integer("vocab_size"),
        "max_position_embeddings": c.integer("n_positions", default=512),
        "relative_attention_num_buckets": c.integer("relative_attention_num_buckets", default=32),
        "relative_attention_max_distance": c.integer("relative_attention_max_distance", default=128),
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
        "norm_eps": c.number("layer_norm_epsilon", default=1e-6),
        "activation": ACTIVATIONS[activation],
        "gated_mlp": gated,
        "position": "relative",
    }


def _bart(c: _Config) -> dict[str, Any]:
    heads, hidden = c.integer("encoder_attention_heads"), c.integer("d_model")
    encoder = c.integer("encoder_layers")
    c.refuse("normalize_before", False, "norms stand behind the residuals")
    for key, other in (("decoder_attention_heads", heads), ("decoder_ffn_dim", c.integer("encoder_ffn_dim"))):
        if c.integer(key, default=other) != other:
            raise UserError(f"{c.where}: {key} = {c.data[key]} differs from the encoder's {other}; they must be equal")
    return {
        "family": "bart",
        "num_hidden_layers": encoder + c.integer("decoder_layers"),
        "num_encoder_layers": encoder,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": _head_dim(c, heads, hidden),
        "intermediate_size": c.integer("encoder_ffn_dim"),
        "vocab_size": c.integer("vocab_size"),
        "max_position_embeddings": c.integer("max_position_embeddings", default=1024),
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
        "norm": "layernorm",
        "activation": c.activation("activation_function", default="gelu"),
        "gated_mlp": False,
        "position": "learned",
        "embedding_scale": hidden**0.5 if c.flag("scale_embedding", False) else 1.0,
        **_all_biases(),
    }


def _nemotron_h(c: _Config) -> dict[str, Any]:
    """Mamba-2, attention without positions, feed-forwards and mixtures, each a layer of its own."""
    letters = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}
    listed = c.data.get("layers_block_type")
    pattern = "".join(letters.get(str(name), "?") for name in listed) if isinstance(listed, list) else None
    pattern = str(pattern or c.data.get("hybrid_override_pattern", ""))
    layers = c.integer("num_hidden_layers", default=max(1, len(pattern)))
    if len(pattern) != layers or set(pattern) - set(PATTERN):
        raise UserError(
            f"{c.where}: hybrid_override_pattern = '{pattern[:40]}' must have one of {' '.join(PATTERN)} "
            f"for each of the {layers} layers"
        )
    fields = _llama(c) | {
        "family": "hybrid",
        "num_hidden_layers": layers,
        "norm_eps": c.number("norm_eps", "layer_norm_epsilon", default=1e-5),
        "activation": c.activation("mlp_hidden_act", default="relu2"),
        "gated_mlp": False,
        "position": "none",
        "layer_pattern": pattern,
    }
    if "M" in pattern:
        fields |= {
            "mamba_num_heads": c.integer("mamba_num_heads"),
            "mamba_head_dim": c.integer("mamba_head_dim"),
            "mamba_n_groups": c.integer("n_groups", default=8),
            "ssm_state_size": c.integer("ssm_state_size", default=128),
            "conv_kernel": c.integer("conv_kernel", default=4),
            "chunk_size": c.integer("chunk_size", default=128),
        }
    if "E" in pattern:
        fields |= _nemotron_experts(c)
    return fields


def _nemotron_experts(c: _Config) -> dict[str, Any]:
    """Shared experts may be wider than routed ones; they count as that many of the routed width."""
    width, shared = c.integer("moe_intermediate_size"), c.integer("n_shared_experts", default=0, least=0)
    shared *= c.integer("moe_shared_expert_intermediate_size", default=width)
    if shared % width or c.data.get("moe_latent_size"):
        raise UserError(
            f"{c.where}: moe_shared_expert_intermediate_size must be a multiple of moe_intermediate_size = {width}, "
            "and experts on a latent (moe_latent_size) are not supported"
        )
    return {
        "num_experts": c.integer("n_routed_experts"),
        "num_experts_per_tok": c.integer("num_experts_per_tok"),
        "moe_intermediate_size": width,
        "num_shared_experts": shared // width,
        "router_bias": True,
    }


def _neox(c: _Config) -> dict[str, Any]:
    """GPT-NeoX, Pythia: rotary positions on a part of each head, LayerNorm, no gate. Attention and feed-forward that
    stand side by side (`use_parallel_residual`) still run one after the other, each behind its own norm."""
    inner = c.data.get("rope_parameters")
    rotary = _Config(c.data | (inner if isinstance(inner, dict) else {}), c.where)
    return _plain_decoder(c, "num_attention_heads", "hidden_size", "num_hidden_layers") | {
        "intermediate_size": c.integer("intermediate_size"),
        "max_position_embeddings": c.integer("max_position_embeddings", default=2048),
        "tie_word_embeddings": c.flag("tie_word_embeddings", False),
        "norm_eps": c.number("layer_norm_eps", default=1e-5),
        "activation": c.activation("hidden_act", default="gelu"),
        "rope_theta": c.rope_theta(),
        "rope_scaling": c.rope_scaling(),
        "partial_rotary_factor": rotary.number("rotary_pct", "partial_rotary_factor", default=0.25),
        "parallel_residual": c.flag("use_parallel_residual", True),
        "qkv_bias": c.flag("attention_bias", True),
        "attention_out_bias": c.flag("attention_bias", True),
    }


def _opt(c: _Config) -> dict[str, Any]:
    hidden = c.integer("hidden_size")
    if c.integer("word_embed_proj_dim", default=hidden) != hidden:
        raise UserError(f"{c.where}: word_embed_proj_dim = {c.data['word_embed_proj_dim']} must be hidden_size")
    c.refuse("do_layer_norm_before", True, "norms stand in front of attention and feed-forward")
    c.refuse("_remove_final_layer_norm", False, "there is a norm in front of the head")
    c.refuse("layer_norm_elementwise_affine", True, "norms have weights")
    biases = c.flag("enable_bias", True)
    return _plain_decoder(c, "num_attention_heads", "hidden_size", "num_hidden_layers") | {
        "intermediate_size": c.integer("ffn_dim"),
        "max_position_embeddings": c.integer("max_position_embeddings", default=2048),
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
        "activation": c.activation("activation_function", default="relu"),
        "position": "learned",
        **dict.fromkeys(_all_biases(), biases),
    }


def _bloom(c: _Config) -> dict[str, Any]:
    hidden = c.integer("hidden_size", "n_embed")
    c.refuse("apply_residual_connection_post_layernorm", False, "residuals go around the norms")
    return _plain_decoder(c, "n_head", "hidden_size", "n_layer") | {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": c.integer("seq_length", default=2048),
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
        "norm_eps": c.number("layer_norm_epsilon", default=1e-5),
        "activation": "gelu_tanh",
        "position": "alibi",
        "embedding_norm": True,
    }


def _mpt(c: _Config) -> dict[str, Any]:
    attention = c.data.get("attn_config")
    inner = _Config(attention if isinstance(attention, dict) else {}, f"{c.where}: attn_config")
    alibi = bool(inner.data.get("alibi", True))
    for key, plain in (("clip_qkv", 0), ("qk_ln", False), ("softmax_scale", 0), ("prefix_lm", False)):
        inner.refuse(key, plain, "attention is the plain one")
    inner.refuse("alibi_bias_max", 8, "slopes end at 2^-8")
    hidden, biases = c.integer("d_model"), not c.flag("no_bias", True)
    return _plain_decoder(c, "n_heads", "d_model", "n_layers") | {
        "intermediate_size": c.integer("expansion_ratio", default=4) * hidden,
        "max_position_embeddings": c.integer("max_seq_len", default=2048),
        "tie_word_embeddings": True,
        "norm_bias": biases,
        "position": "alibi" if alibi else "learned",
        **dict.fromkeys(_all_biases(), biases),
    }


def _plain_decoder(c: _Config, heads: str, hidden: str, layers: str) -> dict[str, Any]:
    """What the decoders of 2020-2023 share, under their own names for the three sizes."""
    count, width = c.integer(heads), c.integer(hidden, "n_embed")
    return {
        "family": "neox",
        "num_hidden_layers": c.integer(layers),
        "hidden_size": width,
        "num_attention_heads": count,
        "num_key_value_heads": count,
        "head_dim": _head_dim(c, count, width),
        "vocab_size": c.integer("vocab_size"),
        "norm": "layernorm",
        "activation": "gelu",
        "gated_mlp": False,
        **_all_biases(),
    }


def _all_biases() -> dict[str, bool]:
    return {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}


_READERS: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "llama": _llama, "mistral": _llama, "qwen2": _llama, "qwen3": _llama,
    "mixtral": _mixtral, "qwen3_moe": _qwen3_moe, "gpt_oss": _gpt_oss,
    "deepseek_v2": _deepseek, "deepseek_v3": _deepseek, "kimi_k2": _deepseek,
    "nemotron_h": _nemotron_h, "gpt_neox": _neox, "opt": _opt, "bloom": _bloom, "mpt": _mpt,
    "gpt2": _gpt2, "bert": _bert, "t5": _t5, "bart": _bart,
}  # fmt: skip
