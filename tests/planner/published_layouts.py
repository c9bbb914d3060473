"""Published layouts beside the planner's choice for the same job; `make layouts` writes docs/published_layouts.md.

A published run says what its software can do: the search may use what the software's stack can do and what the runs of
the job show. It has the costs of the exam (reports/cases.py).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from planner.differences import term_lines, terms
from planner.plan import Plan
from planner.search import plan
from planner.space import space
from reports.cases import Case, SkippedError, interpret
from reports.published import DATA, Row, published_rows
from simulator import presets
from simulator.columns import Columns
from simulator.errors import UserError
from simulator.files import write_text
from simulator.job import Job
from simulator.layout import Layout
from simulator.results import Prediction
from simulator.risk import HIGH_RISK
from simulator.simulate import simulate
from simulator.stack import Stack
from simulator.units import show_seconds

PAGE = Path(__file__).parents[2] / "docs" / "published_layouts.md"
COUNTED = ("high", "medium")
LEAST_LAYOUTS = 4
ROUNDING = 1e-9


@dataclass(frozen=True)
class Published:
    """Runs of one job, as one job for the planner: `cases` are they, `job` has a stack that can do what its software
    and these runs can."""

    cases: tuple[Case, ...]
    job: Job

    @cached_property
    def found(self) -> Plan:
        return plan(self.job, top=1, ties=False)

    @cached_property
    def layouts(self) -> dict[Layout, Prediction]:
        """What was published, predicted; a run whose micro-batch is not stated may mean several."""
        return {layout: simulate(self.job, layout) for case in self.cases for layout in case.layouts}

    @cached_property
    def space(self) -> Columns:
        return space(self.job)

    def outside(self, layout: Layout) -> list[str]:
        """The fields in which a layout differs from the nearest one of the planner's space; empty where it is in it."""
        even = dataclasses.replace(layout, stage_layers=None)
        if layout.stage_layers == even.layers_per_stage(self.job.model.num_hidden_layers):
            layout = even
        names = [field.name for field in dataclasses.fields(Layout)]
        differs = np.array([_differs(self.space, name, getattr(layout, name)) for name in names])
        nearest = int(np.argmin(differs.sum(axis=0)))
        return [name for name, off in zip(names, differs[:, nearest], strict=True) if off]


def groups(rows: Iterable[Row]) -> list[Published]:
    """Runs by job; those are one job that differ in nothing but the layout."""
    found: dict[str, list[Case]] = {}
    for row in rows:
        try:
            case = interpret(row)
        except (SkippedError, UserError):
            continue
        found.setdefault(repr(case.job), []).append(case)
    return [Published(tuple(cases), _able(cases)) for cases in found.values()]


def _able(cases: Sequence[Case]) -> Job:
    """The job with the limits of the software, as far as these runs keep to them."""
    job, layouts = cases[0].job, [layout for case in cases for layout in case.layouts]
    own = _stack(job.stack.name)
    pipelined = [layout for layout in layouts if layout.pp > 1]
    stages = own.sequence_parallel
    if any(layout.tp > 1 and layout.sequence_parallel != (stages == "always") for layout in layouts):
        stages = "optional"
    stack = dataclasses.replace(
        job.stack,
        zero_stages=_with(own.zero_stages, (one.zero_stage for one in layouts)),
        pipeline_zero_stages=_with(own.pipeline_zero_stages, (one.zero_stage for one in pipelined)),
        schedules=_named(own.schedules, (one.schedule for one in pipelined)),
        recompute=_named(own.recompute, (one.recompute for one in layouts)),
        sequence_parallel=stages,
        context_parallel=own.context_parallel or (job.stack.context_parallel if _any(layouts, "cp") else ""),
        expert_dispatch=own.expert_dispatch or (job.stack.expert_dispatch if _any(layouts, "ep") else ""),
        hybrid_shard=own.hybrid_shard or any(one.dp_shard > 1 and one.dp_replicate > 1 for one in layouts),
    )
    return dataclasses.replace(job, stack=stack)


def _stack(name: str) -> Stack:
    return presets.find_stack(name, DATA / "stacks")


