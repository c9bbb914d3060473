"""The sections of a page as HTML. Every text that comes from a file passes through `esc`."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.plan import Plan
from reports.page_charts import GIB, Table, dollars, pareto_rows
from reports.page_inputs import Exam, Inputs, Ratio, error_figures, exam_groups, ratio, step_interval
from reports.page_timeline import busy_table, evenly
from reports.tables import Comparison
from simulator.job import Job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.memory import capacity
from simulator.results import Breakdown, MeasuredTimeline, MemoryBreakdown, Prediction
from simulator.units import show_bytes, show_seconds

MOST_BARS = 16
TIME = tuple(field.name for field in dataclasses.fields(Breakdown))
MEMORY = tuple(field.name for field in dataclasses.fields(MemoryBreakdown) if field.name != "peak")
MEANING = {
    "compute": "kernels",
    "recompute": "forward again, to save memory",
    "tp": "tensor-parallel collectives that nothing hides",
    "cp": "context-parallel exchange that nothing hides",
    "ep": "expert exchange that nothing hides",
    "pp": "waiting for a tensor on a link",
    "dp": "gradients and parameters that nothing hides",
    "bubble": "waiting for another stage",
    "optimizer": "update and gradient norm",
    "host": "launching kernels that the device outruns",
}


@dataclass(frozen=True)
class Named:
    """A prediction and what the page calls it."""

    name: str
    prediction: Prediction


def esc(text: object) -> str:
    """Text that is safe between tags and in quoted attributes."""
    return html.escape(str(text), quote=True)


def candidates(plan: Plan) -> list[Named]:
    """Best, runners-up, and the plain data-parallel baseline if it is none of them."""
    found = [Named("best", plan.best)]
    found += [Named(f"place {place}", p) for place, p in enumerate(plan.runners_up, start=2)]
    for place, one in enumerate(found):
        if one.prediction.layout == plan.baseline.layout:
            found[place] = Named(f"{one.name}, data parallel", one.prediction)
            return found
    return [*found, Named("data parallel", plan.baseline)]


def pasteable(layout: Layout, job: Job) -> str:
    """What `--layout` takes for exactly this layout: the fields that do not follow from the others."""
    names = {field.name: getattr(layout, field.name) for field in dataclasses.fields(layout)}
    given = [name for name in names if names[name] != getattr(Layout(), name)]
    while True:
        read = parse_layout(" ".join(f"{name}={_word(names[name])}" for name in given), job)
        wrong = [name for name in names if getattr(read, name) != names[name] and name not in given]
        if not wrong:
            return " ".join(f"{name}={_word(names[name])}" for name in names if name in given)
        given += wrong


def _word(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def title(job: Job) -> str:
    return f"{job.model.name} on {machines(job)}"


def machines(job: Job) -> str:
    if job.cluster.gpu.kind == "cpu":
        return f"{job.cluster.name} ({job.world_size} processors)"
    return f"{job.nodes} × {job.cluster.name} ({job.world_size} GPUs)"


def recommendation(plan: Plan, known: Ratio | None = None) -> str:
    """The whole answer in one sentence, without markup."""
    best, job = plan.best, plan.job
    device = "processor" if job.cluster.gpu.kind == "cpu" else "GPU"
    cost = dollars(best, job)
    parts = [
        f"{show_seconds(best.step_seconds)} a step",
        f"{best.tokens_per_second:,.0f} tokens/s ({best.tokens_per_second_per_gpu:,.0f} per {device}, "
        f"{best.mfu:.1%} MFU)",
        f"{best.memory.peak / GIB:.3g} of {capacity(job, best.layout) / GIB:.3g} GiB on the fullest {device}",
        *([] if cost is None else [f"${cost:,.0f} for 10⁹ tokens"]),
    ]
    return f"Train with {best.layout.short()}: {', '.join(parts)}; {_against_baseline(plan)}."


def _against_baseline(plan: Plan) -> str:
    best, baseline = plan.best, plan.baseline
    if best.layout == baseline.layout:
        return "this is plain data parallelism"
    if not baseline.fits:
        return f"plain data parallelism does not work: {baseline.problems[0]}"
    gain = baseline.step_seconds / best.step_seconds
    if gain < 1:
        return f"plain data parallelism would be {1 / gain:.3g} times as fast, but the job's [search] leaves it out"
    return f"{gain:.3g} times as fast as plain data parallelism"


def answer(plan: Plan, known: Ratio | None) -> str:
    """The sentence, the figures, the layout to copy."""
    best, job = plan.best, plan.job
    device = "processor" if job.cluster.gpu.kind == "cpu" else "GPU"
    limit, cost = capacity(job, best.layout), dollars(best, job)
    interval = step_interval(best, known)
    spread = f"four of five: {show_seconds(interval[0])} to {show_seconds(interval[1])}" if interval else "predicted"
    tiles = [
        ("step", show_seconds(best.step_seconds), spread),
        ("throughput", f"{best.tokens_per_second:,.0f} tokens/s", f"{best.tokens_per_second_per_gpu:,.0f} per {device}"),
        ("MFU", f"{best.mfu:.1%}", f"{best.hfu:.1%} with recomputation"),
        ("memory", f"{best.memory.peak / GIB:.1f} GiB", f"{best.memory.peak / limit:.0%} of {limit / GIB:.1f} GiB"),
    ]
    risk = getattr(best, "out_of_memory_probability", None)
    if risk is not None:
        tiles.append(("out of memory", f"{risk:.0%}", "probability"))
    if cost is not None:
        tiles.append(("cost", f"${cost:,.0f}", f"10⁹ tokens at ${job.cluster.price_per_gpu_hour:.2f} per GPU hour"))
    boxes = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(value)}<small>{esc(note)}</small></dd></div>" for name, value, note in tiles
    )
    return (
        f'<p class="lead">{esc(recommendation(plan, known))}</p>'
        f'<dl class="tiles">{boxes}</dl>{copy_box(pasteable(best.layout, job), "layout")}'
    )


def copy_box(text: str, what: str) -> str:
    return (
        f'<div class="copy"><code>{esc(text)}</code>'
        f'<button type="button" data-copy="{esc(text)}" aria-label="Copy the {esc(what)}">Copy</button></div>'
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1, caption: str = "") -> str:
    """A table of texts; all columns but the first `texts` are numbers."""
    named = f"<caption>{esc(caption)}</caption>" if caption else ""
    kind = ['class="text"' if place < texts else 'class="number"' for place in range(len(head))]
    top = "".join(f'<th scope="col" {kind[place]}>{esc(name)}</th>' for place, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td {kind[place]}>{esc(cell)}</td>" for place, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    return f'<div class="scroll" tabindex="0"><table>{named}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{esc(summary)}</summary>{content}</details>"


def candidate_table(plan: Plan) -> str:
    """Every layout that the plan holds, to be sorted and filtered."""
    named, job = candidates(plan), plan.job
    layouts = [one.prediction.layout for one in named]
    extra = [name for name in ("cp", "ep") if any(getattr(layout, name) > 1 for layout in layouts)]
    priced = job.cluster.price_per_gpu_hour is not None
    risky = any(getattr(one.prediction, "out_of_memory_probability", None) is not None for one in named)
    head = [
        ("", "text"), ("TP", "number"), *((name.upper(), "number") for name in extra), ("PP", "number"),
        ("VP", "number"), ("DP", "number"), ("ZeRO", "number"), ("MBS", "number"), ("schedule", "text"),
        ("recompute", "text"), ("step", "number"), ("tok/s/GPU", "number"), ("MFU", "number"), ("GiB", "number"),
        *([("OOM", "number")] if risky else []), *([("$/10⁹ tok", "number")] if priced else []),
        ("fits", "text"), ("--layout", "text"),
    ]  # fmt: skip
    top = "".join(
        f'<th scope="col" class="{kind}" aria-sort="none"><button type="button">{esc(name or "layout")}</button></th>'
        for name, kind in head
    )
    body = "".join(_candidate_row(place, one, plan, extra, risky, priced) for place, one in enumerate(named))
    return (
        '<form class="filter" role="search" onsubmit="return false"><label>Filter '
        '<input type="search" id="filter" placeholder="tp=4 pp&gt;=8 step&lt;20" autocomplete="off" spellcheck="false" '
        'aria-describedby="filter-help"></label>'
        '<label class="check"><input type="checkbox" id="fits-only"> only what fits</label>'
        f'<output id="filter-count" for="filter fits-only" aria-live="polite">{len(named)} layouts</output></form>'
        '<p class="hint" id="filter-help">Words, or fields with =, &lt;, &gt;, &lt;=, &gt;=: any field of a layout, '
        "<code>step</code> (s), <code>mfu</code> (%), <code>gib</code>, <code>speed</code> (tokens/s/GPU).</p>"
        '<div class="scroll" tabindex="0"><table id="candidates" class="sortable"><caption class="unseen">Layouts with their '
        f"predictions</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="hint">VP: stages on each pipeline rank. DP: replicas × shards. +SP: sequence parallel. MBS: sequences '
        "in a microbatch. MFU: model FLOPs over the peak.</p>"
    )


def _candidate_row(place: int, one: Named, plan: Plan, extra: list[str], risky: bool, priced: bool) -> str:
    p, layout, job = one.prediction, one.prediction.layout, plan.job
    data = f"{layout.dp_replicate} × {layout.dp_shard}" if layout.zero_stage else str(layout.dp_replicate)
    risk, cost = getattr(p, "out_of_memory_probability", None), dollars(p, job)
    text = pasteable(layout, job)
    fits = "yes" if p.fits else f"no: {p.problems[0]}"
    cells: list[tuple[str, object, str]] = [
        (one.name, place, "text"),
        (f"{layout.tp}{'+SP' if layout.sequence_parallel else ''}", layout.tp, "number"),
        *((str(getattr(layout, name)), getattr(layout, name), "number") for name in extra),
        (str(layout.pp), layout.pp, "number"),
        (str(layout.virtual_stages), layout.virtual_stages, "number"),
        (data, layout.dp, "number"),
        (str(layout.zero_stage), layout.zero_stage, "number"),
        (str(layout.micro_batch_size), layout.micro_batch_size, "number"),
        (layout.schedule if layout.pp > 1 else "–", layout.schedule if layout.pp > 1 else "", "text"),
        (layout.recompute, layout.recompute, "text"),
        (show_seconds(p.step_seconds), p.step_seconds, "number"),
        (f"{p.tokens_per_second_per_gpu:,.0f}", p.tokens_per_second_per_gpu, "number"),
        (f"{p.mfu:.1%}", p.mfu, "number"),
        (f"{p.memory.peak / GIB:.1f}", p.memory.peak, "number"),
        *([("–" if risk is None else f"{risk:.0%}", risk or 0, "number")] if risky else []),
        *([("–" if cost is None else f"{cost:,.0f}", cost or 0, "number")] if priced else []),
        ("yes" if p.fits else "no", int(not p.fits), "text"),
    ]
    fields = {field.name: _word(getattr(layout, field.name)) for field in dataclasses.fields(layout)}
    fields |= {"step": f"{p.step_seconds:.6g}", "mfu": f"{100 * p.mfu:.6g}", "gib": f"{p.memory.peak / GIB:.6g}"}
    fields |= {"speed": f"{p.tokens_per_second_per_gpu:.6g}", "name": one.name.replace(" ", "-").replace(",", "")}
    search = " ".join(f"{name}={value}" for name, value in fields.items())
    shown = "".join(f'<td class="{kind}" data-v="{esc(value)}">{esc(text)}</td>' for text, value, kind in cells)
    return (
        f'<tr data-fields="{esc(search)}" data-fits="{int(p.fits)}" title="{esc("" if p.fits else fits)}">{shown}'
        f'<td class="text" data-v="{esc(text)}">{copy_box(text, "layout")}</td></tr>'
    )


@dataclass(frozen=True)
class Bar:
    """A bar: what it is, its parts by kind in order, their sum as a text, an interval of the sum if known."""

    name: str
    note: str
    parts: dict[str, float]
    text: str
    interval: tuple[float, float] | None = None

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def bars(found: Sequence[Bar], show: Any, limit: float | None = None, limit_text: str = "") -> str:
    """Stacked bars on one scale; `show` turns a value into a text, `limit` is a line over all of them."""
    ends = [end for bar in found for end in (bar.total, bar.interval[1] if bar.interval else 0.0)]
    scale = max([*ends, limit or 0.0]) * 1.01 or 1.0
    rows = "".join(_bar(bar, show, scale, limit, limit_text) for bar in found)
    return f'<div class="bars">{rows}</div>'


def _bar(bar: Bar, show: Any, scale: float, limit: float | None, limit_text: str) -> str:
    parts = {name: value for name, value in bar.parts.items() if value > 1e-6 * scale}
    words = ", ".join(f"{name} {show(value)}" for name, value in parts.items())
    segments = "".join(
        f'<span class="k-{name}" style="width:{100 * value / scale:.3f}%" '
        f'data-tip="{esc(name)}: {esc(show(value))} ({value / bar.total:.1%})"></span>'
        for name, value in parts.items()
    )
    line = ""
    if bar.interval:
        low, high = (100 * end / scale for end in bar.interval)
        tip = f"four of five: {show(bar.interval[0])} to {show(bar.interval[1])}"
        line += f'<i class="whisker" style="left:{low:.3f}%;width:{high - low:.3f}%" data-tip="{esc(tip)}"></i>'
    if limit is not None:
        line += f'<i class="limit" style="left:{100 * limit / scale:.3f}%" data-tip="{esc(limit_text)}"></i>'
    note = f"<code>{esc(bar.note)}</code>" if bar.note else ""
    return (
        f'<div class="bar-name">{esc(bar.name)} {note}</div>'
        f'<div class="bar" role="img" aria-label="{esc(bar.name)}: {esc(bar.text)}: {esc(words)}">{segments}{line}</div>'
        f'<div class="bar-text">{esc(bar.text)}</div>'
    )


def legend(kinds: Sequence[str]) -> str:
    items = "".join(f'<li><span class="k-{kind}"></span>{esc(kind)}</li>' for kind in kinds)
    return f'<ul class="legend" aria-hidden="true">{items}</ul>'


def time_section(plan: Plan, inputs: Inputs, known: Ratio | None) -> str:
    """Where a step's time goes, the best beside the others, and measured where it was run."""
    found, named = [], candidates(plan)
    for one in named:
        p = one.prediction
        parts = {name: max(0.0, float(getattr(p.breakdown, name))) for name in TIME}
        interval = step_interval(p, known)
        found.append(Bar(one.name, p.layout.short(), parts, show_seconds(p.step_seconds), interval))
        if run := inputs.run_of(p.layout):
            step = run.step_seconds
            found.append(
                Bar(f"{one.name}, measured", "", {"measured": step.median}, show_seconds(step.median), (step.p10, step.p90))
            )
    kinds = [name for name in TIME if any(bar.parts.get(name, 0.0) > 0 for bar in found)]
    rows = [
        [name, MEANING[name], *(_share(getattr(one.prediction.breakdown, name), one.prediction) for one in named)]
        for name in kinds
    ]
    rows.append(["step", "", *(show_seconds(one.prediction.step_seconds) for one in named)])
    whiskers = ""
    if known:
        whiskers = (
            f'<p class="hint">Lines at the ends of bars: four of five of {known.count} {esc(known.runs)} took '
            f"{known.low:.2f} to {known.high:.2f} times their predicted step.</p>"
        )
    reasons = "".join(f"<li>{esc(reason)}</li>" for reason in inputs.reasons)
    return (
        legend([*kinds, *(["measured"] if any("measured" in bar.parts for bar in found) else [])])
        + bars(found, show_seconds)
        + whiskers
        + (f'<ul class="reasons">{reasons}</ul>' if reasons else "")
        + folded("The same as a table", table(["", "seconds of a step", *(one.name for one in named)], rows, 2))
    )


