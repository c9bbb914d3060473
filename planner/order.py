"""By what the best layout is chosen: one number of a candidate, of which less is better."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import numpy.typing as npt

from simulator.columns import Columns
from simulator.layout import Layout
from simulator.results import Prediction

Floats = npt.NDArray[np.float64]


class Order(Protocol):
    """What a search minimises. The search has lower bounds of a layout's seconds and leaves the layouts whose value at
    their bound is not below that of the best it found, so an order keeps three rules:

        value(layout, a) <= value(layout, b) where a <= b     then the value at a bound is a bound of the value
        at_least(columns, seconds)[row] <= value(columns.layout(row), seconds[row])
        key(prediction)[0] == value(prediction.layout, prediction.step_seconds)
    """

    def value(self, layout: Layout, seconds: float) -> float:
        """What is minimised, of a layout whose step takes (or takes at least) so many seconds."""
        ...

    def at_least(self, columns: Columns, seconds: Floats) -> Floats:
        """The same, or less, of each row at once."""
        ...

    def key(self, prediction: Prediction) -> tuple[float, str]:
        """Sorts predictions: the value, then what decides among equals."""
        ...


class Fastest:
    """The shortest step; of equals the first by name. The high end of a step's interval is a multiple of it that all
    layouts of a job share, so the best under the pessimistic end is the same."""

    def value(self, layout: Layout, seconds: float) -> float:
        return seconds

    def at_least(self, columns: Columns, seconds: Floats) -> Floats:
        return seconds

    def key(self, prediction: Prediction) -> tuple[float, str]:
        return prediction.step_seconds, prediction.layout.short()


FASTEST: Order = Fastest()


def gap_left(order: Order, best: Prediction, least: float) -> float:
    """How much less than that of the best the value of a layout that was not simulated can be, as a fraction."""
    return max(0.0, 1 - least / order.key(best)[0]) if least < math.inf else 0.0
