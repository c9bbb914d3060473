"""`layoutwise explain` on the command line: what it prints, its JSON document, and --what-if."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import call

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def planned(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> Path:
    call(monkeypatch, "plan", "job.toml")
    capsys.readouterr()
    return folder


def shown(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *words: str) -> str:
    assert call(monkeypatch, "explain", "plan.json", *words) == 0
    return capsys.readouterr().out


def document(monkeypatch: pytest.MonkeyPatch, capsys: Capture, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shown(monkeypatch, capsys, "--json", *words))
    return found


def test_it_prints_the_step_in_parts_what_binds_and_why_others_lose(
    planned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = shown(monkeypatch, capsys, "--against", "tp=4", "--what-if", "none")
    assert "kernels of the step" in out and "TFLOP/s" in out and "communication of the step" in out
    assert "binding constraint: " in out and "yours (dp_shard=2 tp=4" in out and "  tp +" in out
    assert "what if" not in out


def test_what_is_quick_is_planned_without_being_asked(
    planned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = shown(monkeypatch, capsys)
    assert "what if (tokens/s over those of the recommended layout; planned anew)" in out
    assert "memory=+10GiB" in out and "nvlink=none" in out
    monkeypatch.setattr("planner.what_if.PATIENCE", 0.0)
    out = shown(monkeypatch, capsys)
    assert "memory=+10GiB" not in out.split("--what-if plans")[0] and "--what-if plans inter-node=2x" in out


@pytest.mark.parametrize("words", [("--what-if",), ("--what-if", "all"), ("--what-if", "batch=2x")])
def test_what_if_takes_a_value_or_none(
    words: tuple[str, ...], planned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    found = document(monkeypatch, capsys, *words)["what_if"]
    changes = [one["change"] for one in found]
    assert changes == ["batch=2x"] if words[-1] == "batch=2x" else len(changes) > 3
    assert {"change", "meaning", "layout", "step_seconds", "speed", "layout_changes", "problem"} <= set(found[0])


def test_an_unknown_change_is_one_sentence(planned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    assert call(monkeypatch, "explain", "plan.json", "--what-if", "network=2x") == 2
    assert "unknown key 'network'" in capsys.readouterr().err
    assert call(monkeypatch, "explain", "plan.json", "--what-if", "memory") == 2
    assert "'memory' is not of the form key=value" in capsys.readouterr().err


def test_json_is_the_contract(planned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    found = document(monkeypatch, capsys, "--against", "tp=4 pp=2", "--what-if", "batch=2x")
    assert set(found) == {"recommended", "yours", "against", "constraints", "out_of_reach", "what_if", "reasons"}
    difference = found["yours"]["difference"]
    assert sum(term["seconds"] for term in difference["terms"]) == pytest.approx(difference["step_seconds"])
    steps = found["yours"]["step_seconds"] - found["recommended"]["step_seconds"]
    assert difference["step_seconds"] == pytest.approx(steps)
    assert set(found["recommended"]["parts"]) == {"rank", "kernels", "accumulation", "transfers"}
    assert found["constraints"][0]["seconds"] >= found["constraints"][-1]["seconds"]


def test_a_layout_that_cannot_run_is_told_and_compared(
    planned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    out = shown(monkeypatch, capsys, "--against", "tp=5", "--what-if", "none")
    assert "yours (" in out and "cannot run this job" in out and "nearest to yours with" in out
    found = document(monkeypatch, capsys, "--against", "tp=5", "--what-if", "none")
    assert found["against"]["layout"]["tp"] == 5 and found["against"]["problems"]
    assert found["nearest to yours"]["problems"] == []