def _share(seconds: float, p: Prediction) -> str:
    return f"{show_seconds(max(0.0, seconds))} ({max(0.0, seconds) / p.step_seconds:.1%})"


def memory_section(plan: Plan, chart: str) -> str:
    """What fills the ranks of every pipeline stage, against what they have."""
    best, job = plan.best, plan.job
    limit, stages = capacity(job, best.layout), best.memory_per_stage
    shown = evenly(range(len(stages)), MOST_BARS)
    found = [
        Bar(
            f"rank {rank}", "", {name: float(getattr(stages[rank], name)) for name in MEMORY},
            f"{stages[rank].peak / GIB:.1f} GiB",
        )
        for rank in shown
    ]  # fmt: skip
    left = f" {len(shown)} of {len(stages)} are shown." if len(shown) < len(stages) else ""
    rows = [
        [f"rank {rank}", *(show_bytes(getattr(memory, name)) for name in MEMORY), show_bytes(memory.peak)]
        for rank, memory in enumerate(stages)
    ]
    return (
        legend(MEMORY)
        + bars(found, show_bytes, limit, f"capacity {show_bytes(limit)}")
        + f'<p class="hint">Peak of each pipeline rank; the dashed line is the capacity, {show_bytes(limit)}.{left}</p>'
        + chart
        + folded("The same as a table", table(["pipeline", *MEMORY, "peak"], rows))
    )


