"""The sections of a page as HTML."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from planner.plan import Plan
from planner.scaling import Scaling
from reports.page_candidates import candidates
from reports.page_charts import GIB, MEMORY, Table
from reports.page_html import Bar, bars, copy_box, esc, folded, legend, table
from reports.page_inputs import Exam, Inputs, error_figures, exam_groups, step_interval
from reports.page_timeline import busy_table, evenly
from reports.synchronisation import COLUMNS, LAST, Ways, cells
from reports.tables import Comparison
from simulator.error_bars import unseen_mfu
from simulator.job import Job
from simulator.layout import Layout
from simulator.layout_text import spelt_out
from simulator.memory import capacity
from simulator.price import dollars, hours_name
from simulator.results import TIME_MEANING, Breakdown, MeasuredTimeline, Prediction
from simulator.units import show_bytes, show_duration, show_seconds, show_tokens

MOST_BARS = 16
TIME = tuple(field.name for field in dataclasses.fields(Breakdown))

CONTROLS = (
    ("in", "+", "Zoom in"),
    ("out", "−", "Zoom out"),
    ("left", "←", "Earlier"),
    ("right", "→", "Later"),
    ("all", "Whole step", "Show the whole step"),
)


def title(job: Job) -> str:
    return f"{job.model.name} on {machines(job)}"


def machines(job: Job) -> str:
    if job.cluster.gpu.kind == "cpu":
        return f"{job.cluster.name} ({job.world_size} processors)"
    return f"{job.nodes} × {job.cluster.name} ({job.world_size} GPUs)"


def recommendation(plan: Plan) -> str:
    """The whole answer in one sentence, without markup."""
    best, job = plan.best, plan.job
    device = "processor" if job.cluster.gpu.kind == "cpu" else "GPU"
    cost = dollars(best, job)
    parts = [
        f"{show_seconds(best.step_seconds)} a step",
        f"{best.tokens_per_second:,.0f} tokens/s ({best.tokens_per_second_per_gpu:,.0f} per {device}, "
        f"MFU {best.mfu:.1%})",
        f"{best.memory.peak / GIB:.3g} of {capacity(job, best.layout) / GIB:.3g} GiB on the fullest {device}",
        *([] if cost is None else [f"${cost:,.0f} for 10⁹ tokens"]),
    ]
    return f"Train with {in_words(best.layout)}: {', '.join(parts)}; {_against_baseline(plan)}."


def in_words(layout: Layout) -> str:
    """What a layout does, for who does not know the fields' names.

    >>> in_words(Layout(tp=8, pp=4, dp_shard=2, zero_stage=1, sequence_parallel=True))
    'tensor parallelism over 8 (sequence parallel too), 4 pipeline stages (1F1B) and 2 data-parallel shards (ZeRO 1)'
    """
    parts = []
    if layout.tp > 1:
        parts.append(f"tensor parallelism over {layout.tp}{' (sequence parallel too)' * layout.sequence_parallel}")
    if layout.cp > 1:
        parts.append(f"context parallelism over {layout.cp}")
    if layout.ep > 1:
        parts.append(f"experts spread over {layout.ep}")
    if layout.pp > 1:
        each = f" on {layout.pp} ranks" * (layout.virtual_stages > 1)
        parts.append(f"{layout.stages} pipeline stages{each} ({layout.schedule})")
    if layout.dp_shard > 1 and layout.zero_stage:
        parts.append(f"{layout.dp_shard} data-parallel shards (ZeRO {layout.zero_stage})")
    if layout.dp_replicate > 1:
        parts.append(f"{layout.dp_replicate} data-parallel replicas")
    if layout.recompute != "none":
        parts.append(f"{layout.recompute} recomputation")
    if layout.offload != "none":
        parts.append(f"the {layout.offload} in host memory")
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "one process"


def _against_baseline(plan: Plan) -> str:
    best, baseline = plan.best, plan.baseline
    if best.layout == baseline.layout:
        return "this is plain data parallelism"
    if not baseline.fits:
        return f"plain data parallelism does not work: {baseline.problems[0]}"
    gain = baseline.step_seconds / best.step_seconds
    if why := plan.against_faster_baseline:
        return f"plain data parallelism would be {1 / gain:.3g} times as fast, but {why}"
    return f"{gain:.3g} times as fast as plain data parallelism"


def answer(plan: Plan) -> str:
    """The sentence, the figures, the layout to copy."""
    best, job = plan.best, plan.job
    device = "processor" if job.cluster.gpu.kind == "cpu" else "GPU"
    limit, cost = capacity(job, best.layout), dollars(best, job)
    interval = step_interval(best)
    spread = f"four of five: {show_seconds(interval[0])} to {show_seconds(interval[1])}" if interval else "predicted"
    tiles = [
        ("step", show_seconds(best.step_seconds), spread),
        (
            "throughput",
            f"{best.tokens_per_second:,.0f}",
            f"tokens/s, {best.tokens_per_second_per_gpu:,.0f} per {device}",
        ),
        ("MFU", f"{best.mfu:.1%}", f"{best.hfu:.1%} with recomputation"),
        ("memory", f"{best.memory.peak / GIB:.1f} GiB", f"{best.memory.peak / limit:.0%} of {limit / GIB:.1f} GiB"),
    ]
    risk = getattr(best, "out_of_memory_probability", None)
    if risk is not None:
        tiles.append(("runs out of memory", f"{risk:.1%}", "probability"))
    if cost is not None:
        tiles.append(("cost", f"${cost:,.0f}", f"10⁹ tokens at ${job.cluster.price_per_gpu_hour:.2f} per GPU hour"))
    boxes = "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(value)}<small>{esc(note)}</small></dd></div>" for name, value, note in tiles
    )
    return (
        f'<p class="lead">{esc(recommendation(plan))}</p>{_choice(plan)}'
        f'<dl class="tiles">{boxes}</dl>{copy_box(spelt_out(best.layout, job), "layout")}'
    )


def _choice(plan: Plan) -> str:
    """Why this layout is recommended, and a claim that nobody has reached."""
    said = [f"Recommended because {plan.choice.why}."] if plan.choice else []
    if claim := unseen_mfu(plan.job, plan.best.mfu):
        said.append(f"Warning: {claim}.")
    return f'<p class="hint">{esc(" ".join(said))}</p>' if said else ""


def time_section(plan: Plan, inputs: Inputs) -> str:
    """Where a step's time goes, the best beside the others, and measured where it was run."""
    found, named = [], candidates(plan)
    for one in named:
        p = one.prediction
        parts = {name: max(0.0, float(getattr(p.breakdown, name))) for name in TIME}
        interval = step_interval(p)
        found.append(Bar(one.name, p.layout.short(), parts, show_seconds(p.step_seconds), interval))
        if run := inputs.run_of(p.layout):
            step = run.step_seconds
            found.append(
                Bar(
                    f"{one.name}, measured",
                    "",
                    {"measured": step.median},
                    show_seconds(step.median),
                    (step.p10, step.p90),
                )
            )
    kinds = [name for name in TIME if any(bar.parts.get(name, 0.0) > 0 for bar in found)]
    rows = [
        [name, TIME_MEANING[name], *(_share(getattr(one.prediction.breakdown, name), one.prediction) for one in named)]
        for name in kinds
    ]
    rows.append(["step", "", *(show_seconds(one.prediction.step_seconds) for one in named)])
    whiskers = ""
    if known := plan.best.interval:
        whiskers = (
            f'<p class="hint">Lines at the ends of bars: the step is between them with a probability of '
            f"{known.level:.0%}. Known from {esc(known.source)}.</p>"
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
    said = "".join(f"<p>{esc(sentence)}</p>" for sentence in inputs.validated)
    return said + table(head, rows, 2) + '<p class="hint">Errors are predicted / measured − 1.</p>'


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


def timeline_section(
    traced: Prediction, measured: MeasuredTimeline | None, notes: Sequence[str], ops: Table | None
) -> str:
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
        f'<button type="button" data-zoom="{do}" aria-label="{label}">{sign}</button>' for do, sign, label in CONTROLS
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
        f'<div class="toolbar" role="group" aria-label="Zoom">{controls}'
        '<output id="window" aria-live="polite"></output></div>'
        '<ul class="legend" id="timeline-legend" aria-hidden="true"></ul>'
        '<canvas id="timeline" tabindex="0" role="img" aria-describedby="timeline-help" '
        f'aria-label="Timeline of {len(shown)} pipeline ranks; the figures are in the table below"></canvas>'
        '<p class="hint" id="timeline-help">Drag to move, pinch or Ctrl + wheel to zoom, double-click to zoom in. '
        "Keys: arrows, + and −, 0 for the whole step.</p>" + (f'<ul class="hint">{said}</ul>' if said else "") + tables
    )


