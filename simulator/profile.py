"""Profile: what was measured on a machine, the constants fitted to it, and the cluster `this-machine` made of them.

The samples stay in the file beside the constants, so that anyone can fit them again. Every fit is a linear least
squares of relative errors with coefficients that cannot be negative.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from simulator.cluster import (
    AttentionFit,
    AttentionKernel,
    ClusterSpec,
    CollectiveFit,
    Gpu,
    HostFit,
    Link,
    MatmulFit,
)
from simulator.collectives import bus_bytes
from simulator.errors import UserError
from simulator.files import STRICT, read_json, to_dataclass

VERSION = 1
# Ranks per processor that a machine without GPUs may carry: enough to try hybrids on two cores.
CPU_OVERSUBSCRIBE = 2.0


@dataclass(frozen=True)
class Sample:
    """One timing: the median of interleaved repetitions, with the spread between the 10th and 90th percentile; means of
    both where they were repeated later.

    kind is "matmul" (sizes m, n, k), "memory" and "optimizer" (bytes read and written), "attention_forward" and
    "attention_backward" (batch, heads, seq, head_dim, causal 0 or 1), "host_forward", "host_backward", "dtensor"
    (no sizes), "concurrency" and "streaming" (ranks that compute, or update parameters, at once), "compute_alone"
    and "compute_overlapped" (ranks; a product, and the same beside an all-reduce), or a collective's name (ranks,
    bytes, and ranks that share the processors meanwhile, where they are more).
    """

    kind: str
    sizes: tuple[float, ...]
    seconds: float
    p10: float
    p90: float
    precision: str = ""

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Changed:
    """A constant that measured runs changed, and the standard deviation of its logarithm that they leave."""

    name: str
    before: float
    after: float
    spread: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Calibration:
    """What measured runs changed in a profile (calibrate.py): when, how many runs, and the median error of the step
    time of runs that the fit did not use, before and after."""

    created: str
    runs: int
    changed: tuple[Changed, ...]
    error_before: float
    error_after: float

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Profile:
    """Constants of one machine with their samples, the date and the library versions they come from. Constants that
    `calibrations` name are no longer those that the samples give."""

    name: str
    created: str
    versions: dict[str, str]
    kind: str
    devices: int
    memory: float
    process_memory: float
    matmul: dict[str, MatmulFit]
    memory_bandwidth: float
    attention: tuple[AttentionKernel, ...]
    host: HostFit
    link_bandwidth: float
    link_latency: float
    collectives: dict[str, tuple[CollectiveFit, ...]]
    concurrency: tuple[float, ...]
    samples: tuple[Sample, ...]
    overlap_slowdown: float = 0.0
    optimizer_efficiency: float = 0.0
    streaming: tuple[float, ...] = ()
    calibrations: tuple[Calibration, ...] = ()
    version: int = VERSION

    __pydantic_config__ = STRICT


def read_profile(path: Path | str) -> Profile:
    """The profile in a file that `layoutwise measure` wrote. Raises UserError if it is not one."""
    data = read_json(path, "profile")
    if data.get("version") != VERSION:
        raise UserError(f"profile '{path}': version = {data.get('version')!r} is not {VERSION}; measure again")
    return to_dataclass(Profile, data, f"profile '{path}'")


def cluster_of(profile: Profile) -> ClusterSpec:
    """The machine that a profile describes, as a cluster of one node per job node."""
    cpu = profile.kind == "cpu"
    gpu = Gpu(
        name=profile.name,
        kind="cpu" if cpu else "gpu",
        # Ranks on a CPU share its memory; each may use its part.
        memory=profile.memory / profile.devices if cpu else profile.memory,
        memory_bandwidth=profile.memory_bandwidth,
        memory_efficiency=1.0,
        reduction_efficiency=1.0,
        peak={precision: fit.rate for precision, fit in profile.matmul.items()},
        matmul=profile.matmul,
        attention={"sdpa": profile.attention},
        host=profile.host,
        context_memory=profile.process_memory,
        # What runs beside each other on processors shares them, which the engine plays (processors.py).
        overlap_slowdown=0.0 if cpu else profile.overlap_slowdown,
        optimizer_efficiency=profile.optimizer_efficiency,
        source=f"measured {profile.created}",
        timing_spread=timing_spread(profile.samples),
    )
    link = Link("loopback" if cpu else "measured", profile.link_bandwidth, profile.link_latency, profile.collectives)
    return ClusterSpec(
        name="this-machine",
        gpu=gpu,
        gpus_per_node=profile.devices,
        scale_up=link,
        oversubscribe=CPU_OVERSUBSCRIBE if cpu else 1.0,
        concurrency=profile.concurrency,
        streaming=profile.streaming,
        source=f"measured {profile.created}",
    )


def timing_spread(samples: Sequence[Sample]) -> float:
    """ln(90th / 10th percentile) of a timing's repetitions, the median over all timings; 0 where none is known."""
    found = [float(np.log(s.p90 / s.p10)) for s in samples if s.p90 >= s.p10 > 0]
    return float(np.median(found)) if found else 0.0


