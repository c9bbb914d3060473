"""How sure predictions of steps are: a section of docs/validation.md, and lines for a terminal.

`python -m reports.time_residuals_page` predicts all published runs, writes simulator/data/time_residuals.toml and
prints how well intervals hold.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

from reports.choices import Choice, choices, fare
from reports.published import published_rows
from reports.time_residuals import FILE, Run, by_gpu, held_out, residuals_toml, runs, time_residuals_of
from reports.validation import LEAST_LAYOUTS, Result, validate
from simulator.error_bars import LEVEL, TimeResiduals
from simulator.files import write_text


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


def terminal_lines(found: Sequence[Run], known: TimeResiduals) -> list[str]:
    """How well intervals and the rule of the recommendation do."""
    lines = [
        f"interval of {held.level:.0%}: of sources left out {held.by_source:.1%} inside ({held.by_job:.1%} by job), "
        f"mean width {held.width:.3f} in ln, stretched by {held.stretched:.2f}"
        for held in known.held_out
    ]
    d = known.difference
    lines.append(
        f"difference of two layouts of a job: half within {d.half:.1%}, four of five within {d.four_fifths:.1%} "
        f"({d.pairs} pairs, {d.jobs} jobs, {d.sources} sources); left out {d.held_out_half:.1%} and "
        f"{d.held_out_four_fifths:.1%}; sigma of a layout {d.sigma_layout:.3f}, of a job {d.sigma_job:.3f}"
    )
    for careful in (False, True):
        for least in (LEAST_LAYOUTS, 2):
            of = fare(choices(found, known, careful, least))
            lines.append(
                f"{'simplest of ties' if careful else 'predicted fastest':30s} {of.jobs} jobs of >= {least} "
                f"layouts: chosen {of.chosen:+.3f}, others {of.others:+.3f}, more {of.more:+.3f} +- {of.error:.3f}, "
                f"mean regret {of.regret:.2%}"
            )
    return lines


def main() -> None:
    """Write the file, print how well it holds."""
    results = validate(published_rows()).results
    known = time_residuals_of(results)
    write_text(FILE, residuals_toml(known))
    sys.stdout.write("\n".join([f"wrote {FILE}", *terminal_lines(runs(results), known)]) + "\n")


def _choice(picked: Sequence[Choice], careful: bool, least: int) -> tuple[str, ...]:
    found = fare(picked)
    return (
        "fastest, simplest of ties" if careful else "predicted fastest",
        f"{found.jobs} with {least} or more layouts",
        f"{found.chosen:+.3f}",
        f"{found.others:+.3f}",
        f"{found.more:+.3f} (se {found.error:.3f})",
        f"{found.regret:.1%}",
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


if __name__ == "__main__":
    main()
