"""Fixtures for all tests: jobs from few words, and a home without the user's own profile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from simulator.job import Job, build_job

JobMaker = Callable[..., Job]


@pytest.fixture(autouse=True)
def no_user_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see no profile that `layoutwise measure` left on the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def make_job() -> JobMaker:
    """A job from presets: `make_job(model="gpt2", nodes=1, seq_len=1024)`; other words go into [training]."""

    def make(model: str = "llama-3.1-8b", cluster: str = "dgx-h100", nodes: int = 2, **training: Any) -> Job:
        data = {"model": model, "cluster": cluster, "nodes": nodes, "training": training}
        return build_job(data, "job 'test'")

    return make
