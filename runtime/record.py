"""What a run measured: step times, losses, peak memory -> Measurement."""

from __future__ import annotations

import platform
import resource
import statistics
import sys

import torch
import torch.distributed as dist

from planner.plan import Plan
from simulator.results import Measurement, Quantiles, Sharding, Updates


class Recorder:
    """Collects one rank's steps; `measurement` joins all ranks."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.grad_norms: list[float] = []
        self.updates: Updates | None = None
        self.sharding: Sharding | None = None
        # Steps in which freed memory leaves the process, and the bytes that it held in them at most.
        self.counted_steps = 0
        self.needed: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def go_on(self, before: Measurement) -> None:
        """Begin with the losses and norms that were measured up to the checkpoint that was loaded."""
        self.losses, self.grad_norms = list(before.losses), list(before.grad_norms)

    def add(self, seconds: float, loss: float, grad_norm: float) -> None:
        self.seconds.append(seconds)
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    def count_memory(self) -> None:
        """What this rank held at most until now is what it needs: from now on it keeps what it frees."""
        self.needed = peak_memory(self.device)

    def measurement(self, plan: Plan, warmup: int, profiled: bool = False) -> Measurement:
        """The same on every rank: a step lasts as long as on its slowest rank. After a checkpoint was loaded, the times
        are those of the steps since then, without as many for warm-up; at least of the last one. A last step that was
        profiled does not count in the times."""
        seconds = torch.tensor(self.seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        own = (peak_memory(self.device) if self.needed is None else self.needed, reserved_memory(self.device))
        bytes_ = torch.tensor(own, dtype=torch.float64, device=self.device)
        peaks = [torch.zeros_like(bytes_) for _ in range(dist.get_world_size())]
        dist.all_gather(peaks, bytes_)
        counted = seconds[: len(seconds) - profiled] if len(seconds) > 1 else seconds
        spread = quantiles(counted[min(warmup, len(counted) - 1) :].tolist())
        return Measurement(
            layout=plan.layout,
            world_size=dist.get_world_size(),
            steps=len(self.losses),
            warmup=warmup,
            step_seconds=spread,
            tokens_per_second=plan.job.tokens_per_step / spread.median,
            peak_memory=tuple(peak[0].item() for peak in peaks),
            reserved_memory=tuple(peak[1].item() for peak in peaks),
            losses=tuple(self.losses),
            grad_norms=tuple(self.grad_norms),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            versions={"torch": torch.__version__, "python": platform.python_version()},
            updates=self.updates,
            sharding=self.sharding,
        )


def quantiles(seconds: list[float]) -> Quantiles:
    """Median and spread of at least one number, interpolated between neighbours."""
    if len(seconds) == 1:
        return Quantiles(*seconds * 3)
    tenths = statistics.quantiles(seconds, n=10, method="inclusive")
    return Quantiles(median=statistics.median(seconds), p10=tenths[0], p90=tenths[-1])


def peak_memory(device: torch.device) -> float:
    """Bytes: what torch allocated at most since the run began on a GPU; on a CPU the largest resident set that the
    process ever had, interpreter and libraries included."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def reserved_memory(device: torch.device) -> float:
    """Bytes that the process took at most, with what the allocator kept of what was freed."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device))
    return peak_memory(device)
