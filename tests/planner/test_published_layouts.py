"""No published layout of a job is predicted to beat the planner's choice for it: the choice is the optimum of its own
model, over a space that holds what people run."""

from __future__ import annotations

import dataclasses

import pytest
from published_layouts import PAGE, WELL_KNOWN, Published, beats, groups, measured_jobs, short

from reports.published import Row, published_rows
from simulator.layout import Layout

ROWS = published_rows()
JOBS = {rows[0].text("job"): rows for rows in measured_jobs(ROWS)}
# Of them those that are planned in a second or two each.
QUICK = ("30ff25fe", "02bcac0f")


def nothing_beats(rows: list[Row]) -> None:
    found = groups(rows)
    assert found
    for published in found:
        for layout, prediction, fields in beats(published):
            gain = published.found.best.step_seconds / prediction.step_seconds - 1
            # What lies in the space was searched; what does not says where.
            assert fields, f"{layout.short()} is predicted {gain:.1%} faster than {published.found.best.layout.short()}"


@pytest.mark.parametrize("name", QUICK)
def test_no_published_layout_beats_the_choice(name: str) -> None:
    nothing_beats(JOBS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(JOBS) - set(QUICK)))
def test_no_published_layout_beats_the_choice_in_any_job(name: str) -> None:
    """pytest -m slow tests/planner/test_published_layouts.py, in about five minutes: all jobs with four measured
    layouts."""
    nothing_beats(JOBS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", WELL_KNOWN)
def test_no_well_known_layout_beats_the_choice(name: str) -> None:
    """The same command: the runs of docs/published_layouts.md."""
    nothing_beats([row for row in ROWS if row.text("id") == name])


@pytest.fixture(scope="module")
def llama() -> Published:
    (published,) = groups(JOBS["30ff25fe"])
    return published


def test_what_people_run_lies_in_the_space(llama: Published) -> None:
    """The layouts of LLaMA 13B on 32 GPUs that aleph-alpha measured."""
    assert len(llama.layouts) >= 10
    assert [layout for layout in llama.layouts if llama.outside(layout)] == []


def test_fields_outside_of_the_space_are_named(llama: Published) -> None:
    """Of 40 blocks pp = 2 may be cut as 20, 20, or as it balances; nobody cuts them 39 and 1."""
    layout = next(layout for layout in llama.layouts if layout.stages == 2)
    assert llama.outside(dataclasses.replace(layout, stage_layers=(20, 20))) == []
    assert llama.outside(dataclasses.replace(layout, stage_layers=(39, 1))) == ["stage_layers"]
    assert llama.outside(dataclasses.replace(layout, micro_batch_size=64)) == ["micro_batch_size"]


def test_the_software_may_do_what_it_did(llama: Published) -> None:
    assert all(not layout.problems(llama.job) for layout in llama.layouts)


def test_the_page_has_every_run_once() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(WELL_KNOWN) >= 10
    for name, title in WELL_KNOWN.items():
        assert text.count(f'<a id="{name}"></a>{title}') == 1 == text.count(f"[{title}](#{name})")


def test_a_layout_in_a_cell_by_hand() -> None:
    layout = Layout(
        dp_shard=16, tp=8, pp=12, zero_stage=1, micro_batch_size=2, schedule="Interleaved1F1B", virtual_stages=3,
        recompute="full", sequence_parallel=True,
    )  # fmt: skip
    assert short(layout) == "t8s p12x3 d16 z1 b2 full"
    assert short(Layout(dp_replicate=4, ep=4, cp=2)) == "t1 c2 e4 d4 b1"
