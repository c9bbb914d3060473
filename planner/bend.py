"""Why the scaling curve bends: which term of the breakdown grew where efficiency falls most, and what made it grow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from planner.plan import Plan
from planner.scaling import LEAST_FALL, Change, bend_of
from simulator.errors import UserError
from simulator.job import Job
from simulator.layout import Layout
from simulator.price import hours_name
from simulator.results import Breakdown
from simulator.risk import HIGH_RISK
from simulator.simulate import simulate
from simulator.units import show_nodes

# Terms below this part of the largest are counted together.
LEAST_TERM = 0.1
MOST_TERMS = 4
_NAMES = {
    "compute": "kernels",
    "tp": "exposed tensor-parallel collectives",
    "cp": "exposed context-parallel exchange",
    "ep": "exposed expert exchange",
    "pp": "messages between stages",
    "dp": "exposed gradient and parameter collectives",
    "optimizer": "update",
    "host": "launches",
}


def explained(plans: Sequence[Plan], changes: Sequence[Change]) -> tuple[tuple[Change, ...], str]:
    """The changes from each plan to the next with their causes, and a sentence on the largest fall of efficiency (per
    doubling of the nodes), then one on the largest rise."""
    plan_on = {plan.job.nodes: plan for plan in plans}
    found = []
    for change in changes:
        before, after = (plan_on[nodes] for nodes in change.nodes)
        found.append(dataclasses.replace(change, because=_cause(change, before, after)))
    if not found:
        return (), ""
    bend, rise = bend_of(found), min(found, key=lambda change: change.fall)
    words = []
    if bend is not None:
        before, after = (plan_on[nodes] for nodes in bend.nodes)
        kept = _kept(after.job, before.layout, after)
        words.append(f"The bend: {sentence(bend, after.job)}{_more(bend.because, kept)}.")
    else:
        words.append(f"No bend: efficiency never falls by more than {LEAST_FALL:.0%} from one number to the next.")
    if rise.efficiency[1] / rise.efficiency[0] - 1 > LEAST_FALL:
        before, after = (plan_on[nodes] for nodes in rise.nodes)
        kept = _kept(before.job, after.layout, before)
        said = sentence(rise, after.job)
        words.append(f"{said[0].upper()}{said[1:]}{_more('', kept)}.")
    return tuple(found), " ".join(words)


def _more(because: str, kept: str) -> str:
    said = "; ".join(part for part in (because, kept) if part)
    return f" ({said})" if said else ""


def sentence(change: Change, job: Job) -> str:
    """What the tokens take more or less, term by term. The numbers are rounded to the same digit and add up as they
    stand: what small terms and rounding leave is the last of them.

    "from 16 to 32 nodes efficiency falls from 97.1% to 84.0%: 1e9 tokens take 12.3 instead of 10.6 GPU-hours, +1.7:
    bubble +1.2, exposed tensor-parallel collectives +0.6, the rest -0.1"
    """
    before, after = change.gpu_hours
    digits = max(0, 2 - math.floor(math.log10(abs(after - before) or 1.0)))
    unit = 10.0**-digits
    shown = [round(value / unit) for value in (before, after)]
    difference = shown[1] - shown[0]
    terms = terms_of(change)
    parts = {name: round(value / unit) for name, value in terms}
    rest = difference - sum(parts.values())
    words = [f"{_NAMES.get(name, name)} {part * unit:+,.{digits}f}" for name, part in parts.items()]
    if rest:
        words.append(f"the rest {rest * unit:+,.{digits}f}")
    way = "falls" if change.efficiency[1] < change.efficiency[0] else "rises"
    return (
        f"from {change.nodes[0]} to {change.nodes[1]} nodes efficiency {way} from {change.efficiency[0]:.1%} to "
        f"{change.efficiency[1]:.1%}: 1e9 tokens take {shown[1] * unit:,.{digits}f} instead of "
        f"{shown[0] * unit:,.{digits}f} {hours_name(job)}, {difference * unit:+,.{digits}f}: {', '.join(words)}"
    )


def terms_of(change: Change) -> list[tuple[str, float]]:
    """The terms that matter, those that grew most in the direction of the whole first."""
    sign = 1 if change.gpu_hours[1] >= change.gpu_hours[0] else -1
    values = [(field.name, getattr(change.items, field.name)) for field in dataclasses.fields(Breakdown)]
    largest = max(abs(value) for _, value in values)
    kept = [(name, value) for name, value in values if value and abs(value) >= LEAST_TERM * largest]
    kept = sorted(kept, key=lambda term: -abs(term[1]))[:MOST_TERMS]
    return sorted(kept, key=lambda term: -sign * term[1])


def _cause(change: Change, before: Plan, after: Plan) -> str:
    """Where the term that grew most comes from, by the two layouts; empty where nothing grew."""
    name = max((field.name for field in dataclasses.fields(Breakdown)), key=lambda n: getattr(change.items, n))
    if getattr(change.items, name) <= 0:
        return ""
    one, two = before.layout, after.layout
    batches = [p.job.training.global_batch_size for p in (before, after)]
    if name == "bubble" and two.pp > 1:
        count = [layout.microbatches(batch) for layout, batch in zip((one, two), batches, strict=True)]
        return f"a pipeline of {two.pp} ranks has {count[1]} microbatches, one of {one.pp} had {count[0]}"
    if name in ("dp", "optimizer"):
        each = [p.job.tokens_per_step / p.job.world_size for p in (before, after)]
        what = "the gradients of a step" if name == "dp" else "an update"
        return f"{what} are for {each[1]:,.0f} tokens of a GPU, where it was {each[0]:,.0f}".replace(
            "an update are", "an update is"
        )
    if name == "recompute" and one.recompute != two.recompute:
        return f"recompute {two.recompute} instead of {one.recompute}"
    fields = ("tp", "cp", "ep", "pp", "micro_batch_size", "virtual_stages", "schedule", "recompute")
    changed = [
        f"{n} {getattr(two, n)} instead of {getattr(one, n)}" for n in fields if getattr(two, n) != getattr(one, n)
    ]
    return ", ".join(changed)


def _kept(job: Job, layout: Layout, own: Plan) -> str:
    """What the layout of another number of nodes would do on this one, with as many replicas as it has GPUs for."""
    other = _replicated(layout, job.world_size)
    if other is None:
        copies = layout.dp_replicate * layout.dp_shard
        return f"{layout.short()} needs a multiple of {layout.world_size // copies} GPUs, not {job.world_size}"
    if other == own.layout:
        return ""
    name = f"{other.short()} on {show_nodes(job.nodes)}"
    try:
        problems = other.problems(job)
    except UserError as error:
        problems = [str(error)]
    if problems:
        return f"{name} cannot be: {problems[0]}"
    prediction = simulate(job, other)
    if not prediction.fits:
        return f"{name} does not fit: {prediction.problems[0]}"
    if prediction.out_of_memory_probability > HIGH_RISK >= own.best.out_of_memory_probability:
        return f"{name} runs out of memory with a probability of {prediction.out_of_memory_probability:.0%}"
    slower = prediction.step_seconds / own.best.step_seconds - 1
    return f"{name} would take {slower:.1%} longer" if slower > 0 else ""


def _replicated(layout: Layout, world: int) -> Layout | None:
    """The layout on so many ranks by more or fewer replicas, sharded ones last; None where they do not divide."""
    for axis in ("dp_replicate", "dp_shard"):
        size, rest = divmod(getattr(layout, axis) * world, layout.world_size)
        if not rest and size:
            return dataclasses.replace(layout, **{axis: size})
    copies, rest = divmod(layout.dp * world, layout.world_size)
    if rest or not copies:
        return None
    shard, replicate = (copies, 1) if layout.zero_stage else (1, copies)
    return dataclasses.replace(layout, dp_shard=shard, dp_replicate=replicate)
