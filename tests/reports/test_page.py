"""The page without a browser: it is well-formed, safe, and says what the plan says."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from hypothesis import given
from hypothesis import strategies as st
from page_reader import data_of, read
from pages import make_folder, make_plan, scaling_beside

from planner.plan import Plan
from planner.what_if import COLUMNS, what_if, what_if_rows
from reports.page import embedded, page, write_report
from reports.page_candidates import candidate_table, candidates
from reports.page_charts import thinned
from reports.page_inputs import Inputs, find_inputs
from reports.page_sections import in_words, recommendation
from reports.page_timeline import MOST_SPANS, evenly, packed_timeline
from simulator.job import build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout, spelt_out
from simulator.price import dollars
from simulator.results import Prediction, Span, Timeline
from simulator.simulate import simulate
from simulator.units import show_seconds


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan()


@pytest.fixture(scope="module")
def traced(plan: Plan) -> Prediction:
    return simulate(plan.job, plan.layout, trace=True)


@pytest.fixture(scope="module")
def folder(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("measured"), plan)


@pytest.fixture(scope="module")
def full(plan: Plan, traced: Prediction, folder: Path) -> str:
    """A page with every section."""
    inputs = find_inputs(plan, folder)
    inputs = dataclasses.replace(inputs, scaling=scaling_beside(plan), reasons=("why",))
    return page(plan, traced, inputs, [("report/a b.png", "a")])


# The page


def test_it_is_well_formed_and_asks_nothing_of_the_network(full: str) -> None:
    reader = read(full)
    assert reader.outside == []
    assert all(link.startswith("#") or link == "report/a%20b.png" for link in reader.links)
    assert {link[1:] for link in reader.links if link[0] == "#"} <= set(reader.ids)
    assert "default-src 'none'" in full
    # Only the names of XML's own dialects are addresses.
    assert set(re.findall(r"https?://[^\"'\s)]*", full)) <= {"http://www.w3.org/2000/svg"}
    assert "url(" not in full and "@import" not in full


def test_every_section_is_there_and_only_where_it_has_something_to_say(
    full: str, plan: Plan, traced: Prediction
) -> None:
    sections = ["answer", "candidates", "time", "memory", "step", "measured", "scaling", "exam", "job", "files"]
    assert [value for tag, a in read(full).tags if tag == "section" and (value := a["id"])] == sections
    bare = page(plan, traced)
    assert [value for tag, a in read(bare).tags if tag == "section" and (value := a["id"])] == [
        "answer", "candidates", "time", "memory", "step", "job",
    ]  # fmt: skip
    assert page(plan, traced) == bare


def test_what_is_drawn_has_words_for_who_cannot_see_it(full: str) -> None:
    reader = read(full)
    drawn = [a for tag, a in reader.tags if tag == "canvas" or a.get("role") == "img"]
    assert len(drawn) > 5 and all(a.get("aria-label") for a in drawn)
    assert all(a.get("type") == "button" for tag, a in reader.tags if tag == "button")
    assert [a["lang"] for tag, a in reader.tags if tag == "html"] == ["en"]


def test_numbers_are_the_plans(full: str, plan: Plan) -> None:
    """Every candidate's row holds the plan's numbers in full, for sorting, and their texts."""
    rows = re.findall(r'<tr data-fields="([^"]*)" data-fits="([01])"[^>]*>(.*?)</tr>', full)
    named = candidates(plan)
    assert len(rows) == len(named) == len({one.prediction.layout for one in named})
    for (fields, fits, cells), one in zip(rows, named, strict=True):
        p = one.prediction
        values = re.findall(r'data-v="([^"]*)"', cells)
        assert [float(value) for value in values[1:5]] == [
            p.step_seconds, p.tokens_per_second_per_gpu, p.mfu, p.memory.peak
        ]  # fmt: skip
        assert int(fits) == p.fits and f"tp={p.layout.tp} " in fields
        assert parse_layout(values[-1], plan.job) == p.layout
    words = " ".join(read(full).words)
    assert show_seconds(plan.best.step_seconds) in words and f"{plan.best.tokens_per_second:,.0f} tokens/s" in words


def test_bars_are_as_long_as_their_numbers(full: str, plan: Plan, traced: Prediction) -> None:
    """Segments of the best layout's bar are to each other as its breakdown's items, to 0.001 % of the width."""
    bar = re.findall(r'<div class="bar"[^>]*>(.*?)</div>', full)[0]
    widths = {kind: float(width) for kind, width in re.findall(r'class="k-(\w+)" style="width:([\d.]+)%"', bar)}
    b, total = plan.best.breakdown, sum(widths.values())
    for kind, width in widths.items():
        assert width / total == pytest.approx(getattr(b, kind) / b.total(), abs=1e-4)


def test_the_answer_says_how_much_better(plan: Plan) -> None:
    dollar = dollars(plan.best, plan.job)
    assert dollar == pytest.approx(1e9 / plan.best.tokens_per_second / 3600 * 16 * 3.99)
    sentence = recommendation(plan)
    assert f"${dollar:,.0f} for 10⁹ tokens" in sentence and sentence.count(". ") == 0
    slow = dataclasses.replace(plan.baseline, layout=Layout(dp_replicate=16), step_seconds=3 * plan.best.step_seconds)
    assert "3 times as fast as plain data parallelism." in recommendation(
        dataclasses.replace(plan, baseline=dataclasses.replace(slow, fits=True, problems=()))
    )
    big = dataclasses.replace(slow, fits=False, problems=("9 GiB too much",))
    assert "does not work: 9 GiB too much." in recommendation(dataclasses.replace(plan, baseline=big))
    fast = dataclasses.replace(slow, step_seconds=plan.best.step_seconds / 2)
    assert "would be 2 times as fast" in recommendation(dataclasses.replace(plan, baseline=fast))
    same = dataclasses.replace(plan, baseline=plan.best)
    assert "this is plain data parallelism" in recommendation(same)


def test_layouts_in_words() -> None:
    assert in_words(Layout()) == "one process"
    assert in_words(Layout(dp_replicate=4)) == "4 data-parallel replicas"
    words = in_words(Layout(tp=2, pp=4, virtual_stages=2, schedule="Interleaved1F1B", recompute="full"))
    assert words == "tensor parallelism over 2, 8 pipeline stages on 4 ranks (Interleaved1F1B) and full recomputation"


@given(
    st.builds(
        Layout, dp_replicate=st.sampled_from([1, 2]), dp_shard=st.sampled_from([1, 4, 16]),
        tp=st.sampled_from([1, 2, 8]), pp=st.sampled_from([1, 4]), zero_stage=st.sampled_from([0, 1, 2, 3]),
        virtual_stages=st.sampled_from([1, 2, 4]),
        schedule=st.sampled_from(["1F1B", "GPipe", "Interleaved1F1B", "DualPipeV"]), sequence_parallel=st.booleans(),
        stage_layers=st.sampled_from([None, (3, 5)]), rank_order=st.sampled_from(["tp-cp-ep-dp-pp", "tp-pp-dp"]),
    )
)  # fmt: skip
def test_pasted_layouts_come_back(layout: Layout) -> None:
    job = build_job({"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 2}, "test")
    assert parse_layout(spelt_out(layout, job), job) == layout


EVIL = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&{{css}}\u2028<!--"


def test_names_from_files_are_only_text(plan: Plan, traced: Prediction, folder: Path) -> None:
    """Model, cluster, stack, sources, notes, problems, names of published runs, ops of a profile, names of files."""
    job = plan.job
    cluster = dataclasses.replace(job.cluster, name=EVIL, gpu=dataclasses.replace(job.cluster.gpu, name=EVIL))
    job = dataclasses.replace(job, model=dataclasses.replace(job.model, name=EVIL), cluster=cluster)
    job = dataclasses.replace(job, stack=dataclasses.replace(job.stack, name=EVIL), search={"tp": [EVIL]})
    bad = dataclasses.replace(plan.baseline, layout=Layout(dp_replicate=16), fits=False, problems=(EVIL,))
    evil = dataclasses.replace(plan, job=job, baseline=bad, provenance=dict.fromkeys(("created", "gpu"), EVIL))
    found = find_inputs(plan, folder)
    assert found.exam and found.measured
    rows = tuple(dataclasses.replace(row, id=EVIL, gpu=EVIL, stack=EVIL, arch=EVIL) for row in found.exam.rows)
    spans = (*found.measured.spans, Span(0, "compute", EVIL, 0.0, 1.0))
    inputs = dataclasses.replace(
        found, exam=dataclasses.replace(found.exam, rows=rows), reasons=(EVIL,), notes=(EVIL,),
        measured=dataclasses.replace(found.measured, spans=spans),
        comparisons=tuple(dataclasses.replace(c, name=EVIL) for c in found.comparisons),
    )  # fmt: skip
    text = page(evil, traced, inputs, [(EVIL, EVIL)])
    reader = read(text)
    assert [tag for tag, _ in reader.tags if tag == "script"] == ["script", "script"] and reader.outside == []
    assert not any(name.startswith("on") for _, a in reader.tags for name in a)
    assert EVIL in "".join(reader.words)
    assert EVIL in data_of(text)["timeline"]["names"]
    assert all(not link.startswith(("javascript:", "http")) for link in reader.links)


@given(st.recursive(st.text() | st.integers() | st.none(), st.lists, max_leaves=5))
def test_embedded_data_comes_back_and_ends_no_script(value: Any) -> None:
    text = embedded(value)
    assert json.loads(text) == value and not set(text) & set("<>&\u2028\u2029")


# The timeline


def test_packed_spans_come_back(plan: Plan, traced: Prediction) -> None:
    """Names exactly, times to half a tick: of a step of 1 to 10 s a tick is 1 µs."""
    data, notes = packed_timeline(traced, None)
    assert notes == [] and data["tick"] == pytest.approx(1e-6, rel=9.1)
    got = set()
    for row in data["rows"]:
        for lane in row["sides"][0]["lanes"]:
            at, spans = 0, lane["spans"]
            for kind, stage, number, step, lasts in zip(*(spans[n::5] for n in range(5)), strict=True):
                at += step
                name = data["names"][number] if stage < 0 else (
                    f"PP:{stage}{data['kinds'][kind]}{'' if number < 0 else number}"
                )  # fmt: skip
                got.add((row["rank"], lane["stream"], name, at, lasts))
    tick = data["tick"]
    spans = traced.timeline.spans
    assert got == {(s.rank, s.stream, s.name, round(s.start / tick), round(s.seconds / tick)) for s in spans}


def test_the_measured_step_stands_below_the_predicted_one(full: str, traced: Prediction) -> None:
    data = data_of(full)["timeline"]
    assert len(data["rows"]) == traced.layout.pp
    for row in data["rows"]:
        predicted, measured = row["sides"]
        assert (predicted["side"], measured["side"]) == ("predicted", "measured")
        pairs = zip(predicted["lanes"][0]["spans"], measured["lanes"][0]["spans"], strict=True)
        for place, (one, two) in enumerate(pairs):
            assert two == (one if place % 5 < 3 else pytest.approx(2 * one, abs=2))


def test_long_steps_are_folded(traced: Prediction) -> None:
    """40 ranks with 2,000 ops and as many messages each: 16 ranks without messages, two ops as one."""

    def many(stream: str, kind: str) -> list[Span]:
        return [Span(r, stream, f"PP:{r}{kind}{n}", n, 0.5) for r in range(40) for n in range(2000)]

    layout = dataclasses.replace(traced.layout, pp=40)
    long = dataclasses.replace(
        traced, layout=layout, timeline=Timeline((*many("compute", "F"), *many("send", "SEND_F")))
    )
    data, notes = packed_timeline(long, None)
    assert len(notes) == 3 and "16 of 40" in notes[0]
    lanes = [lane for row in data["rows"] for side in row["sides"] for lane in side["lanes"]]
    assert {lane["stream"] for lane in lanes} == {"compute"} and len(lanes) == 16
    assert sum(len(lane["spans"]) for lane in lanes) // 5 <= MOST_SPANS
    assert data["names"][0] == "PP:0F0 to PP:0F1, 2 ops" and data["end"] * data["tick"] == pytest.approx(1999.5)


@given(st.integers(1, 300), st.integers(2, 40))
def test_evenly(count: int, most: int) -> None:
    found = evenly(range(count), most)
    assert found[0] == 0 and found[-1] == count - 1
    assert len(found) == len(set(found)) == min(count, most)


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=300), st.integers(10, 100))
def test_thinned_curves_keep_their_peak(values: list[float], most: int) -> None:
    found = thinned(values, most)
    kept = [values[place] for place in found]
    assert max(kept) == max(values) and min(kept) == min(values)
    assert len(found) <= most + 4 and found == sorted(set(found)) and found[-1] == len(values) - 1


def test_the_memory_curve_reaches_the_peak(full: str, plan: Plan) -> None:
    """Areas lie on each other; the highest edge is the fullest rank's peak."""
    areas = data_of(full)["charts"]["memory"]["series"]
    for below, above in itertools.pairwise(areas):
        assert [p[1] for p in below["points"]] == [p[2] for p in above["points"]]
    assert max(p[1] for p in areas[-1]["points"]) * 2**30 == pytest.approx(plan.best.memory.peak, rel=1e-4)