def _with(known: tuple[int, ...], used: Iterable[int]) -> tuple[int, ...]:
    return tuple(sorted({*known, *(one for one in used if one)}))


def _named(known: tuple[str, ...], used: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys([*known, *used]))


def _any(layouts: Iterable[Layout], axis: str) -> bool:
    return any(getattr(layout, axis) > 1 for layout in layouts)


def _differs(columns: Columns, name: str, value: object) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    found: np.ndarray[tuple[int], np.dtype[np.bool_]]
    found = ~columns.is_named(name, value) if name in columns.names else columns[name] != value
    return found


def beats(published: Published) -> list[tuple[Layout, Prediction, list[str]]]:
    """Layouts that were published and are predicted faster than what the planner chose, with the fields in which they
    lie outside of its space. Those that are predicted not to fit, or too likely not to, do not count."""
    best = published.found.best
    faster = [
        (layout, p)
        for layout, p in published.layouts.items()
        if p.fits
        and p.out_of_memory_probability <= max(HIGH_RISK, best.out_of_memory_probability)
        and p.step_seconds < best.step_seconds * (1 - ROUNDING)
    ]
    return [(layout, p, published.outside(layout)) for layout, p in faster]


def measured_jobs(rows: Iterable[Row]) -> list[list[Row]]:
    """The rows of each job of which at least four different layouts were measured."""
    jobs: dict[str, list[Row]] = {}
    for row in rows:
        if row.ran and row.tokens_per_second_per_gpu and row.text("confidence") in COUNTED and row.text("job"):
            jobs.setdefault(row.text("job"), []).append(row)
    return [found for found in jobs.values() if _layouts_of(found) >= LEAST_LAYOUTS]


def _layouts_of(rows: Iterable[Row]) -> int:
    # A row that does not state its micro-batch is one layout, whatever it means.
    return len({case.layouts for published in groups(rows) for case in published.cases})


# Runs that are well known: reports, papers and submissions. Of BLOOM, OPT, Falcon, Mixtral and the largest Nemotron no
# source states the throughput of a step with its layout, so they are not among the rows.
WELL_KNOWN = {
    "sc21-0019": "GPT 175B, Megatron-LM, SC'21",
    "sc21-0013": "GPT 175B, DeepSpeed ZeRO-3, SC'21",
    "sc21-0010": "GPT 1T, Megatron-LM, SC'21",
    "korth-0002": "GPT 22B, Megatron-LM, selective recomputation",
    "korth-0004": "GPT 175B, Megatron-LM, selective recomputation",
    "korth-0008": "GPT 1T, Megatron-LM, selective recomputation",
    "mtnlg-0001": "MT-NLG 530B",
    "megascale-0016": "GPT 175B, MegaScale",
    "mlperf-0009": "GPT-3 175B, MLPerf v3.1",
    "mlperf-0026": "Llama 3.1 405B, MLPerf v5.0",
    "mcore-0003": "Llama 3 405B, Megatron-Core",
    "bridge-0290": "DeepSeek-V3, Megatron-Bridge",
    "bridge-0053": "Kimi K2, Megatron-Bridge",
    "bridge-0010": "Qwen3 235B, Megatron-Bridge",
    "nemo15b-0001": "Nemotron-4 15B",
    "foundry-0001": "MPT 70B, llm-foundry",
    "pythia-0008": "Pythia 12B, GPT-NeoX",
}

HEAD = """# Published layouts and what would be recommended

Written by `make layouts`. For each well-known run: what was measured, what is predicted of the published layout, and
the layout that `layoutwise plan` recommends for the same job on the same GPUs with the same software, with the whole
space searched. The software's limits are those of its stack, widened by what the run itself did. What a gain is worth:
predictions of published runs are off by a few percent at the median and by a fifth at the 90th percentile
([validation](validation.md)), and a search picks what its model flatters; **a gain within that error is no reason to
change a layout that works**. Those who published these layouts often had reasons that no step time shows: memory to
spare for other batches, one layout for all phases, code of that year.

Tokens per second and GPU. "Seconds" under a run are what the published layout takes longer (+) or shorter (-) than the
recommended one, as predicted, and add up to the difference of the steps. In the table `t8s p12x3 d16 z1 b2 full` is
tp 8 with sequence parallelism, 12 pipeline ranks of 3 stages, 16 data-parallel ranks with ZeRO 1, micro-batches of 2,
full recomputation; `c` is cp, `e` is ep.
"""


