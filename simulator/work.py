"""Work: seconds of one op by what they are spent on, in the fields of a Breakdown."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """Seconds that one op keeps its rank busy, by what they are spent on; the fields are those of Breakdown."""

    compute: float = 0.0
    recompute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    dp: float = 0.0
    host: float = 0.0

    @functools.cached_property
    def total(self) -> float:
        return self.compute + self.recompute + self.tp + self.cp + self.ep + self.dp + self.host

    def __add__(self, other: Work) -> Work:
        return Work(
            self.compute + other.compute,
            self.recompute + other.recompute,
            self.tp + other.tp,
            self.cp + other.cp,
            self.ep + other.ep,
            self.dp + other.dp,
            self.host + other.host,
        )

    @property
    def computation(self) -> float:
        """Seconds on the device and its host, without communication."""
        return self.compute + self.recompute + self.host

    def spent_on(self, names: Collection[str]) -> float:
        """Seconds of these fields."""
        return sum(getattr(self, name) for name in _WORK if name in names)

    def without(self, hidden: float, names: Collection[str]) -> Work:
        """The same work with this many seconds of these fields beside other work."""
        spent = self.spent_on(names)
        kept = 1 - hidden / spent if spent else 1.0
        return Work(**{name: getattr(self, name) * (kept if name in names else 1.0) for name in _WORK})

    def __sub__(self, part: Work) -> Work:
        return Work(**{name: getattr(self, name) - getattr(part, name) for name in _WORK})


_WORK = tuple(field.name for field in dataclasses.fields(Work))
NOTHING = Work()
