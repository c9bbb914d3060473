"""A run that is saved and continued, in whatever layout, is the run that was never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import resume_cases
from resume_cases import SAVED, STEPS, Pair
from workers import start_worker


def run_pairs(name: str, world_sizes: tuple[int, ...], text: Path, folder: Path) -> dict[str, Any]:
    """Losses and norms by name, of one list of pairs: a start for each world size, in this order."""
    results: dict[str, Any] = {}
    for world_size in world_sizes:
        output = folder / f"{world_size}.json"
        start_worker("resume_worker.py", world_size, name, str(text), str(folder), str(output))
        results |= json.loads(output.read_text())
    return results


def check(pair: Pair, runs: dict[str, Any]) -> None:
    resumed, undisturbed = runs[pair.name], runs[f"{pair.name} undisturbed"]
    for key in ("losses", "grad_norms"):
        assert len(resumed[key]) == STEPS
        # Up to the checkpoint these are numbers from the file, then the other layout's.
        assert resumed[key][:SAVED] == undisturbed[key][:SAVED]
        assert resumed[key] == pytest.approx(undisturbed[key], rel=1e-5), key


@pytest.fixture(scope="session")
def fast_runs(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_pairs("FAST", (4,), text_folder, tmp_path_factory.mktemp("resume"))


@pytest.mark.parametrize("pair", resume_cases.FAST, ids=lambda pair: pair.name)
def test_a_checkpoint_goes_on_in_another_layout(pair: Pair, fast_runs: dict[str, Any]) -> None:
    check(pair, fast_runs)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "world_sizes"), [("SHRINKING", (4, 2, 1)), ("GROWING", (1, 2, 4))])
def test_every_pair_of_layouts(name: str, world_sizes: tuple[int, ...], text_folder: Path, tmp_path: Path) -> None:
    runs = run_pairs(name, world_sizes, text_folder, tmp_path)
    for pair in getattr(resume_cases, name):
        check(pair, runs)
