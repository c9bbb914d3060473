"""What a prediction and a recommendation are worth, in words: intervals, ties, claims that nobody has reached."""

from __future__ import annotations

from planner.plan import Plan
from simulator.error_bars import unseen_mfu
from simulator.job import Job
from simulator.results import Prediction
from simulator.units import show_seconds

MOST_TIES = 3


def interval_cell(prediction: Prediction) -> str:
    """`15.1 s to 21.7 s`."""
    found = prediction.interval
    return f"{show_seconds(found.low)} to {show_seconds(found.high)}" if found else ""


def interval_title(prediction: Prediction) -> str:
    """`80% interval`."""
    return f"{prediction.interval.level:.0%} interval" if prediction.interval else "interval"


def interval_sentence(prediction: Prediction) -> str:
    """The interval with where it is known from; empty where there is none."""
    found = prediction.interval
    if found is None:
        return ""
    low, high = (end / prediction.step_seconds - 1 for end in (found.low, found.high))
    return (
        f"step {interval_cell(prediction)} ({low:+.0%} to {high:+.0%}) with a probability of {found.level:.0%}: "
        f"{found.source}"
    )


def choice_lines(plan: Plan) -> list[str]:
    """Why this layout is recommended, what ties with it, and which was fastest."""
    choice = plan.choice
    if choice is None:
        return []
    lines = [f"why: {choice.why}"]
    if choice.ties:
        shown = "; ".join(layout.short() for layout in choice.ties[:MOST_TIES])
        more = len(choice.ties) - MOST_TIES
        lines.append(f"tied with it: {shown}{f'; {more} more' if more > 0 else ''}")
    if choice.fastest != plan.layout:
        lines.append(
            f"fastest by the mean of those simulated: {choice.fastest.short()}, "
            f"{show_seconds(choice.fastest_step_seconds)}"
        )
    return lines


def warnings(job: Job, prediction: Prediction) -> list[str]:
    """Sentences about claims beyond what was ever published."""
    found = unseen_mfu(job, prediction.mfu)
    return [found] if found else []
