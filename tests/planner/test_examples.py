"""The examples: each a user's question that is planned, and the index with their answers, which `make examples` writes.

Large jobs, and whether the index is of today, are for the slow tests.
"""

from __future__ import annotations

import pytest
from examples_table import EXAMPLES, INDEX, LARGE, UNKNOWN, answer, index, names, question

from planner.plan import Plan

PLANS: dict[str, Plan | None] = {UNKNOWN: None}
PLANNED = [name for name in names() if name != UNKNOWN]


def planned(name: str) -> Plan:
    if name not in PLANS:
        PLANS[name] = answer(name)
    found = PLANS[name]
    assert found is not None
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGE else ()) for name in PLANNED]
)
def test_an_example_is_planned(name: str) -> None:
    """The answer can run, fits, is the optimum of the model, and no faster than the hardware."""
    found = planned(name)
    best, job = found.best, found.job
    assert best.layout.problems(job) == [] and best.fits
    assert found.certificate.lower_bound_gap == 0.0
    assert best.layout.world_size == job.world_size
    assert 0.05 < best.mfu < 0.7 and best.memory.peak < job.cluster.gpu.memory


def test_there_are_thirty_and_more_each_with_a_question() -> None:
    assert len(names()) >= 30
    assert all(len(question(name)) > 40 for name in names())
    assert all(len(line) <= 120 for name in names() for line in (EXAMPLES / f"{name}.toml").read_text().splitlines())
    listed = [line.split("]")[0][3:] for line in INDEX.read_text().splitlines() if line.startswith("| [")]
    assert listed == names(), "run `make examples`"


@pytest.mark.slow
def test_the_index_has_the_answers_of_today() -> None:
    for name in PLANNED:
        planned(name)
    assert INDEX.read_text() == index(PLANS), "run `make examples`"
