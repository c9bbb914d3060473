"""Write logits.json: what transformers computes for tiny models of every family, with weights by `formula`.

Run it after a change of the cases, in an environment that has transformers (the tests need only the file):
`python tests/runtime/golden/make_logits.py`.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
LENGTH = 24
# Where the logits are compared: places in the sequence, and entries of the vocabulary.
PLACES, ENTRIES = (0, 9, 23), slice(0, 6)

_LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "rope_theta": 500.0, "tie_word_embeddings": False,
}  # fmt: skip
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
_GPT2 = {
    "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32,
    "activation_function": "gelu_new",
}  # fmt: skip
_NEOX = {
    "model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "vocab_size": 64, "max_position_embeddings": 64, "hidden_act": "gelu", "rotary_pct": 0.5,
    "tie_word_embeddings": False,
}  # fmt: skip
_T5 = {
    "model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 64,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "feed_forward_proj": "relu",
    "tie_word_embeddings": True,
}  # fmt: skip

CASES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "llama3-scaling": _LLAMA | {"rope_scaling": _LLAMA3},
    "linear-scaling": _LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "mistral-window": _LLAMA | {"model_type": "mistral", "sliding_window": 7},
    "qwen2-biases": _LLAMA | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3-norms": _LLAMA | {"model_type": "qwen3", "head_dim": 16},
    "gpt2": _GPT2,
    "neox-parallel": _NEOX | {"use_parallel_residual": True},
    "neox-sequential": _NEOX | {"use_parallel_residual": False, "rotary_pct": 0.25},
    "opt": {
        "model_type": "opt", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48,
        "vocab_size": 64, "max_position_embeddings": 32, "word_embed_proj_dim": 32,
    },
    "bloom-six-heads": {
        "model_type": "bloom", "hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": 64, "seq_length": 64,
    },
    "mpt": {
        "model_type": "mpt", "d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 64,
        "no_bias": True, "attn_config": {"alibi": True},
    },
    "bert": {
        "model_type": "bert", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
        "intermediate_size": 48, "max_position_embeddings": 32, "type_vocab_size": 2,
    },
    "t5": _T5,
    "t5-gated": _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "bart": {
        "model_type": "bart", "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "vocab_size": 64,
        "max_position_embeddings": 32, "scale_embedding": True,
    },
}  # fmt: skip


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 values of the tensor that Hugging Face calls `name`: matrices large enough that attention is sharp,
    scales of norms about one, biases about zero."""
    values = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape) * 0.25
    scale = len(shape) == 1 and not name.endswith("bias")
    return (values + 1.0 if scale else values).astype(np.float32)


def tokens(salt: int = 0) -> np.ndarray:
    """(1, LENGTH) token ids."""
    return (np.arange(LENGTH)[None] * 37 + 11 * salt + 5) % 61


def main() -> None:
    import torch
    import transformers

    found = {}
    for case, config in CASES.items():
        kind = config["model_type"]
        family = {
            "bert": transformers.AutoModelForMaskedLM,
            "t5": transformers.AutoModelForSeq2SeqLM,
            "bart": transformers.AutoModelForSeq2SeqLM,
        }.get(kind, transformers.AutoModelForCausalLM)
        own = transformers.AutoConfig.for_model(**config)
        model = family.from_config(own, attn_implementation="eager").eval().float()
        if kind == "t5" and not config["tie_word_embeddings"]:
            # transformers 5 ties what version 4 and the files of T5 v1.1 have apart.
            model.lm_head.weight = torch.nn.Parameter(torch.empty_like(model.lm_head.weight))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                # The head of GPT-NeoX has another name in files than in transformers 5.
                stored = "embed_out.weight" if (kind, name) == ("gpt_neox", "lm_head.weight") else name
                parameter.copy_(torch.from_numpy(formula(stored, tuple(parameter.shape))))
            inputs = {"input_ids": torch.from_numpy(tokens())}
            if kind in ("t5", "bart"):
                inputs["decoder_input_ids"] = torch.from_numpy(tokens(salt=1))
            logits = model(**inputs).logits[0, PLACES, ENTRIES]
        found[case] = [[round(v, 6) for v in row] for row in logits.tolist()]
    rows = ",\n".join(f'  "{case}": {json.dumps(values)}' for case, values in found.items())
    source = f"transformers {transformers.__version__}, torch {torch.__version__}"
    (HERE / "logits.json").write_text(f'{{"source": "{source}", "logits": {{\n{rows}\n}}}}\n')


if __name__ == "__main__":
    main()
