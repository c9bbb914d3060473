"""A rank's Chrome trace of one step -> the spans of its pipeline ops, named and placed as the simulator's are.

The trace holds ranges of host time: `PP:2F0` and the like from torch's schedule runtime (from runtime/step.py where
there is no pipeline), and in them the waits that runtime/profiler.py marks. A forward or backward counts without its
waits: a wait for a neighbour's tensor goes to the stream `recv` (`PP:2RECV_F0`), one for gathered parameters to `dp`
(`PP:2UNSHARD`), which is where the simulator has them. Where there are kernels of a GPU an op lasts from its first
kernel to its last, whichever thread launched them. Nothing here imports torch.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Mapping
from typing import Any

from simulator.results import Span

STEP, OPTIMIZER = "STEP", "OPTIMIZER"
WAIT_RECV, WAIT_UNSHARD = "WAIT recv", "WAIT unshard"
_OP = re.compile(r"PP:(?P<stage>\d+)(?P<kind>[A-Z_]*?[A-Z])(?P<microbatch>\d*)")
_STREAMS = {
    **dict.fromkeys(("SEND_F", "SEND_B"), "send"),
    **dict.fromkeys(("RECV_F", "RECV_B"), "recv"),
    **dict.fromkeys(("UNSHARD", "REDUCE_GRAD"), "dp"),
}
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")

Event = Mapping[str, Any]


def read_spans(trace: Mapping[str, Any], rank: int) -> list[Span]:
    """The spans of one rank in seconds since its step began.

    Raises ValueError if the trace holds no range of the step.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    ranges = sorted((e for e in events if e.get("cat") == "user_annotation"), key=lambda e: (e["ts"], -e["dur"]))
    step = next((e for e in ranges if e["name"] == STEP), None)
    if step is None:
        raise ValueError(f"the trace of rank {rank} holds no range '{STEP}'")
    ops = [e for e in ranges if _is_op(e["name"]) and _within(e, step)]
    waits = [e for e in ranges if e["name"] in (WAIT_RECV, WAIT_UNSHARD)]
    kernels = _kernels(events, ops)
    spans = []
    for number, op in enumerate(ops):
        inside = [wait for wait in waits if _within(wait, op)]
        spans += [_span(rank, _stream(name), name, w["ts"], w["dur"], step) for w in inside if (name := _waited(op, w))]
        stream = _stream(op["name"])
        if number in kernels and stream == "compute":
            begin, end = kernels[number]
        else:
            end = op["ts"] + op["dur"]
            begin = end - (op["dur"] - sum(wait["dur"] for wait in inside))
        spans.append(_span(rank, stream, op["name"], begin, end - begin, step))
    return sorted(spans, key=lambda span: (span.start, span.start + span.seconds))


def align(spans: Iterable[Span]) -> list[Span]:
    """The spans of all ranks, with the optimizer of each beginning when the last rank has begun: until then it waits
    for the gradient norm of that rank, which the simulator calls a bubble."""
    found = list(spans)
    last = max((span.start for span in found if span.name == OPTIMIZER), default=0.0)
    return [
        Span(s.rank, s.stream, s.name, last, max(0.0, s.start + s.seconds - last)) if s.name == OPTIMIZER else s
        for s in found
    ]


def _span(rank: int, stream: str, name: str, begin: float, length: float, step: Event) -> Span:
    return Span(rank, stream, name, (begin - step["ts"]) / 1e6, length / 1e6)


def _is_op(name: str) -> bool:
    return (name.startswith("PP:") and not name.endswith("RESHARD")) or name == OPTIMIZER


def _within(inner: Event, outer: Event) -> bool:
    """Ranges end in the order in which they nest, but for the clock's rounding."""
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + 1e-2


def _stream(name: str) -> str:
    match = _OP.fullmatch(name)
    return _STREAMS.get(match["kind"], "compute") if match else "compute"


def _waited(op: Event, wait: Event) -> str:
    """What an op waited for, as an op; empty for a pair of ops, of which a wait does not say whose it is."""
    match = _OP.fullmatch(op["name"])
    if match is None:
        return ""
    if wait["name"] == WAIT_UNSHARD:
        return f"PP:{match['stage']}UNSHARD"
    return f"PP:{match['stage']}RECV_{'F' if match['kind'] == 'F' else 'B'}{match['microbatch']}"


def _kernels(events: Iterable[Event], ops: list[Event]) -> dict[int, tuple[float, float]]:
    """Begin and end of the kernels that each op launched, by its place: a launch belongs to the op in whose range it
    lies, because the host does one op at a time, its backward in a thread of autograd's. NCCL's kernels wait for other
    ranks and are left out."""
    begins = [op["ts"] for op in ops]
    launched: dict[int, int] = {}
    on_device = []
    for event in events:
        correlation = event.get("args", {}).get("correlation")
        if correlation is None:
            continue
        if event.get("cat") in _ON_DEVICE and not event["name"].lower().startswith("nccl"):
            on_device.append((correlation, event))
        elif event.get("cat") in _LAUNCHES:
            place = bisect.bisect_right(begins, event["ts"]) - 1
            if place >= 0 and _within(event, ops[place]):
                launched[correlation] = place
    found: dict[int, tuple[float, float]] = {}
    for correlation, event in on_device:
        if (place := launched.get(correlation, -1)) >= 0:
            begin, end = found.get(place, (event["ts"], 0.0))
            found[place] = min(begin, event["ts"]), max(end, event["ts"] + event["dur"])
    return found
