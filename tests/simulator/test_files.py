"""Files in and out: whole or not at all, and one sentence for whoever wrote something wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.plan import Certificate, Plan
from simulator.cluster import AttentionFit, ClusterSpec, CollectiveFit, Gpu, HostFit, Link, MatmulFit
from simulator.errors import UserError
from simulator.files import STRICT, read_json, read_toml, to_dataclass, write_json, write_text
from simulator.job import Job, Training
from simulator.layout import Layout
from simulator.profile import Profile, Sample
from simulator.results import Breakdown, Measurement, MemoryBreakdown, MemorySample, Prediction, Quantiles, Span
from simulator.units import BYTES


@dataclass(frozen=True)
class Engine:
    power: Annotated[float, BYTES]
    cylinders: int = 4

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Car:
    name: str
    engine: Engine
    wheels: tuple[int, ...] = ()

    __pydantic_config__ = STRICT


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = write_json(tmp_path / "deep" / "down" / "x.json", Car("a", Engine(1.5), (1, 2)))
    assert read_json(path, "car") == {"name": "a", "engine": {"power": 1.5, "cylinders": 4}, "wheels": [1, 2]}


@pytest.mark.parametrize("fail", ["encode", "replace"])
def test_the_old_file_stays_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fail: str) -> None:
    path = write_text(tmp_path / "plan.json", "old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    if fail == "replace":
        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(UserError, match="No space left on device"):
            write_text(path, "new")
    else:
        with pytest.raises(UnicodeEncodeError):
            write_text(path, "n" * 100_000 + "\ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.touch()
    assert write_text(tmp_path / "x", "").stat().st_mode == other.stat().st_mode


def test_a_folder_that_cannot_be_made_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        write_text(tmp_path / "file" / "x.json", "")


def test_a_missing_file_names_its_nearest_sibling(tmp_path: Path) -> None:
    (tmp_path / "llama.toml").touch()
    with pytest.raises(UserError, match=r"job '.*lama\.toml' does not exist; did you mean 'llama\.toml'\?"):
        read_toml(tmp_path / "lama.toml", "job")


def test_a_folder_and_a_binary_file_are_named_as_such(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        read_json(tmp_path, "plan")
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        read_json(tmp_path / "x", "plan")


@given(st.integers(min_value=0, max_value=60))
def test_json_cut_off_anywhere_is_the_users_error(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    whole = json.dumps({"layout": {"tp": 8, "pp": 4}, "steps": [1, 2, 3], "name": "x" * 20})
    path = tmp_path_factory.getbasetemp() / "cut.json"
    path.write_text(whole[:length])
    with pytest.raises(UserError, match="is it cut off"):
        read_json(path, "plan")


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[1, 2]")
    with pytest.raises(UserError, match="holds a JSON list, but an object is needed"):
        read_json(tmp_path / "x.json", "plan")


def test_broken_toml_says_where(tmp_path: Path) -> None:
    (tmp_path / "x.toml").write_text("model = \n")
    with pytest.raises(UserError, match=r"not valid TOML.*line 1"):
        read_toml(tmp_path / "x.toml", "job")


def test_a_dataclass_takes_lists_for_tuples_and_units_in_text() -> None:
    car = to_dataclass(Car, {"name": "a", "engine": {"power": "2 kB"}, "wheels": [1, 2]}, "car")
    assert car == Car("a", Engine(2000.0), (1, 2))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"name": "a", "engin": {}}, ["car 'x'", "engin"]),
        ({"name": "a"}, ["'engine' is missing"]),
        ({"name": "a", "engine": {"power": 1, "cylinder": 2}}, ["'engine.cylinder'", "did you mean 'cylinders'?"]),
        ({"name": "a", "engine": {"power": "3 horses"}}, ["engine.power", "'3 horses'", "80 GB"]),
        ({"name": "a", "engine": {"power": 1, "cylinders": "4"}}, ["engine.cylinders", '"4"', "integer"]),
        ({"name": "a", "engine": {"power": 1, "cylinders": 4.5}}, ["engine.cylinders", "4.5", "integer"]),
        ({"name": "a", "engine": {"power": 1, "cylinders": True}}, ["engine.cylinders", "true", "integer"]),
        ({"name": 3, "engine": {"power": 1}}, ["name", "3", "string"]),
        ({"name": "a", "engine": {"power": float("nan")}}, ["engine.power", "finite"]),
        ({"name": "a", "engine": {"power": 1}, "wheels": [1, "x"]}, ["wheels.1", '"x"']),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(data: dict[str, object], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        to_dataclass(Car, data, "car 'x'")
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert "pydantic" not in message


def test_an_unknown_field_of_a_layout_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown key 'micro_batch'; did you mean 'micro_batch_size'"):
        to_dataclass(Layout, {"micro_batch": 2}, "layout")


def test_a_value_outside_a_choice_names_the_choices() -> None:
    with pytest.raises(UserError, match=r"recompute = \"some\".*'none', 'selective' or 'full'"):
        to_dataclass(Layout, {"recompute": "some"}, "layout")


DOCUMENTED = (
    Job, Training, Layout, ClusterSpec, Link, CollectiveFit, Gpu, MatmulFit, AttentionFit, HostFit, Plan, Certificate,
    Prediction, Breakdown, MemoryBreakdown, Span, MemorySample, Measurement, Quantiles, Profile, Sample,
)  # fmt: skip


@pytest.mark.parametrize("kind", DOCUMENTED)
def test_the_documentation_names_every_field(kind: type) -> None:
    words = set(re.findall(r"\w+", (Path(__file__).parents[2] / "docs" / "files.md").read_text()))
    assert {field.name for field in dataclasses.fields(kind)} - words == set()
