"""Where the time of a step goes, below its breakdown: kernels and their rates, collectives and their links."""

from __future__ import annotations

from simulator.job import Job
from simulator.program import build_program
from simulator.results import Prediction
from simulator.step_parts import KernelPart, StepParts, TransferPart, critical_rank, step_parts
from simulator.units import show_bytes, show_seconds

# Rows of each table; what is left of the kernels is one more.
MOST_KERNELS, MOST_TRANSFERS = 8, 8


def parts_of(job: Job, prediction: Prediction) -> StepParts:
    """The parts of the step of the rank whose seconds the prediction's breakdown holds."""
    program = build_program(job, prediction.layout)
    rank = critical_rank(job, prediction.layout, program.stages, prediction.breakdown)
    return step_parts(job, prediction.layout, program, rank)


def kernel_rows(parts: StepParts, prediction: Prediction, job: Job) -> list[tuple[str, str, str, str]]:
    """(kernel, seconds of a step, its share, rate reached) of the kernels that take longest, forward and backward."""
    rows = [
        (k.name, show_seconds(k.seconds), f"{k.seconds / prediction.step_seconds:.1%}", _rate(k, job))
        for k in parts.kernels[:MOST_KERNELS]
    ]
    if left := sum(k.seconds for k in parts.kernels[MOST_KERNELS:]):
        rows.append(("others", show_seconds(left), f"{left / prediction.step_seconds:.1%}", ""))
    if parts.accumulation > 1e-6 * prediction.step_seconds:
        share = f"{parts.accumulation / prediction.step_seconds:.1%}"
        rows.append(("adding up gradients", show_seconds(parts.accumulation), share, ""))
    return rows


def _rate(part: KernelPart, job: Job) -> str:
    if not part.seconds:
        return ""
    if part.kind == "memory":
        used = part.bytes / part.seconds
        return f"{used / 1e9:,.0f} GB/s ({used / job.cluster.gpu.memory_bandwidth:.0%})"
    gpu, reached = job.cluster.gpu, part.flops / part.seconds
    peak = gpu.peak[gpu.arithmetic(job.training.precision)]
    rate = f"{reached / 1e12:,.0f} TFLOP/s" if reached >= 1e12 else f"{reached / 1e9:,.0f} GFLOP/s"
    return f"{rate} ({reached / peak:.0%})"


def transfer_rows(parts: StepParts, prediction: Prediction) -> list[tuple[str, ...]]:
    """(axis, collective, times and size, over what, seconds of each, bus bandwidth, seconds of all alone on their
    links) of what takes longest. The bandwidth is that of the group: the ranks of a node share its network cards."""
    found = sorted(parts.transfers, key=lambda t: -t.seconds)[:MOST_TRANSFERS]
    return [
        (
            t.axis, t.kind.replace("_", "-"), f"{t.count:,.0f} x {show_bytes(t.bytes)}", over(t),
            show_seconds(t.seconds / t.count), f"{t.bandwidth / 1e9:,.1f} GB/s", show_seconds(t.seconds),
        )
        for t in found if t.seconds > 1e-4 * prediction.step_seconds
    ]  # fmt: skip


def over(part: TransferPart) -> str:
    """`NVLink 4, NVSwitch (8 ranks)`; between nodes or racks with their number; with the links that are waited for
    where they are others."""
    if part.axis == "pp":
        return part.link
    where = f", {part.domains} nodes or racks" if part.domains > 1 else ""
    limit = f"; limited by {part.limited_by}" if part.limited_by != part.link else ""
    return f"{part.link} ({part.ranks} ranks{where}{limit})"


def parts_json(parts: StepParts) -> dict[str, object]:
    """The document of `explain --json`: everything, in SI."""
    return {
        "rank": parts.rank,
        "kernels": [vars(kernel) for kernel in parts.kernels],
        "accumulation": parts.accumulation,
        "transfers": [vars(transfer) for transfer in parts.transfers],
    }
