"""Where each weight of a model lies in Hugging Face's files, family by family.

The other way round needs no table: an exported file has the same names. Hugging Face fuses queries, keys and values in
some families and writes matrices of GPT-2 with inputs first; a `Place` says which part of which tensor is ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from simulator.model import ModelSpec


@dataclass(frozen=True)
class Place:
    """One of our tensors in one of theirs. Rows are the first dim of ours.

    transposed: theirs has its last dim for our rows. parts tensors are fused, of which this is number `part`, in turns
    of `turn` rows (0: each whole, one behind the other). offset rows of theirs come before all and mean nothing.
    """

    name: str
    transposed: bool = False
    part: int = 0
    parts: int = 1
    turn: int = 0
    offset: int = 0

    def segments(self, first: int, last: int, rows: int) -> Iterator[tuple[int, int, int]]:
        """Where our rows first ... last - 1 of `rows` lie: (our row, their row, how many) for each contiguous run.

        >>> list(Place("qkv", part=1, parts=3, turn=4).segments(2, 8, 8))
        [(2, 6, 2), (4, 16, 4)]
        """
        turn = self.turn or rows
        row = first
        while row < last:
            number, inside = divmod(row, turn)
            count = min(turn - inside, last - row)
            yield row, self.offset + (number * self.parts + self.part) * turn + inside, count
            row += count


# Our name and theirs; a final * stands for weight and bias.
_Names = dict[str, str | Place]

_LLAMA_BLOCK: _Names = {
    "attention_norm*": "input_layernorm*", "ffn_norm*": "post_attention_layernorm*",
    "attention.wq*": "self_attn.q_proj*", "attention.wk*": "self_attn.k_proj*", "attention.wv*": "self_attn.v_proj*",
    "attention.wo*": "self_attn.o_proj*", "attention.q_norm*": "self_attn.q_norm*",
    "attention.k_norm*": "self_attn.k_norm*", "feed_forward.w1*": "mlp.gate_proj*",
    "feed_forward.w2*": "mlp.down_proj*", "feed_forward.w3*": "mlp.up_proj*",
}  # fmt: skip
_GPT2_BLOCK: _Names = {
    "attention_norm*": "ln_1*", "ffn_norm*": "ln_2*",
    "attention.wo*": Place("attn.c_proj*", transposed=True), "feed_forward.w1*": Place("mlp.c_fc*", transposed=True),
    "feed_forward.w2*": Place("mlp.c_proj*", transposed=True),
}  # fmt: skip
_NEOX_BLOCK: _Names = {
    "attention_norm*": "input_layernorm*", "ffn_norm*": "post_attention_layernorm*",
    "attention.wo*": "attention.dense*", "feed_forward.w1*": "mlp.dense_h_to_4h*",
    "feed_forward.w2*": "mlp.dense_4h_to_h*",
}  # fmt: skip
_BLOOM_BLOCK = _NEOX_BLOCK | {"attention.wo*": "self_attention.dense*"}
_MPT_BLOCK: _Names = {
    "attention_norm*": "norm_1*", "ffn_norm*": "norm_2*", "attention.wo*": "attn.out_proj*",
    "feed_forward.w1*": "ffn.up_proj*", "feed_forward.w2*": "ffn.down_proj*",
}  # fmt: skip
_OPT_BLOCK: _Names = {
    "attention_norm*": "self_attn_layer_norm*", "ffn_norm*": "final_layer_norm*",
    "attention.wq*": "self_attn.q_proj*", "attention.wk*": "self_attn.k_proj*", "attention.wv*": "self_attn.v_proj*",
    "attention.wo*": "self_attn.out_proj*", "feed_forward.w1*": "fc1*", "feed_forward.w2*": "fc2*",
}  # fmt: skip
_BART_BLOCK = _OPT_BLOCK | {
    "cross_attention_norm*": "encoder_attn_layer_norm*", "cross_attention.wq*": "encoder_attn.q_proj*",
    "cross_attention.wk*": "encoder_attn.k_proj*", "cross_attention.wv*": "encoder_attn.v_proj*",
    "cross_attention.wo*": "encoder_attn.out_proj*",
}  # fmt: skip
_BERT_BLOCK: _Names = {
    "attention_norm*": "attention.output.LayerNorm*", "ffn_norm*": "output.LayerNorm*",
    "attention.wq*": "attention.self.query*", "attention.wk*": "attention.self.key*",
    "attention.wv*": "attention.self.value*", "attention.wo*": "attention.output.dense*",
    "feed_forward.w1*": "intermediate.dense*", "feed_forward.w2*": "output.dense*",
}  # fmt: skip

_LLAMA: _Names = {
    "tok_embeddings*": "model.embed_tokens*", "norm*": "model.norm*", "output*": "lm_head*",
}  # fmt: skip
_GPT2: _Names = {
    "tok_embeddings*": "transformer.wte*", "pos_embeddings*": "transformer.wpe*", "norm*": "transformer.ln_f*",
    "output*": "lm_head*",
}  # fmt: skip
_NEOX: _Names = {
    "tok_embeddings*": "gpt_neox.embed_in*", "norm*": "gpt_neox.final_layer_norm*", "output*": "embed_out*",
}  # fmt: skip
_BLOOM: _Names = {
    "tok_embeddings*": "transformer.word_embeddings*", "embedding_norm*": "transformer.word_embeddings_layernorm*",
    "norm*": "transformer.ln_f*", "output*": "lm_head*",
}  # fmt: skip
_MPT: _Names = {
    "tok_embeddings*": "transformer.wte*", "norm*": "transformer.norm_f*", "output*": "lm_head*",
}  # fmt: skip
_OPT: _Names = {
    "tok_embeddings*": "model.decoder.embed_tokens*",
    "pos_embeddings*": Place("model.decoder.embed_positions*", offset=2), "norm*": "model.decoder.final_layer_norm*",
    "output*": "lm_head*",
}  # fmt: skip
_BERT: _Names = {
    "tok_embeddings*": "bert.embeddings.word_embeddings*", "pos_embeddings*": "bert.embeddings.position_embeddings*",
    "type_embeddings*": "bert.embeddings.token_type_embeddings*", "embedding_norm*": "bert.embeddings.LayerNorm*",
    "transform*": "cls.predictions.transform.dense*", "norm*": "cls.predictions.transform.LayerNorm*",
    "output.weight": "cls.predictions.decoder.weight", "output.bias": "cls.predictions.bias",
}  # fmt: skip
_T5: _Names = {
    "tok_embeddings*": "shared*", "encoder_norm*": "encoder.final_layer_norm*", "norm*": "decoder.final_layer_norm*",
    "encoder_bias*": "encoder.block.0.layer.0.SelfAttention.relative_attention_bias*",
    "decoder_bias*": "decoder.block.0.layer.0.SelfAttention.relative_attention_bias*", "output*": "lm_head*",
}  # fmt: skip
_BART: _Names = {
    "tok_embeddings*": "model.shared*", "encoder_positions*": "model.encoder.embed_positions*",
    "decoder_positions*": "model.decoder.embed_positions*",
    "encoder_embedding_norm*": "model.encoder.layernorm_embedding*",
    "decoder_embedding_norm*": "model.decoder.layernorm_embedding*", "output*": "lm_head*",
}  # fmt: skip


def model_type(spec: ModelSpec) -> str:
    """Hugging Face's name of the architecture, which the spec's switches tell within a family."""
    if spec.family == "llama":
        if spec.sliding_window:
            return "mistral"
        return "qwen3" if spec.qk_norm else "qwen2" if spec.qkv_bias and not spec.attention_out_bias else "llama"
    if spec.family == "neox":
        if spec.position == "alibi":
            return "bloom" if spec.embedding_norm else "mpt"
        return "opt" if spec.position == "learned" else "gpt_neox"
    return {"gpt": "gpt2"}.get(spec.family, spec.family)


def hf_place(spec: ModelSpec, name: str) -> Place:
    """Where the weight that a stage calls `name` lies in Hugging Face's files of such a model."""
    kind = model_type(spec)
    if not name.startswith("layers."):
        tables = {
            "gpt2": _GPT2, "gpt_neox": _NEOX, "bloom": _BLOOM, "mpt": _MPT, "opt": _OPT, "bert": _BERT, "t5": _T5,
            "bart": _BART,
        }  # fmt: skip
        return _look_up(tables.get(kind, _LLAMA), name, "")
    _, number, inner = name.split(".", 2)
    index = int(number)
    if kind == "t5":
        return _look_up(_t5_block(spec, index), inner, _side(spec, index, "block"))
    of_heads = "attention.query_key_value*"
    prefix, names = {
        "gpt2": (f"transformer.h.{index}.", _GPT2_BLOCK | _fused(spec, "attn.c_attn*", transposed=True)),
        "gpt_neox": (f"gpt_neox.layers.{index}.", _NEOX_BLOCK | _fused(spec, of_heads, by_head=True)),
        "bloom": (f"transformer.h.{index}.", _BLOOM_BLOCK | _fused(spec, f"self_{of_heads}", by_head=True)),
        "mpt": (f"transformer.blocks.{index}.", _MPT_BLOCK | _fused(spec, "attn.Wqkv*")),
        "opt": (f"model.decoder.layers.{index}.", _OPT_BLOCK),
        "bert": (f"bert.encoder.layer.{index}.", _BERT_BLOCK),
        "bart": (f"model.{_side(spec, index, 'layers')}", _BART_BLOCK),
    }.get(kind, (f"model.layers.{index}.", _LLAMA_BLOCK))  # fmt: skip
    return _look_up(names, inner, prefix)


