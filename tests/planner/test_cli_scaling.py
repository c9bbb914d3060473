"""`plan --nodes` and objectives on the command line: what is written and printed, and how bad input is answered."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import call

from planner.plan import read_plan
from planner.scaling import read_scaling

LIMITS = ("--set", "search.tp=[1, 2]", "--set", "search.pp=[1, 2]", "--set", "search.recompute=none")


def test_a_curve_is_written_with_a_plan_for_each_number(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "job.toml", *LIMITS, "--nodes", "2,1", "--objective", "cheapest", "-o", "out") == 0
    shown = capsys.readouterr().out
    assert {path.name for path in (folder / "out").iterdir()} == {
        "plan.json", "plan-1-nodes.json", "plan-2-nodes.json", "scaling.json",
    }  # fmt: skip
    scaling = read_scaling(folder / "out" / "scaling.json")
    assert [row.nodes for row in scaling.rows] == [1, 2]
    plans = [read_plan(folder / "out" / row.plan) for row in scaling.rows]
    assert [plan.best.step_seconds for plan in plans] == [row.prediction.step_seconds for row in scaling.rows]
    chosen = read_plan(folder / "out" / "plan.json")
    assert chosen.job.nodes == scaling.chosen == min(scaling.rows, key=lambda row: row.gpu_hours).nodes
    # Only of the chosen one are others ranked.
    assert len(chosen.runners_up) == 4 and all(plan.runners_up == () for plan in plans)
    assert "cost is in GPU-hours: neither the cluster nor the job has a price_per_gpu_hour" in shown
    assert "nothing is allowed for failures" in shown and "the batch is the same everywhere" in shown
    assert scaling.bend in shown.replace("\n", " ") and "cheapest tokens: 1 node" in shown


def test_one_document(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--nodes", "1,2", "--scale-batch", "--set", "price_per_gpu_hour=2 USD", "--tokens", "1B")
    assert call(monkeypatch, "plan", "job.toml", *LIMITS, *arguments, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {
        "job", "scale_batch", "tokens", "rows", "missing", "changes", "bend", "chosen", "reason", "version", "plan",
    }  # fmt: skip
    assert [row["global_batch_size"] for row in document["rows"]] == [64, 128] and document["tokens"] == 1e9
    for row in document["rows"]:
        assert row["dollars"] == pytest.approx(2 * row["gpus"] * row["seconds"] / 3600)
    (chosen,) = (row for row in document["rows"] if row["nodes"] == document["chosen"])
    assert document["plan"]["best"]["layout"] == chosen["prediction"]["layout"]


def test_an_objective_in_the_job_needs_no_option(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """gpt2 on 8 A100s trains 10B tokens in hours, so that of one and two nodes one is the least that does in a year."""
    text = (folder / "job.toml").read_text() + '[search]\ntp = 1\npp = 1\nrecompute = "none"\n'
    text += '[objective]\ntokens = "10B"\ndeadline = "365 days"\ngoodput = 0.9\nnodes = [1, 2]\n'
    (folder / "job.toml").write_text(text)
    assert call(monkeypatch, "plan", "job.toml") == 0
    shown = capsys.readouterr().out
    assert "fewest GPUs within 365 days: 1 node, 10B tokens in" in shown and "goodput 0.9: 10% of the time" in shown
    assert read_plan(folder / "plan.json").job.nodes == 1


def test_a_deadline_that_none_meets_exits_with_3(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    goal = ("--tokens", "100T", "--deadline", "1 hour", "--nodes", "1,2")
    assert call(monkeypatch, "plan", "job.toml", *LIMITS, *goal) == 3
    shown = capsys.readouterr()
    assert (
        "error: objective.deadline = 1.00 h for 100T tokens is met on none of 1, 2 nodes: the nearest is" in shown.err
    )
    assert "a deadline of" in shown.err and "tokens in 1.00 h on 2 nodes" in shown.err
    # The curve is there to look at; nothing is recommended.
    assert (folder / "scaling.json").exists() and not (folder / "plan.json").exists()
    assert call(monkeypatch, "plan", "job.toml", *LIMITS, *goal, "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"problems", "remedies", "scaling"} and document["scaling"]["chosen"] is None


def test_no_number_of_nodes_fits(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = ("--set", "search.tp=1", "--set", "search.pp=1", "--set", "search.cp=1")
    assert call(monkeypatch, "plan", "job.toml", *limits, "--nodes", "16,32") == 3
    assert (
        "error: 16 nodes: no layout of gpt2 on 16 x dgx-a100: no sizes that [search] allows" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--nodes", "4,some"), ["'some' is not a number of nodes"]),
        (("--nodes", "0"), ["--nodes 0: a job needs at least 1 node; write them like 4,8,16"]),
        (("--tokens", "1e30"), ["objective.tokens = 1e+30 must be from 1 to 1e+18"]),
        (("--nodes", "none"), ["--nodes names no number of nodes"]),
        (("--objective", "best"), ["objective", "goal", "fastest"]),
        (("--objective", "deadline"), ["objective.tokens", '"1T"']),
        (("--tokens", "1T", "--objective", "deadline"), ["objective.deadline", '"30 days"']),
        (("--tokens", "1X"), ["'1X' is not a number of tokens", "1.5T"]),
        (("--tokens", "1T", "--deadline", "30"), ["'30' is not a duration", "30 days"]),
        (("--tokens", "1T", "--deadline", "soon"), ["'soon' is not a duration", "30 days"]),
        (("--tokens", "1T", "--deadline", "1 day", "--objective", "cheapest"), ["says nothing", "'deadline'"]),
        (("--set", "objective.goodput=90"), ["objective.goodput = 90", "at most 1"]),
        (("--set", "objective.gool=fastest"), ["unknown key", "'goal'"]),
        (("--set", "objective.nodes=[0]"), ["objective.nodes = [0]"]),
        (("--set", "objective.nodes=[99999]"), ["objective.nodes: 99999 nodes have more than"]),
        (("--scale-batch",), ["--scale-batch says nothing", "--nodes"]),
        (("--set", "price_per_gpu_hour=2 EUR"), ["'2 EUR' is not a price", "2.50 USD"]),
        (("--set", "price_per_gpu_hour=-1"), ["price_per_gpu_hour = -1 must be above zero"]),
        (("--set", "price_per_gpu_hour=true"), ["price_per_gpu_hour = True must be above zero"]),
    ],
)
def test_bad_input_gets_one_sentence(
    arguments: tuple[str, ...],
    words: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(monkeypatch, "plan", "job.toml", *arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert len(error.strip().splitlines()) == 1
