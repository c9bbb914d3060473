"""A predicted and a measured step joined op by op: both sides name every span as torch's profiler does (`PP:2F0`)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from planner.plan import Plan
from simulator.files import read_json, to_dataclass, write_json, write_text
from simulator.results import MeasuredTimeline, Prediction, Span
from simulator.simulate import simulate

KINDS = {
    "F": "forward",
    "B": "backward",
    "I": "backward, input's gradient",
    "W": "backward, weights' gradients",
    "OVERLAP_F_B": "forward and backward together",
    "OPTIMIZER": "norm, clipping, update",
    "RECV_F": "waiting for activations",
    "RECV_B": "waiting for gradients",
    "UNSHARD": "gathering parameters",
    "REDUCE_GRAD": "reducing gradients",
}
# Ops that occupy the rank; of the rest both sides see different things (a message's way, the posting of it).
COMPUTE = ("F", "B", "I", "W", "OVERLAP_F_B", "OPTIMIZER")
_FULL = re.compile(r"PP:(?P<stage>\d+)(?P<kind>[A-Z_]*[A-Z])\d*")
_NAME = re.compile(r"(?:PP:)?(?:\d+|\(.*\))?(?P<kind>[A-Z_]*[A-Z])\d*")


@dataclass(frozen=True)
class OpTime:
    """Seconds of one op on one rank (global number), predicted and measured."""

    rank: int
    name: str
    predicted: float
    measured: float

    @property
    def kind(self) -> str:
        return kind_of(self.name)


@dataclass(frozen=True)
class Total:
    """Seconds of several ops together."""

    name: str
    count: int
    predicted: float
    measured: float

    @property
    def ratio(self) -> float:
        """Predicted over measured; 0 where nothing was measured."""
        return self.predicted / self.measured if self.measured else 0.0


def kind_of(name: str) -> str:
    """F of `PP:2F0`, RECV_B of `PP:0RECV_B3`, OVERLAP_F_B of a pair."""
    match = _NAME.fullmatch(name)
    return match["kind"] if match else name


def join(prediction: Prediction, measured: MeasuredTimeline) -> list[OpTime]:
    """Every op of a known kind, rank by rank in the order in which it ran; one that a side does not have takes it no
    time. Spans of one name on one rank count together. A measured rank stands beside its pipeline rank, which is
    predicted for all that do the same. Where no rank has an op for its reduction, as DDP and FSDP without a pipeline,
    it happened inside of the last backward, which is predicted to take longer by what of it outlasts that."""
    found = _seconds(measured.spans)
    within = not any(kind_of(name) == "REDUCE_GRAD" for taken in found.values() for name in taken)
    spans = prediction.timeline.spans
    predicted = _seconds(_reduced_within(spans) if within else spans)
    rows = []
    for rank in range(measured.layout.world_size):
        expected = predicted.get(measured.layout.coordinates(rank)["pp"], {})
        taken = found.get(rank, {})
        rows += [OpTime(rank, n, expected.get(n, 0.0), taken.get(n, 0.0)) for n in dict.fromkeys([*taken, *expected])]
    return rows


def _reduced_within(spans: Sequence[Span]) -> list[Span]:
    """The spans, with each reduction as a part of the backward before it that lasts until the reduction's end."""
    found: list[Span] = []
    last: dict[int, Span] = {}
    ends: dict[int, float] = {}
    for span in sorted(spans, key=lambda span: span.start):
        kind, rank, end = kind_of(_joined_name(span)), span.rank, span.start + span.seconds
        if kind == "REDUCE_GRAD" and rank in last:
            beyond = max(0.0, end - max(span.start, ends[rank]))
            found.append(dataclasses.replace(last[rank], start=end - beyond, seconds=beyond))
            ends[rank] = max(ends[rank], end)
            continue
        found.append(span)
        if kind in ("B", "W"):
            last[rank], ends[rank] = span, max(ends.get(rank, 0.0), end)
    return found


