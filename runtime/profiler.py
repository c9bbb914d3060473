"""One step under torch.profiler: a Chrome trace per rank, and the spans of all ranks as timeline.json."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules
from torch.profiler import ProfilerActivity, profile, record_function

from planner.plan import Plan
from runtime.spans import STEP, WAIT_RECV, WAIT_UNSHARD, align, read_spans
from simulator.files import write_json
from simulator.results import MeasuredTimeline, Span


class StepProfiler:
    """Profiles one step of a run; `folder` gets trace-rank-N.json of every rank, and timeline.json of rank 0."""

    def __init__(self, folder: Path, step: int, device: torch.device) -> None:
        self.folder, self.step, self.device = folder, step, device
        self.spans: list[Span] = []

    @contextlib.contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Profile what is inside, if this is the step to profile. All ranks begin it together."""
        if step != self.step:
            yield
            return
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device.type == "cuda")
        with _marked_waits(), profile(activities=activities) as profiler:
            dist.barrier()
            with record_function(STEP):
                yield
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"trace-rank-{dist.get_rank()}.json"
        profiler.export_chrome_trace(str(path))
        self.spans = read_spans(json.loads(path.read_text(encoding="utf-8")), dist.get_rank())

    def write_timeline(self, plan: Plan, seconds: float) -> None:
        """Gather the spans of all ranks and write them on rank 0. `seconds` is what the step took on this rank."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (seconds, self.spans))
        if dist.get_rank() != 0:
            return
        spans = align(span for _, found in gathered for span in found)
        longest = max(taken for taken, _ in gathered)
        timeline = MeasuredTimeline(plan.layout, self.step + 1, longest, self.device.type, tuple(spans))
        write_json(self.folder / "timeline.json", timeline)


@contextlib.contextmanager
def _marked_waits() -> Iterator[None]:
    """Ranges around the two places where torch's schedule runtime waits inside a forward or backward: for a
    neighbour's tensor and for gathered parameters. It has no ranges of its own there (torch 2.13)."""
    runtime = schedules._PipelineScheduleRuntime
    with (
        mock.patch.object(schedules, "_wait_batch_p2p", _marked(schedules._wait_batch_p2p, WAIT_RECV)),
        mock.patch.object(runtime, "_assert_unsharded", _marked(runtime._assert_unsharded, WAIT_UNSHARD)),
    ):
        yield


def _marked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def marked(*arguments: Any) -> Any:
        with record_function(name):
            return function(*arguments)

    return marked
