"""Predicted memory against what torch's MemTracker counts (docs/memory.md has all cases)."""

from __future__ import annotations

import pytest
from memory_cases import CASES, LONG_CASES, Case
from memory_table import Row, count, page


def check(row: Row) -> None:
    """The peak and what can be told apart of it: state that is there from the first moment to the last."""
    assert not row.missed or row.known, f"{row.error:+.1%}: {row.predicted} for {row.counted}"
    assert row.predicted.parameters == pytest.approx(row.counted.parameters, rel=1e-3)
    assert row.predicted.optimizer == pytest.approx(row.counted.optimizer, rel=1e-3, abs=2**20)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_peak_is_what_torch_counts(case: Case) -> None:
    check(count(case))


@pytest.mark.slow
@pytest.mark.parametrize("case", LONG_CASES, ids=lambda case: case.name)
def test_the_peak_of_other_layouts_too(case: Case) -> None:
    check(count(case))


def test_the_page_shows_every_row() -> None:
    row = count(Case(CASES[0].layout, layers=1, microbatches=1, training={"seq_len": 128}))
    shown = page([row, row])
    assert shown.count("llama-3.1-8b, 1") == 2 and f"{row.error:+.1%}" in shown