def calibrate(
    samples: Sequence[Sample], kind: Literal["cpu", "gpu"] = "cpu", devices: float = float("inf")
) -> dict[str, object]:
    """The constants that samples determine, as keyword arguments of Profile.

    Args:
        kind: on a CPU the host's work for a kernel is part of its sample and taken off; a GPU works beside the host,
            and its samples are the device's alone.
        devices: processors of the machine; ranks beyond them share.

    Raises:
        UserError: samples of a kind that every profile needs are missing.
    """
    host = HostFit(*(_median(samples, kind) for kind in ("host_forward", "host_backward", "dtensor")))
    serial = host if kind == "cpu" else HostFit(0.0, 0.0)
    matmul, memory_bandwidth = _fit_matmul(samples, serial.forward), _fit_memory(samples)
    fastest = max(fit.rate for fit in matmul.values())
    # A single device has no link: then no collective is ever asked for, and messages stay in its memory.
    alone = not any(s.kind == "send_recv" for s in samples) and kind == "gpu"
    link_latency, link_bandwidth = (0.0, memory_bandwidth) if alone else _fit_link(samples, kind)
    return {
        "host": host,
        "matmul": matmul,
        "memory_bandwidth": memory_bandwidth,
        "attention": _fit_attention(samples, serial, fastest),
        "link_latency": link_latency,
        "link_bandwidth": link_bandwidth,
        "collectives": {} if alone else _fit_collectives(samples, link_bandwidth, kind),
        "concurrency": _at_once(samples, "concurrency", devices) if kind == "cpu" else (),
        # Profiles that are older have none.
        "streaming": _at_once(samples, "streaming", devices) if "streaming" in {s.kind for s in samples} else (),
        "overlap_slowdown": _overlap_slowdown(samples),
        "optimizer_efficiency": _optimizer_efficiency(samples, memory_bandwidth),
    }


def non_negative_fit(features: np.ndarray, seconds: np.ndarray, scale: np.ndarray | None = None) -> np.ndarray:
    """Coefficients >= 0 that minimise the error of features @ coefficients against seconds, relative to these seconds
    or to `scale`.

    There are at most five features, so every subset of them is tried: exact, where iterative methods are not.
    """
    scale = seconds if scale is None else scale
    weighted, target = features / scale[:, None], seconds / scale
    count = features.shape[1]
    best, best_error = np.zeros(count), float("inf")
    for size in range(1, count + 1):
        for subset in itertools.combinations(range(count), size):
            found, *_ = np.linalg.lstsq(weighted[:, subset], target, rcond=None)
            error = float(np.sum((weighted[:, subset] @ found - target) ** 2))
            if (found >= 0).all() and error < best_error - 1e-12:
                best, best_error = np.zeros(count), error
                best[list(subset)] = found
    return best


def noisy_fit(features: np.ndarray, seconds: np.ndarray, rounds: int = 10) -> np.ndarray:
    """The same for seconds that scatter by a good part of what they are: relative to the fit itself, because relative
    to the seconds those that came out short would count more than those that came out long."""
    scale = seconds
    for _ in range(rounds):
        found = non_negative_fit(features, seconds, scale)
        scale = features @ found
    return found


