"""Kernel times against measured ones, and kernel lists against the counts of the model."""

from __future__ import annotations

import dataclasses

import pytest

from simulator.activations import saved_bytes
from simulator.compute import (
    attention_seconds,
    kernel_time,
    matmul_precision,
    matmul_seconds,
    optimizer_seconds,
    quantise_seconds,
)
from simulator.kernels import Attention, Cut, Matmul, block_kernels, head_kernels
from simulator.presets import find_cluster, find_model, find_stack

A100, H100, B200 = (find_cluster(name).gpu for name in ("dgx-a100", "dgx-h100", "dgx-b200"))


@pytest.mark.parametrize(
    ("gpu", "precision", "m", "n", "k", "tflops", "tolerance"),
    [
        (A100, "bf16", 8192, 8192, 8192, 253.7, 0.10),
        (A100, "bf16", 4096, 4096, 4096, 228.0, 0.10),
        (A100, "bf16", 6144, 12288, 12288, 250.8, 0.10),
        (H100, "fp8", 8192, 8192, 8192, 1290, 0.10),
        (H100, "fp8", 2048, 2048, 2048, 1011, 0.10),
        (H100, "bf16", 8192, 8192, 8192, 798, 0.10),
    ],
)
def test_matmul_rates(gpu: object, precision: str, m: int, n: int, k: int, tflops: float, tolerance: float) -> None:
    """cuBLASLt on random data, Azure/AI-benchmarking-guide@8fd0c6e; H100 bf16 measured with PyTorch 2.11."""
    seconds = matmul_seconds(gpu, precision, m, n, k)  # type: ignore[arg-type]
    assert 2 * m * n * k / seconds / 1e12 == pytest.approx(tflops, rel=tolerance)


def test_wave_quantisation() -> None:
    """132 processors: 132 tiles are one wave, one tile more is two."""
    gpu = dataclasses.replace(H100, tiles=((128, 128),))
    fits = matmul_seconds(gpu, "bf16", 128 * 12, 128 * 11, 8192)
    spills = matmul_seconds(gpu, "bf16", 128 * 12, 128 * 12, 8192)
    overhead = gpu.matmul["bf16"].overhead
    assert (spills - overhead) / (fits - overhead) == pytest.approx(2.0)


def test_flash_attention_rate() -> None:
    """FlashAttention-3 forward, H100, head 128, causal, 8k: 602 TFLOP/s (arXiv 2407.08608), over the FLOPs left by
    the mask: 2·b·a·s²·d."""
    core = Attention("attention", 2, 16, 16, 8192, 8192, 128, 128, True)
    seconds = attention_seconds(H100, find_stack("megatron-core"), "bf16", core, backward=False)
    assert core.flops == 2 * 2 * 16 * 8192**2 * 128
    assert core.flops / seconds / 1e12 == pytest.approx(602, rel=0.06)


@pytest.mark.parametrize(
    "name",
    ["gpt2", "llama-3.1-8b", "mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b", "gpt-oss-120b", "t5-large", "bert-large"],
)
def test_kernels_do_the_models_flops(name: str) -> None:
    """Matmuls and attention of all blocks and the head are the forward third of ModelSpec.flops_per_token."""
    model, stack, seq = find_model(name), find_stack("megatron-core"), 512
    cut = Cut(1, seq, 1, False)
    kernels = head_kernels(model, cut, stack)
    for i in range(model.num_hidden_layers):
        kernels += block_kernels(
            model, model.block_kind(i), model.block_is_causal(i), cut, stack, model.block_window(i)
        )
    matmuls = sum(2 * k.m * k.n * k.k * k.copies for k in kernels if isinstance(k, Matmul))
    attention = sum(k.flops for k in kernels if isinstance(k, Attention))
    # Norms' and biases' weights multiply nothing, but latent attention's counted ones include small norms: 0.1 %.
    assert 3 * (matmuls + attention) / seq == pytest.approx(model.flops_per_token(seq), rel=1e-3)


