"""How sure predictions of steps are: a section of docs/validation.md."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from reports.time_residuals import Choice, by_gpu, choices, held_out, runs, time_residuals_of
from reports.validation import LEAST_LAYOUTS, Result
from simulator.error_bars import LEVEL, TimeResiduals


def section(results: Sequence[Result]) -> list[str]:
    """Paragraphs: intervals of sources left out, by GPU; errors of differences; the claim for the chosen layout. Empty
    where there are too few sources to leave one out."""
    found = runs(results)
    if len({run.source for run in found}) < 3:
        return []
    known = time_residuals_of(results)
    held = next(one for one in known.held_out if one.level == LEVEL)
    half = next(one for one in known.held_out if one.level != LEVEL)
    rows = [
        (name, str(layouts), str(jobs), f"{inside:.0%}", f"{width:.2f}")
        for name, layouts, jobs, inside, width in by_gpu(held_out(found), held.stretched)
    ]
    d = known.difference
    return [
        "## How sure",
        f"Every prediction has an interval of {LEVEL:.0%} ([how](cost-model.md#how-far-off-a-step-may-be)). Here "
        f"each of "
        f"the {known.pooled.sources} sources ({known.pooled.jobs} jobs, {known.pooled.layouts} layouts) is judged by "
        f"what "
        f"is fitted to the others: {held.by_source:.1%} inside with sources counting the same, {held.by_job:.1%} with "
        f"jobs, mean width {held.width:.2f} in ln(step). Of the interval of {half.level:.0%}: {half.by_source:.1%} and "
        f"{half.by_job:.1%}, width {half.width:.2f}. Both were stretched by {held.stretched:g} and "
        f"{half.stretched:g} to "
        f"hold. By GPU, jobs counting the same:",
        _table(("GPU", "layouts", "jobs", f"inside of {LEVEL:.0%}", "mean width"), rows),
        f"The difference of two layouts of one job is off by {d.half:.1%} at the median and by {d.four_fifths:.1%} "
        f"in one "
        f"of five ({d.pairs:,} pairs of {d.jobs} jobs, {d.sources} sources; of sources left out "
        f"{d.held_out_half:.0%} and "
        f"{d.held_out_four_fifths:.0%} lay within). As standard deviations with the same middle half: "
        f"{d.sigma_layout:.3f} "
        f"of a layout's own, {d.sigma_job:.3f} that all layouts of a job share.",
        "Who picks the best of many predictions picks errors in its favour. Below, e = ln(measured / predicted step), "
        "positive where the claim was too fast, of the layout that a rule picks among those measured of a job and of "
        "the "
        "mean of the others. In sample: the bands are of these rows too.",
        _table(
            ("rule", "jobs", "e of the chosen", "e of the others", "difference", "mean regret"),
            [
                _choice(choices(found, known, careful, least), careful, least)
                for least in (LEAST_LAYOUTS, 2)
                for careful in (False, True)
            ],
        ),
        _claim(choices(found, known, True), known),
    ]


def _choice(picked: Sequence[Choice], careful: bool, least: int) -> tuple[str, ...]:
    more = [choice.chosen - choice.others for choice in picked]
    error = statistics.stdev(more) / math.sqrt(len(more)) if len(more) > 1 else 0.0
    return (
        "fastest, simplest of ties" if careful else "predicted fastest",
        f"{len(picked)} with {least} or more layouts",
        *(f"{statistics.mean(values):+.3f}" for values in ([c.chosen for c in picked], [c.others for c in picked])),
        f"{statistics.mean(more):+.3f} (se {error:.3f})",
        f"{statistics.mean(c.regret for c in picked):.1%}",
    )


def _claim(picked: Sequence[Choice], known: TimeResiduals) -> str:
    claim = statistics.mean(choice.chosen for choice in picked) - known.pooled.q90
    above = sum(choice.chosen > known.pooled.q90 for choice in picked)
    return (
        f"With the high end as the claim the recommended layouts of the {len(picked)} jobs are claimed {-claim:.0%} "
        f"too "
        f"slow on average; {above} took longer than that."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *("---:" for _ in columns[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
