"""The figures of merit of `validate here`, counted by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from planner.plan import Certificate, Plan
from reports.here import (
    Trial,
    bubbles,
    combined,
    ops_of_all,
    read_sentences,
    restless,
    row,
    sentences,
    summary,
    together,
    waiting_share,
)
from reports.here_page import Examined, here_json, layout_cells, write_here
from simulator.errors import UserError
from simulator.job import build_job
from simulator.layout import Layout
from simulator.results import MeasuredTimeline, Measurement, Quantiles, Span, Timeline
from simulator.simulate import simulate

GIB = 2.0**30
JOB = build_job({"model": "gpt2", "cluster": "dgx-h100", "nodes": 1, "training": {"global_batch_size": 8}}, "test")
BEST = simulate(JOB, Layout(dp_replicate=8))
PLAN = Plan(JOB, BEST, (), BEST, Certificate(1, 0, 0, 0, 1, 0, 0), {})


def measurement(seconds: float, layout: Layout, peak: float = GIB) -> Measurement:
    spread = Quantiles(seconds, 0.9 * seconds, 1.2 * seconds)
    ranks = layout.world_size
    return Measurement(layout, ranks, 8, 3, spread, 1000 / seconds, (peak,) * ranks, (5.0, 4.0), (1.0, 1.0), "cpu", {})


def trial(name: str, predicted: float, *rounds: float, pp: int = 1) -> Trial:
    layout = Layout(dp_replicate=int(name.split()[-1]) // pp, pp=pp)
    memory = dataclasses.replace(PLAN.best.memory, peak=0.9 * GIB)
    prediction = dataclasses.replace(PLAN.best, layout=layout, step_seconds=predicted, memory=memory)
    return Trial(name, PLAN, prediction, tuple(measurement(seconds, layout) for seconds in rounds))


# Predicted and measured (medians of the rounds): errors +10 %, -20 %, 0 %, +50 %.
TRIALS = (
    trial("data 1", 1.1, 1.0, 0.9, 1.1),
    trial("data 2", 0.4, 0.5, 0.5, 0.5),
    trial("data 4", 0.6, 0.6, 0.66, 0.54),
    trial("data 8", 0.6 + 1e-3, 0.4 + 2e-3 / 3, 0.39, 0.41),
)


def test_rounds_count_by_their_median() -> None:
    """Medians 1.0, 0.9, 1.1 give 1.0; their tenths 0.9, 0.81, 0.99 give 0.9. 1000 tokens a step."""
    found = TRIALS[0].measured
    assert dataclasses.astuple(found.step_seconds) == pytest.approx((1.0, 0.9, 1.2))
    assert found.tokens_per_second == pytest.approx(1000.0)
    assert TRIALS[0].noise == pytest.approx((1.1 - 0.9) / 1.0)


def test_the_highest_peak_of_each_rank_counts() -> None:
    layout = Layout(dp_replicate=2)
    first = dataclasses.replace(measurement(1.0, layout), peak_memory=(3.0, 5.0))
    second = dataclasses.replace(measurement(1.0, layout), peak_memory=(4.0, 1.0))
    assert combined([first, second]).peak_memory == (4.0, 5.0)


def test_figures_of_merit() -> None:
    """Sizes of the errors 0.1, 0.2, 0, 0.5: the median is 0.15, and the 90th percentile lies at 0.9 · 3 = 2.7 places,
    0.2 + 0.7 · 0.3 = 0.41. By speed the prediction orders 2, 4, 8, 1 and the measurement 8, 2, 4, 1: of six pairs
    (2, 8) and (4, 8) are turned round, so that tau is (4 - 2) / 6. Data 2 is recommended: 0.5 against 0.4007 of data 8.
    Memory is off by 10 % everywhere. Noise: 20, 0, 20 and 5 %, of which the median is 12.5 %."""
    found = summary(TRIALS, "data 2")
    assert found.count == 4
    assert found.median_abs_error == pytest.approx(0.15)
    assert found.p90_abs_error == pytest.approx(0.41)
    assert found.bias == pytest.approx((0.1 - 0.2 + 0.0 + 0.5) / 4)
    assert found.kendall_tau == pytest.approx(1 / 3)
    assert found.regret == pytest.approx(0.5 / (0.4 + 2e-3 / 3) - 1)
    assert found.memory_median_abs_error == pytest.approx(0.1)
    assert found.noise == pytest.approx((0.02 / (0.4 + 2e-3 / 3) + 0.2) / 2)


def test_how_well_rounds_agree_on_the_order() -> None:
    """Rounds (1, 2, 3), (1, 3, 2) and (3, 2, 1) of three layouts. Of three pairs the second turns one round, tau 1/3,
    the third all, -1; second and third agree on one, -1/3: mean -1/3. With a pair of another job on which all three
    agree tau is (2 + 1 - 1) / 4, (1 - 3) / 4 and (2 - 2) / 4: mean 0."""
    three = [trial("data 1", 1.0, 1, 1, 3), trial("data 2", 1.0, 2, 3, 2), trial("data 4", 1.0, 3, 2, 1)]
    two = [trial("data 1", 1.0, 1, 1, 1), trial("data 2", 1.0, 2, 2, 2)]
    assert summary(three, "data 1").repeated_tau == pytest.approx(-1 / 3)
    assert together([(three, "data 1"), (two, "data 1")]).repeated_tau == pytest.approx(0.0)
    assert summary([trial("data 1", 1.0, 1.0), trial("data 2", 1.0, 2.0)], "data 1").repeated_tau is None


def test_the_recommended_layout_that_did_not_run_has_no_regret() -> None:
    assert summary(TRIALS, "tensor 2").regret is None
    assert summary((), "data 2").median_abs_error is None


def test_layouts_of_several_jobs_are_no_choice() -> None:
    """Errors are over all, and the regret is that of the worst job: the second one is in perfect order, but recommends
    its slowest layout, 1.0 against 0.6. Of the six pairs of the first job and the one of the second two are turned
    round: tau is (5 - 2) / 7."""
    right = (TRIALS[0], TRIALS[2])
    found = together([(TRIALS, "data 8"), (right, "data 1")])
    assert found.count == 6
    assert found.kendall_tau == pytest.approx(3 / 7)
    assert found.regret == pytest.approx(1.0 / 0.6 - 1)


def test_noise_is_said_where_it_is_too_large() -> None:
    loud = summary(TRIALS, "data 2")
    assert any("12% apart" in one and "too noisy to trust" in one for one in sentences(loud))
    assert not any("noisy" in one for one in sentences(dataclasses.replace(loud, noise=0.05)))
    assert sentences(loud, ["Others were here."])[-1] == "Others were here."


def test_layouts_whose_rounds_disagree_are_named() -> None:
    """(1.5 - 1.0) / 1.1 = 45 % and (1.3 - 1.0) / 1.0 = 30 %; 20 % is not worth a word, nor is one round."""
    wide, wider = trial("data 2", 1.0, 1.0, 1.0, 1.3), trial("data 4", 1.0, 1.5, 1.1, 1.0)
    (sentence,) = restless([TRIALS[0], wide, wider])
    assert "gpt2 data 4 (45%), gpt2 data 2 (30%) lie more than 25% apart" in sentence
    assert restless([TRIALS[0], trial("data 2", 1.0, 2.0)]) == []


def test_one_round_shows_no_noise() -> None:
    once = [trial("data 1", 1.0, 1.0), trial("data 2", 0.5, 0.6)]
    found = summary(once, "data 2")
    assert (once[0].noise, found.noise) == (None, None)
    assert "One round does not show how noisy the machine is" in sentences(found)[-1]
    assert layout_cells(once[0], "data 2")[5] == ""
    # Where some layouts ran more than once, those say it.
    assert summary([*once, TRIALS[0]], "data 2").noise == pytest.approx(0.2)
    assert "One round" not in " ".join(sentences(summary(TRIALS, "data 2")))


def test_a_pipeline_waits_where_it_does_not_compute() -> None:
    """Two ranks, a step of 10 s: 6 + 5 s of forwards, backwards and update; sends and receives do not count."""
    spans = (
        Span(0, "compute", "PP:0F0", 0, 2), Span(0, "compute", "PP:0B0", 4, 3), Span(0, "send", "PP:0SEND_F0", 2, 2),
        Span(0, "compute", "OPTIMIZER", 9, 1), Span(1, "compute", "PP:1F0", 2, 1), Span(1, "compute", "PP:1B0", 3, 3),
        Span(1, "compute", "OPTIMIZER", 9, 1), Span(1, "recv", "PP:1RECV_F0", 0, 2),
    )  # fmt: skip
    assert waiting_share(spans, 2, 10.0) == pytest.approx(1 - 11 / 20)
    one = trial("pipeline 2", 10.0, 8.0, pp=2)
    timeline = MeasuredTimeline(one.prediction.layout, 9, 11.0, "cpu", spans)
    one = dataclasses.replace(
        one, prediction=dataclasses.replace(one.prediction, timeline=Timeline(spans)), timeline=timeline
    )
    assert bubbles(one) == pytest.approx((1 - 11 / 20, 1 - 11 / 22))
    assert bubbles(TRIALS[0]) == (None, None)
    assert {total.name: (total.count, total.predicted) for total in ops_of_all([one, one])}["F"] == (4, 6)


def test_json_is_the_contract() -> None:
    job = Examined("gpt2", TRIALS, "data 2", {"tensor 2": "no layout"})
    document = json.loads(json.dumps(here_json([job], {"link": None, "warnings": []})))
    assert {"layouts", "recommended", "summary", "jobs", "link"} <= set(document)
    first = document["layouts"][0]
    assert first["layout"]["dp_replicate"] == 1
    assert (first["predicted"]["step_seconds"], first["measured"]["step_seconds"]) == (1.1, 1.0)
    assert first["measured"]["rounds"] == [1.0, 0.9, 1.1]
    assert (first["error"], first["memory_error"]) == pytest.approx((0.1, -0.1))
    assert document["recommended"]["dp_replicate"] == 2
    assert document["jobs"][0]["not_run"] == {"tensor 2": "no layout"}
    assert set(document["summary"]) == {
        "count", "median_abs_error", "p90_abs_error", "bias", "kendall_tau", "regret", "memory_median_abs_error",
        "noise", "repeated_tau",
    }  # fmt: skip
    assert row(TRIALS[1])["predicted"]["bubble"] is None


def test_files_and_figures(tmp_path: Path) -> None:
    about = {"profile": "profile of today", "course": "3 rounds", "warnings": ["Others were here."], "link": None}
    _, written = write_here([Examined("gpt2", TRIALS, "data 2", {"tensor 2": "no layout"})], about, tmp_path)
    assert {path.name for path in written} == {
        "here.json", "here.md", "here-speedup.png", "here-speedup.svg", "here-parity.png", "here-parity.svg",
    }  # fmt: skip
    text = (tmp_path / "here.md").read_text()
    assert "15.0% at the median" in text and "not run: tensor 2: no layout" in text and "| data 8:" in text
    assert (tmp_path / "here-speedup.svg").read_text().startswith("<?xml")
    assert read_sentences(tmp_path / "here.json")[-1] == "Others were here."
    (tmp_path / "here.json").write_text("{}")
    with pytest.raises(UserError, match="has no 'summary'"):
        read_sentences(tmp_path / "here.json")
