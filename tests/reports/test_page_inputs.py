"""What lies beside a plan and is put into its page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from page_reader import data_of, read
from pages import exam_document, make_folder, make_plan, scaling_beside

from planner.plan import Plan
from planner.scaling import write_scaling
from reports.page import write_report
from reports.page_charts import pareto_chart, scaling_chart
from reports.page_inputs import find_inputs, read_exam, step_interval
from reports.synchronisation import SyncRow, run_folder
from simulator.errors import UserError
from simulator.files import write_json
from simulator.layout import Layout
from simulator.price import dollars


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


def test_ways_to_keep_replicas_together_have_their_losses_over_time(plan: Plan, tmp_path: Path) -> None:
    """Two replicas, 40 steps of a second, of half a second asynchronously. A point is a mean over 2 steps: 9.5, 8.5."""
    losses, ways = [10.0 - step for step in range(4)] * 10, {"servers, synchronous": 1.0, "servers, asynchronous": 0.5}
    rows = []
    for name, seconds in ways.items():
        rows.append(SyncRow(name, "", seconds, None, 1 / seconds, None, None, 7.0, 7.0, None, None, None))
        metrics = [
            {
                "loss_metrics/global_avg_loss": loss,
                "ntokens_seen": 64.0 * (n + 1),
                "time_metrics/end_to_end(s)": seconds,
            }
            for n, loss in enumerate(losses)
        ]
        folder = run_folder(tmp_path, 2, name)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    write_json(tmp_path / "sync.json", {"trial": {}, "workers": {"2": rows}, "median_abs_error": None})
    write_report(plan, find_inputs(plan, tmp_path), tmp_path)
    text = (tmp_path / "report.html").read_text()
    words = " ".join(read(text).words)
    assert "2 replicas" in words and "servers, asynchronous" in words and "500 ms" in words
    slow, fast = data_of(text)["charts"]["ways-2"]["series"]
    assert [point[:2] for point in slow["points"][:3]] == [[1.0, 10.0], [2.0, 9.5], [3.0, 8.5]]
    assert fast["points"][-1][:2] == [20.0, 7.5]
    (run_folder(tmp_path, 2, "servers, synchronous") / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics '.*servers-synchronous.metrics.jsonl' cannot be read"):
        find_inputs(plan, tmp_path)
    (tmp_path / "sync.json").write_text('{"workers": {"2": [{"name": 1}]}}')
    with pytest.raises(UserError, match=r"trial '.*sync.json'"):
        find_inputs(plan, tmp_path)


def test_the_exam_counts_rows_that_compare(plan: Plan, tmp_path: Path) -> None:
    exam = read_exam(make_folder(tmp_path, plan) / "validation.json")
    assert [row.id for row in exam.compared] == ["a", "b", "c"]


def test_an_interval_is_the_predictions_own(plan: Plan) -> None:
    found = plan.best.interval
    assert found and step_interval(plan.best) == (found.low, found.high)
    assert step_interval(dataclasses.replace(plan.best, interval=None)) is None


def test_bad_files_beside_a_plan_are_one_sentence(plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "validation.json").write_text('{"summary": {}}')
    with pytest.raises(UserError, match="has no 'rows'"):
        find_inputs(plan, tmp_path)
    document = exam_document()
    document["rows"][0]["error"] = "much"
    (tmp_path / "validation.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"rows\.0\.error"):
        find_inputs(plan, tmp_path)


def test_a_profile_of_another_layout_is_named_and_left_out(plan: Plan, tmp_path: Path) -> None:
    make_folder(tmp_path, plan)
    other = dataclasses.replace(plan, best=dataclasses.replace(plan.best, layout=Layout(dp_replicate=16)))
    inputs = find_inputs(other, tmp_path)
    assert inputs.measured is None and "another layout" in inputs.notes[0]
    # The run is put beside the prediction of what ran.
    assert inputs.comparisons[0].prediction.layout == plan.layout


def test_runs_in_a_folder_are_compared(plan: Plan, tmp_path: Path) -> None:
    make_folder(tmp_path, plan, measured=False)
    make_folder(tmp_path / "runs" / "data-parallel-16", plan)
    (found,) = find_inputs(plan, tmp_path).comparisons
    assert found.name == "data parallel 16" and found.error == pytest.approx(-0.5)
    assert found.memory_error == pytest.approx(1.0)


def test_the_scaling_of_the_same_job_is_shown(plan: Plan, tmp_path: Path) -> None:
    """Twice the GPUs at the same step are half as efficient, cost twice as much and are no faster."""
    make_folder(tmp_path, plan, measured=False)
    scaling = scaling_beside(plan)
    assert [(row.efficiency, row.on_front) for row in scaling.rows] == [(1.0, True), (0.5, False)]
    write_scaling(scaling, tmp_path / "scaling.json")
    inputs = find_inputs(plan, tmp_path)
    assert inputs.scaling == scaling and inputs.notes == ()
    chart = scaling_chart(scaling)
    assert [point[0] for point in chart["series"][1]["points"]] == [16, 32]
    assert [point[1] for point in chart["series"][1]["points"]] == pytest.approx(
        2 * [plan.best.tokens_per_second], rel=1e-5
    )
    beaten, front = pareto_chart(scaling)["series"]
    assert (len(beaten["points"]), len(front["points"])) == (1, 1)
    assert front["points"][0][0] == pytest.approx(dollars(plan.best, plan.job), rel=1e-5)
    for other in ({"nodes": 3}, {"search": {}}):
        job = dataclasses.replace(plan.job, **other)
        theirs = dataclasses.replace(scaling, job=job)
        write_scaling(theirs, tmp_path / "scaling.json")
        found = find_inputs(plan, tmp_path)
        # Another number of nodes is what a scaling is about; another search is another job.
        assert (found.scaling is None) == ("search" in other)
    assert "another job" in found.notes[0]
