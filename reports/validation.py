"""Predict published training runs and measure how wrong the predictions are."""

from __future__ import annotations

from dataclasses import dataclass

from reports.published import Case, Row, SkippedError, interpret
from simulator.errors import UserError
from simulator.results import Prediction
from simulator.simulate import simulate


@dataclass(frozen=True)
class Result:
    """One row, predicted; or skipped with a reason."""

    row: Row
    prediction: Prediction | None
    case: Case | None
    skipped: str = ""

    @property
    def error(self) -> float | None:
        """Predicted over measured tokens per second and GPU, minus 1."""
        measured = self.row.tokens_per_second_per_gpu
        if self.prediction is None or not measured or not self.row.ran:
            return None
        return self.prediction.tokens_per_second_per_gpu / measured - 1


def predict(row: Row) -> Result:
    try:
        case = interpret(row)
    except (SkippedError, UserError) as reason:
        return Result(row, None, None, str(reason))
    predictions = [simulate(case.job, layout) for layout in case.layouts]
    fitting = [p for p in predictions if p.fits] or predictions
    return Result(row, max(fitting, key=lambda p: p.tokens_per_second), case)