def test_a_scan_does_the_flops_of_its_chunks() -> None:
    """Per token and head of Nemotron 3 Nano, chunks of Q = 128 tokens, N = 128 states, P = 64 channels: 2·Q·P inside
    the chunk and 2·2·N·P for its state, and 2·Q·N scores for each of 8 groups: within 10 % of Megatron-LM's 7·N·P."""
    model, stack = find_model("nemotron-3-nano-30b-a3b"), find_stack("megatron-core")
    kernels = block_kernels(model, "mamba", True, Cut(1, 4096, 1, False), stack)
    scan = [k for k in kernels if isinstance(k, Matmul) and k.batched]
    flops = sum(2 * k.m * k.n * k.k * k.copies for k in scan) / 4096
    assert flops == 64 * (2 * 128 * 64 + 2 * 2 * 128 * 64) + 8 * 2 * 128 * 128
    assert flops == pytest.approx(7 * 128 * 64 * 64, rel=0.1)


def test_a_mamba_block_keeps_its_projection_and_the_scans_output() -> None:
    """Norm's input and output (2h), x, B, C and z (2·4,096 + 2,048), the scan's output, and that of the gated norm."""
    model, stack = find_model("nemotron-3-nano-30b-a3b"), find_stack("megatron-core")
    kernels = block_kernels(model, "mamba", True, Cut(1, 4096, 1, False), stack)
    assert saved_bytes(kernels, stack, "bf16") / 4096 == 2 * (2 * 2688 + 10240 + 4096 + 4096)


def test_tensor_parallel_divides_the_matmuls() -> None:
    model, stack = find_model("llama-3.1-70b"), find_stack("megatron-core")

    def flops(tp: int) -> float:
        kernels = block_kernels(model, "dense", True, Cut(1, 4096, tp, tp > 1), stack)
        return sum(2 * k.m * k.n * k.k for k in kernels if isinstance(k, Matmul))

    assert flops(1) == pytest.approx(8 * flops(8))


def test_saved_bytes_of_a_gpt_block() -> None:
    """Korthikanti et al. (arXiv 2205.05198), table 2: s·b·h·(34 + 5·a·s/h) with dropout and unfused attention;
    10 + 24/t of it with tensor parallelism, 34/t with sequence parallelism."""
    model, stack = find_model("gpt3-175b"), find_stack("megatron-2021")
    s, b, h, a = 2048, 1, model.hidden_size, model.num_attention_heads

    def saved(tp: int, sequence_parallel: bool) -> float:
        kernels = block_kernels(model, "dense", True, Cut(b, s, tp, sequence_parallel), stack)
        return saved_bytes(kernels, stack, "bf16")

    sbh = s * b * h
    assert saved(1, False) == pytest.approx(sbh * (34 + 5 * a * s / h))
    assert saved(8, False) == pytest.approx(sbh * (10 + 24 / 8 + 5 * a * s / h / 8))
    assert saved(8, True) == pytest.approx(sbh * (34 + 5 * a * s / h) / 8)


def test_saved_bytes_of_a_llama_block() -> None:
    """Norms in and out, Q and attention's output, K and V, gate, up and product, one fp32 per row:
    12h + 4hk/a + 6f + 4a bytes per token = 139,392 for Llama-3-8B."""
    model, stack = find_model("llama-3.1-8b"), find_stack("megatron-core")
    kernels = block_kernels(model, "dense", True, Cut(1, 8192, 1, False), stack)
    assert saved_bytes(kernels, stack, "bf16") / 8192 == pytest.approx(139_392)


def test_eager_launches_are_counted() -> None:
    """A block whose kernels take the device 1 us each is bound by the host that launches them."""
    model, stack = find_model("gpt2"), find_stack("torchtitan")
    kernels = block_kernels(model, "dense", True, Cut(1, 16, 1, False), stack)
    times = kernel_time(kernels, B200, stack, "bf16", tp=1)
    assert times.host_forward > times.forward


