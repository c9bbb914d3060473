"""Why one layout of a job is slower than another, term by term: the differences of all items of two breakdowns add up
to the difference of the steps, and each has its cause from what the two layouts do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

from planner.bottleneck import axis_words, bubble_words
from planner.step_report import parts_of
from simulator.expert_parallel import per_shard
from simulator.job import Job
from simulator.layout import Layout
from simulator.program import stage_costs
from simulator.results import TIME_MEANING, Breakdown, Prediction
from simulator.step_parts import StepParts
from simulator.units import show_seconds

# Differences below this share of the step have no sentence of their own.
LEAST_SHARE = 0.005


@dataclass(frozen=True)
class Term:
    """One item of a step: what the other layout takes of it more than the first (below zero: less), in seconds, and
    why."""

    name: str
    seconds: float
    cause: str


@dataclass(frozen=True)
class _Side:
    """A prediction with the parts of its step."""

    job: Job
    prediction: Prediction
    parts: StepParts

    def seconds(self, name: str) -> float:
        return float(getattr(self.prediction.breakdown, name))


def terms(job: Job, first: Prediction, other: Prediction) -> list[Term]:
    """What `other` takes longer than `first`, by item, most first; they sum to the difference of the steps."""
    one = _Side(job, first, parts_of(job, first))
    two = _Side(job, other, parts_of(job, other))
    found = []
    for field in fields(Breakdown):
        seconds = two.seconds(field.name) - one.seconds(field.name)
        if one.seconds(field.name) or two.seconds(field.name):
            found.append(Term(field.name, seconds, _CAUSES[field.name](one, two)))
    return sorted(found, key=lambda term: -abs(term.seconds))


def term_lines(found: Sequence[Term], first: Prediction) -> list[str]:
    """A sentence for each term that matters, what costs most first, then what saves; what is left in one."""
    step, small = first.step_seconds, 0.0
    lines = []
    for term in sorted(found, key=lambda term: -term.seconds):
        if abs(term.seconds) < LEAST_SHARE * step:
            small += term.seconds
            continue
        lines.append(f"{term.name} {_signed(term.seconds)} ({term.seconds / step:+.1%} of the step): {term.cause}")
    if small:
        lines.append(f"everything else {_signed(small)}")
    return lines


def summary(found: Sequence[Term], name: str, first: Prediction, other: Prediction, most: int = 2) -> str:
    """One sentence: how much slower, and the terms that make most of it."""
    slower = other.step_seconds - first.step_seconds
    towards = [t for t in found if t.seconds * slower > 0][:most]
    because = "; ".join(f"{t.name} {_signed(t.seconds)} ({TIME_MEANING[t.name]})" for t in towards)
    return (
        f"{name} ({other.layout.short()}) takes {show_seconds(other.step_seconds)}, {_signed(slower)} "
        f"({slower / first.step_seconds:+.1%})" + (f", most of it {because}" if because else "")
    )


def _signed(seconds: float) -> str:
    return f"{'+' if seconds >= 0 else '-'}{show_seconds(abs(seconds))}"


def _cuts(layout: Layout) -> str:
    """The sizes that a kernel's shape follows from: `tp=8 micro_batch_size=2`."""
    axes = [f"{axis}={getattr(layout, axis)}" for axis in ("cp", "ep") if getattr(layout, axis) > 1]
    return " ".join([f"tp={layout.tp}", *axes, f"micro_batch_size={layout.micro_batch_size}"])


def _instead(one: object, two: object) -> str:
    """`two instead of one`, or what both are."""
    return f"{two} instead of {one}" if one != two else f"{two}"


def _compute(one: _Side, two: _Side) -> str:
    """More to do, or the same at a lower rate."""
    said = [words for words in (_more_flops(one, two), _lower_rate(one, two), _more_memory(one, two)) if words]
    added = [side.parts.accumulation for side in (one, two)]
    if abs(added[1] - added[0]) > 1e-3 * one.prediction.step_seconds:
        times = _instead(*map(show_seconds, added))
        said.append(f"gradients are added up over microbatches in {times}")
    if not one.job.stragglers.none:
        said.append("replicas and steps differ in speed")
    return "; ".join(said) or "the same kernels"


