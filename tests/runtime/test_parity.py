"""Every layout trains the same model: its losses and gradient norms are those of a single process."""

from __future__ import annotations

from typing import Any

import pytest
from parity_cases import CASES, STEPS, Case

pytestmark = pytest.mark.xdist_group("distributed")

# Relative. In bf16 layouts round at different places, so that only the size of the difference can be held.
TOLERANCE = {"fp32": {"losses": 1e-5, "grad_norms": 5e-5}, "bf16": {"losses": 5e-3, "grad_norms": 1e-1}}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_trains_like_one_process(case: Case, parity_runs: dict[str, dict[str, Any]]) -> None:
    run, reference = parity_runs[case.name], parity_runs[case.reference.name]
    for key, tolerance in TOLERANCE[case.training.get("precision", "fp32")].items():
        assert len(run[key]) == STEPS
        assert run[key] == pytest.approx(reference[key], rel=tolerance), key


def test_references_learn(parity_runs: dict[str, dict[str, Any]]) -> None:
    """Equal losses say nothing if they never change."""
    for name in {case.reference.name for case in CASES}:
        losses = parity_runs[name]["losses"]
        assert losses[0] > 5.0
        assert losses[-1] < losses[0] - 0.5