def test_adamw_on_b200() -> None:
    """8.03e9 parameters took 46.6 ms (stas00/ml-engineering@744d01e1): without clipping's passes within 40 %."""
    seconds = optimizer_seconds(B200, find_stack("megatron-core"), "adamw", 8.03e9)
    assert 46.6e-3 * 0.7 < seconds < 46.6e-3 * 1.4


def test_a_recipe_in_8_bits_leaves_the_head_in_16() -> None:
    """Only the projections of blocks are quantised (NVIDIA/Megatron-LM@d98e8a64, pytorch/torchtitan@b5bcd76c)."""
    model, stack = find_model("llama-3.1-8b"), find_stack("megatron-core")
    head = [k for k in head_kernels(model, Cut(1, 8192, 1, False), stack) if isinstance(k, Matmul)]
    assert [matmul_precision(k, "mxfp8") for k in head] == ["bf16"]
    assert kernel_time(head, B200, stack, "mxfp8", 1).forward == kernel_time(head, B200, stack, "bf16", 1).forward


def test_casts_move_what_the_stack_says() -> None:
    """torchtitan: 3 passes of 2 bytes over 8,192 x 4,096 inputs and 8,192 x 6,144 gradients (read for the scale, read
    and written for the cast, the transposed copy), at 8 TB/s · 0.75, and 2.5 us for the kernel."""
    stack, kernel = find_stack("torchtitan"), Matmul("qkv", 8192, 6144, 4096)
    forward, backward = (quantise_seconds(B200, stack, "fp8", kernel, backward=b) for b in (False, True))
    assert forward == pytest.approx(2.5e-6 + 6 * 8192 * 4096 / 6e12)
    assert backward == pytest.approx(2.5e-6 + 6 * 8192 * 6144 / 6e12)
    assert quantise_seconds(B200, stack, "bf16", kernel, backward=False) == 0
    assert quantise_seconds(B200, stack, "fp8", kernel._replace(quantised=False), backward=False) == 0


def test_inputs_of_matmuls_are_kept_in_8_bits() -> None:
    """Of 139,392 bytes of a Llama-3-8B block per token, the inputs of qkv, out (kept by attention), gate_up and down
    are 2h + 2h + 2f in 16 bits: 8 bits save h + h + f = 22,528."""
    model, stack = find_model("llama-3.1-8b"), find_stack("megatron-core")
    kernels = block_kernels(model, "dense", True, Cut(1, 8192, 1, False), stack)
    half, whole = (saved_bytes(kernels, stack, p) / 8192 for p in ("fp8", "bf16"))
    assert whole - half == pytest.approx(4096 + 4096 + 14336)


def test_fp16_is_as_fast_as_bf16() -> None:
    assert matmul_seconds(H100, "fp16", 4096, 4096, 4096) == matmul_seconds(H100, "bf16", 4096, 4096, 4096)


def test_four_bits_on_gb200() -> None:
    """8,192 cubed ran at 7,536 TFLOP/s, 2,048 cubed at 1,678 (Azure/AI-benchmarking-guide@8fd0c6e)."""
    gpu = find_cluster("gb200-nvl72").gpu
    for size, rate in ((8192, 7536e12), (2048, 1678e12)):
        assert matmul_seconds(gpu, "nvfp4", size, size, size) == pytest.approx(2 * size**3 / rate, rel=0.08)


def test_a_window_makes_attention_cheap() -> None:
    """A window of 128 keys in 4,096: w(1 - w/2s) = 126 keys for each query instead of 2,048."""
    full = Attention("attention", 1, 64, 8, 4096, 4096, 64, 64, True)
    assert full._replace(window=128).scores / full.scores == pytest.approx(126 / 2048)
    assert full._replace(window=4096).scores == full.scores
