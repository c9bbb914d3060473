"""Published training runs: what their sources state, row by row. reports/cases.py says what a row means."""

from __future__ import annotations

import csv
import io
import math
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from simulator.errors import UserError, nearest
from simulator.files import read_text

DATA = Path(str(resources.files("reports"))) / "data"

TEXTS = (
    "id", "job", "source", "framework", "gpu", "intra_node", "inter_node", "model_name", "arch", "precision", "sp",
    "schedule", "recompute", "recompute_detail", "compile", "attention", "overlap_notes", "notes", "confidence",
    "status",
)  # fmt: skip
COUNTS = (
    "gpus_per_node", "n_gpus", "layers", "hidden", "ffn", "heads", "kv_heads", "vocab", "seq_len", "experts", "topk",
    "gbs", "mbs", "dp", "tp", "pp", "vpp", "cp", "ep", "zero_stage", "shard_size",
)  # fmt: skip
NUMBERS = ("params_b", "iter_time_s", "tokens_per_s_per_gpu", "peak_mem_gib")
COLUMNS = (*TEXTS, *COUNTS, *NUMBERS)


@dataclass(frozen=True)
class Row:
    """One published run. Cells as the source states them: empty texts and None where it does not.

    counts and numbers hold the columns COUNTS and NUMBERS; tokens per second and GPU, seconds and GiB in the latter.
    """

    texts: dict[str, str]
    counts: dict[str, int | None]
    numbers: dict[str, float | None]

    def text(self, column: str) -> str:
        return self.texts[column]

    def count(self, column: str) -> int | None:
        return self.counts[column]

    def number(self, column: str) -> float | None:
        return self.numbers[column]

    @property
    def tokens_per_second_per_gpu(self) -> float | None:
        """As stated, else from the step time."""
        stated, step = self.numbers["tokens_per_s_per_gpu"], self.numbers["iter_time_s"]
        gbs, seq, gpus = self.counts["gbs"], self.counts["seq_len"], self.counts["n_gpus"]
        if stated is None and step and gbs and seq and gpus:
            return gbs * seq / step / gpus
        return stated

    @property
    def ran(self) -> bool:
        """Whether the run fitted into memory."""
        return self.texts["status"].upper() != "OOM"


def read_rows(path: Path | str) -> list[Row]:
    """The rows of one CSV file.

    Raises:
        UserError: a missing or unknown column, a cell that is not the number it should be, an id twice.
    """
    lines = csv.DictReader(io.StringIO(read_text(path, "rows"), newline=""))
    given = list(lines.fieldnames or ())
    for column in given:
        if column not in COLUMNS:
            raise UserError(f"rows '{path}': unknown column '{column}'{nearest(str(column), COLUMNS)}")
    missing = [column for column in COLUMNS if column not in given]
    if missing:
        raise UserError(f"rows '{path}': the column '{missing[0]}' is missing; write it, empty where nothing is known")
    rows, seen = [], set()
    for number, cells in enumerate(lines, start=2):
        if None in cells or None in cells.values():
            raise UserError(f"rows '{path}' line {number}: {len(COLUMNS)} cells are needed")
        if not cells["id"] or cells["id"] in seen:
            raise UserError(f"rows '{path}' line {number}: id = '{cells['id']}' must be there and be there once")
        seen.add(cells["id"])
        where = f"rows '{path}' row {cells['id']}"
        rows.append(
            Row(
                {column: cells[column].strip() for column in TEXTS},
                {column: _count(cells[column], f"{where}: {column}") for column in COUNTS},
                {column: _number(cells[column], f"{where}: {column}") for column in NUMBERS},
            )
        )
    return rows


def published_rows() -> list[Row]:
    """All rows that the project ships, by file and place."""
    return [row for path in sorted((DATA / "published").glob("*.csv")) for row in read_rows(path)]


def source_name(row: Row) -> str:
    """The repository or paper of a row: its source up to the commit, the file or the table."""
    source = row.text("source")
    paper = re.match(r"arXiv [\d.]+", source)
    return paper[0] if paper else re.split(r"[@;,: ]", source)[0]


def _count(cell: str, where: str) -> int | None:
    number = _number(cell, where)
    if number is None:
        return None
    if number != int(number) or number < 0:
        raise UserError(f"{where} = {cell!r} must be a whole number of at least 0")
    return int(number)


def _number(cell: str, where: str) -> float | None:
    if not cell.strip():
        return None
    try:
        number = float(cell)
    except ValueError:
        raise UserError(f"{where} = {cell!r} must be a number or empty") from None
    if not math.isfinite(number) or number < 0:
        raise UserError(f"{where} = {cell!r} must be a number of at least 0 or empty")
    return number
