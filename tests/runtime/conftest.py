"""A folder of text to train on, and the parity runs: one per world size, shared by all cases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from parity_table import run_cases, write_text


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some text with structure: a model learns to count within ten steps."""
    folder = tmp_path_factory.mktemp("text")
    write_text(folder)
    return folder


@pytest.fixture(scope="session")
def parity_runs(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Losses and gradient norms of every case in parity_cases.CASES and of its reference, by name."""
    return run_cases(text_folder, tmp_path_factory.mktemp("parity"), "fast")


@pytest.fixture(scope="session")
def all_parity_runs(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The same with parity_cases.LONG_CASES."""
    return run_cases(text_folder, tmp_path_factory.mktemp("all_parity"), "all")