def measured_section(inputs: Inputs) -> str:
    """Runs beside their predictions."""
    rows = [_comparison_cells(one) for one in inputs.comparisons]
    head = [
        "", "layout", "ranks", "step predicted", "measured", "p10 to p90", "error", "memory predicted", "measured",
        "error", "loss",
    ]  # fmt: skip
    return table(head, rows, 2) + '<p class="hint">Errors are predicted / measured − 1.</p>'


def _comparison_cells(one: Comparison) -> list[str]:
    step, losses = one.measurement.step_seconds, one.measurement.losses
    return [
        one.name,
        one.measurement.layout.short(),
        str(one.measurement.world_size),
        show_seconds(one.prediction.step_seconds),
        show_seconds(step.median),
        f"{show_seconds(step.p10)} to {show_seconds(step.p90)}",
        f"{one.error:+.1%}",
        show_bytes(one.prediction.memory.peak),
        show_bytes(max(one.measurement.peak_memory)),
        f"{one.memory_error:+.1%}",
        f"{losses[0]:.3f} to {losses[-1]:.3f}" if losses else "–",
    ]


def timeline_section(traced: Prediction, measured: MeasuredTimeline | None, notes: Sequence[str], ops: Table | None) -> str:
    """The canvas with its controls, and the same in figures."""
    shown = evenly(range(traced.layout.pp), MOST_BARS)
    rows = [
        [f"rank {rank}", show_seconds(busy), show_seconds(idle), f"{idle / traced.step_seconds:.1%}", show_seconds(end)]
        for rank, busy, idle, end in busy_table(traced, shown)
    ]
    beside = (
        f" The measured one ({show_seconds(measured.seconds)} under the profiler) is below it on the same scale."
        if measured
        else ""
    )
    controls = "".join(
        f'<button type="button" data-zoom="{do}" aria-label="{label}">{sign}</button>'
        for do, sign, label in (
            ("in", "+", "Zoom in"), ("out", "−", "Zoom out"), ("left", "←", "Earlier"), ("right", "→", "Later"),
            ("all", "Whole step", "Show the whole step"),
        )  # fmt: skip
    )
    tables = folded(
        "The same in figures",
        table(["pipeline", "computes", "does not", "of the step", "ends"], rows, caption="Predicted")
        + (table(ops[0], ops[1], caption="Predicted and measured, all ranks") if ops else ""),
    )
    said = "".join(f"<li>{esc(note)}</li>" for note in notes)
    return (
        f"<p>One step, {show_seconds(traced.step_seconds)}, as predicted.{esc(beside)} Every span has the name that "
        "PyTorch's profiler gives it.</p>"
        f'<div class="toolbar" role="group" aria-label="Zoom">{controls}<output id="window" aria-live="polite"></output></div>'
        '<ul class="legend" id="timeline-legend" aria-hidden="true"></ul>'
        '<canvas id="timeline" tabindex="0" role="img" aria-describedby="timeline-help" '
        f'aria-label="Timeline of the {len(shown)} pipeline ranks; the figures are in the table below"></canvas>'
        '<p class="hint" id="timeline-help">Drag to move, pinch or Ctrl + wheel to zoom, double-click to zoom in. Keys: '
        "arrows, + and −, 0 for the whole step.</p>"
        + (f'<ul class="hint">{said}</ul>' if said else "")
        + tables
    )


