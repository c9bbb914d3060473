"""What keeps the recommended layout from being faster: each cause with the seconds that are lost to it.

    memory      by search: the fastest layout of the same space on devices that hold everything, and what it lacks
    tp ... pp   what the breakdown books on an axis: links that were infinitely fast would save this layout that much
    bubble      the same for stages that wait for each other
    device      kernels, over the time that the step's model FLOPs take at the rate that a large matmul sustains

The binding constraint is the largest of them. They do not add up: with more memory there would be less of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.plan import Plan
from planner.search import plan
from planner.step_report import over
from planner.what_if import without_memory_limit
from simulator.files import plain
from simulator.job import Job
from simulator.layout import Layout
from simulator.memory import capacity
from simulator.results import Prediction
from simulator.risk import needed
from simulator.step_parts import StepParts
from simulator.units import show_bytes, show_seconds

NAMES = {
    "tp": "the tensor axis", "cp": "the context axis", "ep": "the expert axis", "pp": "messages between stages",
    "dp": "the data-parallel axis",
}  # fmt: skip
# Causes that cost less of a step than this are not worth a line.
LEAST_SHARE = 0.005
# Schedules whose idle part has the textbook's closed form, and those that have it in each of their chunks.
PLAIN, CHUNKED = ("GPipe", "1F1B"), ("Interleaved1F1B", "LoopedBFS")


@dataclass(frozen=True)
class Constraint:
    """What is in the way: `seconds` of a step that lifting it would save, in words why."""

    name: str
    seconds: float
    reason: str


@dataclass(frozen=True)
class OutOfReach:
    """The fastest layout of the same space if devices held everything, with the bytes that it is short of on those
    that there are; short_by below zero where it would fit, but is too likely not to."""

    prediction: Prediction
    short_by: float


def out_of_reach(read: Plan) -> OutOfReach | None:
    """Of a plan; None where what was recommended is the fastest of all, fitting or not."""
    found = plan(without_memory_limit(read.job), top=1, ties=False).best
    # What is recommended may be a little slower than the best and be preferred as the simpler one: not for memory.
    best = read.choice.best_step_seconds if read.choice else read.best.step_seconds
    if found.step_seconds >= best * (1 - 1e-9):
        return None
    need = needed(read.job, found.layout, found.memory_per_stage)
    return OutOfReach(found, need - capacity(read.job, found.layout))


def constraints(read: Plan, parts: StepParts, free: OutOfReach | None) -> list[Constraint]:
    """What costs time, most first. `parts` are those of the recommended layout's step, `free` what `out_of_reach` found
    if it was asked."""
    best, job = read.best, read.job
    found = [_memory(best, free)] if free else []
    for axis in ("tp", "cp", "ep", "pp", "dp"):
        seconds = float(getattr(best.breakdown, axis))
        found.append(Constraint(axis, seconds, f"{NAMES[axis]}: {axis_words(parts, axis, seconds)}"))
    found.append(Constraint("bubble", best.breakdown.bubble, bubble_words(best.layout, job)))
    found.append(Constraint("host", best.breakdown.host, "kernels that are shorter than their launches"))
    floor = least_seconds(job)
    found.append(Constraint("device", best.breakdown.compute - floor, _device_words(job, parts, floor)))
    kept = [one for one in found if one.seconds > LEAST_SHARE * best.step_seconds]
    return sorted(kept, key=lambda one: -one.seconds)


def least_seconds(job: Job) -> float:
    """What the model FLOPs of a step take on all devices at the rate that a large matmul sustains in training."""
    gpu, precision = job.cluster.gpu, job.training.precision
    flops = job.model.flops_per_token(job.training.seq_len)
    if job.training.peft != "none":
        flops -= job.model.frozen_flops_per_token()
    return (
        job.tokens_per_step
        * flops
        / job.world_size
        / (gpu.matmul[gpu.arithmetic(precision)].rate * gpu.clock(precision))
    )


def _memory(best: Prediction, free: OutOfReach) -> Constraint:
    other = free.prediction
    gain = best.step_seconds - other.step_seconds
    lack = (
        f"but needs {show_bytes(other.memory.peak)}, {show_bytes(free.short_by)} more than there is"
        if free.short_by > 0
        else "and would just fit, but is too likely to run out of memory"
    )
    forced = forced_by_memory(best.layout, other.layout)
    return Constraint(
        "memory",
        gain,
        f"{other.layout.short()} would take {show_seconds(other.step_seconds)}, {lack}"
        + (f"; so memory forces {', '.join(forced)}" if forced else ""),
    )


def forced_by_memory(fits: Layout, free: Layout) -> list[str]:
    """What a layout that fits does to save memory, which the fastest of all does not do."""
    order, found = ("none", "selective", "full"), []
    if order.index(fits.recompute) > order.index(free.recompute):
        found.append(f"recompute={fits.recompute} for {free.recompute}")
    if fits.micro_batch_size < free.micro_batch_size:
        found.append(f"a micro-batch of {fits.micro_batch_size} for {free.micro_batch_size}")
    for axis, words in (("pp", "a pipeline of"), ("tp", "tp over"), ("cp", "cp over"), ("ep", "experts over")):
        mine, wanted = getattr(fits, axis), getattr(free, axis)
        if mine > wanted:
            found.append(f"{words} {mine} ranks for {wanted}")
    if fits.zero_stage > free.zero_stage:
        found.append(f"ZeRO {fits.zero_stage} for {free.zero_stage}")
    elif fits.zero_stage and fits.shards > free.shards:
        found.append(f"shards over {fits.shards} ranks for {free.shards}")
    if fits.schedule != free.schedule or fits.virtual_stages < free.virtual_stages:
        found.append(f"{_schedule(fits)} for {_schedule(free)}")
    return found


def _schedule(layout: Layout) -> str:
    if layout.pp == 1:
        return "no pipeline"
    return layout.schedule + (f" with {layout.virtual_stages} stages a rank" if layout.virtual_stages > 1 else "")


def axis_words(parts: StepParts, axis: str, exposed: float) -> str:
    """What goes over an axis, how fast, and how much of it nothing hides."""
    found = parts.of(axis)
    if not found:
        # What other ways to keep replicas together send is spread over many steps.
        return "what replicas exchange to keep together" if exposed else "nothing is sent"
    first, alone = found[0], sum(t.seconds for t in found)
    hidden = max(0.0, 1 - exposed / alone) if alone else 0.0
    kind = first.kind.replace("_", "-") + ("s" if first.count > 1 else "")
    words = f"{first.count:,.0f} {kind} of {show_bytes(first.bytes)}"
    beside = f", {hidden:.0%} of {show_seconds(alone)} hidden" if hidden > 0.01 else ""
    return f"{words} at {first.bandwidth / 1e9:,.0f} GB/s over {over(first)}{beside}"


def bubble_words(layout: Layout, job: Job) -> str:
    """Why stages wait for each other."""
    count = layout.microbatches(job.training.global_batch_size)
    if layout.pp == 1:
        return "replicas wait for each other"
    if layout.schedule in PLAIN or layout.schedule in CHUNKED:
        chunks = layout.virtual_stages
        idle = (layout.pp - 1) / (count * chunks)
        formula = "(p-1)/(m v)" if chunks > 1 else "(p-1)/m"
        below = f"({count} x {chunks})" if chunks > 1 else str(count)
        return (
            f"{count} microbatches for {layout.pp} stages in a row: {formula} = {layout.pp - 1}/{below} = "
            f"{idle:.1%} of the work, and stages that differ"
        )
    return f"{layout.schedule} with {count} microbatches on {layout.pp} ranks, and stages that differ"


def _device_words(job: Job, parts: StepParts, floor: float) -> str:
    gpu = job.cluster.gpu
    peak = gpu.peak[gpu.arithmetic(job.training.precision)]
    memory = sum(k.seconds for k in parts.kernels if k.kind == "memory")
    reached = parts.flops / parts.arithmetic / peak if parts.arithmetic else 0.0
    return (
        f"{gpu.name}: matmuls and attention reach {reached:.0%} of the data sheet's peak, kernels that memory bounds "
        f"take {show_seconds(memory)}; the model's FLOPs alone take {show_seconds(floor)}, whatever the layout"
    )


def constraint_lines(found: Sequence[Constraint], best: Prediction) -> list[str]:
    """The binding constraint and those behind it, a line each."""
    if not found:
        return ["nothing keeps it from being faster but the devices themselves"]
    lines = []
    for place, one in enumerate(found):
        head = "binding constraint" if place == 0 else "then"
        share = one.seconds / best.step_seconds
        lines.append(f"{head}: {one.name}, {show_seconds(one.seconds)} ({share:.1%} of the step): {one.reason}")
    return lines


def constraints_json(found: Sequence[Constraint], free: OutOfReach | None) -> dict[str, object]:
    """The documents of `explain --json`."""
    beyond = None
    if free:
        beyond = {
            "layout": plain(free.prediction.layout),
            "step_seconds": free.prediction.step_seconds,
            "peak": free.prediction.memory.peak,
            "short_by": free.short_by,
        }
    return {"constraints": [vars(one) for one in found], "out_of_reach": beyond}
