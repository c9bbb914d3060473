"""Microbenchmarks that ranks run on their devices: kernels, the host's work per kernel, shared processors, collectives.

Started by `runtime.measure` under torchrun, once for every number of ranks; rank 0 writes the samples to a file.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.benchmark_cases import (
    GRIDS,
    Case,
    Grid,
    Operands,
    call_seconds,
    cycling,
    sample,
    time_cases,
    together_seconds,
)
from runtime.collective_benchmarks import collective_samples, groups
from runtime.host_overhead import host_seconds, now, train_once
from runtime.machine import (
    keep_awake,
    leave,
    memory_bytes,
    own_processors,
    processor_name,
    processors,
    resident_bytes,
    take_processors,
)
from runtime.measure import PROGRESS
from runtime.optimizer import build_optimizer, clip_gradients, squared_norm
from simulator.files import write_json
from simulator.job import Training
from simulator.presets import find_stack
from simulator.profile import Sample


def matmul_cases(grid: Grid, device: torch.device, precision: str) -> list[Case]:
    """Forward products, and those of their backward: dX = dY W and dW = dYᵀ X."""
    operands = Operands(device, torch.bfloat16 if precision == "bf16" else torch.float32, grid.pool)
    cases = []
    for m, n, k in grid.matmul:
        sets = operands.sets((m, k), (n, k), (m, n))
        forms: tuple[tuple[tuple[int, int, int], Callable[..., Tensor]], ...] = (
            ((m, n, k), lambda x, w, g: F.linear(x, w)),
            ((m, k, n), lambda x, w, g: g @ w),
            ((n, k, m), lambda x, w, g: g.t() @ x),
        )
        cases += [Case("matmul", sizes, cycling(form, sets), precision) for sizes, form in forms]
    return cases


def memory_cases(grid: Grid, device: torch.device) -> list[Case]:
    """The residual addition: two tensors read, one written."""
    operands = Operands(device, torch.float32, grid.pool)
    return [
        Case("memory", (3.0 * size,), cycling(torch.add, operands.sets((size // 4,), (size // 4,))))
        for size in grid.memory
    ]


def optimizer_cases(grid: Grid, device: torch.device) -> list[Case]:
    """Gradient norm, clipping and AdamW over parameters in fp32, as a step ends; sizes as the simulator counts them."""
    return [_optimizer_case(elements, device) for elements in grid.optimizer]


def _optimizer_case(elements: int, device: torch.device) -> Case:
    stack = find_stack("layoutwise-cuda" if device.type == "cuda" else "layoutwise-cpu")
    parameter = nn.Parameter(torch.randn(elements, device=device))
    parameter.grad = torch.randn_like(parameter)
    optimizer = build_optimizer([parameter], Training(global_batch_size=1, seq_len=1, precision="fp32"))

    def step(i: int) -> None:
        clip_gradients([parameter], squared_norm([parameter], 1).sqrt())
        optimizer.step()

    return Case("optimizer", (elements * stack.optimizer_traffic["adamw"],), step)


def attention_cases(grid: Grid, device: torch.device) -> list[Case]:
    """Scaled dot product attention on heads that lie as the projections leave them: (batch, seq, heads, head_dim)."""
    # CUDA has fused kernels for 16 bits only.
    operands = Operands(device, torch.bfloat16 if device.type == "cuda" else torch.float32, grid.pool)
    cases = []
    for head_dim, seq, causal in itertools.product(grid.head_dims, grid.attention, (False, True)):
        batch, heads = max(1, grid.tokens // seq), max(1, grid.width // head_dim)
        shape = (batch, seq, heads, head_dim)
        sets = [[t.transpose(1, 2) for t in tensors] for tensors in operands.sets(shape, shape, shape, shape)[:8]]

        def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, causal: bool = causal) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        graphs = [[forward(*tensors), *tensors] for tensors in sets]

        def backward(out: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> object:
            return torch.autograd.grad(out, (q, k, v), g, retain_graph=True)

        sizes = (batch, heads, seq, head_dim, float(causal))
        cases.append(Case("attention_forward", sizes, cycling(forward, sets)))
        cases.append(Case("attention_backward", sizes, cycling(backward, graphs)))
    return cases


def host_samples(grid: Grid, device: torch.device) -> list[Sample]:
    """The host's work per kernel, without sizes."""
    return [sample(kind, (), seconds) for kind, seconds in host_seconds(device, 10 * grid.repeats).items()]


def at_once_rounds(grid: Grid, device: torch.device, counts: Sequence[int]) -> list[list[float]]:
    """Seconds of some small training steps ("concurrency"), and of some updates of the most parameters of the grid
    ("streaming"), on the first so many ranks at once while the others wait: of the one for all counts and then of the
    other, round after round. The mean over these ranks: that they are not done together is part of what their next
    collective takes (collective_benchmarks.py). So many ranks have the processors that they would have in a run.
    """
    layer = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512), nn.LayerNorm(512)).to(device)
    x = torch.randn(grid.concurrency_tokens, 512, device=device, requires_grad=True)
    update = _optimizer_case(grid.optimizer[-1], device).call
    works: list[Callable[[int], object]] = [lambda i: layer(x).sum().backward(), update]
    times = []
    for _ in range(1 + grid.repeats):
        for work, count in itertools.product(works, counts):
            dist.barrier()
            active = dist.get_rank() < count
            with own_processors(dist.get_rank(), count):
                start = now(device)
                # More than one, because the system takes a while to find each rank a processor.
                for i in range(3 * active):
                    work(i)
                times.append((now(device) - start) * active / count)
    mean = torch.tensor(times, dtype=torch.float64).view(-1, len(works) * len(counts))[1:]
    dist.all_reduce(mean)
    rounds: list[list[float]] = mean.tolist()
    return rounds