def scaling_section(scaling: Scaling, curve: str, front: str) -> str:
    """The best layout for each number of nodes, where the curve bends, and the front of time, cost and GPUs."""
    job, tokens = scaling.job, show_tokens(scaling.tokens)
    priced = job.cluster.price_per_gpu_hour is not None
    rows = [
        [
            str(row.nodes), str(row.gpus), *([str(row.global_batch_size)] if scaling.scale_batch else []),
            show_seconds(row.prediction.step_seconds), f"{row.prediction.tokens_per_second:,.0f}",
            f"{row.prediction.mfu:.1%}", f"{row.efficiency:.1%}", show_duration(row.seconds),
            f"${row.dollars:,.0f}" if row.dollars is not None else f"{row.gpu_hours:,.0f}",
            f"{row.prediction.out_of_memory_probability:.1%}",
            "time, cost" if row.on_time_cost_front else "GPUs" if row.on_front else "",
            "yes" if row.nodes == scaling.chosen else "", row.prediction.layout.short(),
        ]
        for row in scaling.rows
    ]  # fmt: skip
    head = [
        "nodes", "GPUs", *(["batch"] if scaling.scale_batch else []), "step", "tokens/s", "MFU", "efficiency",
        f"{tokens} tokens", "cost" if priced else hours_name(job), "runs out of memory", "best in", "chosen", "layout",
    ]  # fmt: skip
    said = [scaling.bend, *([f"By the objective, {scaling.reason}."] if scaling.reason else [])]
    said += [f"{one.nodes} nodes: {one.reason}." for one in scaling.missing]
    price = f"${job.cluster.price_per_gpu_hour:.2f} per GPU-hour" if priced else f"{hours_name(job)}, no price is known"
    allowed = f"{job.objective.goodput:.0%} of the time" if job.objective.goodput else "all of the time"
    batch = "grows with the GPUs" if scaling.scale_batch else "stays the same"
    return (
        f"<p>The global batch {batch}. Cost: {esc(price)}; steps that count are made in {allowed}.</p>{curve}"
        + "".join(f"<p>{esc(sentence)}</p>" for sentence in said if sentence)
        + table(head, rows, 0)
        + f"<h3>Time, cost and GPUs</h3>{front}"
    )


