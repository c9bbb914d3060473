"""The reference transformer: a decoder (GPT, Llama, GPT-NeoX and their relatives, with or without experts) or an
encoder (BERT) from a ModelSpec, cut into pipeline stages. Encoders with decoders are in encoder_decoder.py, of the same
blocks.

A `Stage` holds a range of blocks, and at the ends of the model the embedding and the head. One process holds one stage
with everything in it. Names are torchtitan's (`tok_embeddings`, `layers.3.attention.wq`, `norm`, `output`), and a block
keeps its index in the whole model, so that a parameter has the same name in every layout.

Modules are built on the meta device and get their values from `init_weights`, after they have been sharded.
Shapes in comments: B microbatch, T sequence, h hidden_size, a heads (of this rank), d head_dim.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.context import own_positions
from runtime.experts import MixtureOfExperts
from runtime.positions import causal_bias, heads_of, inverse_frequencies
from runtime.shards import local_ranges, local_tensor
from simulator.model import ModelSpec

# Standard deviation of the initial matrices, as in GPT-2 and Llama.
INIT_STD = 0.02

# Names that wrappers give to the module within.
_WRAPPERS = ("_checkpoint_wrapped_module", "_orig_mod", "module")

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


def build_norm(spec: ModelSpec, size: int) -> nn.Module:
    if spec.norm == "rmsnorm":
        return nn.RMSNorm(size, eps=spec.norm_eps)
    return nn.LayerNorm(size, eps=spec.norm_eps, bias=spec.norm_bias)


def norms_behind(spec: ModelSpec) -> bool:
    """Whether norms stand behind the residual sums, as in the first transformers, and not in front of each part."""
    return spec.family in ("bert", "bart")


def rope_table(spec: ModelSpec, seq_len: int, device: torch.device) -> Tensor:
    """Cosines and sines of rotary position embedding (arXiv 2104.09864), float32 of shape (2, T, r/2) for the r dims of
    a head that are rotated: all of them, but for GPT-NeoX."""
    places = torch.arange(seq_len, device=device, dtype=torch.float32)
    angles = torch.outer(places, inverse_frequencies(spec, device))
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the halves of every head's first dims, x (B, T, a, d), as Hugging Face's Llama does."""
    cos, sin = rope.to(x.dtype).unsqueeze(-2)
    rotated = 2 * rope.shape[-1]
    left, right = x[..., :rotated].chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin, x[..., rotated:]), dim=-1)


