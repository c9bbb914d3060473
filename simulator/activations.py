"""Bytes of activations: what kernels keep for the backward, what is left for a weight gradient, what comes and goes
within a backward.

Formulas count tensors as the stack's software makes them; constants come from its elementwise table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from simulator.compute import UNFUSED, activation_width
from simulator.kernels import Attention, Kernel, Matmul, Pointwise
from simulator.stack import Stack

NORMS = ("layernorm", "rmsnorm")


# Matmuls that LoRA puts adapters beside: those of attention (arXiv 2106.09685, section 4.2).
_ADAPTED = ("qkv", "q", "k", "v", "q_a", "q_b", "kv_a", "kv_b", "attention_out")


def saved_bytes(kernels: Iterable[Kernel], stack: Stack, precision: str, frozen: bool = False) -> float:
    """Bytes that kernels keep for the backward pass.

    Frozen weights have no gradient, so matmuls keep no input but where an adapter sits beside them, which needs it in
    16 bits.

    Rule: inputs of matmuls (each tensor counted once), what the stack's elementwise table keeps, Q, K, V, output and
    fp32 row sums of fused attention; the probabilities (and dropout's mask and copy) of an unfused one. Logits are
    counted apart (kept_logits).
    Reference: Korthikanti et al., arXiv 2205.05198, table 2: 34·sbh + 5·a·s²·b for a GPT block with dropout.
    """
    width, inputs = activation_width(precision), stack.recipes[precision].matmul_inputs
    total = 0.0
    for kernel in kernels:
        if isinstance(kernel, Matmul) and frozen:
            total += kernel.saved * width if kernel.name in _ADAPTED else 0.0
        elif isinstance(kernel, Matmul):
            total += kernel.saved * (width if inputs is None or not kernel.quantised else inputs)
        elif isinstance(kernel, Attention):
            heads, groups = kernel.batch * kernel.heads, kernel.batch * kernel.key_value_heads
            rows = heads * kernel.queries
            if kernel.learned_bias:
                total += 4 * (
                    rows * (kernel.keys + kernel.qk_dim) + heads * kernel.keys * (kernel.qk_dim + kernel.v_dim)
                )
                total += width * rows * kernel.v_dim
                continue
            total += width * (rows * kernel.qk_dim + groups * kernel.keys * (kernel.qk_dim + kernel.v_dim))
            total += width * rows * kernel.v_dim
            total += score_bytes(kernel, stack, precision)
        else:
            entry = stack.elementwise[kernel.name]
            total += kernel.elements * (entry.saved * width + entry.saved_fp32 * 4)
    return total


def kept_kinds(
    kernels: Iterable[Kernel], stack: Stack, precision: str, frozen: bool, selective: bool
) -> tuple[tuple[str, float], ...]:
    """What a block without full recomputation keeps, in bytes by what it is; `selective` where the stack drops a part
    of it (and keeps inputs: selective_keeps_outputs is told apart no further). They sum to saved_bytes less that."""
    found: dict[str, float] = {}
    for kernel in kernels:
        size = saved_bytes([kernel], stack, precision, frozen)
        if selective:
            dropped = score_bytes(kernel, stack, precision) if isinstance(kernel, Attention) else size
            size -= recomputed_share(kernel, stack) * dropped
        if isinstance(kernel, Attention):
            kind = "attention cores"
        elif isinstance(kernel, Matmul):
            kind = "inputs of matmuls"
        elif kernel.name in NORMS:
            kind = "norms"
        elif kernel.name in ("activation", "gated_activation"):
            kind = "activation functions"
        else:
            kind = kernel.name
        found[kind] = found.get(kind, 0.0) + size
    return tuple((kind, size) for kind, size in found.items() if size)


def score_bytes(core: Attention, stack: Stack, precision: str) -> float:
    """Bytes that an attention core keeps beside Q, K, V and output: fp32 row sums if fused, else the probabilities
    (and dropout's mask and copy), with the copies that the stack's softmax keeps besides."""
    rows = core.batch * core.heads * core.queries
    if stack.attention[0] not in UNFUSED:
        return 4 * rows
    width = activation_width(precision)
    copies = stack.elementwise[UNFUSED[stack.attention[0]]].saved * width
    return rows * core.keys * (copies + (2 * width + 1 if stack.dropout else width))


def weight_input_bytes(kernels: Iterable[Kernel], stack: Stack, precision: str) -> float:
    """Bytes that the gradients of weights need beside those of outputs: the inputs of matmuls and norms. The input of
    a matmul behind an attention core is the output of the core."""
    width, total = activation_width(precision), 0.0
    for kernel in kernels:
        if isinstance(kernel, Attention):
            total += kernel.batch * kernel.heads * kernel.queries * kernel.v_dim * width
        elif isinstance(kernel, Matmul) or kernel.name in NORMS:
            total += saved_bytes([kernel], stack, precision)
    return total


def recomputed_share(kernel: Kernel, stack: Stack) -> float:
    """The share of a kernel that the stack's selective recomputation runs again."""
    kind = "matmul" if isinstance(kernel, Matmul) else "attention" if isinstance(kernel, Attention) else "pointwise"
    return stack.selective_recompute.get(kernel.name, stack.selective_recompute.get(kind, 0.0))


def kept_outputs(kernels: Iterable[Kernel], stack: Stack, precision: str) -> float:
    """Bytes of the outputs of the kernels that selective recomputation does not run again, with the fp32 row sums of
    attention cores: what torch's selective checkpoint keeps beside the input of a block.

    Ignored: partial outputs of attention under context parallelism.
    """
    width, total = activation_width(precision), 0.0
    for kernel in kernels:
        share = 1 - recomputed_share(kernel, stack)
        if isinstance(kernel, Matmul):
            total += share * kernel.copies * kernel.m * kernel.n * width
        elif isinstance(kernel, Attention):
            rows = kernel.batch * kernel.heads * kernel.queries
            total += share * rows * (kernel.v_dim * width + 4)
        else:
            total += share * kernel.elements * width
    return total


def deferred_bytes(kernels: Iterable[Kernel], stack: Stack, precision: str) -> float:
    """Bytes that a split backward leaves from its input gradient to its weight gradient, beside what kernels saved:
    the gradient of the output of everything that has weights, matmuls and norms (stage_backward_input in
    torch.distributed.pipelining). That of the logits may lie in their place."""
    width, total = activation_width(precision), 0.0
    for kernel in kernels:
        if isinstance(kernel, Matmul):
            total += kernel.copies * kernel.m * kernel.n * width * (kernel.name != "output" or not stack.loss_in_place)
        elif isinstance(kernel, Pointwise) and kernel.name in NORMS:
            total += kernel.elements * (4 if stack.elementwise[kernel.name].saved_fp32 else width)
    return total


def norm_working(kernels: Iterable[Kernel], stack: Stack, precision: str) -> float:
    """Bytes that come and go in the backward of the largest norm."""
    width, largest = activation_width(precision), 0.0
    for kernel in kernels:
        if isinstance(kernel, Pointwise) and kernel.name in NORMS:
            entry = stack.elementwise[kernel.name]
            largest = max(largest, kernel.elements * (entry.working_fp32 * 4 or 2 * width))
    return largest


def _alive_logits(stack: Stack, cut: bool) -> float:
    """Bytes of each logit that are alive at once in a loss that is not in place; `cut`: tp cuts the vocabulary."""
    return stack.parallel_logits_bytes if cut and stack.parallel_logits_bytes is not None else stack.logits_bytes


def kept_logits(stack: Stack, precision: str, cut: bool) -> float:
    """Bytes of each logit from the loss to its backward: the logits as they are where the loss writes their gradient in
    their place, else their fp32 logarithms."""
    if stack.loss_in_place:
        return activation_width(precision)
    return min(4.0, _alive_logits(stack, cut))


def _passing_logits(stack: Stack, precision: str, cut: bool, logits: float) -> float:
    """Bytes that a loss works with besides what it has kept."""
    if stack.loss_in_place:
        return min(4.0 * logits, stack.loss_piece_bytes)
    return (_alive_logits(stack, cut) - kept_logits(stack, precision, cut)) * logits


def context_buffers(core: Attention, stack: Stack, width: float, ranks: int) -> float:
    """Bytes of buffers for keys and values of other ranks in the backward of an attention core over so many
    context-parallel ranks, besides the rank's own and their gradients.

    Rule, with a block the rank's keys and values: ring: the block that comes, and the gradients that go round
    with it, sent and received (in fp32 where they travel apart); all_gather: the blocks of all others, and the
    gradients of all blocks before they are scattered; ulysses: queries, keys and values as they lie before the
    exchange, and the output's gradient.
    Reference: simulator/context_parallel.py.
    """
    if ranks == 1:
        return 0.0
    elements = core.batch * core.key_value_heads * core.keys * (core.qk_dim + core.v_dim)
    if stack.context_parallel == "ring":
        return elements * (width + 2 * (4.0 if stack.ring_gradients_apart else width))
    if stack.context_parallel == "all_gather":
        return elements * width * (2 * ranks - 1)
    queries = core.batch * core.heads * core.queries * (core.qk_dim + core.v_dim)
    return (elements + queries) * width


def working_bytes(
    kernels: Sequence[Kernel], stack: Stack, precision: str, stream: float, keeps_gradients: bool, ranks: int = 1
) -> float:
    """Bytes that a unit's backward needs at its fullest, beyond what its kernels saved.

    Rule: walk the kernels backwards. Each takes the gradient of its output and makes that of its input, a matmul also
    that of its weight, in the width of the matmul; what it had saved is gone after it. The gradient of the residual
    `stream` (bytes) is there all the time. Weight gradients stay until the unit's end where the software keeps them
    apart that long, else the next kernel finds them added up. Attention over several context-parallel `ranks` has
    their buffers besides.
    Ignored: workspaces within kernels; copies for a change of layout.
    """
    width = activation_width(precision)
    live = freed = weights = fullest = late = 0.0
    merges, attends = 0, False
    for kernel in reversed(kernels):
        saved = saved_bytes([kernel], stack, precision)
        made, after, own = 0.0, live, 0.0
        if isinstance(kernel, Matmul):
            into, out = kernel.copies * kernel.m * kernel.k * width, kernel.copies * kernel.m * kernel.n * width
            own = 0.0 if kernel.batched else kernel.copies * kernel.n * kernel.k * width
            made, after = into, max(0.0, live - out) + into
            if kernel.saved and merges:
                after, merges = after - merges * into, 0
            saved, late = saved + late, 0.0
            attends = attends and not kernel.saved
        elif isinstance(kernel, Attention):
            heads, groups = kernel.batch * kernel.heads, kernel.batch * kernel.key_value_heads
            keys = groups * kernel.keys * (kernel.qk_dim + kernel.v_dim)
            made = after = (heads * kernel.queries * kernel.qk_dim + keys) * width
            made += context_buffers(kernel, stack, width, ranks)
            if kernel.learned_bias:
                # The gradients of probabilities and of scores.
                made += 2 * 4 * heads * kernel.queries * kernel.keys
            attends = True
            if stack.attention[0] in UNFUSED:
                # The gradients of probabilities and of scores, in every copy that the softmax keeps.
                copies = 2 * (1 + stack.elementwise[UNFUSED[stack.attention[0]]].saved)
                made += heads * kernel.queries * kernel.keys * copies * width
        elif kernel.name == "gradient_add":
            merges += 1
        elif kernel.name == "cross_entropy":
            made, saved = (
                _passing_logits(stack, precision, kernel.cut, kernel.elements),
                kept_logits(stack, precision, kernel.cut) * kernel.elements,
            )
            # A loss in pieces has no gradient of all logits.
            after = kernel.elements * (width if stack.loss_in_place else min(width, _alive_logits(stack, kernel.cut)))
            if stack.loss_in_place:
                # The gradient lies where the logits lay, and goes with the matmul that made them.
                after, late, saved = 0.0, saved, 0.0
        elif kernel.name == "gated_activation":
            made = after = 2 * kernel.elements * width
            if stack.elementwise[kernel.name].in_place:
                # The gradients lie where the inputs lay.
                made = 0.0
        elif kernel.name in NORMS:
            # Between projections and core it passes the gradient on, in front of them the residual stream takes it.
            made, after = kernel.elements * width, live if attends else 0.0
        else:
            made = kernel.elements * width if live else 0.0
        fullest = max(fullest, live + made + weights + own - freed)
        live, freed = after, freed + saved
        weights += own if keeps_gradients else 0.0
    return stream + fullest
