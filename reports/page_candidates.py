"""The layouts that a plan holds, as a table to sort and filter, each with the text that `--layout` takes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from planner.plan import Plan
from reports.page_charts import GIB
from reports.page_html import copy_box, esc
from simulator.layout import written
from simulator.layout_text import spelt_out
from simulator.price import dollars
from simulator.results import Prediction
from simulator.units import show_seconds


@dataclass(frozen=True)
class Named:
    """A prediction and what the page calls it."""

    name: str
    prediction: Prediction


def candidates(plan: Plan) -> list[Named]:
    """Best, runners-up, and the plain data-parallel baseline if it is none of them."""
    found = [Named("best", plan.best)]
    found += [Named(f"place {place}", p) for place, p in enumerate(plan.runners_up, start=2)]
    for place, one in enumerate(found):
        if one.prediction.layout == plan.baseline.layout:
            found[place] = Named(f"{one.name}, data parallel", one.prediction)
            return found
    return [*found, Named("data parallel", plan.baseline)]


def candidate_table(plan: Plan) -> str:
    """Every layout that the plan holds, to be sorted and filtered."""
    named, job = candidates(plan), plan.job
    layouts = [one.prediction.layout for one in named]
    extra = [name for name in ("cp", "ep") if any(getattr(layout, name) > 1 for layout in layouts)]
    offloads = any(layout.offload != "none" for layout in layouts)
    priced = job.cluster.price_per_gpu_hour is not None
    risky = any(getattr(one.prediction, "out_of_memory_probability", None) is not None for one in named)
    head = [
        ("", "text"), ("step", "number"), ("tok/s/GPU", "number"), ("MFU", "number"), ("GiB", "number"),
        ("fits", "text"), *([("OOM", "number")] if risky else []), *([("$/10⁹ tok", "number")] if priced else []),
        *((name, "number axis") for name in ("TP", *(name.upper() for name in extra), "PP", "VP", "DP", "ZeRO", "MBS")),
        ("schedule", "text axis"), ("recompute", "text axis"), *([("offload", "text axis")] if offloads else []),
        ("--layout", "text"),
    ]  # fmt: skip
    top = "".join(
        f'<th scope="col" class="{kind}" aria-sort="none"><button type="button">{esc(name or "layout")}</button></th>'
        for name, kind in head
    )
    body = "".join(_candidate_row(place, one, plan, extra, risky, priced, offloads) for place, one in enumerate(named))
    return (
        '<div class="filter" role="search"><label>Filter '
        '<input type="search" id="filter" placeholder="tp=4 pp&gt;=8 step&lt;20" autocomplete="off" spellcheck="false" '
        'aria-describedby="filter-help"></label>'
        '<label class="check"><input type="checkbox" id="fits-only"> only what fits</label>'
        f'<output id="filter-count" for="filter fits-only" aria-live="polite">{len(named)} layouts</output></div>'
        '<p class="hint" id="filter-help">Words, or fields with =, &lt;, &gt;, &lt;=, &gt;=: any field of a layout, '
        "<code>step</code> (s), <code>mfu</code> (%), <code>gib</code>, <code>speed</code> (tokens/s/GPU).</p>"
        '<div class="scroll" tabindex="0"><table id="layouts" class="sortable"><caption class="unseen">Layouts with '
        f"their predictions</caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"
        '<p class="hint">VP: stages on each pipeline rank. DP: replicas × shards. +SP: sequence parallel. MBS: '
        "sequences in a microbatch. MFU: model FLOPs over the peak.</p>"
    )


def _candidate_row(
    place: int, one: Named, plan: Plan, extra: list[str], risky: bool, priced: bool, offloads: bool
) -> str:
    p, layout, job = one.prediction, one.prediction.layout, plan.job
    data = f"{layout.dp_replicate} × {layout.dp_shard}" if layout.zero_stage else str(layout.dp_replicate)
    risk, cost = getattr(p, "out_of_memory_probability", None), dollars(p, job)
    text = spelt_out(layout, job)
    fits = "yes" if p.fits else f"no: {p.problems[0]}"
    cells: list[tuple[str, object, str]] = [
        (one.name, place, "text"),
        (show_seconds(p.step_seconds), p.step_seconds, "number"),
        (f"{p.tokens_per_second_per_gpu:,.0f}", p.tokens_per_second_per_gpu, "number"),
        (f"{p.mfu:.1%}", p.mfu, "number"),
        (f"{p.memory.peak / GIB:.1f}", p.memory.peak, "number"),
        ("yes" if p.fits else "no", int(not p.fits), "text"),
        *([("–" if risk is None else f"{risk:.1%}", risk or 0, "number")] if risky else []),
        *([("–" if cost is None else f"{cost:,.0f}", cost or 0, "number")] if priced else []),
        (f"{layout.tp}{'+SP' * layout.sequence_parallel}", layout.tp, "number axis"),
        *((str(getattr(layout, name)), getattr(layout, name), "number axis") for name in extra),
        (str(layout.pp), layout.pp, "number axis"),
        (str(layout.virtual_stages), layout.virtual_stages, "number axis"),
        (data, layout.dp, "number axis"),
        (str(layout.zero_stage), layout.zero_stage, "number axis"),
        (str(layout.micro_batch_size), layout.micro_batch_size, "number axis"),
        (layout.schedule if layout.pp > 1 else "–", layout.schedule if layout.pp > 1 else "", "text axis"),
        (layout.recompute, layout.recompute, "text axis"),
        *([(layout.offload, layout.offload, "text axis")] if offloads else []),
    ]
    fields = {field.name: written(getattr(layout, field.name)) for field in dataclasses.fields(layout)}
    fields |= {"step": f"{p.step_seconds:.6g}", "mfu": f"{100 * p.mfu:.6g}", "gib": f"{p.memory.peak / GIB:.6g}"}
    fields |= {"speed": f"{p.tokens_per_second_per_gpu:.6g}", "name": one.name.replace(" ", "-").replace(",", "")}
    search = " ".join(f"{name}={value}" for name, value in fields.items())
    shown = "".join(f'<td class="{kind}" data-v="{esc(value)}">{esc(text)}</td>' for text, value, kind in cells)
    return (
        f'<tr data-fields="{esc(search)}" data-fits="{int(p.fits)}" title="{esc("" if p.fits else fits)}">{shown}'
        f'<td class="text" data-v="{esc(text)}">{copy_box(text, "layout")}</td></tr>'
    )
