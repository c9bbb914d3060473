"""A predicted timeline as a Chrome trace: open it in ui.perfetto.dev or chrome://tracing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from simulator.results import Span

_STREAMS = ("compute", "pp", "dp")


def chrome_trace(spans: Iterable[Span]) -> dict[str, Any]:
    """Spans as `traceEvents`: a process per pipeline rank, a thread per stream, times in microseconds."""
    spans = list(spans)
    events: list[dict[str, Any]] = []
    for rank in sorted({span.rank for span in spans}):
        events.append(_name("process_name", rank, 0, f"pipeline rank {rank}"))
        events += [_name("thread_name", rank, tid, stream) for tid, stream in enumerate(_STREAMS)]
    for span in spans:
        events.append(
            {
                "ph": "X",
                "pid": span.rank,
                "tid": _STREAMS.index(span.stream),
                "name": span.name,
                "cat": span.stream,
                "ts": span.start * 1e6,
                "dur": span.seconds * 1e6,
            }
        )
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}
