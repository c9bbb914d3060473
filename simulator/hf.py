"""Hugging Face `config.json` -> ModelSpec. Both spellings of transformers 4 and 5 are read; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from simulator.checks import check_model
from simulator.errors import UserError, nearest
from simulator.model import PATTERN, ModelSpec

_ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2",
}  # fmt: skip


# No size of a model comes near; beyond it floats lose count.
LARGEST = 2**40


class _Config:
    """A `config.json` with checked access: missing keys and values of the wrong kind are the user's error."""

    def __init__(self, data: dict[str, Any], where: str) -> None:
        self.data, self.where = data, where

    def integer(self, *keys: str, default: int | None = None, least: int = 1) -> int:
        """The first of these keys that is present and not null; the later ones are aliases."""
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
                raise UserError(f"{self.where}: {key} = {repr(value)[:40]} must be an integer of at least {least}")
            return value
        if default is None:
            if keys[0] in self.data:
                raise UserError(f"{self.where}: {keys[0]} = null must be an integer of at least {least}")
            raise UserError(f"{self.where}: the key '{keys[0]}' is missing{_hint(keys[0], self.data)}")
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UserError(f"{self.where}: {key} = {value!r} must be true or false")
        return value

    def number(self, *keys: str, default: float) -> float:
        for key in keys:
            value = self.data.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
                raise UserError(f"{self.where}: {key} = {value!r} must be a positive number")
            return float(value)
        return default

    def activation(self, *keys: str, default: str) -> Any:
        name = next((self.data[k] for k in keys if self.data.get(k) is not None), default)
        if str(name) not in _ACTIVATIONS:
            raise UserError(f"{self.where}: {keys[0]} = {name!r} is not known{nearest(str(name), _ACTIVATIONS)}")
        return _ACTIVATIONS[name]

    def rope_theta(self, default: float = 10000.0) -> float:
        """transformers 5 moved `rope_theta` into `rope_parameters`."""
        inner = self.data.get("rope_parameters")
        if isinstance(inner, dict) and "rope_theta" in inner:
            return _Config(inner, self.where).number("rope_theta", default=default)
        return self.number("rope_theta", default=default)


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


def _hint(key: str, data: dict[str, Any]) -> str:
    hint = nearest(key, data)
    return hint if "did you mean" in hint else ""


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
        "qkv_bias": attention_bias or qwen,
        "attention_out_bias": attention_bias and not qwen,
        "mlp_bias": c.flag("mlp_bias", False),
        "qk_norm": c.data["model_type"] in ("qwen3", "qwen3_moe"),
    }


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
    activation = str(projection).removeprefix("gated-")
    if activation not in _ACTIVATIONS:
        raise UserError(
            f"{c.where}: feed_forward_proj = {projection!r} is not known{nearest(activation, _ACTIVATIONS)}"
        )
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
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
        "norm_eps": c.number("layer_norm_epsilon", default=1e-6),
        "activation": _ACTIVATIONS[activation],
        "gated_mlp": gated,
        "position": "relative",
    }


def _bart(c: _Config) -> dict[str, Any]:
    heads, hidden = c.integer("encoder_attention_heads"), c.integer("d_model")
    encoder = c.integer("encoder_layers")
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
    """GPT-NeoX, Pythia: rotary positions, LayerNorm, no gate. The attention and the feed-forward that run side by side
    (`use_parallel_residual`) are taken to run one after the other."""
    return _plain_decoder(c, "num_attention_heads", "hidden_size", "num_hidden_layers") | {
        "intermediate_size": c.integer("intermediate_size"),
        "max_position_embeddings": c.integer("max_position_embeddings", default=2048),
        "tie_word_embeddings": c.flag("tie_word_embeddings", False),
        "norm_eps": c.number("layer_norm_eps", default=1e-5),
        "activation": c.activation("hidden_act", default="gelu"),
    }


def _opt(c: _Config) -> dict[str, Any]:
    hidden = c.integer("hidden_size")
    if c.integer("word_embed_proj_dim", default=hidden) != hidden:
        raise UserError(f"{c.where}: word_embed_proj_dim = {c.data['word_embed_proj_dim']} must be hidden_size")
    return _plain_decoder(c, "num_attention_heads", "hidden_size", "num_hidden_layers") | {
        "intermediate_size": c.integer("ffn_dim"),
        "max_position_embeddings": c.integer("max_position_embeddings", default=2048),
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
        "activation": c.activation("activation_function", default="relu"),
        "position": "learned",
    }


def _bloom(c: _Config) -> dict[str, Any]:
    hidden = c.integer("hidden_size", "n_embed")
    return _plain_decoder(c, "n_head", "hidden_size", "n_layer") | {
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "max_position_embeddings": c.integer("seq_length", default=2048),
        "tie_word_embeddings": c.flag("tie_word_embeddings", True),
        "norm_eps": c.number("layer_norm_epsilon", default=1e-5),
        "position": "alibi",
    }


def _mpt(c: _Config) -> dict[str, Any]:
    attention = c.data.get("attn_config")
    alibi = not isinstance(attention, dict) or bool(attention.get("alibi", True))
    hidden, biases = c.integer("d_model"), not c.flag("no_bias", True)
    return _plain_decoder(c, "n_heads", "d_model", "n_layers") | {
        "intermediate_size": c.integer("expansion_ratio", default=4) * hidden,
        "max_position_embeddings": c.integer("max_seq_len", default=2048),
        "tie_word_embeddings": True,
        # Without biases the norms have a scale alone, like RMSNorm's.
        "norm": "layernorm" if biases else "rmsnorm",
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
