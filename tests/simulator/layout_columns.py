"""Layouts as rows of a table, which the planner builds from ranges of values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.columns import DEFAULTS, NAMED, Columns
from simulator.layout import Layout


def columns_of(layouts: Sequence[Layout]) -> Columns:
    """These layouts as columns."""
    names = {name: list(values) for name, values in NAMED.items()}
    numbers = {}
    for name, default in DEFAULTS.items():
        values = [getattr(layout, name) for layout in layouts]
        if name not in names and isinstance(default, int) and not isinstance(default, bool):
            numbers[name] = np.array(values, dtype=np.int64)
            continue
        known = names.setdefault(name, [default])
        known += [value for value in dict.fromkeys(values) if value not in known]
        place = {value: i for i, value in enumerate(known)}
        numbers[name] = np.array([place[value] for value in values], dtype=np.int64)
    return Columns(numbers, names)