def scaling_section(plans: Sequence[Plan], scaling: str, pareto: str) -> str:
    """The best layout for each number of nodes, and the front of time, cost and GPUs."""
    rows = []
    for plan in sorted(plans, key=lambda plan: plan.job.world_size):
        best, cost = plan.best, dollars(plan.best, plan.job)
        rows.append([
            str(plan.job.nodes), str(plan.job.world_size), best.layout.short(), show_seconds(best.step_seconds),
            f"{best.tokens_per_second:,.0f}", f"{best.mfu:.1%}", "–" if cost is None else f"${cost:,.0f}",
        ])  # fmt: skip
    front = [
        [
            str(plan.job.world_size), p.layout.short(), f"{1e9 / p.tokens_per_second / 3600:,.3g}",
            "–" if (cost := dollars(p, plan.job)) is None else f"${cost:,.0f}",
        ]
        for plan, p, on_front in pareto_rows(plans)
        if on_front
    ]  # fmt: skip
    head = ["nodes", "GPUs", "best layout", "step", "tokens/s", "MFU", "10⁹ tokens"]
    return (
        f"<p>The global batch stays the same.</p>{scaling}"
        + table(head, rows, 0)
        + f"<h3>Time, cost and GPUs</h3>{pareto}"
        + folded("The front as a table", table(["GPUs", "layout", "hours for 10⁹ tokens", "cost"], front, 0))
    )


