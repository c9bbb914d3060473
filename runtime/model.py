"""The reference transformer: a GPT- or Llama-like decoder from a ModelSpec, with or without experts, cut into stages.

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
from torch.distributed.tensor import DTensor

from runtime.context import own_positions
from runtime.experts import MixtureOfExperts
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
}


def _norm(spec: ModelSpec, size: int) -> nn.Module:
    kind = nn.RMSNorm if spec.norm == "rmsnorm" else nn.LayerNorm
    return kind(size, eps=spec.norm_eps)


def rope_table(spec: ModelSpec, seq_len: int, device: torch.device) -> Tensor:
    """Cosines and sines of rotary position embedding (arXiv 2104.09864), float32 of shape (2, T, d/2)."""
    pairs = torch.arange(0, spec.head_dim, 2, device=device, dtype=torch.float32)
    angles = torch.outer(
        torch.arange(seq_len, device=device, dtype=torch.float32), spec.rope_theta ** (-pairs / spec.head_dim)
    )
    return torch.stack((angles.cos(), angles.sin()))


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate the halves of every head, x (B, T, a, d), as Hugging Face's Llama does."""
    cos, sin = rope.to(x.dtype).unsqueeze(-2)
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention with grouped queries. Under tensor parallelism a rank computes its share of the heads."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        h, d = spec.hidden_size, spec.head_dim
        self.head_dim = d
        self.grouped = spec.num_key_value_heads != spec.num_attention_heads
        # What context parallelism puts in the place of the attention core.
        self.ring: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
        self.wq = nn.Linear(h, spec.num_attention_heads * d, bias=spec.qkv_bias)
        self.wk = nn.Linear(h, spec.num_key_value_heads * d, bias=spec.qkv_bias)
        self.wv = nn.Linear(h, spec.num_key_value_heads * d, bias=spec.qkv_bias)
        self.wo = nn.Linear(spec.num_attention_heads * d, h, bias=spec.attention_out_bias)
        self.q_norm = _norm(spec, d) if spec.qk_norm else None
        self.k_norm = _norm(spec, d) if spec.qk_norm else None

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (w(x).view(batch, length, -1, self.head_dim) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = _rotate(q, rope), _rotate(k, rope)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        if self.ring is not None:
            out = self.ring(q, k, v)
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


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
    """Pre-norm attention and feed-forward (or experts) on the residual stream, x (B, T, h)."""

    def __init__(self, spec: ModelSpec, index: int) -> None:
        super().__init__()
        self.attention_norm = _norm(spec, spec.hidden_size)
        self.attention = Attention(spec)
        self.ffn_norm = _norm(spec, spec.hidden_size)
        mixed = spec.block_kind(index) == "moe"
        self.feed_forward = None if mixed else FeedForward(spec, spec.intermediate_size)
        self.moe = _mixture(spec) if mixed else None

    def forward(self, x: Tensor, rope: Tensor | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope)
        feed_forward = self.moe or self.feed_forward
        assert feed_forward is not None
        return x + feed_forward(self.ffn_norm(x))


def _mixture(spec: ModelSpec) -> MixtureOfExperts:
    width = spec.num_shared_experts * spec.moe_intermediate_size
    return MixtureOfExperts(spec, _ACTIVATIONS[spec.activation], FeedForward(spec, width) if width else None)


class Stage(nn.Module):
    """The blocks `layers` of a model; with the embedding if `first`, with final norm and head if `last`.

    The first stage takes token ids (B, T), the others the residual stream (B, T, h), which is also what a stage
    returns, except for the last one: logits (B, T, V). With sequence parallelism T is a rank's share of the sequence
    everywhere on the residual stream, with context parallelism T is a rank's share from the token ids on.
    """

    def __init__(self, spec: ModelSpec, seq_len: int, layers: Sequence[int], first: bool, last: bool) -> None:
        super().__init__()
        self.spec, self.seq_len = spec, seq_len
        self.tok_embeddings = nn.Embedding(spec.vocab_size, spec.hidden_size) if first else None
        learned = first and spec.position == "learned"
        self.pos_embeddings = nn.Embedding(spec.max_position_embeddings, spec.hidden_size) if learned else None
        self.layers = nn.ModuleDict({str(index): Block(spec, index) for index in layers})
        self.norm = _norm(spec, spec.hidden_size) if last else None
        self.output = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False) if last else None
        self.rope: Tensor | None = None
        self.context_ranks, self.context_place = 1, 0
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make head and embedding one parameter where the model has them tied. Needed again after anything that
        replaces parameters, because the two modules are then served one after the other."""
        if self.spec.tie_word_embeddings and self.tok_embeddings is not None and self.output is not None:
            self.output.weight = self.tok_embeddings.weight

    def positions(self, device: torch.device) -> Tensor:
        """Where this rank's tokens stand in their sequence."""
        return own_positions(self.seq_len, self.context_ranks, self.context_place).to(device)

    def forward(self, x: Tensor) -> Tensor:
        if self.tok_embeddings is not None:
            tokens, x = x, self.tok_embeddings(x)
            if self.pos_embeddings is not None:
                x = x + self.pos_embeddings(self.positions(tokens.device)[: tokens.shape[1]])
        for block in self.layers.values():
            x = block(x, self.rope)
        if self.norm is not None and self.output is not None:
            x = self.output(self.norm(x))
        return x


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


def init_weights(stage: Stage, seed: int, device: torch.device) -> None:
    """Give a stage on the meta device memory on `device`, and initial values that do not depend on the layout.

    Every parameter is drawn whole from a generator seeded by (seed, its name), and each rank keeps its part of it:
    no communication, and never more than one whole parameter in memory. Matrices are N(0, 0.02), norms 1, biases 0.
    """
    stage.to_empty(device=device)
    stage.tie_weights()
    if stage.spec.position == "rope":
        stage.rope = rope_table(stage.spec, stage.seq_len, device)[:, stage.positions(device)]
    with torch.no_grad():
        for name, parameter in named_weights(stage):
            part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            if parameter.ndim == 1 or name.endswith("bias"):
                part.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                part.copy_(local_part(_draw(parameter.shape, seed, name, device), parameter))


def _draw(shape: torch.Size, seed: int, name: str, device: torch.device) -> Tensor:
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))
    return torch.empty(shape, device=device).normal_(0.0, INIT_STD, generator=generator)


def local_part(full: Tensor, like: Tensor) -> Tensor:
    """The part of a full tensor that this rank holds of `like`, without communication.

    Mesh axes are undone from the innermost outwards: tensor parallelism cuts first, then FSDP cuts each piece, also
    where both cut the same dim.
    """
    if not isinstance(like, DTensor):
        return full
    coordinates = like.device_mesh.get_coordinate()
    assert coordinates is not None
    for axis in reversed(range(like.device_mesh.ndim)):
        placement = like.placements[axis]
        if not placement.is_replicate():
            pieces = full.chunk(like.device_mesh.size(axis), dim=placement.dim)
            # A dim shorter than the axis leaves the last ranks with nothing.
            index = coordinates[axis]
            full = pieces[index] if index < len(pieces) else full.narrow(placement.dim, 0, 0)
    return full
