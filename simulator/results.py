"""What comes out: a Prediction before a run, a Measurement after it, with the same names for the same things."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import NamedTuple

from simulator.files import STRICT
from simulator.layout import Layout

# What the fields of Breakdown and of MemoryBreakdown mean, for whoever reads them in a table.
TIME_MEANING = {
    "compute": "kernels",
    "recompute": "forward again, to save memory",
    "tp": "tensor-parallel collectives that nothing hides",
    "cp": "context-parallel exchange that nothing hides",
    "ep": "expert exchange that nothing hides",
    "pp": "waiting for a tensor on a link",
    "dp": "gradients and parameters that nothing hides",
    "bubble": "waiting for another stage or replica",
    "optimizer": "update and gradient norm",
    "host": "launching kernels that the device outruns",
}
MEMORY_MEANING = {
    "parameters": "weights",
    "gradients": "summed over the microbatches",
    "optimizer": "moments, and fp32 weights where the others are narrower",
    "activations": "kept for the backward, times the microbatches alive",
    "buffers": "gathered weights, tensors on the way",
    "overhead": "device context, communicators, fragmentation",
}


@dataclass(frozen=True)
class Breakdown:
    """Seconds of one step on the critical rank; they sum to the step. Communication counts where it is exposed."""

    compute: float = 0.0
    recompute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    pp: float = 0.0
    dp: float = 0.0
    bubble: float = 0.0
    optimizer: float = 0.0
    host: float = 0.0

    __pydantic_config__ = STRICT

    def total(self) -> float:
        return float(sum(getattr(self, f.name) for f in dataclasses.fields(self)))


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes of one rank at its peak; `peak` is their sum."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    overhead: float
    peak: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class MemoryMoment:
    """Bytes of one pipeline rank around one op of its program, named as its span is, without the `PP:` in front:
    `during` at the op's fullest, `after` when it has ended. The largest `during.peak` of a rank is its peak."""

    op: str
    during: MemoryBreakdown
    after: MemoryBreakdown

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Span:
    """One op on one rank's stream: `compute`, `send`, `recv` or `dp`. Pipeline ops are named as torch's profiler
    names them: `PP:2F0`."""

    rank: int
    stream: str
    name: str
    start: float
    seconds: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class MemorySample:
    """What a rank holds from this moment on: at the begin of an op what it takes, at its end what it leaves. The first
    of a rank is its step's begin, with no op; the largest peak of a rank is its peak."""

    rank: int
    seconds: float
    op: str
    memory: MemoryBreakdown

    __pydantic_config__ = STRICT


class Timeline(NamedTuple):
    """One step of every simulated rank: its spans in the order in which they end, and its memory over time.
    `rank` is the pipeline rank, which stands for all that do the same."""

    spans: tuple[Span, ...] = ()
    memory: tuple[MemorySample, ...] = ()


@dataclass(frozen=True)
class Synchronisation:
    """Many steps of replicas that differ or wait for each other little, simulated one by one. A step is done whenever
    as many updates have come in as there are replicas.

    mean and p95 are seconds of a step; computing, communicating and waiting those of a replica's own, which sum to the
    mean but for the replicas that were under way at the end. staleness counts updates by how many others came between
    the parameters that they were made from and themselves: ((0, 12), (3, 88)). lead is how many steps a replica was
    ahead of the slowest at most.
    """

    steps: int
    mean: float
    p95: float
    computing: float
    communicating: float
    waiting: float
    waiting_p95: float
    staleness: tuple[tuple[int, int], ...]
    mean_staleness: float
    lead: int
    events: int
    changes_mathematics: bool = False

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Interval:
    """Seconds of a step between which it is expected with a probability of `level`, and what says so."""

    low: float
    high: float
    level: float
    source: str

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Prediction:
    """One layout of one job, predicted. `memory` is the fullest rank's; memory_per_stage is by pipeline rank.

    synchronisation is there for ways other than an all-reduce, and where ranks or steps differ; step_seconds is then
    its mean.

    mfu counts model FLOPs (ModelSpec.flops_per_token) over the device's data-sheet peak; hfu adds recomputation.
    out_of_memory_probability is that of a true peak above the memory there is, given how far peaks are off (risk.py);
    interval is that of step_seconds, given how far steps are off (error_bars.py).
    """

    layout: Layout
    fits: bool
    problems: tuple[str, ...]
    step_seconds: float
    tokens_per_second: float
    tokens_per_second_per_gpu: float
    mfu: float
    hfu: float
    breakdown: Breakdown
    memory: MemoryBreakdown
    memory_per_stage: tuple[MemoryBreakdown, ...]
    out_of_memory_probability: float
    timeline: Timeline = field(default=Timeline(), compare=False)
    synchronisation: Synchronisation | None = None
    interval: Interval | None = None

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Quantiles:
    """Spread of the step time in seconds."""

    median: float
    p10: float
    p90: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Updates:
    """Updates that parameter servers applied. staleness[n] of them met parameters with n more updates of others in them
    than those that they were computed from; lead[n] of them came from a replica that was n updates ahead of the slowest
    when it began to compute, which the layout's `staleness` bounds. by_replica are those of each replica."""

    staleness: tuple[int, ...]
    lead: tuple[int, ...]
    by_replica: tuple[int, ...]

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Sharding:
    """An epoch, cut among replicas: samples that each owns, the largest share over the mean one less 1, and how many
    samples are left out or seen twice in an epoch."""

    sizes: tuple[float, ...]
    imbalance: float
    dropped: int
    repeated: int

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Measurement:
    """One layout, run for real. Steps and losses are without and with the warm-up respectively: `losses` and
    `grad_norms` hold every step from the first, the step times leave the first `warmup` steps out. Where replicas do
    not wait for each other a step is as many updates as there are replicas, of whomever, and its loss and norm are
    their means. peak_memory is what each rank needs, reserved_memory what it took at most, with what its allocator
    keeps of what was freed."""

    layout: Layout
    world_size: int
    steps: int
    warmup: int
    step_seconds: Quantiles
    tokens_per_second: float
    peak_memory: tuple[float, ...]
    losses: tuple[float, ...]
    grad_norms: tuple[float, ...]
    device: str
    versions: dict[str, str]
    updates: Updates | None = None
    sharding: Sharding | None = None
    reserved_memory: tuple[float, ...] = ()
    version: int = 1

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class MeasuredTimeline:
    """One step of every rank, profiled. Spans are those of a Timeline, but `rank` is the global rank; `seconds` is the
    step on its slowest rank, the profiler's own work included."""

    layout: Layout
    step: int
    seconds: float
    device: str
    spans: tuple[Span, ...]
    version: int = 1

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Collective:
    """Collectives or messages of one kind along one axis in one step: how many, and the bytes of their buffers."""

    name: str
    axis: str
    count: int
    bytes: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class TrackedMemory:
    """Bytes of tensors at the fullest moment of a step. `temporary` is what a backward makes besides gradients of
    parameters; gathered parameters count as activations or as temporary, by when they were gathered."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    temporary: float
    peak: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Alone:
    """One rank, run without the others. step_seconds is its own work, None where tensors were fake; `communication` is
    what the simulator says that the rank's collectives are."""

    layout: Layout
    rank: int
    coordinates: dict[str, int]
    fake: bool
    step_seconds: float | None
    memory: TrackedMemory
    collectives: tuple[Collective, ...]
    communication: tuple[Collective, ...]
    device: str
    versions: dict[str, str]
    version: int = 1

    __pydantic_config__ = STRICT