def test_a_page_of_a_large_plan_is_small() -> None:
    """70B on 256 GPUs with its timeline: 15,276 spans, under a megabyte."""
    large = make_plan(
        model="llama-3.1-70b", nodes=32, training={"global_batch_size": 512, "seq_len": 8192},
        search={"tp": [4], "pp": [8], "virtual_stages": [5], "recompute": ["none"]},
    )  # fmt: skip
    traced = simulate(large.job, large.layout, trace=True)
    assert len(traced.timeline.spans) > 15_000
    assert len(page(large, traced).encode()) < 700_000


def test_offload_has_a_column_where_a_layout_has_it(plan: Plan, full: str) -> None:
    assert ">offload<" not in full
    moved = dataclasses.replace(plan.best, layout=dataclasses.replace(plan.layout, offload="optimizer"))
    shown = candidate_table(dataclasses.replace(plan, best=moved))
    assert shown.count(">offload<") == 1
    assert shown.count('data-v="optimizer">optimizer<') == 1 and 'data-v="none">none<' in shown
    assert "the optimizer in host memory" in recommendation(dataclasses.replace(plan, best=moved))


def test_what_if_is_a_table(plan: Plan, traced: Prediction, full: str) -> None:
    """Planned anew: 16 GPUs with twice the network."""
    assert "planned anew" not in full
    rows = what_if_rows(what_if(plan, ["inter-node=2x"]))
    words = " ".join(read(page(plan, traced, Inputs(what_if=(COLUMNS, rows)))).words)
    assert "What if" in words and all(cell in words for cell in (*COLUMNS, *rows[0]))


