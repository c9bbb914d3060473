"""A folder to work in, with a small job."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_job import JOB


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job.toml").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    return tmp_path
