"""Plans and predictions as tables for a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from planner.certainty import choice_lines, interval_cell, interval_sentence, interval_title, warnings
from planner.compare import Comparison
from planner.explain import mathematics, memory_rows, time_rows
from planner.memory_parts_report import cell, part_rows, parts_of
from planner.memory_report import (
    BLOCKS,
    ITEMS,
    PLAIN_BLOCKS,
    binding_sentence,
    chart,
    fullest_samples,
    stage_rows,
)
from planner.plan import Plan
from planner.remedies import Remedies, remedy_lines, risk_sentence, show_risk
from simulator.job import Job
from simulator.layout import Layout
from simulator.layout_text import spelt_out
from simulator.memory import capacity
from simulator.price import dollars, gpu_hours, hours_name
from simulator.results import Prediction
from simulator.risk import memory_residuals
from simulator.sync_rules import changes_mathematics
from simulator.units import show_bytes, show_seconds


def print_plan(plan: Plan) -> None:
    """The best layouts, the data-parallel baseline, and what the search did."""
    job, best = plan.job, plan.best
    console = new_console()
    console.print(
        f"{job.model.name} ({job.model.parameters() / 1e9:.3g} B parameters) on {_ranks(job)}, "
        f"{job.training.global_batch_size} x {job.training.seq_len} tokens a step, "
        f"{job.training.precision}, {job.stack.name}"
    )
    shown = [(str(place), p) for place, p in enumerate((best, *plan.runners_up), start=1)]
    # Most jobs cut neither sequences nor experts.
    extra = [axis for axis in ("cp", "ep") if any(getattr(p.layout, axis) > 1 for _, p in shown)]
    synced = any(p.layout.sync != "all_reduce" for _, p in shown)
    table = new_table(
        "", "TP", *(axis.upper() for axis in extra), "PP", "VP", "DP", "ZeRO", "MBS", "schedule", "recompute",
        *(["sync"] if synced else []), "step", interval_title(best), "tok/s/GPU", "MFU", "GiB", "OOM risk",
    )  # fmt: skip
    if plan.riskier:
        shown.append(("riskier", plan.riskier))
    for place, p in [*shown, ("data parallel", plan.baseline)]:
        if p is plan.baseline:
            table.add_section()
        sync = [_sync_cell(p.layout)] if synced else []
        table.add_row(place, *_layout_cells(p.layout, extra), *sync, *_number_cells(p))
    console.print(table)
    if not plan.baseline.fits:
        console.print(f"plain data parallelism: {plan.baseline.problems[0]}")
    elif why := plan.against_faster_baseline:
        console.print(escape(f"plain data parallelism is faster, but {why}"))
    console.print("+SP sequence parallel, VP stages per rank, DP replicas x shards, MBS micro-batch size")
    if synced:
        console.print(
            escape("* not one gradient of the whole batch: another mathematics, tried because [search] names it")
        )
    console.print(f"recommended: {spelt_out(best.layout, job)}")
    for line in (*choice_lines(plan), interval_sentence(best), *(f"warning: {w}" for w in warnings(job, best))):
        if line:
            console.print(escape(line))
    console.print(escape(risk_sentence(best, job, None)))
    if plan.riskier:
        faster, risk = best.step_seconds / plan.riskier.step_seconds - 1, plan.riskier.out_of_memory_probability
        console.print(
            f"{faster:.1%} faster, but out of memory with a probability of {risk:.0%}: "
            f"{spelt_out(plan.riskier.layout, job)}"
        )
    if warning := mathematics(best):
        console.print(escape(warning))
    c = plan.certificate
    console.print(
        f"{c.space} layouts: {c.illegal} illegal, {c.out_of_memory} out of memory, {c.bounded} ruled out by a bound, "
        f"{c.simulated} simulated, in {c.seconds:.1f} s; "
        + _nothing_better(plan)
        + (f" by more than {c.lower_bound_gap:.2%}" if c.lower_bound_gap else "")
    )


def _nothing_better(plan: Plan) -> str:
    """What the search has proved, of the layout with the best value of all."""
    if plan.riskier:
        return "none of these is better than the riskier one"
    best = plan.choice.best if plan.choice else plan.layout
    return "none of these is better" + ("" if best == plan.layout else f" than {best.short()}")


def print_columns(columns: list[tuple[str, Prediction]], job: Job) -> None:
    """Where the time and the memory of predictions go, side by side."""
    console = new_console()
    for name, p in columns:
        console.print(f"{name}: {p.layout.short()}" + ("" if p.fits else f"  ({p.problems[0]})"))
    table = new_table("seconds of a step", "", *(name for name, _ in columns))
    for item, meaning, values in time_rows(columns):
        table.add_row(item, meaning, *(_share(v, p.step_seconds) for v, (_, p) in zip(values, columns, strict=True)))
    table.add_section()
    table.add_row("step", "", *(show_seconds(p.step_seconds) for _, p in columns))
    table.add_row(interval_title(columns[0][1]), "of the step", *(interval_cell(p) for _, p in columns))
    simulated = [p.synchronisation for _, p in columns]
    if any(simulated):
        shown = [(show_seconds(s.p95), f"{s.mean_staleness:.1f}") if s else ("", "") for s in simulated]
        table.add_row("95th percentile", "of many steps", *(p95 for p95, _ in shown))
        table.add_row("staleness", "updates of others since the parameters", *(stale for _, stale in shown))
    table.add_row("tokens/s/GPU", "", *(f"{p.tokens_per_second_per_gpu:,.0f}" for _, p in columns))
    peak = "data-sheet peak" if job.cluster.gpu.kind == "gpu" else "the matmul rate measured here"
    table.add_row("MFU", f"model FLOPs over {peak}", *(f"{p.mfu:.1%}" for _, p in columns))
    table.add_row(f"{hours_name(job)} per 1e9 tokens", "", *(f"{gpu_hours(p, job):,.3g}" for _, p in columns))
    prices = [dollars(p, job) for _, p in columns]
    if job.cluster.price_per_gpu_hour is not None:
        at = f"at {job.cluster.price_per_gpu_hour:,.2f} USD per GPU-hour"
        table.add_row("$ per 1e9 tokens", at, *(f"{price:,.0f}" for price in prices))
    console.print(table)
    memory = new_table("bytes of the fullest rank", "", *(name for name, _ in columns))
    for item, meaning, values in memory_rows(columns):
        memory.add_row(item, meaning, *(show_bytes(v) for v in values))
    memory.add_section()
    limits = dict.fromkeys(show_bytes(capacity(job, p.layout)) for _, p in columns)
    has = f"of {' or '.join(limits)} that a rank has"
    memory.add_row("peak", has, *(show_bytes(p.memory.peak) for _, p in columns))
    spread = memory_residuals().of(job.stack.name).log_sigma
    risk = f"of running out: predicted peaks err by {spread:.0%}"
    memory.add_row("OOM risk", risk, *(show_risk(p.out_of_memory_probability) for _, p in columns))
    console.print(memory)
    for name, p in columns:
        for line in (interval_sentence(p), *(f"warning: {warning}" for warning in warnings(job, p))):
            console.print(escape(f"{name}: {line}"))


def print_comparison(found: Comparison, job: Job) -> None:
    """Ways to keep replicas together, a row each, and what the textbook says of their exchange."""
    console = new_console()
    first = next(way for way in found.ways if way.prediction is not None)
    base = dataclasses.replace(
        first.layout, sync="all_reduce", servers=0, staleness=0, sync_interval=1, outer_optimizer="none"
    )
    console.print(f"{job.model.name} on {_ranks(job)}, {job.stack.name}: {base.short()}")
    if not job.stragglers.none:
        shown = {name: value for name, value in vars(job.stragglers).items() if value and name != "steps"}
        console.print(escape("stragglers: " + ", ".join(f"{name} {value}" for name, value in shown.items())))
    table = new_table(
        "", "step", "p95", "computing", "transfers", "waiting", "stale", "ahead", "tok/s/GPU", "GiB", "least exchange"
    )
    for way in found.ways:
        p = way.prediction
        if p is None:
            continue
        s = p.synchronisation
        own = p.step_seconds - p.breakdown.dp - p.breakdown.bubble
        parts = (own, p.breakdown.dp, p.breakdown.bubble)
        mark = " *" if changes_mathematics(way.layout) else ""
        table.add_row(
            way.name + mark, show_seconds(p.step_seconds), show_seconds(way.p95), *map(show_seconds, parts),
            f"{s.mean_staleness:.1f}" if s else "0.0", str(s.lead) if s else "0",
            f"{p.tokens_per_second_per_gpu:,.0f}", f"{p.memory.peak / 2**30:.1f}{'' if p.fits else ' (too much)'}",
            show_seconds(way.bound),
        )  # fmt: skip
    console.print(table)
    for way in found.ways:
        if way.problems:
            console.print(escape(f"{way.name}: {way.problems[0]}"))
    console.print(
        "* another mathematics: gradients of older parameters, or replicas that agree only now and then. A step is not "
        "worth as much there; how much less, no simulator of time can say"
    )
    console.print(
        "stale: updates of others between a replica's parameters and its own; ahead: steps before the slowest"
    )
    table = new_table(
        f"M = {show_bytes(found.bytes)} among n = {found.replicas} replicas", "", "B each way", "least"
    )  # fmt: skip
    for name, formula, rate, seconds in found.textbook:
        table.add_row(name, escape(formula), f"{rate / 1e9:.3g} GB/s", show_seconds(seconds))
    console.print(table)


def print_memory(name: str, prediction: Prediction, job: Job) -> None:
    """The memory of a prediction with its timeline: by pipeline stage, and the fullest rank over the step."""
    console, layout = new_console(), prediction.layout
    table = new_table("pipeline rank", *ITEMS, "peak")
    for ranks, memory in stage_rows(prediction):
        table.add_row(ranks, *(f"{getattr(memory, item) / 2**30:.2f}" for item in (*ITEMS, "peak")))
    console.print(f"memory of {name} in GiB, each pipeline rank at its fullest")
    console.print(table)
    groups = [ranks for ranks, _ in stage_rows(prediction)]
    parts = new_table("of it", "", *(f"rank {ranks}" for ranks in groups))
    for item, part, sizes in part_rows(parts_of(job, prediction), groups):
        parts.add_row(item, part, *(cell(*size) for size in sizes))
    console.print(parts)
    console.print("in parentheses: microbatches, or communicators")
    samples = fullest_samples(prediction)
    console.print(f"{name}, pipeline rank {samples[0].rank} over the step; dashes: what there is")
    encoding = console.encoding.lower()
    blocks = BLOCKS if encoding.startswith("utf") else PLAIN_BLOCKS
    for line in chart(samples, prediction.step_seconds, capacity(job, layout), blocks=blocks):
        console.print(escape(line))
    console.print(f"{name}: {binding_sentence(job, prediction)}")


def print_advice(prediction: Prediction, job: Job, found: Remedies, name: str = "") -> None:
    """What would make a layout fit, a line each; of one that fits its risk, and what lowers it."""
    console = new_console()
    if prediction.fits:
        said = risk_sentence(prediction, job, found.found[0] if found.found else None)
        console.print(escape(f"{name}: {said}" if name else said))
        return
    for line in remedy_lines(found, name):
        console.print(escape(line))


def print_texts(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1, last: bool = False
) -> None:
    """A table of texts as they are; all columns but the first `texts`, and the last if so, are numbers."""
    table = Table(title=escape(title), title_justify="left", title_style="bold", box=box.SIMPLE)
    for place, name in enumerate(columns):
        # A reason or a layout may be longer than a terminal is wide.
        left = place < texts or (last and place == len(columns) - 1)
        table.add_column(escape(name), justify="left" if left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    new_console().print(table)


def print_lines(lines: Sequence[str]) -> None:
    """Sentences as they are, a line each."""
    for line in lines:
        new_console().print(escape(line))


def _ranks(job: Job) -> str:
    if job.cluster.gpu.kind == "cpu":
        return f"{job.cluster.name} ({job.world_size} processors)"
    return f"{job.nodes} x {job.cluster.name} ({job.world_size} GPUs)"


def _layout_cells(layout: Layout, extra: list[str]) -> list[str]:
    data = f"{layout.dp_replicate} x {layout.dp_shard}" if layout.zero_stage else str(layout.dp_replicate)
    return [
        f"{layout.tp}{'+SP' if layout.sequence_parallel else ''}",
        *(str(getattr(layout, axis)) for axis in extra),
        str(layout.pp),
        str(layout.virtual_stages),
        data,
        str(layout.zero_stage),
        str(layout.micro_batch_size),
        layout.schedule if layout.pp > 1 else "-",
        layout.recompute + "+offload" * (layout.offload != "none"),
    ]


def _sync_cell(layout: Layout) -> str:
    """`parameter_server 4, staleness 2 *`"""
    mark = " *" if changes_mathematics(layout) else ""
    shown = {
        "parameter_server": f" {layout.servers}, staleness {'none' if layout.staleness is None else layout.staleness}",
        "local_sgd": f" {layout.sync_interval}" + (", nesterov" if layout.outer_optimizer != "none" else ""),
    }
    return layout.sync + shown.get(layout.sync, "") + mark


def _number_cells(p: Prediction) -> list[str]:
    fits = "" if p.fits else " (does not fit)" if "too much" in p.problems[0] else " (impossible)"
    return [
        show_seconds(p.step_seconds),
        interval_cell(p),
        f"{p.tokens_per_second_per_gpu:,.0f}",
        f"{p.mfu:.1%}",
        f"{p.memory.peak / 2**30:.1f}{fits}",
        show_risk(p.out_of_memory_probability),
    ]


def _share(seconds: float, step: float) -> str:
    return f"{show_seconds(seconds)} ({seconds / step:.1%})"


def new_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE)
    for place, name in enumerate(columns):
        table.add_column(name, justify="left" if place == 0 or name == "" else "right", no_wrap=True)
    return table


def new_console() -> Console:
    """As wide as the tables need where the output is no terminal, so that a pipe gets whole lines."""
    import sys

    return Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 180)