class Attention(nn.Module):
    """Self-attention with grouped queries. Under tensor parallelism a rank computes its share of the heads.

    `bias` is added to the scores of every sample, (a or 1, T, T), and holds the causal mask too. Without it the mask is
    the plain causal one, or none at all if not `causal`.
    """

    def __init__(self, spec: ModelSpec, causal: bool = True, window: int = 0) -> None:
        super().__init__()
        h, d = spec.hidden_size, spec.head_dim
        self.head_dim = d
        self.causal, self.window = causal, window
        # T5 has its scale in the initial weights.
        self.scale = 1.0 if spec.family == "t5" else None
        self.grouped = spec.num_key_value_heads != spec.num_attention_heads
        # What context parallelism puts in the place of the attention core.
        self.ring: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.wq = nn.Linear(h, spec.num_attention_heads * d, bias=spec.qkv_bias)
        self.wk = nn.Linear(h, spec.num_key_value_heads * d, bias=spec.qkv_bias)
        self.wv = nn.Linear(h, spec.num_key_value_heads * d, bias=spec.qkv_bias)
        self.wo = nn.Linear(spec.num_attention_heads * d, h, bias=spec.attention_out_bias)
        self.q_norm = build_norm(spec, d) if spec.qk_norm else None
        self.k_norm = build_norm(spec, d) if spec.qk_norm else None
        self.bias: Tensor | None = None

    def forward(self, x: Tensor, rope: Tensor | None, bias: Tensor | None = None) -> Tensor:
        return self.attend(x, x, rope, self.bias if bias is None else bias)

    def attend(self, x: Tensor, memory: Tensor, rope: Tensor | None, bias: Tensor | None) -> Tensor:
        """Queries of x (B, T, h) look at the keys of `memory`, which is x itself in self-attention."""
        q, k, v = (
            weight(source).unflatten(-1, (-1, self.head_dim))
            for weight, source in ((self.wq, x), (self.wk, memory), (self.wv, memory))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = _rotate(q, rope), _rotate(k, rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.ring is not None:
            return self.wo(self.ring(q, k, v).transpose(1, 2).flatten(2))
        mask = None if bias is None else bias.to(q.dtype)
        causal = self.causal and mask is None
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=self.grouped
        )
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """w2(act(w1 x) · w3 x) if gated, else w2(act(w1 x))."""

    def __init__(self, spec: ModelSpec, width: int) -> None:
        super().__init__()
        h, f = spec.hidden_size, width
        self.activation = _ACTIVATIONS[spec.activation]
        self.w1 = nn.Linear(h, f, bias=spec.mlp_bias)
        self.w2 = nn.Linear(f, h, bias=spec.mlp_bias)
        self.w3 = nn.Linear(h, f, bias=spec.mlp_bias) if spec.gated_mlp else None

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation(self.w1(x))
        if self.w3 is not None:
            inner = inner * self.w3(x)
        return self.w2(inner)


class Block(nn.Module):
    """Attention and feed-forward (or experts) on the residual stream, x (B, T, h), each with a norm in front of it (or
    behind the sum); with `parallel_residual` both read the same x."""

    def __init__(self, spec: ModelSpec, index: int = 0) -> None:
        super().__init__()
        self.norms_behind, self.parallel = norms_behind(spec), spec.parallel_residual
        self.attention_norm = build_norm(spec, spec.hidden_size)
        self.attention = Attention(spec, spec.block_is_causal(index), spec.block_window(index))
        self.ffn_norm = build_norm(spec, spec.hidden_size)
        mixed = spec.block_kind(index) == "moe"
        self.feed_forward = None if mixed else FeedForward(spec, spec.intermediate_size)
        self.moe = _mixture(spec) if mixed else None

    def forward(self, x: Tensor, rope: Tensor | None, bias: Tensor | None = None) -> Tensor:
        feed_forward = self.moe or self.feed_forward
        assert feed_forward is not None
        if self.norms_behind:
            x = self.attention_norm(x + self.attention(x, rope, bias=bias))
            return self.ffn_norm(x + feed_forward(x))
        attended = x + self.attention(self.attention_norm(x), rope, bias=bias)
        return attended + feed_forward(self.ffn_norm(x if self.parallel else attended))


def _mixture(spec: ModelSpec) -> MixtureOfExperts:
    width = spec.num_shared_experts * spec.moe_intermediate_size
    return MixtureOfExperts(spec, _ACTIVATIONS[spec.activation], FeedForward(spec, width) if width else None)


class Transformer(nn.Module):
    """What a stage of a model and a model in one piece have in common: blocks in `layers`, perhaps an embedding and a
    head, and what blocks know of positions."""

    tok_embeddings: nn.Embedding | None
    output: nn.Linear | None
    layers: nn.ModuleDict

    def __init__(self, spec: ModelSpec, seq_len: int) -> None:
        super().__init__()
        self.spec, self.seq_len = spec, seq_len
        self.rope: Tensor | None = None
        self.context_ranks, self.context_place = 1, 0

    def tie_weights(self) -> None:
        """Make head and embedding one parameter where the model has them tied. Needed again after anything that
        replaces parameters, because the two modules are then served one after the other."""
        if self.spec.tie_word_embeddings and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    def positions(self, device: torch.device) -> Tensor:
        """Where this rank's tokens stand in their sequence."""
        return own_positions(self.seq_len, self.context_ranks, self.context_place).to(device)

    def place(self, device: torch.device) -> None:
        """Make what blocks need to know of positions, on `device`. Blocks share one tensor of each kind."""
        spec = self.spec
        if spec.position == "rope":
            self.rope = rope_table(spec, self.seq_len, device)[:, self.positions(device)]
        made: dict[int, Tensor | None] = {}
        for attention in (m for m in self.modules() if isinstance(m, Attention) and m.causal):
            if attention.window not in made:
                heads = heads_of(attention.wq.weight, spec.num_attention_heads)
                made[attention.window] = causal_bias(spec, self.seq_len, attention.window, heads, device)
            attention.bias = made[attention.window]


class Stage(Transformer):
    """The blocks `layers` of a model; with the embedding if `first`, with final norm and head if `last`.

    The first stage takes token ids (B, T), the others the residual stream (B, T, h), which is also what a stage
    returns, except for the last one: logits (B, T, V). With sequence parallelism T is a rank's share of the sequence
    everywhere on the residual stream, with context parallelism T is a rank's share from the token ids on.

    BERT's head for masked tokens transforms the stream before its norm; its pooler and its head for the next sentence
    are not built, because nothing is trained on pairs of sentences, and every token is of the first segment.
    """

    def __init__(self, spec: ModelSpec, seq_len: int, layers: Sequence[int], first: bool, last: bool) -> None:
        super().__init__(spec, seq_len)
        h, bert = spec.hidden_size, spec.family == "bert"
        self.tok_embeddings = nn.Embedding(spec.vocab_size, h) if first else None
        learned = first and spec.position == "learned"
        self.pos_embeddings = nn.Embedding(spec.max_position_embeddings, h) if learned else None
        self.type_embeddings = nn.Embedding(spec.type_vocab_size, h) if first and bert else None
        self.embedding_norm = build_norm(spec, h) if first and (bert or spec.embedding_norm) else None
        self.layers = nn.ModuleDict({str(index): Block(spec, index) for index in layers})
        self.transform = nn.Linear(h, h) if last and bert else None
        self.norm = build_norm(spec, h) if last else None
        self.output = nn.Linear(h, spec.vocab_size, bias=bert) if last else None
        self.tie_weights()

    def forward(self, x: Tensor) -> Tensor:
        if self.tok_embeddings is not None:
            x = self._embed(x)
        # Cast once: blocks would each keep their own copy for the backward.
        rope = None if self.rope is None else self.rope.to(x.dtype)
        for block in self.layers.values():
            x = block(x, rope)
        if self.transform is not None:
            x = _ACTIVATIONS[self.spec.activation](self.transform(x))
        if self.norm is not None and self.output is not None:
            x = self.output(self.norm(x))
        return x

    def _embed(self, tokens: Tensor) -> Tensor:
        assert self.tok_embeddings is not None
        x = self.tok_embeddings(tokens)
        places = self.positions(tokens.device)[: tokens.shape[1]]
        if self.pos_embeddings is not None:
            x = x + self.pos_embeddings(places)
        if self.type_embeddings is not None:
            x = x + self.type_embeddings(torch.zeros_like(places))
        return x if self.embedding_norm is None else self.embedding_norm(x)


def named_weights(stage: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A stage's parameters with the names that they have in the whole model; a shared one comes once."""
    for name, parameter in stage.named_parameters():
        yield canonical_name(name), parameter


def canonical_name(name: str) -> str:
    """A parameter's name without what `checkpoint_wrapper`, `torch.compile` and DDP put into it.

    >>> canonical_name("module.layers.3._checkpoint_wrapped_module.attention.wq.weight")
    'layers.3.attention.wq.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def init_weights(stage: Transformer, seed: int, device: torch.device) -> None:
    """Give a stage on the meta device memory on `device`, and initial values that do not depend on the layout.

    Every parameter is drawn whole from a generator seeded by (seed, its name), and each rank keeps its part of it:
    no communication, and never more than one whole parameter in memory. Matrices are N(0, 0.02), norms 1, biases 0.
    """
    stage.to_empty(device=device)
    stage.tie_weights()
    stage.place(device)
    with torch.no_grad():
        for name, parameter in named_weights(stage):
            part = local_tensor(parameter)
            if parameter.ndim == 1 or name.endswith("bias"):
                part.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                rows = tuple(slice(first, last) for first, last in local_ranges(parameter))
                part.copy_(_draw(parameter.shape, seed, name, device)[rows])


def _draw(shape: torch.Size, seed: int, name: str, device: torch.device) -> Tensor:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))
    return torch.empty(shape, device=device).normal_(0.0, INIT_STD, generator=generator)