def overlap_samples(grid: Grid, device: torch.device) -> list[Sample]:
    """A matrix product alone, and while an all-reduce of the largest size goes on beside it: "compute_alone" and
    "compute_overlapped", on the slowest rank. The all-reduces outlast the products."""
    size, buffer = 1024 if device.type == "cpu" else 8192, torch.zeros(grid.collective[-1] // 4, device=device)
    x = torch.randn(size, size, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    product = Case("compute_alone", (), lambda i: x @ x)
    alone, reduction = ([together_seconds(case, 2, device) for _ in range(3)] for case in (
        product, Case("all_reduce", (), cycling(dist.all_reduce, [[buffer]])),
    ))  # fmt: skip
    # All ranks must make the same number of calls.
    lengths = torch.tensor([min(alone), min(reduction)], dtype=torch.float64, device=device)
    dist.all_reduce(lengths, dist.ReduceOp.MAX)
    one, other = lengths.tolist()
    products = max(2, min(50, int(4 * grid.seconds / one)))
    # Shared, either takes up to twice as long.
    reductions = max(1, min(50, math.ceil(2.5 * products * one / other)))
    times: dict[str, list[float]] = {"compute_alone": [], "compute_overlapped": []}
    for _ in range(1 + grid.repeats):
        times["compute_alone"].append(call_seconds(product, products, device))
        dist.barrier()
        works = [dist.all_reduce(buffer, async_op=True) for _ in range(reductions)]
        times["compute_overlapped"].append(call_seconds(product, products, device))
        for work in works:
            work.wait()
    found = []
    for kind, seconds in times.items():
        slowest = torch.tensor(seconds[1:], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append(sample(kind, (dist.get_world_size(),), slowest.tolist()))
    return found


def describe(device: torch.device) -> dict[str, object]:
    """What a Profile says of the machine. Call it before anything large is allocated: the process's memory is what a
    training rank holds without its model."""
    train_once(device)
    versions = {"torch": torch.__version__, "backend": dist.get_backend()}
    if device.type == "cuda":
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info()
        return {
            "name": torch.cuda.get_device_name(),
            "kind": "gpu",
            "devices": torch.cuda.device_count(),
            "memory": float(total),
            "process_memory": float(total - free - torch.cuda.memory_reserved()),
            "versions": versions | {"cuda": str(torch.version.cuda)},
        }
    return {
        "name": processor_name(),
        "kind": "cpu",
        "devices": processors(),
        "memory": float(memory_bytes()),
        "process_memory": float(resident_bytes()),
        "versions": versions,
    }


def list_steps(
    grid: Grid, device: torch.device, counts: Sequence[int], at_once: list[list[float]]
) -> list[tuple[str, Callable[[], list[Sample]]]]:
    """What this number of ranks measures, with names for the progress.

    Args:
        counts: ranks that are timed computing at once.
        at_once: takes those timings, which are made before and after all others, since a disturbance of some seconds
            would change each of them alike.
    """

    def kernels(make: Callable[..., list[Case]], *arguments: str) -> Callable[[], list[Sample]]:
        return lambda: time_cases(make(grid, device, *arguments), grid, device)

    def concurrency() -> list[Sample]:
        at_once.extend(at_once_rounds(grid, device, counts))
        return []

    ranks = dist.get_world_size()
    steps: list[tuple[str, Callable[[], list[Sample]]]]
    if ranks == 1:
        steps = [
            ("matmul fp32", kernels(matmul_cases, "fp32")),
            ("matmul bf16", kernels(matmul_cases, "bf16")),
            ("memory", kernels(memory_cases)),
            ("optimizer", kernels(optimizer_cases)),
            ("attention", kernels(attention_cases)),
        ]
    else:
        steps = [
            (f"collectives of {group.ranks}", functools.partial(collective_samples, grid, device, group))
            for group in groups()
        ]
        if ranks == 2:
            steps.append(("compute beside communication", lambda: overlap_samples(grid, device)))
    if counts:
        shared = ("ranks at once", concurrency)
        steps = [shared, *steps, shared]
    return steps


def run(grid_name: str, output: Path, counts: Sequence[int] = ()) -> None:
    """Everything that this number of ranks is there for, and so many of them computing at once; rank 0 writes
    {"machine", "samples"}."""
    cuda = torch.cuda.is_available()
    # A GPU is not busy with what fills a processor.
    grid = GRIDS["gpu" if cuda and grid_name == "full" else grid_name]
    device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        take_processors(int(os.environ["LOCAL_RANK"]), local_ranks)
        keep_awake(local_ranks)
    ranks, samples = int(os.environ["WORLD_SIZE"]), list[Sample]()
    if ranks == 1:
        # Before the process has its group, because this needs one of its own.
        print(PROGRESS, 0.0, "host", flush=True)
        samples += host_samples(grid, device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=60))
    # The machine is described once, by the world of one rank.
    machine = describe(device) if ranks == 1 else None
    at_once: list[list[float]] = []
    for index, (name, step) in enumerate(steps := list_steps(grid, device, counts, at_once)):
        if dist.get_rank() == 0:
            print(PROGRESS, index / len(steps), name, flush=True)
        samples += step()
    timed = zip(itertools.product(("concurrency", "streaming"), counts), zip(*at_once, strict=True), strict=True)
    samples += [sample(kind, (count,), times) for (kind, count), times in timed]
    if dist.get_rank() == 0:
        write_json(output, {"machine": machine, "samples": [asdict(s) for s in samples]})
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", choices=("full", "quick"), default="full")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--at-once", type=int, nargs="*", default=[], help="numbers of ranks timed computing together")
    arguments = parser.parse_args()
    run(arguments.grid, arguments.output, arguments.at_once)
    leave()


if __name__ == "__main__":
    main()