def _per_unit(coefficient: float, sizes: np.ndarray, seconds: np.ndarray) -> float:
    """A coefficient that noise has fitted to nothing is taken from the largest sample alone."""
    largest = int(np.argmax(sizes))
    return float(coefficient) or float(seconds[largest] / sizes[largest])


def _of(samples: Sequence[Sample], kind: str) -> list[Sample]:
    found = [s for s in samples if s.kind == kind]
    if not found:
        raise UserError(f"the profile has no samples of kind '{kind}'; measure again")
    return found


def _median(samples: Sequence[Sample], kind: str) -> float:
    return float(np.median([s.seconds for s in _of(samples, kind)]))


def _beyond(samples: list[Sample], host: float) -> np.ndarray:
    """Seconds without the host's part; a tenth is kept, so that a tiny sample stays positive."""
    seconds = np.array([s.seconds for s in samples])
    return np.maximum(seconds - host, 0.1 * seconds)


def _fit_matmul(samples: Sequence[Sample], host: float) -> dict[str, MatmulFit]:
    result = {}
    for precision in sorted({s.precision for s in _of(samples, "matmul")}):
        chosen = [s for s in _of(samples, "matmul") if s.precision == precision]
        m, n, k = np.array([s.sizes for s in chosen]).T
        features = np.stack([2 * m * n * k, 2 * m * n, 2 * n * k, 2 * m * k, np.ones_like(m)], axis=1)
        seconds = np.array([s.seconds for s in chosen])
        fitted, *sides, constant = non_negative_fit(features, seconds)
        per_flop = _per_unit(fitted, features[:, 0], seconds)
        overhead = max(0.0, float(constant) - host)
        # Where noise has fitted no arithmetic, its sides are not known either.
        k0, m0, n0 = (float(side / per_flop) if fitted else 0.0 for side in sides)
        result[precision] = MatmulFit(rate=float(1 / per_flop), k0=k0, overhead=overhead, m0=m0, n0=n0)
    return result


def _optimizer_efficiency(samples: Sequence[Sample], memory_bandwidth: float) -> float:
    """The share of the bandwidth of elementwise kernels that an optimizer step reaches; 0 where it was not measured."""
    if not any(s.kind == "optimizer" for s in samples):
        return 0.0
    return _fit_memory(samples, "optimizer") / memory_bandwidth


def _fit_memory(samples: Sequence[Sample], kind: str = "memory") -> float:
    """Bytes per second. The constant is the host's part and fitted with it: for the smallest tensors it is most of
    the time, and taking off the host's average kernel instead would leave anything."""
    chosen = _of(samples, kind)
    size = np.array([s.sizes[0] for s in chosen])
    features, seconds = np.stack([size, np.ones_like(size)], axis=1), np.array([s.seconds for s in chosen])
    return 1 / _per_unit(non_negative_fit(features, seconds)[0], size, seconds)


def _fit_attention(samples: Sequence[Sample], host: HostFit, fastest: float) -> tuple[AttentionKernel, ...]:
    kernels = []
    forward, backward = _of(samples, "attention_forward"), _of(samples, "attention_backward")
    for head_dim in sorted({int(s.sizes[3]) for s in forward}):
        kernels.append(
            AttentionKernel(
                head_dim,
                _attention_fit([s for s in forward if s.sizes[3] == head_dim], 4.0, host.forward, fastest),
                _attention_fit([s for s in backward if s.sizes[3] == head_dim], 10.0, host.backward, fastest),
            )
        )
    return tuple(kernels)


