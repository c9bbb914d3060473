"""What `validate here` leaves in its folder: here.json, here.md, and figures as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reports.here import Summary, Trial, ops_of_all, row, sentences, summary, together
from reports.page_figures import write_both
from reports.plots import draw_parity, draw_predicted_vs_measured, draw_timelines
from reports.tables import comparison_table
from reports.timeline import cells
from simulator.files import plain, write_json, write_text
from simulator.units import show_seconds

OPS = ("ops of the profiled steps", "count", "predicted ms", "measured ms", "ratio")
COLUMNS = ("layout", "ranks", "predicted", "measured", "error", "rounds apart", "memory", "bubble", "measured")


class Examined(NamedTuple):
    """One job: its layouts that ran, which of them is recommended, and why others did not run."""

    model: str
    trials: Sequence[Trial]
    recommended: str
    missing: Mapping[str, str]


def here_json(jobs: Sequence[Examined], about: Mapping[str, Any]) -> dict[str, Any]:
    """What `validate here --json` prints and here.json holds: every layout, and the figures of merit by job and over
    all of them. `about` goes on top as it is."""
    first = next((trial for trial in jobs[0].trials if trial.name == jobs[0].recommended), None)
    return dict(about) | {
        "layouts": [row(trial) for job in jobs for trial in job.trials],
        "recommended": None if first is None else plain(first.prediction.layout),
        "jobs": [
            {
                "model": job.model,
                "recommended": job.recommended,
                **plain(summary(job.trials, job.recommended)),
                "not_run": dict(job.missing),
            }
            for job in jobs
        ],
        "summary": plain(together([(job.trials, job.recommended) for job in jobs])),
    }


def layout_cells(trial: Trial, recommended: str) -> list[str]:
    """A layout as texts, in the order of COLUMNS."""
    found = row(trial)
    bubble = ["" if found[side]["bubble"] is None else f"{found[side]['bubble']:.0%}" for side in _SIDES]
    return [
        trial.name + (" *" if trial.name == recommended else ""),
        str(found["ranks"]),
        show_seconds(found["predicted"]["step_seconds"]),
        show_seconds(found["measured"]["step_seconds"]),
        f"{found['error']:+.1%}",
        "" if found["noise"] is None else f"{found['noise']:.0%}",
        f"{found['memory_error']:+.1%}",
        *bubble,
    ]


_SIDES = ("predicted", "measured")


def said_of(document: Mapping[str, Any]) -> list[str]:
    """The sentences of a document."""
    return sentences(Summary(**document["summary"]), document["warnings"])


def write_here(jobs: Sequence[Examined], about: Mapping[str, Any], folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Write here.json, here.md and the figures; the document and what was written."""
    document = here_json(jobs, about)
    first = jobs[0]
    written = [write_json(folder / "here.json", document)]
    figures: list[Path] = []
    if first.trials:
        title = f"{first.model} on this machine"
        compared = [trial.comparison for trial in first.trials]
        names = [trial.name for trial in first.trials]
        figures += write_both(draw_predicted_vs_measured(compared, title, names), folder / "here-speedup")
        points = {
            job.model: [(t.measured.step_seconds.median, t.prediction.step_seconds) for t in job.trials]
            for job in jobs
            if job.trials
        }
        figures += write_both(draw_parity(points, "seconds of a step"), folder / "here-parity")
    shown = timeline_of(first.trials, first.recommended)
    if shown is not None and shown.timeline is not None:
        name = folder / "here-timelines"
        figures += write_both(draw_timelines(shown.prediction, shown.timeline), name)
    text = write_text(folder / "here.md", _markdown(jobs, document, [f.name for f in figures if f.suffix == ".png"]))
    return document, [*written, text, *figures]


def timeline_of(trials: Sequence[Trial], recommended: str) -> Trial | None:
    """The layout whose two timelines are worth a picture: the fastest of the pipelines, which have most to show, or
    the recommended one where there is none."""
    profiled = [trial for trial in trials if trial.timeline]
    pipelines = [trial for trial in profiled if trial.prediction.layout.pp > 1]
    chosen = [trial for trial in profiled if trial.name == recommended]
    return min(pipelines, key=lambda trial: trial.prediction.step_seconds, default=next(iter(chosen), None))


def _markdown(jobs: Sequence[Examined], document: Mapping[str, Any], figures: Sequence[str]) -> str:
    lines = ["# Layouts of this machine, predicted and measured", ""]
    lines += [*said_of(document), "", f"{document['profile']}; {document['course']}.", ""]
    for job in jobs:
        lines += [f"## {job.model}: {job.recommended} is recommended", ""]
        lines += [comparison_table([trial.comparison for trial in job.trials])] if job.trials else []
        lines += [f"* not run: {name}: {reason}" for name, reason in job.missing.items()]
        lines += [""]
    lines += ["## Where it errs", "", "| " + " | ".join(OPS) + " |", "|---" + "|---:" * (len(OPS) - 1) + "|"]
    every = [trial for job in jobs for trial in job.trials]
    lines += [f"| {' | '.join(cells(one))} |" for one in ops_of_all(every)]
    lines += ["", *(f"![{name}]({name})" for name in figures), ""]
    return "\n".join(lines)