def what_if_section(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Other links, memory, batches and nodes, each planned anew."""
    return (
        "<p>Each change was planned anew. Speeds are tokens/s over those of the recommendation, with its own layout "
        f"and with the best there.</p>{table(head, rows, 2, last=True)}"
    )


def ways_section(found: Sequence[Ways], charts: Sequence[str]) -> str:
    """Every way to keep replicas together, for each number of them, with its chart."""
    parts = [
        f"<h3>{one.workers} replicas</h3>{table(COLUMNS, [cells(row) for row in one.rows])}{chart}"
        for one, chart in zip(found, charts, strict=True)
    ]
    return (
        "".join(parts) + '<p class="hint">Speedups are over the first row, errors those of the predicted speedup. '
        f"Losses are means over the last {LAST:.0%} of the steps: when all have seen as many samples, and when the "
        "first one has ended.</p>"
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
        '<p class="toolbar"><label>Highlight <select id="group"></select></label> <output id="group-text"></output></p>'
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
    return f'<dl class="facts">{listed}</dl>' + folded(
        "Where the numbers come from", f'<dl class="facts">{sources}</dl>'
    )


def files_section(files: Sequence[tuple[str, str]]) -> str:
    """What lies beside the page."""
    items = "".join(f'<li><a href="{esc(name)}">{esc(name)}</a>: {esc(what)}</li>' for name, what in files)
    return f'<ul class="files">{items}</ul>'
