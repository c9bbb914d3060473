"""ModelSpec -> Hugging Face `config.json`, which an exported model needs beside its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from runtime.hf_names import model_type
from simulator.errors import UserError
from simulator.hf import read_config
from simulator.model import ModelSpec

_ACTIVATIONS = {"gelu_tanh": "gelu_new"}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "gpt2": "GPT2LMHeadModel", "gpt_neox": "GPTNeoXForCausalLM", "opt": "OPTForCausalLM",
    "bloom": "BloomForCausalLM", "mpt": "MptForCausalLM", "bert": "BertForMaskedLM",
    "t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration",
}  # fmt: skip
EXCHANGED = ("llama", "gpt", "neox", "bert", "t5", "bart")


def check_exchanged(spec: ModelSpec) -> None:
    """Raises UserError if the files of this family are not known."""
    if spec.family not in EXCHANGED:
        raise UserError(
            f"weights of the {spec.family} family cannot be read or written; those of {', '.join(EXCHANGED)} can"
        )


def hf_config(spec: ModelSpec, dtype: str = "float32") -> dict[str, Any]:
    """The object of `config.json`: `read_config` of it is `spec`, and dropout is off, as in our runs.

    Raises:
        UserError: no architecture that we write has all of the spec's switches.
    """
    check_exchanged(spec)
    kind = model_type(spec)
    config = {
        "gpt2": _gpt2, "gpt_neox": _neox, "opt": _opt, "bloom": _bloom, "mpt": _mpt, "bert": _bert, "t5": _t5,
        "bart": _bart,
    }.get(kind, _llama)(spec)  # fmt: skip
    whole = {
        "model_type": kind,
        "architectures": [_ARCHITECTURES[kind]],
        "torch_dtype": dtype,
        "vocab_size": spec.vocab_size,
        "tie_word_embeddings": spec.tie_word_embeddings,
        **config,
    }
    read = read_config(whole, spec.name)
    lost = [f.name for f in dataclasses.fields(spec) if getattr(read, f.name) != getattr(spec, f.name)]
    if lost:
        raise UserError(f"{spec.name} cannot be written as model_type = '{kind}', which has no such {', '.join(lost)}")
    return whole


def _activation(spec: ModelSpec) -> str:
    return _ACTIVATIONS.get(spec.activation, spec.activation)


def _sizes(spec: ModelSpec) -> dict[str, Any]:
    return {
        "num_hidden_layers": spec.num_hidden_layers,
        "hidden_size": spec.hidden_size,
        "num_attention_heads": spec.num_attention_heads,
        "intermediate_size": spec.intermediate_size,
        "max_position_embeddings": spec.max_position_embeddings,
        "hidden_act": _activation(spec),
    }


def _rope(spec: ModelSpec) -> dict[str, Any]:
    scaling = None if spec.rope_scaling is None else dataclasses.asdict(spec.rope_scaling)
    return {"rope_theta": spec.rope_theta} | ({"rope_scaling": scaling} if scaling else {})


def _llama(spec: ModelSpec) -> dict[str, Any]:
    return {
        **_sizes(spec),
        **_rope(spec),
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "rms_norm_eps": spec.norm_eps,
        "attention_bias": spec.attention_out_bias,
        "mlp_bias": spec.mlp_bias,
        "attention_dropout": 0.0,
        **({"sliding_window": spec.sliding_window} if spec.sliding_window else {}),
    }


def _gpt2(spec: ModelSpec) -> dict[str, Any]:
    return {
        "n_layer": spec.num_hidden_layers,
        "n_embd": spec.hidden_size,
        "n_head": spec.num_attention_heads,
        "n_inner": spec.intermediate_size,
        "n_positions": spec.max_position_embeddings,
        "layer_norm_epsilon": spec.norm_eps,
        "activation_function": _activation(spec),
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
    }


def _neox(spec: ModelSpec) -> dict[str, Any]:
    rope = _rope(spec)
    return {
        **_sizes(spec),
        "rotary_emb_base": rope.pop("rope_theta"),
        **rope,
        "layer_norm_eps": spec.norm_eps,
        "rotary_pct": spec.partial_rotary_factor,
        "use_parallel_residual": spec.parallel_residual,
        "attention_bias": spec.qkv_bias,
    }


def _opt(spec: ModelSpec) -> dict[str, Any]:
    sizes = _sizes(spec)
    sizes["activation_function"] = sizes.pop("hidden_act")
    sizes["ffn_dim"] = sizes.pop("intermediate_size")
    return sizes | {
        "word_embed_proj_dim": spec.hidden_size, "enable_bias": spec.mlp_bias, "do_layer_norm_before": True,
        "dropout": 0.0,
    }  # fmt: skip


def _bloom(spec: ModelSpec) -> dict[str, Any]:
    return {
        "n_layer": spec.num_hidden_layers,
        "hidden_size": spec.hidden_size,
        "n_head": spec.num_attention_heads,
        "seq_length": spec.max_position_embeddings,
        "layer_norm_epsilon": spec.norm_eps,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _mpt(spec: ModelSpec) -> dict[str, Any]:
    return {
        "n_layers": spec.num_hidden_layers,
        "d_model": spec.hidden_size,
        "n_heads": spec.num_attention_heads,
        "expansion_ratio": spec.intermediate_size // spec.hidden_size,
        "max_seq_len": spec.max_position_embeddings,
        "no_bias": not spec.mlp_bias,
        "attn_config": {"alibi": True},
    }


def _bert(spec: ModelSpec) -> dict[str, Any]:
    return {
        **_sizes(spec),
        "type_vocab_size": spec.type_vocab_size,
        "layer_norm_eps": spec.norm_eps,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }


def _t5(spec: ModelSpec) -> dict[str, Any]:
    gated = "gated-gelu" if spec.activation == "gelu_tanh" else f"gated-{spec.activation}"
    return {
        "d_model": spec.hidden_size,
        "d_kv": spec.head_dim,
        "d_ff": spec.intermediate_size,
        "num_layers": spec.num_encoder_layers,
        "num_decoder_layers": spec.num_hidden_layers - spec.num_encoder_layers,
        "num_heads": spec.num_attention_heads,
        "n_positions": spec.max_position_embeddings,
        "relative_attention_num_buckets": spec.relative_attention_num_buckets,
        "relative_attention_max_distance": spec.relative_attention_max_distance,
        "layer_norm_epsilon": spec.norm_eps,
        "feed_forward_proj": gated if spec.gated_mlp else _activation(spec),
        "dropout_rate": 0.0,
    }


def _bart(spec: ModelSpec) -> dict[str, Any]:
    both = {"attention_heads": spec.num_attention_heads, "ffn_dim": spec.intermediate_size}
    return {
        "d_model": spec.hidden_size,
        "encoder_layers": spec.num_encoder_layers,
        "decoder_layers": spec.num_hidden_layers - spec.num_encoder_layers,
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()},
        "max_position_embeddings": spec.max_position_embeddings,
        "activation_function": _activation(spec),
        "scale_embedding": spec.embedding_scale != 1.0,
        "dropout": 0.0,
    }