def exam_section(exam: Exam, chart: str) -> str:
    """How far predictions of published runs are off, by GPU, stack and architecture."""
    rows = []
    for name, runs in [("all runs", exam.compared), *exam_groups(exam.compared)]:
        found = error_figures(runs)
        rows.append([name, str(found["count"]), *(f"{found[key]:.1%}" for key in ("median_abs",)),
                     *(f"{found[key]:+.1%}" for key in ("p10", "median", "p90"))])  # fmt: skip
    head = ["", "runs", "median size", "p10", "median", "p90"]
    return (
        f"<p>{len(exam.compared)} published training runs and their predictions. Errors are of the throughput, "
        "predicted / measured − 1: below zero the prediction is too slow.</p>"
        '<p class="toolbar"><label>Stand out <select id="group"></select></label> <output id="group-text"></output></p>'
        + chart
        + folded("Errors by group", table(head, rows))
    )


def job_section(plan: Plan) -> str:
    """The job, what the search did, where the numbers come from."""
    job, c, t = plan.job, plan.certificate, plan.job.training
    facts = [
        ("model", f"{job.model.name}, {job.model.parameters() / 1e9:.4g} B parameters"),
        ("cluster", f"{machines(job)}, {job.cluster.gpu.name}"),
        ("batch", f"{t.global_batch_size} sequences × {t.seq_len} tokens = {job.tokens_per_step:,} tokens a step"),
        ("precision, optimizer", f"{t.precision}, {t.optimizer}"),
        ("stack", job.stack.name),
        ("search", "; ".join(f"{name} = {values}" for name, values in job.search.items()) or "all layouts"),
        ("searched", f"{c.space:,} layouts in {c.seconds:.1f} s: {c.illegal:,} illegal, {c.out_of_memory:,} out of "
         f"memory, {c.bounded:,} ruled out by a lower bound, {c.simulated:,} simulated"),
        ("proof", "no layout left out is faster" if c.lower_bound_gap == 0
         else f"a layout that was not simulated could be up to {c.lower_bound_gap:.1%} faster"),
    ]  # fmt: skip
    listed = "".join(f"<dt>{esc(name)}</dt><dd>{esc(value)}</dd>" for name, value in facts)
    sources = "".join(f"<dt>{esc(name)}</dt><dd>{esc(text)}</dd>" for name, text in plan.provenance.items())
    return f'<dl class="facts">{listed}</dl>' + folded("Where the numbers come from", f'<dl class="facts">{sources}</dl>')


def files_section(files: Sequence[tuple[str, str]]) -> str:
    """What lies beside the page."""
    items = "".join(f'<li><a href="{esc(name)}">{esc(name)}</a>: {esc(what)}</li>' for name, what in files)
    return f'<ul class="files">{items}</ul>'


def known_ratio(plan: Plan, inputs: Inputs) -> Ratio | None:
    return ratio(inputs.exam, plan.job)
