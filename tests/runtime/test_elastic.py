"""Ranks die, torchrun starts all of them again, and the run ends as if nothing had been."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from elastic_worker import DEATH
from tiny_jobs import tiny_plan
from workers import start_worker

from planner.plan import write_plan
from simulator.layout import Layout

LAYOUT = Layout(dp_shard=2, zero_stage=3, micro_batch_size=4)


def train(plan: Path, steps: int, every: int, deaths: list[list[Any]], output: Path) -> tuple[dict[str, Any], str]:
    """The measurement of a run on two ranks, and their stderr."""
    arguments = [str(plan), f"--steps={steps}", "--warmup=0", f"--output={output}"]
    arguments += [f"--checkpoint={output.with_suffix('')}", f"--checkpoint-every={every}"]
    written = start_worker("elastic_worker.py", 2, json.dumps(deaths), *arguments, restarts=len(deaths))
    return json.loads(output.read_text()), written


def check_equal(disturbed: dict[str, Any], undisturbed: dict[str, Any], steps: int) -> None:
    for key in ("losses", "grad_norms"):
        assert len(undisturbed[key]) == steps
        # The same layout adds up in the same order, and nothing is lost on the way through a file.
        assert disturbed[key] == undisturbed[key], key


def test_death_in_a_save_leaves_the_checkpoint_before_it(text_folder: Path, tmp_path: Path) -> None:
    """Rank 0 dies when step 10's files are written but have no name, and rank 1 soon after it has gone on: both times
    the run goes on from step 5."""
    plan = write_plan(tiny_plan(LAYOUT, data=str(text_folder)), tmp_path / "plan.json")
    undisturbed, _ = train(plan, 12, 12, [], tmp_path / "undisturbed.json")
    disturbed, written = train(plan, 12, 5, [[0, "save", 2, 0.0], [1, "step", 1, 0.0]], tmp_path / "disturbed.json")
    check_equal(disturbed, undisturbed, 12)
    folder = tmp_path / "disturbed"
    assert written.count(f"going on from '{folder / 'step-00000005'}'") == 2
    assert written.count(DEATH) == 2
    # The last two are kept, and nothing else.
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000010", "step-00000012"]


@pytest.mark.slow
def test_ten_deaths_at_random_moments(text_folder: Path, tmp_path: Path) -> None:
    """Each start is killed within its first steps, so that all ten deaths come before the run can end."""
    chance = random.Random(7)
    plan = write_plan(tiny_plan(LAYOUT, data=str(text_folder)), tmp_path / "plan.json")
    undisturbed, _ = train(plan, 200, 200, [], tmp_path / "undisturbed.json")
    deaths = [[chance.randrange(2), "step", chance.randint(1, 8), chance.uniform(0.0, 0.1)] for _ in range(10)]
    disturbed, written = train(plan, 200, 3, deaths, tmp_path / "disturbed.json")
    check_equal(disturbed, undisturbed, 200)
    assert written.count(DEATH) == 10
