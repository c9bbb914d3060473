"""ModelSpec: the dimensions of a transformer in Hugging Face's names, and what follows from them by counting.

A model is an embedding, a row of blocks, and a head. A block is one of these kinds:

    dense     attention + feed-forward               (GPT, Llama, BERT, the encoder of T5 / BART)
    moe       attention + routed and shared experts  (Mixtral, DeepSeek, Qwen3, GPT-OSS)
    cross     attention + cross attention + feed-forward (the decoder of T5 / BART)
    mamba, attention, mlp, experts      one of these alone (hybrids: Nemotron-H and Nemotron 3)

Notation in the formulas: h hidden_size, a heads, k key-value heads, d head_dim, f intermediate_size, V vocab_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from simulator.files import STRICT

BlockKind = Literal["dense", "moe", "cross", "mamba", "attention", "mlp", "experts"]
# The letters of a hybrid's pattern, as Hugging Face's `hybrid_override_pattern` writes them.
PATTERN: dict[str, BlockKind] = {"M": "mamba", "*": "attention", "-": "mlp", "E": "experts"}


def seen_keys(keys: float, causal: bool, window: int) -> float:
    """Keys that a query sees on average: half of them if causal, w·(1 - w/2s) under a causal window of w keys."""
    if causal and 0 < window < keys:
        return window * (1 - window / (2 * keys))
    return keys * (0.5 if causal else 1.0)


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are changed for long contexts, in Hugging Face's names: `linear` divides them by `factor`;
    `llama3` only those of wavelengths above `original_max_position_embeddings / low_freq_factor`, with a smooth passage
    to those that stay. The other kinds are known by name alone."""

    rope_type: Literal["linear", "llama3", "dynamic", "yarn", "longrope"]
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class ModelSpec:
    """One model, immutable. Built by `simulator.hf.read_config` from a `config.json`; all sizes are in elements.

    `num_hidden_layers` counts every block of the model, encoder and decoder together; `num_encoder_layers` says how
    many of them, from the front, are encoder blocks (0 for a decoder-only model, all of them for BERT).
    Queries see the last `sliding_window` keys (0: all), but in every `full_attention_interval`-th block all of them.
    The router chooses `topk_group` of `n_group` groups of experts first, and experts among those.
    `partial_rotary_factor` of each head is rotated; with `parallel_residual` attention and feed-forward of a block read
    the same input and are added side by side; `embedding_norm` is a norm behind the token embedding.
    """

    name: str
    family: Literal["gpt", "llama", "moe", "neox", "hybrid", "bert", "t5", "bart"]
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    norm_eps: float = 1e-5
    norm_bias: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    gated_mlp: bool = True
    position: Literal["rope", "learned", "relative", "alibi", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    partial_rotary_factor: float = 1.0
    parallel_residual: bool = False
    embedding_norm: bool = False
    embedding_scale: float = 1.0
    qkv_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_encoder_layers: int = 0
    type_vocab_size: int = 0
    relative_attention_num_buckets: int = 0
    relative_attention_max_distance: int = 128
    num_experts: int = 0
    num_experts_per_tok: int = 0
    n_group: int = 1
    topk_group: int = 1
    moe_intermediate_size: int = 0
    num_shared_experts: int = 0
    first_k_dense_replace: int = 0
    router_bias: bool = False
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    sliding_window: int = 0
    full_attention_interval: int = 0
    attention_sinks: bool = False
    layer_pattern: str = ""
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    mamba_n_groups: int = 0
    ssm_state_size: int = 0
    conv_kernel: int = 0
    chunk_size: int = 0

    __pydantic_config__ = STRICT

    @property
    def causal(self) -> bool:
        """Whether every block sees the past alone, so that half of the attention scores are masked."""
        return self.num_encoder_layers == 0

    @property
    def encoder_decoder(self) -> bool:
        return 0 < self.num_encoder_layers < self.num_hidden_layers

    @property
    def qk_head_dim(self) -> int:
        """Length of one head's query and key: for multi-head latent attention the part with and without RoPE."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.kv_lora_rank else self.head_dim

    @property
    def value_head_dim(self) -> int:
        return self.v_head_dim if self.kv_lora_rank else self.head_dim

    @property
    def mamba_width(self) -> int:
        """Inner width of a Mamba-2 mixer."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_width(self) -> int:
        """Channels of its convolution: the inner width, and B and C of each group."""
        return self.mamba_width + 2 * self.mamba_n_groups * self.ssm_state_size

    def block_kind(self, index: int) -> BlockKind:
        """The kind of the block with this index (0 is the one after the embedding)."""
        if self.layer_pattern:
            return PATTERN[self.layer_pattern[index]]
        if self.encoder_decoder and index >= self.num_encoder_layers:
            return "cross"
        return "moe" if self.num_experts and index >= self.first_k_dense_replace else "dense"

    def block_is_causal(self, index: int) -> bool:
        """Whether this block's self-attention is causal: decoder blocks are, encoder blocks are not."""
        return index >= self.num_encoder_layers

    def block_window(self, index: int) -> int:
        """How many keys a query of this block sees at most; 0 for all."""
        every = self.full_attention_interval
        return 0 if every and (index + 1) % every == 0 else self.sliding_window

    def attention_parameters(self) -> int:
        """Weights of one self-attention: 2·h·d·(a + k) for grouped queries, plus biases and query-key norms.

        Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, eq. 9-13) counts its low-rank factors instead.
        """
        h, a, k, d = self.hidden_size, self.num_attention_heads, self.num_key_value_heads, self.head_dim
        if self.kv_lora_rank:
            rank, rope = self.kv_lora_rank, self.qk_rope_head_dim
            query = h * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * a * self.qk_head_dim
            if not self.q_lora_rank:
                query = h * a * self.qk_head_dim
            key_value = h * (rank + rope) + rank + rank * a * (self.qk_nope_head_dim + self.v_head_dim)
            return query + key_value + a * self.v_head_dim * h
        weights = h * (a + 2 * k) * d + a * d * h
        biases = (a + 2 * k) * d * self.qkv_bias + h * self.attention_out_bias
        return weights + biases + 2 * d * self.qk_norm + a * self.attention_sinks

    def mlp_parameters(self, width: int) -> int:
        """Weights of one feed-forward of this width: 3·h·f if gated, else 2·h·f, plus biases."""
        matrices = 3 if self.gated_mlp else 2
        biases = (matrices - 1) * width + self.hidden_size
        return matrices * self.hidden_size * width + biases * self.mlp_bias

    def norm_parameters(self) -> int:
        """Weights of one norm over h: a scale, and for LayerNorm a shift, unless the model has none."""
        return self.hidden_size * (2 if self.norm == "layernorm" and self.norm_bias else 1)

    def router_parameters(self) -> int:
        return self.hidden_size * self.num_experts + self.num_experts * self.router_bias

    def expert_parameters(self) -> int:
        """Weights of all routed experts of one block."""
        return self.num_experts * self.mlp_parameters(self.moe_intermediate_size)

    def shared_expert_parameters(self) -> int:
        return (
            self.mlp_parameters(self.moe_intermediate_size * self.num_shared_experts) if self.num_shared_experts else 0
        )

    def mamba_parameters(self) -> int:
        """Weights of one Mamba-2 mixer (arXiv 2405.21060): projections in and out, convolution with its bias, a decay,
        a step and a skip for each head, and the gated norm."""
        h, width = self.hidden_size, self.mamba_width
        into = h * (width + self.conv_width + self.mamba_num_heads)
        return into + self.conv_width * (self.conv_kernel + 1) + 3 * self.mamba_num_heads + width + width * h

    def block_norms(self, kind: BlockKind) -> int:
        """Norms in front of the parts of a block."""
        return {"cross": 3, "dense": 2, "moe": 2}.get(kind, 1)

    def block_parameters(self, kind: BlockKind) -> int:
        """Weights of one block, norms included."""
        if kind == "mamba":
            return self.mamba_parameters() + self.norm_parameters()
        if kind == "attention":
            return self.attention_parameters() + self.norm_parameters()
        if kind == "mlp":
            return self.mlp_parameters(self.intermediate_size) + self.norm_parameters()
        if kind in ("moe", "experts"):
            mixture = self.router_parameters() + self.expert_parameters() + self.shared_expert_parameters()
            attention = self.attention_parameters() if kind == "moe" else 0
            return attention + mixture + self.block_norms(kind) * self.norm_parameters()
        dense = self.attention_parameters() + self.mlp_parameters(self.intermediate_size) + 2 * self.norm_parameters()
        return dense + (self.attention_parameters() + self.norm_parameters() if kind == "cross" else 0)

    def embedding_parameters(self) -> int:
        """Token, position and segment embeddings, with the norms that some families put behind them."""
        h = self.hidden_size
        token = self.vocab_size * h
        if self.family in ("gpt", "neox"):
            positions = self.max_position_embeddings * h * (self.position == "learned")
            return token + positions + self.norm_parameters() * self.embedding_norm
        if self.family == "bert":
            return token + (self.max_position_embeddings + self.type_vocab_size) * h + self.norm_parameters()
        if self.family == "bart":
            # Positions are offset by two; encoder and decoder have a table and a norm each.
            return token + 2 * ((self.max_position_embeddings + 2) * h + self.norm_parameters())
        if self.family == "t5":
            return token + 2 * self.relative_attention_num_buckets * self.num_attention_heads
        return token

    def head_parameters(self) -> int:
        """Final norm and output projection; a tied projection is counted with the embedding.

        BERT's head is that of pre-training: pooler, masked-token transform with its vocabulary bias, next-sentence.
        """
        h = self.hidden_size
        projection = 0 if self.tie_word_embeddings else self.vocab_size * h
        if self.family == "bert":
            return (h * h + h) + (h * h + h + self.norm_parameters() + self.vocab_size) + (2 * h + 2) + projection
        final_norms = {"bart": 0, "t5": 2}.get(self.family, 1)
        return final_norms * self.norm_parameters() + projection

    def parameters(self) -> int:
        """All weights. Equal to the published counts (tests/simulator/test_model.py names them)."""
        blocks = sum(self.block_parameters(self.block_kind(i)) for i in range(self.num_hidden_layers))
        return self.embedding_parameters() + blocks + self.head_parameters()

    def active_matmul_parameters(self) -> int:
        """Weights that multiply every token: blocks without norms and biases, top-k experts alone, and the head."""
        h, a, k = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        attention = self.attention_parameters()
        if not self.kv_lora_rank:
            attention = h * (a + 2 * k) * self.head_dim + a * self.head_dim * h
        matrices = 3 if self.gated_mlp else 2
        total = self.vocab_size * h
        for index in range(self.num_hidden_layers):
            kind = self.block_kind(index)
            width = 0 if kind in ("mamba", "attention") else self.intermediate_size
            if kind in ("moe", "experts"):
                width = self.moe_intermediate_size * (self.num_experts_per_tok + self.num_shared_experts)
                total += h * self.num_experts
            if kind == "mamba":
                total += h * (2 * self.mamba_width + self.conv_width + self.mamba_num_heads)
            total += attention * self._attentions(kind) + matrices * h * width
        return total

    def _attentions(self, kind: BlockKind) -> int:
        """Attentions of a block."""
        return {"mamba": 0, "mlp": 0, "experts": 0, "cross": 2}.get(kind, 1)

    def flops_per_token(self, seq_len: int) -> float:
        """Model FLOPs of one token, forward and backward: the numerator of every MFU this project prints.

        Rule: 6 per weight that multiplies the token, plus attention 3·2·s·a·(d_qk + d_v), halved where causal.
        Reference: Megatron-LM `num_floating_point_operations`. torchtitan and PaLM (arXiv 2204.02311) do not halve
        causal attention: 58 instead of 51.5 GFLOP per token for Llama-3.1-8B at 8,192.
        Ignored: norms, activations, softmax, embedding look-up (< 1 %); recomputation, by definition.
        """
        return 6.0 * self.active_matmul_parameters() + 3.0 * self._attention_flops_per_token(seq_len)

    def frozen_flops_per_token(self) -> float:
        """The part of `flops_per_token` that weights without gradients do not need."""
        return 2.0 * self.active_matmul_parameters()

    def recomputed_flops_per_token(self, seq_len: int, recompute: str) -> float:
        """FLOPs that recomputation adds per token: the blocks' forward if full, their attention cores if selective."""
        attention = self._attention_flops_per_token(seq_len)
        blocks = 2.0 * (self.active_matmul_parameters() - self.vocab_size * self.hidden_size)
        return {"none": 0.0, "selective": attention, "full": blocks + attention}[recompute]

    def _attention_flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs of all attention cores and scans for one token."""
        scores = 2.0 * seq_len * self.num_attention_heads * (self.qk_head_dim + self.value_head_dim)
        total = 0.0
        for index in range(self.num_hidden_layers):
            kind = self.block_kind(index)
            seen = seen_keys(seq_len, self.block_is_causal(index), self.block_window(index))
            total += scores * (seen / seq_len) * (self._attentions(kind) > 0)
            total += scores * (kind == "cross")
            if kind == "mamba":
                # The scan stands in for attention: 7 per channel and state, as Megatron-LM counts it.
                total += 7.0 * self.mamba_width * self.ssm_state_size
        return total
