"""A predicted timeline as a Chrome trace: open it in ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from simulator.results import MeasuredTimeline, Prediction, Span

STREAMS = ("compute", "send", "recv", "dp")
# From what is there all the time to what comes and goes.
ITEMS = ("overhead", "parameters", "optimizer", "gradients", "buffers", "activations")
_MESSAGE = re.compile(r"PP:(?P<stage>\d+)(?P<way>SEND|RECV)_(?P<kind>[FB])(?P<microbatch>\d+)")

Event = dict[str, Any]


def chrome_trace(prediction: Prediction) -> dict[str, Any]:
    """The timeline as `traceEvents`, times in microseconds.

    A process per pipeline rank; a thread per stream, and further ones where spans of a stream overlap; an arrow from
    every send to its receive; a counter of bytes, by item.
    """
    alike = prediction.layout.world_size // prediction.layout.pp
    many = f" ({alike} alike)" if alike > 1 else ""
    events = _processes(prediction.timeline.spans, lambda rank: f"pipeline rank {rank}{many}")
    return {"traceEvents": [*events, *_arrows(events), *_memory(prediction)], "displayTimeUnit": "ms"}


def measured_trace(timeline: MeasuredTimeline) -> dict[str, Any]:
    """A measured step in the same form, a process per rank; the arrows stay within a copy of the pipeline."""
    events = _processes(timeline.spans, lambda rank: f"rank {rank}")
    place = {rank: timeline.layout.coordinates(rank) | {"pp": 0} for rank in {span.rank for span in timeline.spans}}
    copies = {timeline.layout.rank(**place[rank]) for rank in place}
    arrows = [
        arrow | {"id": f"{copy}-{arrow['id']}"}
        for copy in sorted(copies)
        for arrow in _arrows([e for e in events if timeline.layout.rank(**place[e["pid"]]) == copy])
    ]
    return {"traceEvents": [*events, *arrows], "displayTimeUnit": "ms"}


def _processes(spans: Sequence[Span], name: Callable[[int], str]) -> list[Event]:
    """The spans of every rank on the threads of a process, with their names."""
    events: list[Event] = []
    for rank in sorted({span.rank for span in spans}):
        events.append(_named("process_name", rank, 0, name(rank)))
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        threads = [
            (stream, lane)
            for stream in STREAMS
            for lane in _lanes(span for span in spans if span.rank == rank and span.stream == stream)
        ]
        for tid, (stream, lane) in enumerate(threads):
            events.append(_named("thread_name", rank, tid, stream))
            events += [_complete(span, tid) for span in lane]
    return events


def _lanes(spans: Iterable[Span]) -> list[list[Span]]:
    """Spans of one stream on as few lines as they need to not overlap; at least one line."""
    lanes: list[list[Span]] = [[]]
    for span in sorted(spans, key=lambda span: span.start):
        free = (lane for lane in lanes if not lane or lane[-1].start + lane[-1].seconds <= span.start * (1 + 1e-12))
        lane = next(free, None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(span)
    return lanes


def _complete(span: Span, tid: int) -> Event:
    times = {"ts": span.start * 1e6, "dur": span.seconds * 1e6}
    return {"ph": "X", "pid": span.rank, "tid": tid, "name": span.name, "cat": span.stream, **times}


def _arrows(events: list[Event]) -> Iterator[Event]:
    """A flow from the begin of every send to the end of its receive."""
    sent: dict[tuple[str, int, int], Event] = {}
    received: dict[tuple[str, int, int], Event] = {}
    for event in events:
        match = _MESSAGE.fullmatch(event["name"]) if event["ph"] == "X" else None
        if match is None:
            continue
        kind, stage, microbatch = match["kind"], int(match["stage"]), int(match["microbatch"])
        if match["way"] == "SEND":
            sent[kind, stage + (1 if kind == "F" else -1), microbatch] = event
        else:
            # A measured rank posts a receive and waits for it later: the last span of the name is the wait.
            received[kind, stage, microbatch] = event
    for number, (key, end) in enumerate(received.items()):
        begin = sent[key]
        arrow = {"name": f"{key[0]}{key[2]}", "cat": "message", "id": number}
        yield {**arrow, "ph": "s", "pid": begin["pid"], "tid": begin["tid"], "ts": begin["ts"]}
        yield {**arrow, "ph": "f", "bp": "e", "pid": end["pid"], "tid": end["tid"], "ts": end["ts"] + end["dur"]}


def _memory(prediction: Prediction) -> Iterator[Event]:
    """Bytes of each rank over time, by item: a stack of areas whose largest height is the rank's peak."""
    for sample in prediction.timeline.memory:
        held = {item: getattr(sample.memory, item) for item in ITEMS}
        yield {"ph": "C", "pid": sample.rank, "name": "memory (bytes)", "ts": sample.seconds * 1e6, "args": held}


def _named(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
