"""Many layouts as columns of integers, one row each, and which of them are legal.

`Layout.problems` stays the only place that knows the rules: each of its parts is asked once for every combination of
the fields that it reads, and rows that share the combination share the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from simulator.axes import RANK_ORDER
from simulator.layout import Layout
from simulator.layout_rules import (
    batch_problems,
    grid_problems,
    order_problems,
    pipeline_problems,
    stack_problems,
    tensor_problems,
)
from simulator.offload import offload_problems
from simulator.schedules import SCHEDULES
from simulator.sync_rules import sync_problems

if TYPE_CHECKING:
    from simulator.job import Job

Column = npt.NDArray[np.int64]
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Layout)}
# Values of the fields that are no numbers; a row holds the place of its value. Of stage_layers and rank_order, and of
# fields that a search names, every set of columns has its own.
NAMED: dict[str, list[Any]] = {
    "schedule": list(SCHEDULES),
    "recompute": ["none", "selective", "full"],
    "stage_layers": [None],
    "rank_order": [RANK_ORDER],
    "sequence_parallel": [False, True],
    "offload": ["none", "optimizer"],
}


@dataclass(frozen=True)
class Columns:
    """Layouts as rows: `numbers` has a column for every field of Layout, `names` the values of those fields that are
    no numbers, by their place."""

    numbers: dict[str, Column]
    names: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(self.numbers["tp"])

    def __getitem__(self, field: str) -> Column:
        return self.numbers[field]

    def layout(self, row: int) -> Layout:
        """The layout of one row."""
        return self.layouts(np.array([row]))[0]

    def layouts(self, rows: npt.NDArray[Any]) -> list[Layout]:
        """The layouts of the rows at these places."""
        fields = {name: column[rows].tolist() for name, column in self.numbers.items()}
        for name, values in self.names.items():
            fields[name] = [values[place] for place in fields[name]]
        names = list(fields)
        return [Layout(**dict(zip(names, row, strict=True))) for row in zip(*fields.values(), strict=True)]

    def take(self, rows: npt.NDArray[Any]) -> Columns:
        """The rows at these places, or those for which a mask is true."""
        return Columns({name: column[rows] for name, column in self.numbers.items()}, self.names)

    def replace(self, **changes: Column) -> Columns:
        """The same rows with other values in some columns."""
        return Columns(self.numbers | changes, self.names)

    @property
    def dp(self) -> Column:
        return self["dp_replicate"] * self["dp_shard"]

    def microbatches(self, global_batch_size: int) -> Column:
        """Microbatches that one data-parallel rank runs in a step; 0 where a size is not legal."""
        share = self.dp * self["micro_batch_size"]
        return np.where(share > 0, global_batch_size // np.maximum(share, 1), 0)

    def is_named(self, field: str, *values: object) -> npt.NDArray[np.bool_]:
        """Where a field that is no number has one of these values."""
        places = [i for i, value in enumerate(self.names[field]) if value in values]
        return np.isin(self[field], places)


def distinct(*columns: npt.NDArray[Any]) -> tuple[Column, Column]:
    """(a row of every combination of values that occurs, the combination of every row).

    Values are integers from 0 on; tables of their size are cheaper than sorting.
    """
    rows = len(columns[0])
    key, size = np.zeros(rows, dtype=np.int64), 1
    for column in columns:
        code, count = _dense(column.astype(np.int64, copy=False))
        key, size = key * count + code, size * count
        if size > 4 * rows + 1024:
            key, size = _dense(key)
    key, size = _dense(key)
    first = np.zeros(size, dtype=np.int64)
    first[key[::-1]] = np.arange(rows - 1, -1, -1)
    return first, key


def _dense(values: Column) -> tuple[Column, int]:
    """The places of values among those that occur, and how many do."""
    top = int(values.max(initial=-1)) + 1
    if top > 64 * len(values) + 2**20:
        found, codes = np.unique(values, return_inverse=True)
        return codes, len(found)
    seen = np.zeros(top, dtype=bool)
    seen[values] = True
    return (np.cumsum(seen) - 1)[values], int(seen.sum())


# The rules of layout_rules.py with the fields that they read. Microbatches follow from the batch and three fields.
_GRID = ("dp_replicate", "dp_shard", "cp", "tp", "pp")
RULES: dict[Callable[[Layout, Job], list[str]], tuple[str, ...]] = {
    order_problems: ("rank_order", *_GRID),
    grid_problems: (*_GRID, "ep", "zero_stage", "sequence_parallel"),
    batch_problems: ("dp_replicate", "dp_shard", "micro_batch_size"),
    tensor_problems: ("tp", "cp", "ep", "sequence_parallel"),
    pipeline_problems: ("pp", "virtual_stages", "schedule", "recompute", "stage_layers", "microbatches"),
    stack_problems: (
        "ep", "tp", "cp", "pp", "zero_stage", "schedule", "recompute", "sequence_parallel", "rank_order", "replicates",
        "shards",
    ),
    sync_problems: ("replicates", "ep", "zero_stage", "world"),
    offload_problems: ("offload", "zero_stage"),
}  # fmt: skip


def legal(job: Job, columns: Columns) -> npt.NDArray[np.bool_]:
    """Which rows have no problems with the job: exactly those for which Layout.problems(job) is empty."""
    sizes = ("dp_replicate", "dp_shard", "cp", "tp", "pp", "ep", "micro_batch_size", "virtual_stages")
    found = np.all([columns[name] >= 1 for name in sizes], axis=0)
    world = columns["dp_replicate"] * columns["dp_shard"] * columns["cp"] * columns["tp"] * columns["pp"]
    extra = [name for name in columns.numbers if name not in _ENUMERATED]
    derived = {
        "microbatches": columns.microbatches(job.training.global_batch_size),
        "replicates": columns["dp_replicate"] > 1,
        "shards": columns["dp_shard"] > 1,
        "world": world,
    }
    fields = columns.numbers | derived
    for rule, reads in RULES.items():
        rows = np.flatnonzero(found)
        if not len(rows):
            break
        firsts, codes = distinct(*(fields[name][rows] for name in (*reads, *extra)))
        fine = [not rule(layout, job) for layout in columns.layouts(rows[firsts])]
        found[rows] = np.array(fine)[codes]
    return found


_ENUMERATED = {*_GRID, "ep", "zero_stage", "micro_batch_size", "virtual_stages", *NAMED}
