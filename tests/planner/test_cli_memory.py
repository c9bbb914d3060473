"""What the command line says of memory: what would make a layout fit, and how sure it is that one does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import call

from planner.plan import read_plan
from simulator.errors import UserError

LARGE = ("--set", "model=llama-3.1-8b", "--set", "cluster=dgx-h100", "--set", "training.seq_len=8192")


def test_a_layout_that_does_not_fit_gets_remedies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call_it = ("simulate", "job.toml", *LARGE, "--layout", "micro_batch_size=2 dp_shard=8")
    assert call(monkeypatch, *call_it) == 0
    shown = capsys.readouterr().out
    assert "GiB too much" in shown and "what would make it fit, cheapest first:" in shown
    assert call(monkeypatch, *call_it, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert not document["fits"] and document["remedies"]
    for remedy in document["remedies"]:
        assert remedy["fits"] and {"change", "peak", "step_seconds"} <= set(remedy)
        assert f"{remedy['change'].replace('nodes=', '--set nodes=')}: {remedy['peak'] / 2**30:.1f} GiB" in shown
    # What it says can be typed, in place of what it changes.
    change = next(r["change"] for r in document["remedies"] if r["nodes"] == 1)
    typed = dict(word.split("=") for word in f"{call_it[-1]} {change}".split())
    layout = " ".join(f"{key}={value}" for key, value in typed.items())
    assert call(monkeypatch, *call_it[:-1], layout, "--json") == 0
    assert json.loads(capsys.readouterr().out)["fits"]


def test_where_nothing_fits_there_are_remedies(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 3 with one sentence, and what would make the nearest miss fit below it; the same as JSON."""
    pins = {"recompute": '"none"', "tp": 1, "pp": 1, "cp": 1, "zero_stage": 1}
    words = [word for key, value in pins.items() for word in ("--set", f"search.{key}={value}")]
    assert call(monkeypatch, "plan", "job.toml", *LARGE, *words) == 3
    shown = capsys.readouterr()
    assert shown.out == "" and not (folder / "plan.json").exists()
    error, *lines = shown.err.splitlines()
    assert error.startswith("error: no layout of llama-3.1-8b") and "nearest" in error
    assert lines[0] == "what would make the nearest fit, cheapest first:"
    assert any("recompute=full" in line for line in lines)
    assert call(monkeypatch, "plan", "job.toml", *LARGE, *words, "--json") == 3
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"problems", "misses", "remedies"} and document["misses"][0]["short_by"] > 0
    assert all(remedy["fits"] for remedy in document["remedies"])


def test_a_plan_from_before_there_were_risks_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "plan", "job.toml")
    document = json.loads((folder / "plan.json").read_text())
    risk = document["best"].pop("out_of_memory_probability")
    del document["riskier"]
    (folder / "plan.json").write_text(json.dumps(document))
    assert read_plan(folder / "plan.json").best.out_of_memory_probability == risk


def test_a_plan_whose_parts_do_not_sum_to_the_step_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody has edited it: a second more of computing, in the same step; first of a runner-up, then of the best."""
    call(monkeypatch, "plan", "job.toml")
    document = json.loads((folder / "plan.json").read_text())
    document["runners_up"][0]["breakdown"]["compute"] += 1.0
    (folder / "plan.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="the parts of runners_up"):
        read_plan(folder / "plan.json")
    whole = document["best"]["step_seconds"]
    document["best"]["breakdown"]["compute"] += 1.0
    (folder / "plan.json").write_text(json.dumps(document))
    capsys.readouterr()
    for command in ("run", "report", "explain"):
        assert call(monkeypatch, command, "plan.json") == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert f"best.breakdown sum to {whole + 1:g} s, not to best.step_seconds = {whole:g}" in sentence


def test_parts_of_every_item_sum_to_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As JSON of a layout, with every item of the fullest rank."""
    layout = ("--layout", "tp=2 pp=4 zero_stage=0 sequence_parallel=true")
    assert call(monkeypatch, "simulate", "job.toml", *LARGE, *layout, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    peaks = [memory["peak"] for memory in document["memory_per_stage"]]
    parts = document["memory_parts"][peaks.index(max(peaks))]
    for item in ("parameters", "gradients", "optimizer", "activations", "buffers", "overhead"):
        assert sum(p["bytes"] for p in parts if p["item"] == item) == pytest.approx(document["memory"][item], abs=1)