# The command


def test_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--nodes", "1", "--what-if", "batch=2x", "--json")
    assert call(monkeypatch, "report", folder, "-o", tmp_path / "out", *given) == 0
    document = json.loads(capsys.readouterr().out)
    assert Path(document["page"]) == tmp_path / "out" / "report.html"
    files = [Path(path) for path in document["files"]]
    assert {path.suffix for path in files} == {".html", ".json", ".png", ".svg"}
    assert all(path.stat().st_size > 500 for path in files)
    beside = {path.relative_to(tmp_path / "out").as_posix() for path in files[1:]}
    reader = read(files[0].read_text())
    assert {link for link in reader.links if link[0] != "#"} == beside
    assert "128 sequences in a step" in reader.words
    # Nothing half-written is left.
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == set(files)


def test_bad_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "report", tmp_path) == 2
    assert "has no plan.json" in capsys.readouterr().err
    assert call(monkeypatch, "report", folder / "plan.json", "--validation", folder / "plan.json") == 2
    assert "has no 'rows'" in capsys.readouterr().err
    assert call(monkeypatch, "report", folder, "--nodes", "some") == 2
    assert "'some' is not a number" in capsys.readouterr().err
    assert call(monkeypatch, "report", folder, "--nodes", "none", "--what-if", "network=2x") == 2
    assert "unknown key 'network'" in capsys.readouterr().err


def test_figures_are_the_same_whenever_they_are_drawn(plan: Plan, tmp_path: Path) -> None:
    one, two = (write_report(plan, Inputs(), tmp_path / name) for name in ("a", "b"))
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]
