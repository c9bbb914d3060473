"""One profiled step: the ops that the simulator predicts are those that ran, in the same order."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_jobs import tiny_plan

from planner.plan import write_plan
from runtime.here import run_here
from runtime.settings import Settings
from simulator.errors import UserError
from simulator.files import read_json, to_dataclass
from simulator.layout import Layout
from simulator.program import OPTIMIZER
from simulator.results import MeasuredTimeline
from simulator.schedules import compute_order

LAYOUTS = [
    Layout(dp_replicate=2, micro_batch_size=2),
    Layout(pp=2, schedule="Interleaved1F1B", virtual_stages=2, micro_batch_size=2),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.short)
def test_the_ops_that_run_are_those_that_are_simulated(layout: Layout, text_folder: Path, tmp_path: Path) -> None:
    plan = tiny_plan(layout, data=str(text_folder))
    path = write_plan(plan, tmp_path / "plan.json")
    folder = tmp_path / "profile"
    measured = run_here(path, tmp_path / "m.json", Settings(4, 1, profile=folder), timeout=120)
    assert len(measured.losses) == 4
    timeline = to_dataclass(MeasuredTimeline, read_json(folder / "timeline.json", "timeline"), "timeline")
    assert (timeline.layout, timeline.step) == (layout, 4)
    # The profiled step is in no quantile.
    assert timeline.seconds > 0
    microbatches = layout.microbatches(plan.job.training.global_batch_size)
    for rank in range(2):
        stage = layout.coordinates(rank)["pp"]
        if layout.pp > 1:
            order = compute_order(layout.schedule, stage, layout.pp, layout.virtual_stages, microbatches)
            expected = [f"PP:{op}" for op in order]
        else:
            expected = [f"PP:0{kind}{n}" for n in range(microbatches) for kind in "FB"]
        ran = [span.name for span in timeline.spans if span.rank == rank and span.stream == "compute"]
        assert ran == [*expected, str(OPTIMIZER)]
        trace = json.loads((folder / f"trace-rank-{rank}.json").read_text())
        assert any(event["name"].startswith("aten::mm") for event in trace["traceEvents"])


def test_a_profile_leaves_a_step_to_measure(tmp_path: Path) -> None:
    path = write_plan(tiny_plan(Layout()), tmp_path / "plan.json")
    with pytest.raises(UserError, match=r"steps = 2 must be at least warmup\(1\) \+ 2"):
        run_here(path, tmp_path / "m.json", Settings(2, 1, profile=tmp_path))
