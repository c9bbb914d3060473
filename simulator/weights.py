"""The weights of a stage one by one, as the project's runtime holds them on a rank: what is gathered and reduced.

Sharding cuts every tensor along its first dim and fills it up to a multiple of the ranks, so sizes need shapes and not
sums alone. Order and names of the parts are those of runtime/model.py and runtime/encoder_decoder.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from simulator.model import BlockKind, ModelSpec


class Weight(NamedTuple):
    """One tensor on a rank: `rows` of dim 0, each of `columns` elements. A partial one is whole on every rank of the
    tensor axis, and each of them finds a summand of its gradient."""

    rows: int
    columns: int = 1
    partial: bool = False

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    def padded(self, shards: int) -> int:
        """Elements with the rows that fill the last shard: 8 rows over 64 ranks count as 64."""
        return math.ceil(self.rows / shards) * shards * self.columns


class Cutting(NamedTuple):
    """How tensor and expert parallelism cut weights: `expert_tp` ranks split each routed expert by its width, `ep`
    hold different ones. Without sequence parallelism norms and positions see every token on every rank."""

    tp: int = 1
    sequence_parallel: bool = False
    ep: int = 1
    expert_tp: int = 1


Weights = tuple[Weight, ...]


def elements(weights: Iterable[Weight], shards: int = 1) -> int:
    """Elements of some weights, filled up for this many shards."""
    return sum(weight.padded(shards) for weight in weights)


def block_weights(model: ModelSpec, kind: BlockKind, cut: Cutting) -> Weights:
    """A block of kind dense, moe or cross without the routed experts that expert parallelism spreads."""
    norm, attention = _norm(model, cut), _attention(model, cut)
    found = norm + attention + (norm + attention if kind == "cross" else ()) + norm
    if kind != "moe":
        return found + _feed_forward(model, model.intermediate_size, cut)
    experts, h = model.num_experts, model.hidden_size
    found += (Weight(experts, h, cut.tp > 1), *(Weight(experts, 1, cut.tp > 1) for _ in range(model.router_bias)))
    if cut.ep == 1:
        found += expert_weights(model, cut)
    shared = model.num_shared_experts * model.moe_intermediate_size
    return found + (_feed_forward(model, shared, cut) if shared else ())


def expert_weights(model: ModelSpec, cut: Cutting) -> Weights:
    """The routed experts of a block, each weight one tensor with the experts first."""
    experts, h, f = model.num_experts // cut.ep, model.hidden_size, model.moe_intermediate_size // cut.expert_tp
    wide = Weight(experts, f * h)
    up = 1 + model.gated_mlp
    biases = (Weight(experts, f), Weight(experts, h, cut.expert_tp > 1), Weight(experts, f))
    return (wide,) * (1 + up) + (biases[: 1 + up] if model.mlp_bias else ())


def embedding_weights(model: ModelSpec, cut: Cutting) -> Weights:
    """Token embedding, cut by vocabulary, with positions, segments and norms."""
    h, partial = model.hidden_size, cut.sequence_parallel
    token = (Weight(model.vocab_size // cut.tp, h),)
    if model.family == "t5":
        # Tables of biases by distance are cut by heads.
        heads = model.num_attention_heads // cut.tp
        return token + (Weight(model.relative_attention_num_buckets, heads),) * 2
    if model.family == "bart":
        # Positions are offset by two.
        return token + (Weight(model.max_position_embeddings + 2, h, partial),) * 2 + _norm(model, cut) * 2
    positions = (Weight(model.max_position_embeddings, h, partial),) if model.position == "learned" else ()
    segments = (Weight(model.type_vocab_size, h, partial),) if model.family == "bert" else ()
    norm = _norm(model, cut) if model.family == "bert" or model.embedding_norm else ()
    return token + positions + segments + norm


def head_weights(model: ModelSpec, cut: Cutting, tied: bool) -> Weights:
    """Final norms and projection; a tied one belongs to the embedding. BERT's head transforms its input first; its
    pooler and its head for the next sentence are not trained here."""
    h, norms = model.hidden_size, {"bart": 0, "t5": 2}.get(model.family, 1)
    transform = _transform(model, cut) if model.family == "bert" else ()
    projection = () if tied else (Weight(model.vocab_size // cut.tp, h),)
    bias = (Weight(model.vocab_size // cut.tp),) if model.family == "bert" else ()
    return transform + _norm(model, cut) * norms + projection + bias


def _transform(model: ModelSpec, cut: Cutting) -> Weights:
    """Cut by columns; under sequence parallelism whole, because every rank has its own tokens."""
    h, partial = model.hidden_size, cut.sequence_parallel
    rows = h if partial else h // cut.tp
    return Weight(rows, h, partial), Weight(rows, 1, partial)


def _norm(model: ModelSpec, cut: Cutting) -> Weights:
    return _scales(model, model.hidden_size, cut.sequence_parallel)


def _scales(model: ModelSpec, size: int, partial: bool) -> Weights:
    return (Weight(size, 1, partial),) * (1 + (model.norm == "layernorm" and model.norm_bias))


def _attention(model: ModelSpec, cut: Cutting) -> Weights:
    h, d = model.hidden_size, model.head_dim
    heads, shared = model.num_attention_heads * d // cut.tp, model.num_key_value_heads * d // cut.tp
    found: Weights = ()
    for rows in (heads, shared, shared):
        found += (Weight(rows, h), *(Weight(rows) for _ in range(model.qkv_bias)))
    found += (Weight(h, heads), *(Weight(h) for _ in range(model.attention_out_bias)))
    # A rank norms its own heads, so that what it finds for the scale of a head is a summand.
    return found + (_scales(model, d, cut.tp > 1) * 2 if model.qk_norm else ())


def _feed_forward(model: ModelSpec, width: int, cut: Cutting) -> Weights:
    h, f = model.hidden_size, width // cut.tp
    bias = model.mlp_bias
    up = (Weight(f, h), *(Weight(f) for _ in range(bias)))
    down = (Weight(h, f), *(Weight(h) for _ in range(bias)))
    return up + down + (up if model.gated_mlp else ())
