"""Encoders with decoders, T5 (arXiv 1910.10683) and BART (arXiv 1910.13461), in one piece: no pipeline cuts them.

`layers` counts encoder and decoder together, as ModelSpec does: blocks are sharded and recomputed as a decoder's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from runtime.model import Attention, FeedForward, Transformer, build_norm, norms_behind
from runtime.model import Block as EncoderBlock
from runtime.positions import relative_buckets
from simulator.model import ModelSpec

# Rows of BART's position tables in front of that of the first position; fairseq kept them for padding.
POSITION_OFFSET = 2


class CrossAttention(Attention):
    """Attention of the decoder's stream x to the encoder's output `memory`, without positions and without a mask."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__(spec, causal=False)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]  # other inputs than the others
        return self.attend(x, memory, None, None)


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention and feed-forward on the residual stream, x (B, T, h)."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norms_behind = norms_behind(spec)
        self.attention_norm = build_norm(spec, spec.hidden_size)
        self.attention = Attention(spec)
        self.cross_attention_norm = build_norm(spec, spec.hidden_size)
        self.cross_attention = CrossAttention(spec)
        self.ffn_norm = build_norm(spec, spec.hidden_size)
        self.feed_forward, self.moe = FeedForward(spec, spec.intermediate_size), None

    def forward(self, x: Tensor, memory: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.norms_behind:
            x = self.attention_norm(x + self.attention(x, None, bias=bias))
            x = self.cross_attention_norm(x + self.cross_attention(x, memory))
            return self.ffn_norm(x + self.feed_forward(x))
        x = x + self.attention(self.attention_norm(x), None, bias=bias)
        x = x + self.cross_attention(self.cross_attention_norm(x), memory)
        return x + self.feed_forward(self.ffn_norm(x))


class EncoderDecoder(Transformer):
    """Takes the token ids of encoder and decoder, both (B, T), and returns logits (B, T, V).

    One token embedding serves encoder and decoder. BART adds learned positions (whose first two rows no token uses) and
    a norm to each. T5 has a final norm behind each, and a table of biases by distance that all blocks of a side share;
    its tied head is scaled by h^-1/2.
    """

    def __init__(self, spec: ModelSpec, seq_len: int) -> None:
        super().__init__(spec, seq_len)
        h, t5 = spec.hidden_size, spec.family == "t5"
        blocks = [
            EncoderBlock(spec, i) if i < spec.num_encoder_layers else DecoderBlock(spec)
            for i in range(spec.num_hidden_layers)
        ]
        self.tok_embeddings = nn.Embedding(spec.vocab_size, h)
        self.layers = nn.ModuleDict({str(index): block for index, block in enumerate(blocks)})
        rows = spec.max_position_embeddings + POSITION_OFFSET
        self.encoder_positions, self.decoder_positions = (None if t5 else nn.Embedding(rows, h) for _ in range(2))
        self.encoder_embedding_norm, self.decoder_embedding_norm = (
            None if t5 else build_norm(spec, h) for _ in range(2)
        )
        buckets, heads = spec.relative_attention_num_buckets, spec.num_attention_heads
        self.encoder_bias, self.decoder_bias = (nn.Embedding(buckets, heads) if t5 else None for _ in range(2))
        self.encoder_norm, self.norm = (build_norm(spec, h) if t5 else None for _ in range(2))
        self.output = nn.Linear(h, spec.vocab_size, bias=False)
        self.tie_weights()

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        blocks, encoders = list(self.layers.values()), self.spec.num_encoder_layers
        memory = self._embed(source, self.encoder_positions, self.encoder_embedding_norm)
        bias = self._bias(self.encoder_bias, causal=False)
        for block in blocks[:encoders]:
            memory = block(memory, None, bias)
        if self.encoder_norm is not None:
            memory = self.encoder_norm(memory)
        x = self._embed(target, self.decoder_positions, self.decoder_embedding_norm)
        bias = self._bias(self.decoder_bias, causal=True)
        for block in blocks[encoders:]:
            x = block(x, memory, bias)
        if self.norm is not None:
            x = self.norm(x)
        assert self.output is not None
        scaled = self.spec.family == "t5" and self.spec.tie_word_embeddings
        return self.output(x * self.spec.hidden_size**-0.5 if scaled else x)

    def _embed(self, tokens: Tensor, positions: nn.Module | None, norm: nn.Module | None) -> Tensor:
        assert self.tok_embeddings is not None
        x = self.tok_embeddings(tokens)
        if self.spec.embedding_scale != 1.0:
            x = x * self.spec.embedding_scale
        if positions is not None:
            x = x + positions(torch.arange(tokens.shape[1], device=tokens.device) + POSITION_OFFSET)
        return x if norm is None else norm(x)

    def _bias(self, table: nn.Module | None, causal: bool) -> Tensor | None:
        """T5's biases (a, T, T), by distance; -inf for what a causal query must not see. They are learned, so they
        are made again for every microbatch."""
        if table is None:
            return None
        spec, device = self.spec, next(table.parameters()).device
        buckets, longest = spec.relative_attention_num_buckets, spec.relative_attention_max_distance
        bias = table(relative_buckets(self.seq_len, causal, buckets, longest, device)).permute(2, 0, 1)
        if causal:
            hidden = torch.ones(self.seq_len, self.seq_len, dtype=torch.bool, device=device).triu(1)
            bias = bias.masked_fill(hidden, -torch.inf)
        return bias
