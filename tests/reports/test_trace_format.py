"""Traces keep to the Trace Event Format, so that Perfetto and chrome://tracing load them whole."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pages import make_folder, make_plan

from reports.page import write_report
from reports.page_inputs import find_inputs

Events = list[dict[str, Any]]
# What each phase needs besides `ph` (Trace Event Format, "Event Descriptions").
NEEDS = {
    "X": {"name", "cat", "pid", "tid", "ts", "dur"},
    "s": {"name", "cat", "pid", "tid", "ts", "id"},
    "f": {"name", "cat", "pid", "tid", "ts", "id", "bp"},
    "C": {"name", "pid", "ts", "args"},
    "M": {"name", "pid", "args"},
}


@pytest.fixture(scope="module", params=["predicted", "measured"])
def events(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Events:
    plan = make_plan(search={"pp": [2], "tp": [2], "virtual_stages": [1, 2]})
    folder = make_folder(tmp_path_factory.mktemp("trace"), plan)
    written = write_report(plan, find_inputs(plan, folder), folder)
    (path,) = [path for path in written if path.name == f"{request.param}.trace.json"]
    assert path == folder / "report" / path.name
    found: dict[str, Any] = json.loads(Path(path).read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found["displayTimeUnit"] in ("ms", "ns")
    return list(found["traceEvents"])


def test_events_have_what_their_phase_needs(events: Events) -> None:
    assert {"X", "s", "f", "M"} <= {event["ph"] for event in events} <= NEEDS.keys()
    for event in events:
        assert NEEDS[event["ph"]] <= event.keys() and isinstance(event["name"], str)
        numbers = [event[key] for key in ("ts", "dur", "pid", "tid") if key in event]
        assert all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers)
        assert all(isinstance(event.get(key, 0), int) for key in ("pid", "tid"))


def test_counters_are_numbers(events: Events) -> None:
    for event in events:
        if event["ph"] == "C":
            assert event["args"] and all(isinstance(value, int | float) for value in event["args"].values())


def test_flows_pair_up_within_spans(events: Events) -> None:
    """An id begins once and ends once, later; both ends lie in a span of their thread, to which they are bound."""
    begins, ends = ({e["id"]: e for e in events if e["ph"] == ph} for ph in "sf")
    assert begins.keys() == ends.keys() and begins
    assert set(Counter(e["id"] for e in events if e["ph"] in "sf").values()) == {2}
    spans: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for e in events:
        if e["ph"] == "X":
            spans.setdefault((e["pid"], e["tid"]), []).append((e["ts"], e["ts"] + e["dur"]))
    for number, begin in begins.items():
        end = ends[number]
        assert begin["ts"] <= end["ts"] and (begin["name"], begin["cat"]) == (end["name"], end["cat"])
        for one in (begin, end):
            around = spans[one["pid"], one["tid"]]
            assert any(low - 1e-6 <= one["ts"] <= high + 1e-6 for low, high in around)


def test_processes_and_threads_are_named_once(events: Events) -> None:
    named = Counter((e["name"], e["pid"], e.get("tid")) for e in events if e["ph"] == "M")
    assert set(named.values()) == {1}
    threads = {(pid, tid) for name, pid, tid in named if name == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= threads
