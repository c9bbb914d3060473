"""What microbenchmarks are made of: sizes, cases, operands that lie in no cache, and timings in rounds.

All cases of a kind are timed in turn, round after round, so that a disturbance meets many cases once and not one
case always.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.host_overhead import now
from simulator.profile import Sample

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Grid:
    """The sizes that are measured, and how often.

    matmul: (m, n, k) of forward products; each is measured in the two forms of its backward too.
    memory, collective: bytes. optimizer: parameters. attention: sequence lengths at `tokens` tokens and `width` =
    heads · head_dim.
    seconds: the least length of one timing. pool: elements that operands are cut from, larger than the caches.
    between: seconds that a rank computes before each collective where it shares processors with what moves the bytes;
    0 calls collectives one behind the other.
    """

    matmul: tuple[tuple[int, int, int], ...]
    memory: tuple[int, ...]
    optimizer: tuple[int, ...]
    attention: tuple[int, ...]
    head_dims: tuple[int, ...]
    tokens: int
    width: int
    collective: tuple[int, ...]
    concurrency_tokens: int
    repeats: int
    seconds: float
    pool: int = 16 * MIB
    between: float = 0.0


_WEIGHTS = ((128, 128), (384, 128), (256, 256), (1024, 256), (256, 1024), (512, 512), (2048, 512), (512, 2048))
_LARGE = ((64, 2048, 2048), (512, 4096, 512), (2048, 1024, 1024))
_GPU_WEIGHTS = ((1024, 1024), (2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096))
GRIDS = {
    "gpu": Grid(
        matmul=(*((m, n, k) for m in (512, 2048, 8192) for n, k in _GPU_WEIGHTS), (8192, 8192, 8192)),
        memory=tuple(MIB * 2**i for i in range(9)),
        optimizer=tuple(MIB * 4**i for i in range(5)),
        attention=(512, 1024, 2048, 4096, 8192),
        head_dims=(64, 128),
        tokens=8192,
        width=2048,
        collective=tuple(4 * KIB * 4**i for i in range(9)),
        concurrency_tokens=0,
        repeats=10,
        seconds=3e-3,
        pool=256 * MIB,
    ),
    "full": Grid(
        matmul=tuple((m, n, k) for m in (64, 256, 1024) for n, k in _WEIGHTS) + _LARGE,
        memory=tuple(64 * KIB * 2**i for i in range(10)),
        optimizer=(MIB, 4 * MIB, 16 * MIB),
        attention=(64, 128, 256, 512, 1024),
        head_dims=(32, 64, 128),
        tokens=1024,
        width=256,
        collective=(4 * KIB, 64 * KIB, 512 * KIB, 2 * MIB, 8 * MIB, 32 * MIB),
        concurrency_tokens=1024,
        repeats=4,
        seconds=3e-3,
        between=20e-3,
    ),
    "quick": Grid(
        matmul=((64, 128, 128), (256, 256, 128), (256, 512, 256)),
        memory=(64 * KIB, MIB, 4 * MIB),
        optimizer=(256 * KIB, MIB),
        attention=(64, 256),
        head_dims=(32,),
        tokens=256,
        width=256,
        collective=(4 * KIB, 256 * KIB, MIB),
        concurrency_tokens=128,
        repeats=2,
        seconds=1e-3,
        between=2e-3,
    ),
}


@dataclass(frozen=True)
class Case:
    """Something to time: call(i) runs it once on operands number i."""

    kind: str
    sizes: tuple[float, ...]
    call: Callable[[int], object]
    precision: str = ""


class Operands:
    """Tensors cut from one pool that is larger than the caches of a processor, one behind the other.

    A training step comes back to a tensor after it has touched many others; operands that lie in the cache from the
    last repetition would be too fast.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, elements: int) -> None:
        self.pool = torch.randn(elements, device=device).to(dtype)
        self.position = 0

    def take(self, *shape: int) -> Tensor:
        """The next tensor of this shape, a leaf that needs a gradient."""
        count = math.prod(shape)
        if self.position + count > self.pool.numel():
            self.position = 0
        part = self.pool[self.position : self.position + count]
        self.position += count
        return part.view(shape).requires_grad_()

    def sets(self, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
        """As many sets of tensors as the pool holds, between 2 and 64."""
        count = self.pool.numel() // sum(math.prod(shape) for shape in shapes)
        return [[self.take(*shape) for shape in shapes] for _ in range(max(2, min(64, count)))]


def cycling(function: Callable[..., object], sets: Sequence[Sequence[Tensor]]) -> Callable[[int], object]:
    return lambda i: function(*sets[i % len(sets)])


def time_cases(cases: Sequence[Case], grid: Grid, device: torch.device) -> list[Sample]:
    """Median seconds of each case, in rounds over all cases."""
    counts = []
    for case in cases:
        first, second = call_seconds(case, 1, device), call_seconds(case, 1, device)
        counts.append(max(1, min(200, int(grid.seconds / min(first, second)))))
    rounds = [
        [call_seconds(case, count, device) for case, count in zip(cases, counts, strict=True)]
        for _ in range(1 + grid.repeats)
    ]
    # The first round takes its results' memory from the system, the others from what it gave back.
    return [
        sample(case.kind, case.sizes, times, case.precision)
        for case, times in zip(cases, zip(*rounds[1:], strict=True), strict=True)
    ]


def call_seconds(case: Case, count: int, device: torch.device) -> float:
    """Seconds of one call, averaged over `count` calls. The results live until the end, as activations do."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The device waits until the host has queued the calls: their launches do not count.
        torch.cuda._sleep(int(2e5 * count))
        start.record()
        results = [case.call(i) for i in range(count)]
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count
    begin = time.perf_counter()
    results = [case.call(i) for i in range(count)]  # noqa: F841
    return (time.perf_counter() - begin) / count


def sample(kind: str, sizes: Sequence[float], seconds: Sequence[float], precision: str = "") -> Sample:
    """The median and the spread of repeated timings."""
    p10, median, p90 = (float(v) for v in np.percentile(seconds, (10, 50, 90)))
    return Sample(kind, tuple(float(s) for s in sizes), median, p10, p90, precision)


def together_seconds(case: Case, count: int, device: torch.device) -> float:
    """Seconds of one call on this rank, after all ranks have met."""
    dist.barrier()
    start = now(device)
    for i in range(count):
        case.call(i)
    return (now(device) - start) / count
