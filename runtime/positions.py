"""How attention knows where tokens stand: rotary frequencies, alibi, windows, T5's buckets.

Biases are added to attention scores, 0 where nothing changes and -inf where a query must not see a key. Shapes in
comments: T sequence, a heads (of this rank), d head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from simulator.model import ModelSpec, RopeScaling


def inverse_frequencies(spec: ModelSpec, device: torch.device) -> Tensor:
    """Radians per position of each rotated pair, float32: theta^(-2i/r) for the r dims of a head that are rotated."""
    rotated = int(spec.head_dim * spec.partial_rotary_factor)
    pairs = torch.arange(0, rotated, 2, device=device, dtype=torch.float32)
    frequencies = 1.0 / spec.rope_theta ** (pairs / rotated)
    return frequencies if spec.rope_scaling is None else _scaled(frequencies, spec.rope_scaling)


def _scaled(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies of a longer context.

    Rule of llama3: wavelengths above context / low_freq_factor grow by `factor`, those below context /
    high_freq_factor stay, and between them the frequency is interpolated over context / wavelength.
    Reference: Llama 3.1 (arXiv 2407.21783, section 3.4.2) as transformers computes it (modeling_rope_utils.py).
    """
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    assert scaling.rope_type == "llama3", scaling.rope_type
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


def alibi_slopes(heads: int) -> Tensor:
    """What each head takes off a score per token of distance (arXiv 2108.12409): 2^(-8i/n) for i = 1 ... n = heads if
    that is a power of two; else those of the next lower one, then every other one of twice as many."""
    lower = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / lower) for i in range(1, lower + 1)]
    slopes += [2.0 ** (-4.0 * i / lower) for i in range(1, 2 * (heads - lower), 2)]
    return torch.tensor(slopes)


def heads_of(query_weight: Tensor, heads: int) -> slice:
    """The heads that this rank computes, of `heads` in all: a contiguous share of them under tensor parallelism."""
    names = query_weight.device_mesh.mesh_dim_names if isinstance(query_weight, DTensor) else None
    if not names or "tp" not in names:
        return slice(0, heads)
    mesh = query_weight.device_mesh
    share = heads // mesh.size(names.index("tp"))
    first = mesh.get_local_rank("tp") * share
    return slice(first, first + share)


def causal_bias(spec: ModelSpec, seq_len: int, window: int, heads: slice, device: torch.device) -> Tensor | None:
    """What a causal attention adds to its scores: (a, T, T) for alibi, (1, T, T) for a window of `window` keys, None
    where the causal mask is all."""
    if spec.position != "alibi" and not 0 < window < seq_len:
        return None
    place = torch.arange(seq_len, device=device)
    distance = (place[:, None] - place[None, :]).float()
    hidden = distance < 0
    if window:
        hidden |= distance >= window
    slopes = torch.zeros(1) if spec.position != "alibi" else alibi_slopes(spec.num_attention_heads)[heads]
    bias = -slopes.to(device)[:, None, None] * distance
    return bias.masked_fill_(hidden, -math.inf)


def relative_buckets(seq_len: int, causal: bool, buckets: int, longest: int, device: torch.device) -> Tensor:
    """T5's bucket of every (query, key), int64 (T, T): one for each short distance, then logarithmically wider ones up
    to `longest`. Without a causal mask half of the buckets are for keys behind the query (arXiv 1910.10683, 2.1)."""
    place = torch.arange(seq_len, device=device)
    ahead = place[None, :] - place[:, None]
    found = torch.zeros_like(ahead)
    if causal:
        distance = (-ahead).clamp(min=0)
    else:
        buckets //= 2
        found += (ahead > 0) * buckets
        distance = ahead.abs()
    exact = buckets // 2
    far = torch.log(distance.clamp(min=1).float() / exact) / math.log(longest / exact) * (buckets - exact)
    return found + torch.where(distance < exact, distance, (exact + far.long()).clamp(max=buckets - 1))
