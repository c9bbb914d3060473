"""The kernels of one block, of the embedding and of the head: what one rank runs for one microbatch.

Every kernel says its sizes (from which compute.py gets seconds) and what it keeps for the backward pass (from which
memory.py gets bytes). Lists follow the modules in order: norm, projections, attention, output, norm, feed-forward.

Notation: T tokens of the microbatch on this rank, s sequence, t tensor-parallel ranks, c context-parallel ranks,
h hidden, a heads, k key-value heads, d head length, f feed-forward width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from simulator.model import BlockKind, ModelSpec, seen_keys
from simulator.stack import Stack


class Matmul(NamedTuple):
    """(m, k) x (k, n), `copies` times. The backward is two of them: (m, n) x (n, k) and (k, m) x (m, n).

    Recipes in 8 and 4 bits leave some matmuls in 16: those are not `quantised`. Copies are experts, or `batched` in
    one kernel.
    """

    name: str
    m: float
    n: float
    k: float
    saved: float = 0.0
    copies: float = 1.0
    quantised: bool = True
    batched: bool = False


class Attention(NamedTuple):
    """Softmax(QK')V of `batch` sequences and `heads` heads; saved are Q, K, V, the output and one fp32 per row.

    With context parallelism `steps` blocks of `keys` keys pass by, of which a causal rank works on half. A query
    sees the last `window` keys, all if 0. A learned_bias on the scores has a gradient, for which torch has no fused
    kernel: its plain one keeps probabilities and copies of Q, K and V in fp32 (_scaled_dot_product_attention_math).
    """

    name: str
    batch: float
    heads: float
    key_value_heads: float
    queries: float
    keys: float
    qk_dim: int
    v_dim: int
    causal: bool
    steps: int = 1
    window: int = 0
    learned_bias: bool = False

    @property
    def scores(self) -> float:
        """Elements of the score matrices, masked ones left out."""
        seen = seen_keys(self.keys * self.steps, self.causal, self.window)
        return self.batch * self.heads * self.queries * seen

    @property
    def flops(self) -> float:
        """Forward: QK' and PV, 2 per multiply-add. The backward has 2.5 times as many (arXiv 2307.08691)."""
        return 2.0 * self.scores * (self.qk_dim + self.v_dim)


class Pointwise(NamedTuple):
    """A memory-bound operation over `elements`; `name` is the key of the stack's elementwise table. A loss says whether
    tp cuts its vocabulary."""

    name: str
    elements: float
    cut: bool = False


Kernel = Matmul | Attention | Pointwise


@dataclass(frozen=True)
class Cut:
    """How the kernels of a microbatch are cut: sizes of one rank's share follow from it.

    expert_tp are the ranks that split each routed expert: tp, or 1 where every expert is whole. expert_load is the
    tokens that reach the experts of this rank over the mean of all ranks.
    """

    micro_batch_size: int
    seq_len: int
    tp: int
    sequence_parallel: bool
    cp: int = 1
    ep: int = 1
    expert_tp: int = 0
    expert_load: float = 1.0

    @property
    def tokens(self) -> int:
        """Tokens of a microbatch on this rank; context parallelism gives each rank its part of the sequence."""
        return self.micro_batch_size * self.seq_len // self.cp

    @property
    def norm_tokens(self) -> float:
        """Tokens that norms, residuals and dropout see: sequence parallelism gives each rank its part."""
        return self.tokens / (self.tp if self.sequence_parallel else 1)


def block_kernels(
    model: ModelSpec, kind: BlockKind, causal: bool, cut: Cut, stack: Stack, window: int = 0
) -> list[Kernel]:
    """The kernels of one block on one rank, forward order. A query sees the last `window` keys, all if 0."""
    if model.block_norms(kind) == 1:
        return [*_norm(cut, model), *_mixer(model, kind, cut, stack, window), *_residual(cut, model, stack)]
    kernels = [
        *_norm(cut, model),
        *_self_attention(model, causal, cut, stack, window),
        *_residual(cut, model, stack),
    ]
    if kind == "cross":
        cross = _self_attention(model, False, cut, stack, by_distance=False)
        kernels += [*_norm(cut, model), *cross, *_residual(cut, model, stack)]
    kernels += _norm(cut, model)
    kernels += _mixture(model, cut, stack) if kind == "moe" else _feed_forward(model, cut, stack)
    return kernels + _residual(cut, model, stack)


def _mixer(model: ModelSpec, kind: BlockKind, cut: Cut, stack: Stack, window: int) -> list[Kernel]:
    """What a block of a hybrid does: one thing."""
    if kind == "mamba":
        return _mamba(model, cut, stack)
    if kind == "attention":
        return _self_attention(model, True, cut, stack, window)
    return _mixture(model, cut, stack) if kind == "experts" else _feed_forward(model, cut, stack)


def _mamba(model: ModelSpec, cut: Cut, stack: Stack) -> list[Kernel]:
    """A Mamba-2 mixer: projection, convolution, the scan in chunks of Q tokens, gated norm, projection.

    The scan (arXiv 2405.21060, section 6) is matmuls inside a chunk - scores of B and C per group, their product with
    the inputs, the state that a chunk leaves and what it gets out of the one before, per head - and passes over
    the inputs and the states, the stack's "ssd".
    Ignored: the part of the work inside a chunk that the mask leaves out, which kernels do all the same.
    """
    tokens, h, q = cut.tokens, model.hidden_size, min(model.chunk_size, cut.seq_len)
    width, heads = model.mamba_width / cut.tp, model.mamba_num_heads / cut.tp
    n, p, chunks = model.ssm_state_size, model.mamba_head_dim, tokens / q
    into = (model.mamba_width + model.conv_width + model.mamba_num_heads) / cut.tp
    return [
        Matmul("mamba_in", tokens, into, h, attention_input(cut, stack) * h),
        Pointwise("conv", tokens * model.conv_width / cut.tp),
        Matmul("ssd_scores", q, q, n, copies=chunks * model.mamba_n_groups / cut.tp, quantised=False, batched=True),
        Matmul("ssd_inside", q, p, q, copies=chunks * heads, quantised=False, batched=True),
        Matmul("ssd_state", n, p, q, copies=chunks * heads, quantised=False, batched=True),
        Matmul("ssd_between", q, p, n, copies=chunks * heads, quantised=False, batched=True),
        Pointwise("ssd", tokens * width),
        Pointwise("gated_activation", tokens * width),
        Matmul("mamba_out", tokens, h, width, tokens * width),
    ]


def attention_input(cut: Cut, stack: Stack) -> float:
    """Tokens of a column-parallel input that are kept: Megatron its shard, to gather it again; DTensor the whole."""
    return cut.norm_tokens if stack.regathers_inputs else float(cut.tokens)


def _norm(cut: Cut, model: ModelSpec) -> list[Kernel]:
    return [Pointwise(model.norm, cut.norm_tokens * model.hidden_size)]


def _residual(cut: Cut, model: ModelSpec, stack: Stack) -> list[Kernel]:
    elements = cut.norm_tokens * model.hidden_size
    dropout = [Pointwise("dropout", elements)] if stack.dropout and model.family != "llama" else []
    return [*dropout, Pointwise("add", elements)]


def _self_attention(
    model: ModelSpec, causal: bool, cut: Cut, stack: Stack, window: int = 0, by_distance: bool = True
) -> list[Kernel]:
    """Projections and core; `by_distance` where the model's biases by distance, if it learns such, are added."""
    tokens, h = cut.tokens, model.hidden_size
    heads, groups = model.num_attention_heads / cut.tp, max(1.0, model.num_key_value_heads / cut.tp)
    kept = attention_input(cut, stack) * h
    if model.kv_lora_rank:
        projections = _latent_projections(model, cut, kept)
    elif stack.fused_projections:
        projections = [Matmul("qkv", tokens, (heads + 2 * groups) * model.head_dim, h, kept)]
    else:
        projections = [
            Matmul("q", tokens, heads * model.head_dim, h, kept),
            Matmul("k", tokens, groups * model.head_dim, h),
            Matmul("v", tokens, groups * model.head_dim, h),
        ]
    # In the backward the gradients of q, k and v (of gate and up) meet at their common input.
    if not stack.fused_projections and not model.kv_lora_rank:
        projections += [Pointwise("gradient_add", tokens * h)] * 2
    rotary: list[Kernel] = []
    if model.qk_norm:
        rotary.append(Pointwise(model.norm, tokens * (heads + groups) * model.head_dim))
    if model.position == "rope":
        rotated = model.qk_rope_head_dim or model.head_dim
        rotary.append(Pointwise("rope", tokens * (heads + groups) * rotated))
    core = _attention_core(model, causal, window, heads, groups, cut, stack)
    if by_distance and model.position == "relative" and not stack.fuses_learned_bias:
        core = [part._replace(learned_bias=True) if isinstance(part, Attention) else part for part in core]
    return [*projections, *rotary, *core, Matmul("attention_out", tokens, h, heads * model.value_head_dim)]


def _attention_core(
    model: ModelSpec, causal: bool, window: int, heads: float, groups: float, cut: Cut, stack: Stack
) -> list[Kernel]:
    """The core on one of c context-parallel ranks: with "ulysses" all of the sequence for a part of the heads, else
    the rank's own queries against c blocks of keys, whose c partial outputs are added up."""
    dims, batch = (model.qk_head_dim, model.value_head_dim), cut.micro_batch_size
    if stack.context_parallel == "ulysses":
        heads, groups = heads / cut.cp, max(1.0, groups / cut.cp) if cut.cp > 1 else groups
        return [Attention("attention", batch, heads, groups, cut.seq_len, cut.seq_len, *dims, causal, 1, window)]
    length = cut.seq_len // cut.cp
    core: list[Kernel] = [Attention("attention", batch, heads, groups, length, length, *dims, causal, cut.cp, window)]
    if cut.cp > 1:
        core.append(Pointwise("add", (cut.cp - 1) * cut.tokens * heads * model.value_head_dim))
    return core


def _latent_projections(model: ModelSpec, cut: Cut, kept: float) -> list[Kernel]:
    """Multi-head latent attention (arXiv 2405.04434): down-projections are replicated over tp, up-projections cut."""
    tokens, h, heads = cut.tokens, model.hidden_size, model.num_attention_heads / cut.tp
    rank, rope = model.kv_lora_rank, model.qk_rope_head_dim
    if model.q_lora_rank:
        query: list[Kernel] = [
            Matmul("q_a", tokens, model.q_lora_rank, h, kept),
            Pointwise("rmsnorm", tokens * model.q_lora_rank),
            Matmul("q_b", tokens, heads * model.qk_head_dim, model.q_lora_rank, tokens * model.q_lora_rank),
        ]
    else:
        query = [Matmul("q", tokens, heads * model.qk_head_dim, h, kept)]
    return [
        *query,
        Matmul("kv_a", tokens, rank + rope, h),
        Pointwise("rmsnorm", tokens * rank),
        Matmul("kv_b", tokens, heads * (model.qk_nope_head_dim + model.v_head_dim), rank, tokens * rank),
    ]


def _feed_forward(model: ModelSpec, cut: Cut, stack: Stack) -> list[Kernel]:
    width = model.intermediate_size / cut.tp
    kept = attention_input(cut, stack)
    return _gated(model, cut.tokens, width, kept, stack, again=kept if stack.copies_gate_input and cut.tp > 1 else 0.0)


def _gated(
    model: ModelSpec,
    tokens: float,
    width: float,
    kept_tokens: float,
    stack: Stack,
    count: float = 1.0,
    again: float = 0.0,
) -> list[Kernel]:
    """Up, activation, down; `count` experts of `tokens` each. Gate and up are one matmul where the stack fuses them;
    elsewhere up keeps `again` tokens of its own."""
    h = model.hidden_size
    kept = kept_tokens * h
    # ReLU keeps its output, which is the input of the matmul behind it.
    kept_twice = model.activation == "relu" and not model.gated_mlp
    down = Matmul("down", tokens, h, width, 0.0 if kept_twice else count * tokens * width, count)
    if not model.gated_mlp:
        return [Matmul("up", tokens, width, h, kept, count), Pointwise("activation", count * tokens * width), down]
    ups: list[Kernel] = [Matmul("gate_up", tokens, 2 * width, h, kept, count)]
    if not stack.fused_projections:
        ups = [Matmul("gate", tokens, width, h, kept, count), Matmul("up", tokens, width, h, again * h, count)]
        ups.append(Pointwise("gradient_add", count * tokens * h))
    return [*ups, Pointwise("gated_activation", count * tokens * width), down]


def _mixture(model: ModelSpec, cut: Cut, stack: Stack) -> list[Kernel]:
    """Routed experts, shared experts beside them. Every expert gets T·topk/E tokens, times the cut's expert_load.

    A rank holds E / ep experts and gets ep times the tokens for each. Tokens are put into the order of the ranks
    they go to, and where they arrive into the order of the experts; results go the same way back.
    Ignored: that the experts of a rank differ.
    """
    h, expert_tp = model.hidden_size, cut.expert_tp or cut.tp
    # Experts that are not split work on a part of the tokens instead.
    routed = cut.tokens * model.num_experts_per_tok * expert_tp / cut.tp
    gated_tokens = cut.norm_tokens if cut.ep > 1 else cut.tokens
    experts = model.num_experts / cut.ep
    load = cut.expert_load if cut.ep > 1 else 1.0
    per_expert, width = load * routed * cut.ep / model.num_experts, model.moe_intermediate_size / expert_tp
    order: list[Kernel] = [Pointwise("permute", routed * h)]
    if cut.ep > 1 and experts > 1:
        order.append(Pointwise("permute", load * routed * h))
    kernels: list[Kernel] = [
        Matmul("router", gated_tokens, model.num_experts, h, attention_input(cut, stack) * h, quantised=False),
        *order,
        *_gated(model, per_expert, width, load * routed, stack, count=experts),
        *order,
    ]
    if model.num_shared_experts:
        shared = model.moe_intermediate_size / cut.tp * model.num_shared_experts
        kernels += _gated(model, cut.tokens, shared, 0.0, stack)
    return kernels


def embedding_kernels(model: ModelSpec, cut: Cut, stack: Stack) -> list[Kernel]:
    """Look-up of the token vectors, with the norm or dropout that some families put behind it."""
    elements = cut.norm_tokens * model.hidden_size
    extra = [Pointwise("dropout", elements)] if stack.dropout and model.family != "llama" else []
    return [Pointwise("embedding", cut.tokens * model.hidden_size), *extra]


def head_kernels(model: ModelSpec, cut: Cut, stack: Stack) -> list[Kernel]:
    """Final norm, projection on the vocabulary (cut over tp), loss."""
    vocabulary, kept = model.vocab_size / cut.tp, attention_input(cut, stack) * model.hidden_size
    return [
        *_norm(cut, model),
        Matmul("output", cut.tokens, vocabulary, model.hidden_size, kept, quantised=False),
        Pointwise("cross_entropy", cut.tokens * (model.vocab_size if stack.gathers_logits else vocabulary), cut.tp > 1),
    ]
