"""What `explain` says adds up and names the cause."""

from __future__ import annotations

import pytest

from planner.explain import explain, memory_rows, sentences, time_rows
from planner.plan import Plan
from planner.search import plan
from simulator.errors import UserError
from simulator.job import build_job


@pytest.fixture(scope="module")
def found() -> Plan:
    data = {"model": "llama-3.1-70b", "cluster": "dgx-h100", "nodes": 8, "training": {"global_batch_size": 128}}
    return plan(build_job(data, "test"))


def test_rows_sum_to_step_and_peak(found: Plan) -> None:
    columns = explain(found, "tp=8 pp=2")
    names = ["recommended", "data parallel", "yours"]
    if found.baseline.layout == found.layout:
        names.remove("data parallel")
    assert [name for name, _ in columns] == names
    for place, (_, prediction) in enumerate(columns):
        assert sum(row[2][place] for row in time_rows(columns)) == pytest.approx(prediction.step_seconds)
        assert sum(row[2][place] for row in memory_rows(columns)) == pytest.approx(prediction.memory.peak)


def test_a_layout_that_talks_too_much_is_told_so(found: Plan) -> None:
    (*_, sentence) = sentences(explain(found, "tp=8 pp=4"))
    assert "tp (+" in sentence and "%" in sentence


def test_an_illegal_layout_is_refused_with_the_rule(found: Plan) -> None:
    with pytest.raises(UserError, match="must divide num_attention_heads"):
        explain(found, "tp=3")
