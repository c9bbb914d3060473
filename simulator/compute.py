"""Seconds of kernels on one device: matmul, attention, memory-bound operations, the optimizer.

Formulas take and return plain floats (numpy arrays pass too where there is no branch); constants come from the Gpu's
data (`simulator/data/gpus.toml` or a measured profile). Every function says what it ignores.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass

from simulator.cluster import AttentionFit, AttentionKernel, Gpu, HostFit
from simulator.errors import UserError
from simulator.kernels import Attention, Kernel, Matmul, Pointwise
from simulator.stack import Stack

# Cores that write their scores to memory, with the elementwise operation that turns them into probabilities: one fused
# kernel for scale, mask and softmax, or PyTorch's operations one after another.
UNFUSED = {"unfused": "softmax", "eager": "eager_softmax"}


def activation_width(precision: str) -> int:
    """Bytes of one element of an activation; fp8 is for the inputs of matmuls alone."""
    return 4 if precision == "fp32" else 2


# Bytes of an element that a matmul reads where that is less than an activation's; the scales of blocks not counted.
_QUANTISED = {"fp8": 1.0, "mxfp8": 1.0, "nvfp4": 0.5}


def matmul_input_width(precision: str) -> float:
    """Bytes of one element of what the matmuls of blocks read."""
    return _QUANTISED.get(precision, activation_width(precision))


def matmul_precision(kernel: Matmul, precision: str) -> str:
    """What a matmul of a recipe computes in: those that are not quantised stay in 16 bits."""
    return "bf16" if precision in _QUANTISED and not kernel.quantised else precision


def matmul_seconds(gpu: Gpu, precision: str, m: float, n: float, k: float, batch: float = 1) -> float:
    """Seconds of `batch` products (m, k) x (k, n) in one kernel.

    Rule: overhead + max(arithmetic, bytes). Arithmetic is in waves of tiles: ceil(tiles / multiprocessors) waves of
    2·Tm·Tn·(k + k0) / (rate · e / multiprocessors), the best tile shape counting; e = sqrt(TmTn/(Tm + Tn) / 85.3) is
    what a small tile loses to loading its operands, 1 at 128 x 256. The tiles of a batch fill waves together.
    Without tiles (a measured machine): 2·(m·n·k + k0·m·n + m0·n·k + n0·m·k) / rate, where each side of the product,
    the output and both operands, costs by its size; rms error 2-3 % of fp32 and 7 % of bf16 on a processor.
    Reference: tile and wave quantisation as NVIDIA's matmul background guide explains it; constants fitted to
    cuBLASLt tables (Azure/AI-benchmarking-guide@8fd0c6e), rms error 2-10 % by GPU.
    Ignored: split-K and stream-K, alignment of the sizes, power throttling (Gpu.sustained).
    """
    fit = gpu.matmul[gpu.arithmetic(precision)]
    width = matmul_input_width(precision)
    bytes_moved = batch * ((m * k + k * n) * width + m * n * max(width, 2))
    memory = bytes_moved / (gpu.memory_bandwidth * gpu.memory_efficiency)
    if not gpu.tiles:
        sides = fit.k0 * m * n + fit.m0 * n * k + fit.n0 * m * k
        return fit.overhead + 2 * batch * (m * n * k + sides) / fit.rate
    best = math.inf
    for tile_m, tile_n in gpu.tiles:
        tiles = batch * math.ceil(m / tile_m) * math.ceil(n / tile_n)
        waves = math.ceil(tiles / gpu.multiprocessors)
        efficiency = min(1.0, math.sqrt(tile_m * tile_n / (tile_m + tile_n) / (128 * 256 / 384)))
        per_wave = 2 * tile_m * tile_n * (k + fit.k0) / (fit.rate * efficiency / gpu.multiprocessors)
        best = min(best, waves * per_wave)
    return fit.overhead + max(best, memory)


def attention_seconds(gpu: Gpu, stack: Stack, precision: str, core: Attention, backward: bool) -> float:
    """Seconds of one attention core, forward or backward.

    Rule: FLOPs / (rate · s / (s + half_length)) for fused kernels, causal with constants of its own (over the FLOPs
    that the mask leaves). Reference: least squares on the plots of flash-attention@0251105a and arXiv 2407.08608,
    largest error 5.4 %. An unfused core is its two matmuls and the passes over the scores.
    Ignored: grouped queries (FLOPs are the same), unequal query and key lengths.
    """
    name = attention_kernel(gpu, stack)
    if name in UNFUSED:
        return _unfused_attention_seconds(gpu, stack, precision, core, backward)
    flops = core.flops * (2.5 if backward else 1.0)
    fit = _attention_fit(gpu.attention[name], core, backward)
    rate, half = (fit.causal_rate, fit.causal_half_length) if core.causal else (fit.rate, fit.half_length)
    return flops * (1 + half / core.keys) / rate


def attention_kernel(gpu: Gpu, stack: Stack) -> str:
    """The attention kernel that a stack runs on a device: the first that it names and that the device has a rate for.

    Raises:
        UserError: no kernel of the stack has a rate on the device.
    """
    for name in stack.attention:
        if name in UNFUSED or name in gpu.attention:
            return name
    raise UserError(
        f"stack {stack.name} runs attention with {' or '.join(stack.attention)}, which has no rate on {gpu.name}"
    )


def _attention_fit(kernels: tuple[AttentionKernel, ...], core: Attention, backward: bool) -> AttentionFit:
    """The constants of the head length nearest to the core's own."""
    kernel = min(kernels, key=lambda known: abs(known.head_dim - core.qk_dim))
    return kernel.backward if backward else kernel.forward