def main() -> None:
    """Write the page."""
    rows = {row.text("id"): row for row in published_rows()}
    table, sections = [], []
    for place, (name, title) in enumerate(WELL_KNOWN.items()):
        print(f"{place + 1} of {len(WELL_KNOWN)}: {title}", file=sys.stderr, flush=True)
        line, section = _entry(rows[name], title)
        table.append(line)
        sections.append(section)
    head = "| run | GPUs | published layout | measured | predicted | recommended layout | predicted | gain |"
    lines = [HEAD, head, "|---|---|---|---:|---:|---|---:|---:|", *table, "", *sections]
    write_text(PAGE, "\n".join(lines).rstrip() + "\n")
    print(f"written to {PAGE}")


def _entry(row: Row, title: str) -> tuple[str, str]:
    """The run's line of the table, and its section."""
    (published,) = groups([row])
    job, best = published.job, published.found.best
    known = max(published.layouts.values(), key=lambda p: (p.fits, p.tokens_per_second))
    measured = row.tokens_per_second_per_gpu
    gain = best.tokens_per_second / known.tokens_per_second - 1
    line = (
        f"| [{title}](#{row.text('id')}) | {job.world_size:,} {job.cluster.gpu.name} | {short(known.layout)} | "
        f"{measured:,.0f} | {known.tokens_per_second_per_gpu:,.0f} | {short(best.layout)} | "
        f"{best.tokens_per_second_per_gpu:,.0f} | {gain:+.1%} |"
    )
    said = []
    missing = published.outside(known.layout)
    if missing:
        said.append(f"The published layout lies outside of the space that is searched: {', '.join(missing)}.")
    if not known.fits:
        said.append(f"The published layout is predicted not to fit, although it ran: {known.problems[0]}.")
    elif known.out_of_memory_probability > HIGH_RISK:
        said.append(
            f"The published layout is predicted to run out of memory with {known.out_of_memory_probability:.0%}, which "
            "is more than is recommended, although it ran."
        )
    if published.found.riskier:
        said.append(f"Faster still, but likelier to run out of memory: {short(published.found.riskier.layout)}.")
    assumed = ", ".join(published.cases[0].assumptions)
    said.append(f"Source: {row.text('source')}." + (f" Not stated there and assumed: {assumed}." if assumed else ""))
    if known.layout == best.layout:
        why = ["The recommended layout is the published one."]
    else:
        slower = known.step_seconds - best.step_seconds
        sign = "+" if slower >= 0 else "-"
        why = [f"Seconds: {sign}{show_seconds(abs(slower))} of {show_seconds(best.step_seconds)}."]
        why += [f"* {one}" for one in term_lines(terms(job, best, known), best)]
    section = [
        f'### <a id="{row.text("id")}"></a>{title}, {job.world_size:,} {job.cluster.gpu.name}', "",
        f"published `{known.layout.short()}`<br>recommended `{best.layout.short()}`", "", *why, "", " ".join(said), "",
    ]  # fmt: skip
    return line, "\n".join(section)


def short(layout: Layout) -> str:
    """A layout in a cell of the table: `t8 p12 d16 z1 b1 full`."""
    parts = [f"t{layout.tp}{'s' if layout.sequence_parallel else ''}"]
    parts += [f"{axis[0]}{getattr(layout, axis)}" for axis in ("cp", "ep") if getattr(layout, axis) > 1]
    if layout.pp > 1:
        parts.append(f"p{layout.pp}" + (f"x{layout.virtual_stages}" if layout.virtual_stages > 1 else ""))
    parts += [f"d{layout.dp}" + (f" z{layout.zero_stage}" if layout.zero_stage else ""), f"b{layout.micro_batch_size}"]
    if layout.recompute != "none":
        parts.append(layout.recompute)
    return " ".join(parts)


if __name__ == "__main__":
    main()
