"""What each item of a rank's memory consists of, as rows for a terminal and as JSON."""

from __future__ import annotations

from typing import Any

from simulator.files import plain
from simulator.job import Job
from simulator.memory_items import MemoryPart, memory_parts
from simulator.program import stage_costs
from simulator.results import Prediction


def parts_of(job: Job, prediction: Prediction) -> tuple[tuple[MemoryPart, ...], ...]:
    """The parts of every pipeline rank of a prediction, each rank at its fullest."""
    return memory_parts(job, prediction.layout, stage_costs(job, prediction.layout))


def part_rows(
    ranks: tuple[tuple[MemoryPart, ...], ...], groups: list[str]
) -> list[tuple[str, str, list[tuple[float, int]]]]:
    """(item, part, (bytes, count) per column), in the order of items.

    Args:
        groups: ranks of a column as text, "3" or "1-4"; the first of them stands for all.
    """
    found: dict[tuple[str, str], list[tuple[float, int]]] = {}
    for column, group in enumerate(groups):
        for part in ranks[int(group.split("-")[0])]:
            row = found.setdefault((part.item, part.name), [(0.0, 0)] * len(groups))
            row[column] = (part.bytes, part.count)
    order = {item: place for place, item in enumerate(dict.fromkeys(p.item for rank in ranks for p in rank))}
    return [(*key, found[key]) for key in sorted(found, key=lambda key: order[key[0]])]


def cell(size: float, count: int) -> str:
    """GiB, with how many of them there are.

    >>> cell(3 * 2**30, 3)
    '3.00 (3)'
    """
    if not size:
        return ""
    return f"{size / 2**30:.2f}" + (f" ({count})" if count else "")


def parts_json(job: Job, prediction: Prediction) -> dict[str, Any]:
    """`memory_parts` of `simulate --json` and `explain --json`: by pipeline rank, each at its fullest."""
    return {"memory_parts": [[plain(part) for part in rank] for rank in parts_of(job, prediction)]}