def _unfused_attention_seconds(gpu: Gpu, stack: Stack, precision: str, core: Attention, backward: bool) -> float:
    """Batched QK' and PV and the passes over all scores, masked ones included: nothing is skipped."""
    batches = core.batch * core.heads
    scores = batches * core.queries * core.keys
    one = matmul_seconds(gpu, precision, core.queries, core.keys, core.qk_dim, batches)
    two = matmul_seconds(gpu, precision, core.queries, core.v_dim, core.keys, batches)
    products = (one + two) * (2 if backward else 1) / gpu.clock(precision)
    softmax = UNFUSED[attention_kernel(gpu, stack)]
    return products + pointwise_seconds(gpu, stack, precision, Pointwise(softmax, scores), backward)


def pointwise_seconds(gpu: Gpu, stack: Stack, precision: str, kernel: Pointwise, backward: bool) -> float:
    """Seconds of a memory-bound operation: overhead per kernel + bytes / (efficiency · bandwidth).

    Reference: STREAM-like and fused-kernel measurements (Azure/AI-benchmarking-guide@8fd0c6e, Dao-AILab/quack).
    Ignored: data that stays in the cache between kernels, so short sequences are predicted a little slow.
    """
    entry = stack.elementwise[kernel.name]
    passes, count = (entry.backward, entry.kernels_backward) if backward else (entry.forward, entry.kernels_forward)
    efficiency = gpu.reduction_efficiency if kernel.name in _REDUCTIONS else gpu.memory_efficiency
    width = activation_width(precision)
    return count * gpu.memory_overhead + kernel.elements * passes * width / (gpu.memory_bandwidth * efficiency)


def quantise_seconds(gpu: Gpu, stack: Stack, precision: str, kernel: Matmul, backward: bool) -> float:
    """Seconds of casting what a matmul of an 8- or 4-bit recipe multiplies: its input forward, its output's gradient
    backward.

    Rule: a memory-bound kernel; its passes are the stack's "quantise", which says what of the cast is done by the norm
    or activation before, and whether the scale is looked for first.
    Ignored: casts of weights.
    """
    if precision not in _QUANTISED or not kernel.quantised:
        return 0.0
    elements = kernel.copies * kernel.m * (kernel.n if backward else kernel.k)
    return pointwise_seconds(gpu, stack, precision, Pointwise("quantise", elements), backward)


_REDUCTIONS = ("layernorm", "rmsnorm", "softmax", "eager_softmax", "cross_entropy")


@dataclass(frozen=True)
class KernelTime:
    """Seconds of a list of kernels: on the device, and of the host that launches them."""

    forward: float
    backward: float
    host_forward: float
    host_backward: float
    # The part of the backward that makes weight gradients.
    weights: float = 0.0
    host_weights: float = 0.0

    def without_weights(self) -> KernelTime:
        """The same for frozen weights, which have no gradient."""
        return dataclasses.replace(
            self,
            backward=self.backward - self.weights,
            host_backward=self.host_backward - self.host_weights,
            weights=0.0,
            host_weights=0.0,
        )

    def __add__(self, other: KernelTime) -> KernelTime:
        return KernelTime(
            self.forward + other.forward,
            self.backward + other.backward,
            self.host_forward + other.host_forward,
            self.host_backward + other.host_backward,
            self.weights + other.weights,
            self.host_weights + other.host_weights,
        )


