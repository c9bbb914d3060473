"""The host's work per kernel, timed on blocks of the runtime's own model that are so small that nothing else counts.

Seconds are per kernel as `simulator.compute.kernel_time` counts them, so that a block's total is right although the
simulator does not count views, hooks and Python's calls of modules.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from runtime.fake_group import fake_group
from runtime.model import Stage, init_weights
from runtime.optimizer import build_optimizer, clip_gradients, squared_norm
from runtime.parallelize import apply_tensor_parallel
from simulator.cluster import AttentionFit, AttentionKernel, Gpu, HostFit, MatmulFit
from simulator.compute import kernel_time
from simulator.job import Training
from simulator.kernels import Cut, block_kernels
from simulator.presets import find_model, find_stack

LAYERS = 4
TOKENS = 8
BLOCK = replace(
    find_model("llama-3.1-8b"),
    num_hidden_layers=LAYERS,
    hidden_size=32,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=32,
    vocab_size=64,
)


def host_seconds(device: torch.device, repeats: int) -> dict[str, list[float]]:
    """Repeated timings of one kernel's host work: "host_forward", "host_backward", and what "dtensor" adds to a kernel
    of a tensor-parallel block, which is the mean over blocks without and with sequence parallelism. The other rank of
    such a block is not there (fake_group.py): what collectives take is measured elsewhere.
    Ignored: the host's call of a collective counts here and there.
    """
    kernels_forward, kernels_backward = kernel_counts(device)
    with fake_group(0, 2):
        # Under sequence parallelism each of the two ranks has half of the tokens between blocks.
        stages = [(build_stage(device, cut), TOKENS // (2 if cut else 1)) for cut in (None, False, True)]
        # The first rounds fill the caches of DTensor and of the allocator.
        rounds = [[_time(stage, device, tokens) for stage, tokens in stages] for _ in range(3 + repeats)][3:]
    seconds = np.array(rounds) / LAYERS
    plain, parallel = seconds[:, 0], seconds[:, 1:].mean(axis=1)
    added = (parallel - plain).sum(axis=1) / (kernels_forward + kernels_backward)
    return {
        "host_forward": (plain[:, 0] / kernels_forward).tolist(),
        "host_backward": (plain[:, 1] / kernels_backward).tolist(),
        "dtensor": added.tolist(),
    }


def kernel_counts(device: torch.device) -> tuple[float, float]:
    """Kernels of BLOCK, forward and backward: the simulated seconds of a host that takes one second for each."""
    stack = find_stack("layoutwise-cuda" if device.type == "cuda" else "layoutwise-cpu")
    fit = AttentionFit(1.0, 0.0, 1.0, 0.0)
    gpu = Gpu(
        name="counter",
        kind="cpu",
        memory=1.0,
        memory_bandwidth=1.0,
        peak={},
        matmul={"fp32": MatmulFit(1.0)},
        attention={name: (AttentionKernel(BLOCK.head_dim, fit, fit),) for name in stack.attention},
        host=HostFit(1.0, 1.0),
        source="",
    )
    kernels = block_kernels(BLOCK, "dense", True, Cut(1, TOKENS, 1, False), stack)
    work = kernel_time(kernels, gpu, stack, "fp32", 1)
    return work.host_forward, work.host_backward


def build_stage(device: torch.device, sequence_parallel: bool | None) -> Stage:
    """LAYERS blocks; None leaves them plain, else they are cut over a mesh of all ranks."""
    with torch.device("meta"):
        stage = Stage(BLOCK, TOKENS, range(LAYERS), first=False, last=False)
    if sequence_parallel is not None:
        apply_tensor_parallel(stage, init_device_mesh(device.type, (dist.get_world_size(),)), sequence_parallel)
    init_weights(stage, 0, device)
    return stage


def train_once(device: torch.device) -> None:
    """A step of the tiny blocks, cut and not, with clipping and optimizer: what torch loads only when it is first
    used (DTensor's dispatcher, the compiler behind fused optimizers) is a rank's memory too."""
    for cut in (None, True):
        stage = build_stage(device, cut)
        _time(stage, device, TOKENS)
        norm = squared_norm(stage.parameters(), 1).sqrt()
        clip_gradients(stage.parameters(), norm)
        build_optimizer(stage.parameters(), Training(1, TOKENS, "fp32")).step()


def _time(stage: Stage, device: torch.device, tokens: int) -> tuple[float, float]:
    """Seconds of the stage, forward and backward."""
    x = torch.randn(1, tokens, BLOCK.hidden_size, device=device, requires_grad=True)
    start = now(device)
    out = stage(x)
    middle = now(device)
    out.sum().backward()
    return middle - start, now(device) - middle


def now(device: torch.device) -> float:
    """The time when the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
