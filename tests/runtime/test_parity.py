"""Every layout trains the same model: its losses and gradient norms are those of a single process."""

from __future__ import annotations

import re
from typing import Any

import pytest
from parity_cases import CASES, LONG_CASES, Case
from parity_table import PAGE, TOLERANCE, differences

Runs = dict[str, dict[str, Any]]


def assert_parity(case: Case, runs: Runs) -> None:
    tolerance = TOLERANCE[case.training.get("precision", "fp32")]
    found = differences(case, runs)
    assert all(found[key] <= tolerance[key] for key in tolerance), found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_trains_like_one_process(case: Case, parity_runs: Runs) -> None:
    assert_parity(case, parity_runs)


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_layouts_of_up_to_eight_ranks_train_like_one_process(case: Case, all_parity_runs: Runs) -> None:
    assert_parity(case, all_parity_runs)


def test_references_learn(parity_runs: Runs) -> None:
    """Equal losses say nothing if they never change."""
    for name in {case.reference.name for case in CASES}:
        losses = parity_runs[name]["losses"]
        assert losses[0] > 5.0
        assert losses[-1] < losses[0] - 0.3


def test_cases_differ() -> None:
    names = [case.name for case in CASES + LONG_CASES]
    assert len(set(names)) == len(names)


def test_the_page_claims_nothing_that_is_not_run() -> None:
    """docs/parity.md: every row is a case, and its differences are within what the tests hold."""
    cases = {(case.layout.short(), case.model): case for case in CASES + LONG_CASES}
    rows = re.findall(r"^\| `(.+?)` \| (\S+) \| (.*?) ?\| (\S+) \| (\S+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) >= 25
    for layout, model, training, losses, norms in rows:
        assert (layout, model) in cases
        tolerance = TOLERANCE["bf16" if "bf16" in training else "fp32"]
        assert float(losses) <= tolerance["losses"] and float(norms) <= tolerance["grad_norms"]