def kernel_time(kernels: Iterable[Kernel], gpu: Gpu, stack: Stack, precision: str, tp: int) -> KernelTime:
    """Forward and backward seconds of kernels that run one after another on one device. Matmuls run at the
    clock that a training load sustains; kernels that keep the arithmetic units less busy do not feel it."""
    host = gpu.host or stack.host
    forward = backward = weights = 0.0
    launches_forward = launches_backward = launches_weights = 0.0
    for kernel in kernels:
        if isinstance(kernel, Matmul):
            m, n, k = kernel.m, kernel.n, kernel.k
            used = matmul_precision(kernel, precision)
            wide = stack.recipes[precision].kept_wide if used == precision else 0.0
            forward += _sustained_seconds(gpu, used, wide, m, n, k, kernel.copies)
            backward += _sustained_seconds(gpu, used, wide, m, k, n, kernel.copies)
            weight = _sustained_seconds(gpu, used, wide, k, n, m, kernel.copies)
            backward += weight
            weights += weight
            forward += quantise_seconds(gpu, stack, precision, kernel, backward=False)
            backward += quantise_seconds(gpu, stack, precision, kernel, backward=True)
            calls = 1 if stack.grouped_experts or kernel.batched else kernel.copies
            casts = calls if used in _QUANTISED else 0
            launches_forward += calls + casts
            launches_backward += 2 * calls + casts
            launches_weights += calls
        elif isinstance(kernel, Attention):
            forward += attention_seconds(gpu, stack, precision, kernel, backward=False)
            backward += attention_seconds(gpu, stack, precision, kernel, backward=True)
            on_forward, on_backward = _attention_launches(gpu, stack)
            launches_forward += on_forward
            launches_backward += on_backward
        else:
            forward += pointwise_seconds(gpu, stack, precision, kernel, backward=False)
            backward += pointwise_seconds(gpu, stack, precision, kernel, backward=True)
            launches_forward += stack.elementwise[kernel.name].kernels_forward
            launches_backward += stack.elementwise[kernel.name].kernels_backward
    launches = (launches_forward, launches_backward)
    return _with_host(host, tp, KernelTime(forward, backward, *launches, weights, launches_weights))


def _sustained_seconds(gpu: Gpu, precision: str, wide: float, m: float, n: float, k: float, batch: float) -> float:
    """Seconds of a matmul within a step, `wide` of it in 16 bits (Recipe.kept_wide)."""
    seconds = matmul_seconds(gpu, precision, m, n, k, batch) / gpu.clock(precision)
    if not wide:
        return seconds
    return (1 - wide) * seconds + wide * matmul_seconds(gpu, "bf16", m, n, k, batch) / gpu.clock("bf16")


def _attention_launches(gpu: Gpu, stack: Stack) -> tuple[int, int]:
    """Kernels of one attention core, forward and backward: unfused, two products and those of the softmax."""
    softmax = UNFUSED.get(attention_kernel(gpu, stack))
    if softmax is None:
        return 1, 1
    return 2 + stack.elementwise[softmax].kernels_forward, 4 + stack.elementwise[softmax].kernels_backward


def _with_host(host: HostFit, tp: int, work: KernelTime) -> KernelTime:
    """Turn launches into seconds. DTensor costs where tp cuts ops."""
    dtensor = host.dtensor if tp > 1 else 0.0
    return dataclasses.replace(
        work,
        host_forward=work.host_forward * (host.forward + dtensor),
        host_backward=work.host_backward * (host.backward + dtensor),
        host_weights=work.host_weights * (host.backward + dtensor),
    )


def optimizer_seconds(gpu: Gpu, stack: Stack, optimizer: str, parameters: float) -> float:
    """Seconds of one optimizer step with gradient clipping over this rank's parameters.

    Rule: bytes read and written per parameter (stack) over the bandwidth that fused elementwise kernels reach, or that
    an optimizer step was measured to reach (Gpu.optimizer_efficiency).
    Reference: AdamW with fp32 master weights moves 30 bytes, its gradient norm 4 more; 8.03e9 parameters took 46.6 ms
    on a B200 (stas00/ml-engineering@744d01e1), this rule gives 45 ms.
    Ignored: kernels per tensor (multi-tensor kernels are assumed on GPUs).
    """
    efficiency = gpu.optimizer_efficiency or gpu.memory_efficiency
    return parameters * stack.optimizer_traffic[optimizer] / (gpu.memory_bandwidth * efficiency)


def host_optimizer_seconds(bandwidth: float, parameters: float) -> float:
    """Seconds of an optimizer step on the host of a node with these parameters: 28 bytes each for AdamW in fp32 (weight
    and two moments read and written, gradient read) at what the host's memory and cores reach (stack).
    Ignored: the way of gradients and weights over PCIe, which runs beside it."""
    return parameters * 28 / bandwidth


def accumulation_seconds(gpu: Gpu, parameters: float) -> float:
    """Seconds of adding one microbatch's gradients to those of the microbatches before: 12 bytes per parameter, in
    fp32. Stacks that let the matmul add into its output (Megatron-Core) do not pay it."""
    return parameters * 12 / (gpu.memory_bandwidth * gpu.memory_efficiency)
