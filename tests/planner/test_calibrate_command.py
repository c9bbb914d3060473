"""`layoutwise calibrate`: profile and measured runs from their files, the new profile into its own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from planner.cli import app
from planner.plan import write_plan
from planner.search import plan
from simulator.calibrate import constants, scaled
from simulator.errors import UserError
from simulator.files import write_json
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.profile import Profile, cluster_of, read_profile
from simulator.results import Measurement, Quantiles
from simulator.simulate import simulate
from tests.simulator.test_calibrate import profile

LAYOUTS = (Layout(), Layout(micro_batch_size=4), Layout(dp_replicate=2), Layout(dp_replicate=2, micro_batch_size=4))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A profile, and four runs on a machine whose ranks share processors worse than it says."""
    file = write_json(tmp_path / "profile.json", profile())
    job = build_job(
        {
            "model": "llama-bytes-12m", "cluster": "this-machine", "nodes": 1, "profile": str(file),
            "training": {"global_batch_size": 8, "seq_len": 128},
        },
        "job",
    )  # fmt: skip
    true = scaled(profile(), {"concurrency.2": 0.7})
    for number, layout in enumerate(LAYOUTS):
        _write_run(tmp_path / f"run{number}", job, layout, true)
    return tmp_path


def _write_run(folder: Path, job: Job, layout: Layout, true: Profile) -> None:
    found = plan(dataclasses.replace(job, search={"dp_replicate": [1], "dp_shard": [1], "tp": [1], "pp": [1]}), top=1)
    write_plan(dataclasses.replace(found, job=job, best=simulate(job, layout)), folder / "plan.json")
    seconds = simulate(dataclasses.replace(job, cluster=cluster_of(true)), layout).step_seconds
    step = Quantiles(seconds, 0.99 * seconds, 1.01 * seconds)
    run = Measurement(layout, layout.world_size, 20, 5, step, 1.0, (1.0,), (1.0,), (1.0,), "cpu", {})
    write_json(folder / "measurement.json", run)


def test_what_changed_is_written_and_the_rest_is_as_it_was(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = runs / "new.json"
    app(["calibrate", str(runs / "profile.json"), str(runs), "-o", str(new), "--json"], standalone_mode=False)
    document = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in document["changed"]] == ["concurrency.2"]
    assert document["refused"]["host.dtensor"] == "no measured layout has tensor parallelism"
    assert len(document["checked"]) == 4
    before, after = constants(profile()), constants(read_profile(new))
    assert after["concurrency.2"] == pytest.approx(0.7 * before["concurrency.2"], rel=0.05)
    assert {name for name in before if after[name] != before[name]} == {"concurrency.2"}


def test_the_result_says_why_others_stayed(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    app(["calibrate", str(runs / "profile.json"), str(runs)], standalone_mode=False)
    said = capsys.readouterr().out
    assert "median error of runs that the fit did not use" in said
    assert "host.dtensor stays: no measured layout has tensor parallelism" in said


def test_a_measurement_without_its_plan_is_refused(runs: Path) -> None:
    (runs / "run0" / "plan.json").unlink()
    with pytest.raises(UserError, match=r"run0/measurement.json' has no plan.json beside it"):
        app(["calibrate", str(runs / "profile.json"), str(runs / "run0" / "measurement.json")], standalone_mode=False)


def test_a_folder_without_measurements_is_refused(runs: Path) -> None:
    (runs / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty' holds no measurement.json"):
        app(["calibrate", str(runs / "profile.json"), str(runs / "empty")], standalone_mode=False)


def test_a_plan_of_another_layout_is_refused(runs: Path) -> None:
    (runs / "run0" / "plan.json").write_text((runs / "run2" / "plan.json").read_text())
    with pytest.raises(UserError, match=r"is of the layout '.*', but '.*' is a plan of"):
        app(["calibrate", str(runs / "profile.json"), str(runs)], standalone_mode=False)