def _more_flops(one: _Side, two: _Side) -> str:
    flops = [side.parts.flops for side in (one, two)]
    if not flops[0] or abs(flops[1] / flops[0] - 1) <= 0.002:
        return ""
    total = one.job.model.num_hidden_layers
    facts = {
        f"of {total} blocks": [side.parts.blocks for side in (one, two)],
        "data-parallel ranks": [side.prediction.layout.dp for side in (one, two)],
        "tensor ranks, which repeat what is not cut": [side.prediction.layout.tp for side in (one, two)],
    }
    why = [f"{_instead(*values)} {words}" for words, values in facts.items() if values[0] != values[1]]
    more = f"{flops[1] / flops[0] - 1:+.1%} FLOPs on the rank that the step waits for"
    return f"{more} ({', '.join(why) or 'uneven stages'})"


def _lower_rate(one: _Side, two: _Side) -> str:
    rates = [side.parts.flops / side.parts.arithmetic if side.parts.arithmetic else 0.0 for side in (one, two)]
    if not rates[0] or abs(rates[1] / rates[0] - 1) <= 0.002:
        return ""
    cuts = _instead(*(_cuts(side.prediction.layout) for side in (one, two)))
    unit, name = (1e12, "TFLOP/s") if min(rates) >= 1e12 else (1e9, "GFLOP/s")
    return f"matmuls and attention at {rates[1] / unit:,.1f} instead of {rates[0] / unit:,.1f} {name} ({cuts})"


def _more_memory(one: _Side, two: _Side) -> str:
    memory = [sum(k.seconds for k in side.parts.kernels if k.kind == "memory") for side in (one, two)]
    if not memory[0] or abs(memory[1] / memory[0] - 1) <= 0.01:
        return ""
    whole = two.prediction.layout.tp > 1 and not two.prediction.layout.sequence_parallel
    every = " (without sequence parallelism every tensor rank does all of them)" if whole else ""
    return f"kernels that memory bounds take {_instead(*map(show_seconds, memory))}{every}"


def _recompute(one: _Side, two: _Side) -> str:
    kinds = [side.prediction.layout.recompute for side in (one, two)]
    words = {"none": "nothing runs again", "selective": "the stack's selective part runs again in every backward",
             "full": "every block's forward runs again in its backward"}  # fmt: skip
    return f"recompute={kinds[1]}, {words[kinds[1]]}" + (f", not {kinds[0]}" if kinds[0] != kinds[1] else "")


def _axis(axis: str) -> Callable[[_Side, _Side], str]:
    def cause(one: _Side, two: _Side) -> str:
        said = []
        for side in (two, one):
            layout = side.prediction.layout
            size = {"dp": f"{layout.dp_replicate} x {layout.dp_shard}, ZeRO {layout.zero_stage}"}.get(axis)
            shown = f"{axis}={size if size is not None else getattr(layout, axis)}"
            said.append(f"{shown}: {axis_words(side.parts, axis, side.seconds(axis))}")
        return "; instead of ".join(said) if said[0] != said[1] else said[0]

    return cause


def _bubble(one: _Side, two: _Side) -> str:
    said = []
    for side in (two, one):
        layout = side.prediction.layout
        said.append(f"pp={layout.pp}: " + (bubble_words(layout, side.job) if layout.pp > 1 else "nobody to wait for"))
    return "; instead of ".join(said) if said[0] != said[1] else said[0]


def _optimizer(one: _Side, two: _Side) -> str:
    held = []
    for side in (two, one):
        layout, stages = side.prediction.layout, stage_costs(side.job, side.prediction.layout)
        own = [stages[s] for s in layout.stages_of(side.parts.rank)]
        share = per_shard(layout, side.job.stack, sum(s.parameters for s in own), sum(s.experts for s in own))
        held.append(f"{share / 1e9:,.3g} B parameters with ZeRO {layout.zero_stage}")
    return f"each rank updates {held[0]}" + (f" instead of {held[1]}" if held[0] != held[1] else "")


def _host(one: _Side, two: _Side) -> str:
    return (
        f"kernels that are shorter than their launches: {_instead(*(_cuts(s.prediction.layout) for s in (one, two)))}"
    )


_CAUSES: dict[str, Callable[[_Side, _Side], str]] = {
    "compute": _compute, "recompute": _recompute, **{axis: _axis(axis) for axis in ("tp", "cp", "ep", "pp", "dp")},
    "bubble": _bubble, "optimizer": _optimizer, "host": _host,
}  # fmt: skip
