"""The collectives and messages that the simulator predicts for a rank are those that the runtime issues: as many, with
as many bytes, of each kind and along each axis."""

from __future__ import annotations

import pytest
from communication_cases import CASES, LONG_CASES, Case
from communication_table import PAGE

pytestmark = pytest.mark.xdist_group("distributed")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_predicted_is_counted(case: Case) -> None:
    assert case.predicted() == case.counted()


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_predicted_is_counted_in_many_layouts(case: Case) -> None:
    assert case.predicted() == case.counted()


def test_the_page_shows_every_case() -> None:
    """docs/communication.md; cases have names of their own."""
    names = [case.name for case in CASES + LONG_CASES]
    assert len(set(names)) == len(names) >= 48
    shown = PAGE.read_text()
    assert all(f"`{case.name}`" in shown for case in CASES + LONG_CASES)