def _seconds(spans: Iterable[Span]) -> dict[int, dict[str, float]]:
    """Seconds by rank and name."""
    found: dict[int, dict[str, float]] = {}
    for span in sorted(spans, key=lambda span: span.start):
        name = _joined_name(span)
        if kind_of(name) in KINDS:
            of_rank = found.setdefault(span.rank, {})
            of_rank[name] = of_rank.get(name, 0.0) + span.seconds
    return found


def _joined_name(span: Span) -> str:
    """The simulator names a collective after the op that it follows; torch has an op of its own for a reduction."""
    if span.stream == "dp" and (match := _FULL.fullmatch(span.name)) and match["kind"] in ("B", "W"):
        return f"PP:{match['stage']}REDUCE_GRAD"
    return span.name


def total(name: str, rows: Sequence[OpTime]) -> Total:
    return Total(name, len(rows), sum(row.predicted for row in rows), sum(row.measured for row in rows))


def totals_by_kind(rows: Sequence[OpTime]) -> list[Total]:
    """One total for every kind that there is, all ranks together, and one for all that compute."""
    found = [total(kind, chosen) for kind in KINDS if (chosen := [row for row in rows if row.kind == kind])]
    return [*found, total("computation", [row for row in rows if row.kind in COMPUTE])]


def totals_by_rank(rows: Sequence[OpTime]) -> list[Total]:
    """The computation of every rank."""
    ranks = sorted({row.rank for row in rows})
    return [total(f"rank {r}", [row for row in rows if row.rank == r and row.kind in COMPUTE]) for r in ranks]


def timeline_page(prediction: Prediction, measured: MeasuredTimeline, figure: str) -> str:
    """Markdown: the step, the totals by kind and by rank, and every op."""
    rows = join(prediction, measured)
    ops = [Total(row.name, row.rank, row.predicted, row.measured) for row in rows]
    return "\n".join(
        [
            f"# Step {measured.step} of `{measured.layout.short()}`, predicted and measured",
            "",
            f"Predicted {prediction.step_seconds * 1e3:.2f} ms; measured {measured.seconds * 1e3:.2f} ms under the "
            f"profiler, whose own work is in it ({measured.device}). Ratios are predicted over measured.",
            "",
            f"![predicted over measured]({figure})",
            "",
            _table("kind", "ops", totals_by_kind(rows)),
            _table("computation of", "ops", totals_by_rank(rows)),
            _table("op", "rank", ops),
        ]
    )


def _table(first: str, second: str, totals: Sequence[Total]) -> str:
    lines = [f"| {first} | {second} | predicted ms | measured ms | ratio |", "|---|---:|---:|---:|---:|"]
    lines += [f"| {' | '.join(cells(one))} |" for one in totals]
    return "\n".join(lines) + "\n"


def cells(one: Total) -> list[str]:
    """A total as texts: name, count, milliseconds predicted and measured, ratio."""
    ratio = f"{one.ratio:.2f}" if one.measured else "-"
    return [one.name, str(one.count), f"{one.predicted * 1e3:.3f}", f"{one.measured * 1e3:.3f}", ratio]


def write_timeline(plan: Plan, folder: Path) -> tuple[list[Total], list[Path]]:
    """Predict the plan's step again with its spans, and put it beside `folder`/timeline.json: timeline.md with its
    figure, and both timelines as Chrome traces. Returns the totals by kind, and what was written.

    Raises UserError if there is no timeline.json of this layout.
    """
    from reports.plots import timelines
    from reports.trace import chrome_trace, measured_trace

    path = folder / "timeline.json"
    measured = to_dataclass(MeasuredTimeline, read_json(path, "timeline"), f"timeline '{path}'")
    prediction = simulate(plan.job, plan.layout, trace=True)
    figure = timelines(prediction, measured, folder / "timeline.png")
    written = [
        write_text(folder / "timeline.md", timeline_page(prediction, measured, figure.name)),
        figure,
        write_json(folder / "predicted.trace.json", chrome_trace(prediction)),
        write_json(folder / "measured.trace.json", measured_trace(measured)),
    ]
    return totals_by_kind(join(prediction, measured)), written
