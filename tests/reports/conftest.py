"""Rows by hand: a run whose cells are all known, with the ones that a test is about changed."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest

from reports.published import COLUMNS, Row, read_rows

# Made up: GPT-3 13B as Megatron-LM of 2022 would run it on two nodes.
CELLS = {
    "id": "row-1", "job": "one", "source": "a paper, table 1", "framework": "Megatron-LM 2022", "gpu": "A100-SXM-80GB",
    "gpus_per_node": "8", "n_gpus": "16", "model_name": "GPT 13B", "arch": "gpt", "layers": "40", "hidden": "5120",
    "ffn": "20480", "heads": "40", "kv_heads": "40", "vocab": "51200", "seq_len": "2048", "precision": "fp16",
    "gbs": "32", "mbs": "2", "dp": "1", "tp": "8", "pp": "2", "cp": "1", "sp": "yes", "zero_stage": "0",
    "schedule": "1F1B", "recompute": "selective", "attention": "unfused", "tokens_per_s_per_gpu": "1000",
    "confidence": "high", "status": "ok",
}  # fmt: skip

WriteRows = Callable[..., Path]
MakeRow = Callable[..., Row]


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """A CSV file with a row for each dictionary of cells that differ from CELLS."""

    def write(*rows: dict[str, str], name: str = "rows.csv") -> Path:
        path = tmp_path / name
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(CELLS | {"id": f"row-{i}"} | row for i, row in enumerate(rows, start=1))
        return path

    return write


@pytest.fixture
def make_row(write_rows: WriteRows) -> MakeRow:
    """One row: `make_row(pp="4")`."""
    return lambda **cells: read_rows(write_rows(cells))[0]