def _attention_fit(samples: list[Sample], flops_factor: float, host: float, fastest: float) -> AttentionFit:
    """Rate and half length, full and causal, from t = flops / rate · (1 + half_length / s).

    Short sequences say little about the rate of long ones: it is at most that of a matmul (`fastest`).
    """
    constants: list[float] = []
    for causal in (0, 1):
        chosen = [s for s in samples if s.sizes[4] == causal]
        batch, heads, seq, dim, _ = np.array([s.sizes for s in chosen]).T
        flops = flops_factor * batch * heads * seq**2 * dim / (1 + causal)
        per_flop, per_row = non_negative_fit(np.stack([flops, flops / seq], axis=1), _beyond(chosen, host))
        if per_flop < 1 / fastest:
            per_flop = 1 / fastest
            beyond = np.maximum(_beyond(chosen, host) - flops * per_flop, 0.0)
            per_row = float(np.median(beyond * seq / flops))
        constants += [1 / per_flop, per_row / per_flop]
    return AttentionFit(*constants)


def _fit_link(samples: Sequence[Sample], kind_of_machine: str) -> tuple[float, float]:
    # Of a pair that is alone: messages among others are fitted with the collectives.
    chosen = [s for s in _of(samples, "send_recv") if _group_of(s)[0] == _group_of(s)[1]]
    size = np.array([s.sizes[1] for s in chosen])
    features = np.stack([np.ones_like(size), size], axis=1)
    seconds = np.array([s.seconds for s in chosen])
    latency, per_byte = (noisy_fit if kind_of_machine == "cpu" else non_negative_fit)(features, seconds)
    return float(latency), 1 / _per_unit(per_byte, size, seconds)


def _group_of(sample: Sample) -> tuple[int, int]:
    """Ranks of a collective, and those that shared the processors while it was measured."""
    return int(sample.sizes[0]), int(sample.sizes[2] if len(sample.sizes) > 2 else sample.sizes[0])


def _fit_collectives(
    samples: Sequence[Sample], link: float, kind_of_machine: str
) -> dict[str, tuple[CollectiveFit, ...]]:
    result = {}
    measured = {s.kind for s in samples}
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "send_recv", *({"all_to_all"} & measured)):
        fits = []
        for ranks, active in sorted({_group_of(s) for s in _of(samples, kind)}):
            chosen = [s for s in _of(samples, kind) if _group_of(s) == (ranks, active)]
            x = np.array([bus_bytes(kind, ranks, s.sizes[1]) for s in chosen])
            seconds = np.array([s.seconds for s in chosen])
            features = np.stack([np.ones_like(x), x, np.sqrt(x)], axis=1)
            if kind_of_machine == "cpu":
                # Processors copy at one rate, and ranks that share them make every timing scatter.
                (latency, per_byte), ramp, shared = noisy_fit(features[:, :2], seconds), 0.0, active
            else:
                (latency, per_byte, ramp), shared = non_negative_fit(features, seconds), 0
            per_byte = per_byte or 1e-3 / link
            fits.append(CollectiveFit(ranks, float(latency), float(1 / per_byte / link), float(ramp), shared))
        result[kind] = tuple(fits)
    return result


def _overlap_slowdown(samples: Sequence[Sample]) -> float:
    """By how much longer compute takes while communication goes on beside it, as a share; 0 where it was not
    measured."""
    medians = {s.kind: s.seconds for s in samples if s.kind.startswith("compute_")}
    if len(medians) < 2:
        return 0.0
    return max(0.0, medians["compute_overlapped"] / medians["compute_alone"] - 1)


def _at_once(samples: Sequence[Sample], kind: str, devices: float) -> tuple[float, ...]:
    """Speed of each of k ranks that do the same at once, for k = 1, 2, ...; counts not measured are interpolated.

    Of the mean rank, as the samples are. k ranks never run at more than the whole of the machine's processors,
    whatever disturbed the first.
    """
    chosen = sorted(_of(samples, kind), key=lambda s: s.sizes[0])
    ranks = np.array([s.sizes[0] for s in chosen])
    seconds = np.array([s.seconds for s in chosen])
    speeds = seconds[0] / seconds
    counts = np.arange(1, ranks[-1] + 1)
    bound = np.minimum(1.0, devices / counts)
    return tuple(float(v) for v in np.minimum(np.interp(counts, ranks, speeds), bound))
