"""Where the memory goes: by pipeline stage, over the step, and which moment of which rank decides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from simulator.job import Job
from simulator.memory import capacity
from simulator.results import MemoryBreakdown, MemorySample, Prediction
from simulator.risk import needed
from simulator.units import show_bytes, show_seconds

ITEMS = tuple(field.name for field in fields(MemoryBreakdown) if field.name != "peak")
WIDTH, HEIGHT = 72, 8
BLOCKS, PLAIN_BLOCKS = " ▁▂▃▄▅▆▇█", " .:#"


@dataclass(frozen=True)
class Binding:
    """What decides whether a layout fits: the fullest pipeline rank, the op at which it is fullest, that op's second
    of the step, its largest item, and the bytes that are left then (below zero where it does not fit)."""

    rank: int
    op: str
    seconds: float
    item: str
    bytes: float
    peak: float
    free: float


def binding(job: Job, prediction: Prediction) -> Binding:
    """Of a prediction with its timeline."""
    fullest = max(fullest_samples(prediction), key=lambda sample: sample.memory.peak)
    item = max(ITEMS, key=lambda name: float(getattr(fullest.memory, name)))
    free = capacity(job, prediction.layout) - needed(job, prediction.layout, prediction.memory_per_stage)
    held = float(getattr(fullest.memory, item))
    return Binding(fullest.rank, fullest.op, fullest.seconds, item, held, fullest.memory.peak, free)


def binding_sentence(job: Job, prediction: Prediction) -> str:
    """The binding constraint in words, with how much memory is free."""
    found = binding(job, prediction)
    layout, limit = prediction.layout, capacity(job, prediction.layout)
    share = found.seconds / prediction.step_seconds if prediction.step_seconds else 0.0
    where = f"pipeline rank {found.rank} of {layout.pp}" if layout.pp > 1 else "every rank"
    alike = layout.world_size // layout.pp
    many = f" ({alike} alike)" if layout.pp > 1 and alike > 1 else ""
    left = f"{show_bytes(found.free)} of {show_bytes(limit)} are free"
    if found.free < 0:
        left = f"{show_bytes(-found.free)} more than the {show_bytes(limit)} there are"
    shared = "" if job.cluster.gpu.kind == "gpu" else " per rank (ranks share the machine's memory)"
    return (
        f"{where}{many} is fullest at {found.op or 'the begin'}, {show_seconds(found.seconds)} into the step "
        f"({share:.0%}): {show_bytes(found.peak)}, most of it {found.item} ({show_bytes(found.bytes)}); {left}{shared}"
    )


def fullest_samples(prediction: Prediction) -> list[MemorySample]:
    """The memory over the step of the rank whose peak is the highest."""
    peaks = [memory.peak for memory in prediction.memory_per_stage]
    rank = peaks.index(max(peaks))
    return [sample for sample in prediction.timeline.memory if sample.rank == rank]


def stage_rows(prediction: Prediction) -> list[tuple[str, MemoryBreakdown]]:
    """Memory by pipeline rank; neighbours with the same bytes are one row."""
    groups: list[tuple[int, int, MemoryBreakdown]] = []
    for rank, memory in enumerate(prediction.memory_per_stage):
        if groups and all(math.isclose(getattr(groups[-1][2], i), getattr(memory, i), rel_tol=1e-3) for i in ITEMS):
            first, _, held = groups[-1]
            groups[-1] = (first, rank, max(held, memory, key=lambda m: m.peak))
        else:
            groups.append((rank, rank, memory))
    return [(str(first) if first == last else f"{first}-{last}", memory) for first, last, memory in groups]


def chart(
    samples: Sequence[MemorySample], seconds: float, limit: float, width: int = WIDTH, blocks: str = BLOCKS
) -> list[str]:
    """The memory of one rank over a step as lines of text: the largest of each stretch of time, over what is there all
    the time; a dashed line is the memory there is. An axis that does not begin at zero says so. Below it the items that
    change, each from its least to its most.

    Args:
        samples: of one rank, in the order of time.
        seconds: of the step.
        limit: bytes that the rank may use.
        blocks: characters from empty to full.
    """
    total = _heights(samples, seconds, width, "peak")
    top, least = max(limit, *total), min(sample.memory.peak for sample in samples)
    # Most of it never changes: the axis begins below what does.
    floor = max(0.0, least - (top - least) / 4)
    step = (top - floor) / HEIGHT
    marked = min(HEIGHT, math.ceil((limit - floor) / step - 1e-9)) - 1
    lines = []
    for row in reversed(range(HEIGHT)):
        cells = "".join(_cell((value - floor) / step - row, blocks) for value in total)
        if row == marked:
            cells = cells.replace(" ", "-")
        label = f"{(floor + step * (row + 1)) / 2**30:6.1f}" if row % 2 else " " * 6
        lines.append(f"{label} |{cells}")
    lines.append(f"{floor / 2**30:6.1f} +{'-' * width}")
    lines.append(f"{'GiB':>6}  0 s{show_seconds(seconds).rjust(width - 3)}")
    if floor > 0:
        lines.append(f"        the axis begins at {floor / 2**30:.1f} GiB, not at zero")
    for item in ITEMS:
        values = _heights(samples, seconds, width, item)
        low = min(float(getattr(sample.memory, item)) for sample in samples)
        # What fragments goes with what is held.
        if item != "overhead" and max(values) - low > 1e-3 * top:
            line = "".join(_cell((value - low) / (max(values) - low), blocks) for value in values)
            lines.append(f"        {line}  {item}, {show_bytes(low)} to {show_bytes(max(values))}")
    return lines


def _cell(filled: float, blocks: str) -> str:
    """The character for a cell that is filled to this part; something is never nothing."""
    steps = len(blocks) - 1
    return blocks[min(steps, math.ceil(filled * steps - 1e-9))] if filled > 0 else blocks[0]


def _heights(samples: Sequence[MemorySample], seconds: float, width: int, item: str) -> list[float]:
    """The largest value within each of `width` equal stretches of the step."""
    found = [0.0] * width
    for place, sample in enumerate(samples):
        until = samples[place + 1].seconds if place + 1 < len(samples) else seconds
        first = min(width - 1, int(sample.seconds / seconds * width)) if seconds else 0
        last = min(width - 1, max(first, math.ceil(until / seconds * width - 1e-9) - 1)) if seconds else width - 1
        value = float(getattr(sample.memory, item))
        for column in range(first, last + 1):
            found[column] = max(found[column], value)
    return found
