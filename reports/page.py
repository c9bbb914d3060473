"""One self-contained page about a plan: opens from disk, asks no network, works without scripts but for its curves."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from planner.plan import Plan
from reports import page_charts, page_sections
from reports.page_candidates import candidate_table, candidates
from reports.page_html import esc, folded, table
from reports.page_inputs import Inputs
from reports.page_timeline import packed_timeline
from reports.timeline import cells, join, totals_by_kind
from simulator.files import write_json, write_text
from simulator.results import Prediction
from simulator.simulate import simulate

WEB = Path(__file__).parent / "web"
SCRIPTS = ("theme.js", "table.js", "chart.js", "timeline.js")
# What lies beside the page, in this folder of its own.
BESIDE = "report"


def page(plan: Plan, traced: Prediction, inputs: Inputs = Inputs(), files: Sequence[tuple[str, str]] = ()) -> str:  # noqa: B008
    """The page as a text.

    Args:
        traced: the plan's best layout, simulated with its timeline.
        inputs: what else is known; its parts that are empty have no section.
        files: what will lie beside the page: name relative to it, and what it is.
    """
    data: dict[str, Any] = {"charts": {}}
    sections = [("candidates", "Candidates", candidate_table(plan))]
    sections.append(("time", "Where the time goes", page_sections.time_section(plan, inputs)))
    memory = _chart(
        data, "memory", "Memory of the fullest rank over the step", page_charts.memory_chart(traced, plan.job)
    )
    sections.append(("memory", "Memory", page_sections.memory_section(plan, memory)))
    sections.append(("step", "Timeline", _timeline(data, traced, inputs)))
    if inputs.comparisons:
        runs = page_sections.measured_section(inputs)
        if (run := inputs.run_of(plan.layout)) and len(run.losses) > 1:
            runs += _chart(data, "loss", "Loss of the run of this plan", page_charts.loss_chart(run))
        sections.append(("measured", "Predicted and measured", runs))
    if inputs.scaling and inputs.scaling.rows:
        curve = _chart(data, "scaling", "Throughput over GPUs", page_charts.scaling_chart(inputs.scaling))
        front = _chart(data, "pareto", "Time against cost", page_charts.pareto_chart(inputs.scaling))
        section = page_sections.scaling_section(inputs.scaling, curve, front)
        sections.append(("scaling", "More or fewer GPUs", section))
    if inputs.what_if and inputs.what_if[1]:
        sections.append(("what-if", "What if", page_sections.what_if_section(*inputs.what_if)))
    if inputs.ways:
        drawn_ways = [
            _chart(
                data, f"ways-{one.workers}", f"Loss over time of {one.workers} replicas", page_charts.ways_chart(one)
            )
            for one in inputs.ways
        ]
        section = page_sections.ways_section(inputs.ways, drawn_ways)
        sections.append(("ways", "Ways to keep replicas together", section))
    if inputs.exam and inputs.exam.compared:
        parity = page_charts.parity_chart(inputs.exam, plan.job)
        drawn = _chart(data, "parity", "Predicted against measured throughput", parity, tabled=False)
        sections.append(("exam", "How far predictions are off", page_sections.exam_section(inputs.exam, drawn)))
    sections.append(("job", "Job and provenance", page_sections.job_section(plan)))
    if files:
        listed = page_sections.files_section([(quote(name), what) for name, what in files])
        sections.append(("files", "Beside this page", listed))
    notes = "".join(f'<p class="hint">{esc(note)}</p>' for note in inputs.notes)
    body = "".join(
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{esc(heading)}</h2>'
        f"{content}</section>"
        for name, heading, content in sections
    )
    places = {
        "title": esc(page_sections.title(plan.job)),
        "created": esc(plan.provenance.get("created", "")),
        "version": esc(plan.provenance.get("layoutwise", "")),
        "css": _read("page.css"),
        "scripts": "\n".join(_read(name) for name in SCRIPTS),
        "nav": "".join(f'<li><a href="#{name}">{esc(heading)}</a></li>' for name, heading, _ in sections),
        "answer": page_sections.answer(plan) + notes,
        "sections": body,
        "data": embedded(data),
    }
    # In one pass: what is filled in may itself hold braces.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: places[match[1]], _read("page.html"))


def embedded(data: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _chart(data: dict[str, Any], name: str, title: str, chart: dict[str, Any] | None, tabled: bool = True) -> str:
    """Where a chart is drawn, with its points as a table; nothing where there is none."""
    if chart is None:
        return ""
    data["charts"][name] = chart | {"title": title}
    head, rows = page_charts.table_of(chart)
    numbers = folded("The same as a table", table(head, rows)) if tabled and len(rows) <= 60 else ""
    return (
        f'<figure class="chart" id="chart-{name}"><figcaption>{esc(title)}</figcaption>'
        f'<div class="plot" data-chart="{name}"></div></figure>{numbers}'
    )


def _timeline(data: dict[str, Any], traced: Prediction, inputs: Inputs) -> str:
    data["timeline"], notes = packed_timeline(traced, inputs.measured)
    ops = None
    if inputs.measured:
        rows = [cells(one) for one in totals_by_kind(join(traced, inputs.measured))]
        ops = (["ops", "count", "predicted ms", "measured ms", "ratio"], rows)
    return page_sections.timeline_section(traced, inputs.measured, notes, ops)


def _read(name: str) -> str:
    return (WEB / name).read_text(encoding="utf-8")


def write_report(plan: Plan, inputs: Inputs, folder: Path) -> list[Path]:
    """report.html in `folder`, and beside it in report/ the traces for Perfetto and the figures as PNG and SVG."""
    from reports.page_figures import memory_bars, time_bars
    from reports.plots import timelines
    from reports.scaling_figure import curve
    from reports.trace import chrome_trace, measured_trace

    traced = simulate(plan.job, plan.layout, trace=True)
    beside = folder / BESIDE
    named = [(one.name, one.prediction) for one in candidates(plan)]
    files = [
        (write_json(beside / "predicted.trace.json", chrome_trace(traced)), "the predicted step, for ui.perfetto.dev")
    ]
    if inputs.measured:
        trace = write_json(beside / "measured.trace.json", measured_trace(inputs.measured))
        files.append((trace, "the measured step, for ui.perfetto.dev"))
        files.append((timelines(traced, inputs.measured, beside / "timeline.png"), "both steps as a picture"))
    title = page_sections.title(plan.job)
    files += [(path, "where the time goes") for path in time_bars(named, beside / "time", title)]
    files += [(path, "memory of every pipeline rank") for path in memory_bars(plan, beside / "memory", title)]
    if inputs.scaling and inputs.scaling.rows:
        files += [(path, "throughput, time and cost over GPUs") for path in curve(inputs.scaling, beside / "scaling")]
    text = page(plan, traced, inputs, [(path.relative_to(folder).as_posix(), what) for path, what in files])
    return [write_text(folder / "report.html", text), *(path for path, _ in files)]
