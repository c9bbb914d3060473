"""A step's spans, small enough to travel in a page: numbers instead of names, and long steps folded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from reports.timeline import kind_of
from simulator.results import MeasuredTimeline, Prediction, Span

# About 20 bytes each; more would be slow to draw and no wider than a pixel.
MOST_SPANS = 16_000
MOST_RANKS = 16
STREAMS = ("compute", "recv", "send", "dp")
SEVERAL = "SEVERAL"
_PARTS = re.compile(r"PP:(?P<stage>\d+)(?P<kind>[A-Z_]*[A-Z])(?P<microbatch>\d*)")

Sides = dict[str, dict[int, list[Span]]]


def packed_timeline(prediction: Prediction, measured: MeasuredTimeline | None) -> tuple[dict[str, Any], list[str]]:
    """The predicted step, and the measured one beside it, as plain data, with sentences on what was folded.

    Times are whole numbers of `tick` seconds, of which a step has 10^6 to 10^7. A lane's `spans` are one flat list
    of five numbers each: kind (a place in `kinds`), stage, microbatch, ticks from the begin of the span before, ticks
    it lasts. A stage of -1 says that the third number is a place in `names`: a span whose name is no `PP:2F0`.
    """
    layout = prediction.layout
    ranks = evenly(range(layout.pp), MOST_RANKS)
    sides: Sides = {"predicted": _by_rank(prediction.timeline.spans, {rank: rank for rank in ranks})}
    if measured is not None:
        sides["measured"] = _by_rank(measured.spans, {layout.rank(pp=rank): rank for rank in ranks})
    notes = [f"{len(ranks)} of {layout.pp} pipeline ranks are shown."] if len(ranks) < layout.pp else []
    sides, folded = _fold(sides)
    notes += folded
    every = [span for side in sides.values() for spans in side.values() for span in spans]
    end = max((span.start + span.seconds for span in every), default=prediction.step_seconds)
    tick = 10.0 ** (math.floor(math.log10(end)) - 6)
    packer = _Packer(tick)
    rows = [
        {
            "rank": rank,
            "sides": [{"side": name, "lanes": packer.lanes(found[rank])} for name, found in sides.items()],
        }
        for rank in ranks
    ]
    data = {"tick": tick, "end": round(end / tick), "stages": layout.stages, "pp": layout.pp, "rows": rows}
    return data | {"kinds": list(packer.kinds), "names": list(packer.names)}, notes


def evenly(items: Sequence[int], most: int) -> list[int]:
    """At most so many of them, at even distances, the first and the last included."""
    if len(items) <= most:
        return list(items)
    return [items[round(place * (len(items) - 1) / (most - 1))] for place in range(most)]


def _by_rank(spans: Iterable[Span], shown: dict[int, int]) -> dict[int, list[Span]]:
    found: dict[int, list[Span]] = {rank: [] for rank in shown.values()}
    for span in spans:
        if span.rank in shown:
            found[shown[span.rank]].append(span)
    return found


def _fold(sides: Sides) -> tuple[Sides, list[str]]:
    """Leave messages out, then put neighbouring ops together, until there are no more than MOST_SPANS."""
    notes: list[str] = []
    if _count(sides) > MOST_SPANS:
        sides = {
            name: {rank: [s for s in spans if s.stream not in ("send", "recv")] for rank, spans in side.items()}
            for name, side in sides.items()
        }
        notes.append("Messages between pipeline ranks are left out here; the trace has them.")
    if (count := _count(sides)) > MOST_SPANS:
        together = math.ceil(count / MOST_SPANS)
        sides = {
            name: {rank: _together(spans, together) for rank, spans in side.items()} for name, side in sides.items()
        }
        notes.append(f"{together} neighbouring ops are drawn as one; the trace has each of them.")
    return sides, notes


def _count(sides: Sides) -> int:
    return sum(len(spans) for side in sides.values() for spans in side.values())


def _together(spans: list[Span], many: int) -> list[Span]:
    """Runs of `many` spans of a stream as one from the first's begin to the last's end."""
    found = []
    for stream in STREAMS:
        lane = sorted((span for span in spans if span.stream == stream), key=lambda span: span.start)
        for place in range(0, len(lane), many):
            run = lane[place : place + many]
            end = max(span.start + span.seconds for span in run)
            name = run[0].name if len(run) == 1 else f"{run[0].name} to {run[-1].name}, {len(run)} ops"
            found.append(Span(run[0].rank, stream, name, run[0].start, end - run[0].start))
    return found


class _Packer:
    """Gives kinds and odd names their numbers."""

    def __init__(self, tick: float) -> None:
        self.tick = tick
        self.kinds: dict[str, int] = {}
        self.names: dict[str, int] = {}

    def lanes(self, spans: list[Span]) -> list[dict[str, Any]]:
        """The streams that have spans, each with its spans from the first to the last."""
        found = []
        for stream in STREAMS:
            lane = sorted((span for span in spans if span.stream == stream), key=lambda span: span.start)
            if lane:
                found.append({"stream": stream, "spans": self._numbers(lane)})
        return found

    def _numbers(self, lane: list[Span]) -> list[int]:
        numbers: list[int] = []
        before = 0
        for span in lane:
            begin = round(span.start / self.tick)
            numbers += [*self._name(span.name), begin - before, round(span.seconds / self.tick)]
            before = begin
        return numbers

    def _name(self, name: str) -> tuple[int, int, int]:
        if match := _PARTS.fullmatch(name):
            microbatch = int(match["microbatch"]) if match["microbatch"] else -1
            return _place(self.kinds, match["kind"]), int(match["stage"]), microbatch
        kind = SEVERAL if " to " in name else kind_of(name)
        return _place(self.kinds, kind), -1, _place(self.names, name)


def _place(known: dict[str, int], name: str) -> int:
    return known.setdefault(name, len(known))


def busy_table(prediction: Prediction, ranks: Sequence[int]) -> list[tuple[int, float, float, float]]:
    """The timeline in figures: pipeline rank, seconds it computes, seconds of the step it does not, and its last
    moment of computing."""
    rows = []
    for rank in ranks:
        lane = [s for s in prediction.timeline.spans if s.rank == rank and s.stream == "compute"]
        busy = sum(span.seconds for span in lane)
        end = max((span.start + span.seconds for span in lane), default=0.0)
        rows.append((rank, busy, prediction.step_seconds - busy, end))
    return rows