def _side(spec: ModelSpec, index: int, blocks: str) -> str:
    encoders = spec.num_encoder_layers
    return f"encoder.{blocks}.{index}." if index < encoders else f"decoder.{blocks}.{index - encoders}."


def _fused(spec: ModelSpec, name: str, transposed: bool = False, by_head: bool = False) -> _Names:
    """Queries, keys and values in one tensor: one behind the other, or head by head."""
    turn = spec.head_dim if by_head else 0
    return {
        f"attention.{ours}*": Place(name, transposed, part, 3, turn) for part, ours in enumerate(("wq", "wk", "wv"))
    }


def _t5_block(spec: ModelSpec, index: int) -> _Names:
    """T5 numbers the parts of a block: attention, in a decoder cross-attention, feed-forward."""
    last = 1 if index < spec.num_encoder_layers else 2
    feed_forward = f"layer.{last}.DenseReluDense."
    names: _Names = {"attention_norm*": "layer.0.layer_norm*", "ffn_norm*": f"layer.{last}.layer_norm*"}
    names["cross_attention_norm*"] = "layer.1.layer_norm*"
    for ours in "qkvo":
        names[f"attention.w{ours}*"] = f"layer.0.SelfAttention.{ours}*"
        names[f"cross_attention.w{ours}*"] = f"layer.1.EncDecAttention.{ours}*"
    first = {"w1": "wi_0", "w3": "wi_1"} if spec.gated_mlp else {"w1": "wi"}
    return names | {
        f"feed_forward.{ours}*": f"{feed_forward}{theirs}*" for ours, theirs in (first | {"w2": "wo"}).items()
    }


def _look_up(names: _Names, name: str, prefix: str) -> Place:
    module, _, end = name.rpartition(".")
    found = names.get(name) or names[f"{module}*"]
    place = Place(found) if isinstance(found, str) else found
    theirs = prefix + place.name.replace("*", f".{end}")
    return Place(theirs, place.transposed and end == "weight", place.part, place.parts, place.turn, place.offset)
