"""The collectives and messages that the simulator predicts for a rank are those that the runtime issues: as many, with
as many bytes, of each kind and along each axis."""

from __future__ import annotations

import re

import pytest
from communication_cases import CASES, LONG_CASES, Case
from communication_table import PAGE


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_predicted_is_counted(case: Case) -> None:
    assert case.predicted() == case.counted()


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_predicted_is_counted_in_many_layouts(case: Case) -> None:
    assert case.predicted() == case.counted()


def test_the_page_claims_nothing_that_is_not_run() -> None:
    """docs/communication.md: every row is a case with a name of its own, and its prediction is what is counted."""
    cases = {case.name for case in CASES + LONG_CASES}
    assert len(cases) == len(CASES + LONG_CASES) >= 48
    rows = re.findall(r"^\| `(.+?)` \| .* \| (equal|DIFFERENT) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) >= 40
    assert all(name in cases and verdict == "equal" for name, verdict in rows)
