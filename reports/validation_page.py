"""The exam as tables, for a terminal and for docs/validation.md."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reports.plots import parity
from reports.published import source_name
from reports.scores import Errors, errors
from reports.time_residuals_page import section
from reports.validation import COUNTED, LEAST_LAYOUTS, Result, Validation
from simulator.files import write_text

WORST, MOST_JOBS = 10, 20
IMAGE = Path("images") / "validation.png"
# Words of the lead-in of a group of rows, and what the rows are grouped by.
GROUPS: tuple[tuple[str, Callable[[Result], str]], ...] = (
    ("GPU", lambda result: result.row.text("gpu")),
    ("model family", lambda result: result.row.text("arch")),
    ("stack", lambda result: result.stack),
    ("framework", lambda result: result.row.text("framework")),
)
FITTED = Path(__file__).parents[1] / "docs" / "fitted.md"


@dataclass(frozen=True)
class PageTable:
    """A table of texts; all columns but the first `texts` are numbers."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1

    def markdown(self) -> str:
        if not self.rows:
            return "None."
        lines = [self.columns, tuple("---" if i < self.texts else "---:" for i in range(len(self.columns)))]
        cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (*lines, *self.rows)]
        return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def summary_table(validation: Validation) -> PageTable:
    """The three questions and their answers."""
    s = validation.summary
    rows = [
        ("how fast", "median error of tokens/s/GPU", _percent(s.median_abs_error)),
        ("", "90th percentile", _percent(s.p90_abs_error)),
        ("", "mean error", _percent(s.mean_abs_error)),
        ("", "bias (mean of the signed errors)", _signed(s.bias)),
        ("", "median of the signed errors", _signed(errors([r.error or 0.0 for r in validation.compared]).median)),
        ("which layout", f"jobs with at least {LEAST_LAYOUTS} measured layouts", str(s.jobs)),
        ("", "median regret", _percent(s.regret_median)),
        ("", "90th percentile", _percent(s.regret_p90)),
        ("", "median Kendall tau", "-" if s.kendall_tau_median is None else f"{s.kendall_tau_median:.2f}"),
        ("does it fit", "of rows predicted not to fit, did not", _percent(s.fit_precision)),
        ("", "of rows that did not fit, predicted so", _percent(s.fit_recall)),
        ("", "median error of peak memory", _percent(s.memory_median_abs_error)),
        ("rows", "high and medium confidence", str(s.count)),
        ("", "of these skipped", str(s.skipped)),
    ]
    return PageTable("summary", ("question", "figure", "answer"), tuple(rows), 2)


def group_tables(validation: Validation) -> list[PageTable]:
    """Errors of tokens per second and GPU by GPU, model family, stack and framework."""
    return [
        PageTable(
            f"by {word}",
            (word, "rows", "median error", "90th percentile", "bias", "median signed"),
            tuple((name, *_cells(found)) for name, found in validation.errors_by(key).items()),
        )
        for word, key in GROUPS
    ]


def worst_table(validation: Validation) -> PageTable:
    """The rows that are predicted worst, and where the simulator sees their time."""
    worst = sorted(validation.compared, key=lambda r: (-abs(r.error or 0.0), r.row.text("id")))[:WORST]
    return PageTable(
        "worst rows",
        ("row", "model", "GPUs", "stack", "layout", "time goes to", "measured", "predicted", "error"),
        tuple(
            (
                r.row.text("id"), r.row.text("model_name"), f"{r.row.count('n_gpus')} {r.row.text('gpu')}", r.stack,
                r.prediction.layout.short(), _time(r), f"{r.measured:,.0f}",
                f"{r.prediction.tokens_per_second_per_gpu:,.0f}", _signed(r.error),
            )
            for r in worst
            if r.prediction and r.measured
        ),
        6,
    )  # fmt: skip


def job_table(validation: Validation) -> PageTable:
    """The jobs whose order was examined, the worst choice first."""
    rows: dict[str, Result] = {}
    for result in validation.compared:
        rows.setdefault(result.row.text("job"), result)
    return PageTable(
        "jobs",
        ("job", "model", "GPUs", "stack", "layouts", "regret", "Kendall tau"),
        tuple(
            (
                job.job, rows[job.job].row.text("model_name"),
                f"{rows[job.job].row.count('n_gpus')} {rows[job.job].row.text('gpu')}", rows[job.job].stack,
                str(job.layouts), _percent(job.regret), "-" if job.tau is None else f"{job.tau:.2f}",
            )
            for job in sorted(validation.jobs, key=lambda job: (-job.regret, job.job))
        ),
        4,
    )  # fmt: skip


def fit_table(validation: Validation) -> PageTable:
    """What ran and what did not, against what is predicted."""
    seen = Counter((r.prediction.fits, r.row.ran) for r in validation.counted if r.prediction)
    rows = tuple(
        (said, str(seen[fits, True]), str(seen[fits, False]))
        for said, fits in (("predicted to fit", True), ("predicted not to fit", False))
    )
    return PageTable("fit", ("", "ran", "out of memory"), rows)


def memory_table(validation: Validation) -> PageTable:
    """Errors of peak memory by stack."""
    found: dict[str, list[float]] = {}
    for result in validation.counted:
        if result.memory_error is not None:
            found.setdefault(result.stack, []).append(result.memory_error)
    rows = tuple((name, *_cells(errors(found[name]))) for name in sorted(found, key=lambda n: (-len(found[n]), n)))
    return PageTable("peak memory", ("stack", "rows", "median error", "90th percentile", "bias", "median signed"), rows)


def skipped_table(validation: Validation) -> PageTable:
    """Why rows are not predicted, the most frequent reason first."""
    reasons: dict[str, list[Result]] = {}
    for result in validation.results:
        if result.skipped:
            reasons.setdefault(result.skipped, []).append(result)
    rows = tuple(
        (reason, str(len(found)), str(sum(r.counts for r in found)), found[0].row.text("id"))
        for reason, found in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    )
    return PageTable("skipped", ("reason", "rows", "high and medium", "for example"), rows)


def assumptions_table(validation: Validation) -> PageTable:
    """What stands in for empty cells, by stack, with the number of rows that needed it."""
    seen = Counter(
        (result.stack, assumption)
        for result in validation.results
        if result.case
        for assumption in result.case.assumptions
        if not assumption.startswith("stack =")
    )
    ordered = sorted(seen.items(), key=lambda item: (item[0][0], -item[1], item[0][1]))
    rows = tuple((stack, assumption, str(count)) for (stack, assumption), count in ordered)
    return PageTable("assumptions", ("stack", "assumed", "rows"), rows, 2)


def sources_table(validation: Validation) -> PageTable:
    """Who measured: rows by the place that published them, which the first part of `source` names."""
    counts: Counter[str] = Counter()
    ran: Counter[str] = Counter()
    for result in validation.results:
        source = source_name(result.row)
        counts[source] += 1
        ran[source] += result.row.ran
    rows = tuple(
        (source, str(counts[source]), str(ran[source]), str(counts[source] - ran[source]))
        for source in sorted(counts, key=lambda source: (-counts[source], source))
    )
    return PageTable("sources", ("source", "rows", "ran", "out of memory"), rows)


def terminal_tables(validation: Validation) -> list[PageTable]:
    """What the command prints; the page has more."""
    shown = [
        summary_table(validation), *group_tables(validation)[:3], worst_table(validation), skipped_table(validation),
        assumptions_table(validation),
    ]  # fmt: skip
    return [table for table in shown if table.rows]


def write_page(validation: Validation, folder: Path | str, ours: bool) -> list[Path]:
    """Write validation.md and images/validation.png into a folder.

    Args:
        ours: the rows are those that the project ships, to some of which its constants were fitted.
    """
    folder = Path(folder)
    points: dict[str, list[tuple[float, float]]] = {}
    for r in validation.compared:
        if r.prediction and r.measured:
            pair = (r.measured, r.prediction.tokens_per_second_per_gpu)
            points.setdefault(r.row.text("gpu").split("-")[0], []).append(pair)
    image = parity(points, folder / IMAGE, "tokens per second and GPU of published runs")
    return [write_text(folder / "validation.md", page(validation, ours)), image]


def page(validation: Validation, ours: bool) -> str:
    """docs/validation.md: what was measured, by whom, how far predictions are off, and what they rest on."""
    s, total = validation.summary, len(validation.results)
    compared = len(validation.compared)
    shipped = "that the project ships (`reports/data/published`)" if ours else "of the file"
    command = "make validation" if ours else "layoutwise validate published --rows FILE -o DIR"
    words = ("GPU", "model family", "stack, the software as the simulator knows it", "framework, as the row names it")
    jobs = job_table(validation)
    parts = [
        "# Predictions of published runs",
        f"Generated by `{command}`; edit the code, not this page.",
        f"{total} training runs that others measured and published are predicted from what their sources state: "
        f"hardware, dimensions of the model, layout. {s.count} of the rows {shipped} are of {' or '.join(COUNTED)} "
        "confidence: what matters is stated, or all of it but one or two things. All figures below are over these. "
        f"{s.skipped} of them are skipped with a reason, {compared} have a throughput to compare with.",
        "## Headline",
        summary_table(validation).markdown(),
        f"![measured and predicted tokens per second and GPU]({IMAGE.as_posix()})",
        "An error is predicted / measured - 1 of tokens per second and GPU: positive where the prediction is too fast. "
        "Figures without a sign are of its size. FLOP/s and MFU are not compared: sources count FLOPs in ways that "
        "differ by 10 to 35 %.",
        _noise(validation),
        *(_fitted() if ours else []),
        "## How fast",
        *(f"By {word}:\n\n{table.markdown()}" for word, table in zip(words, group_tables(validation), strict=True)),
        "### The worst rows",
        "`time goes to` is where the simulator sees the step; what it has wrong may be missing there.",
        worst_table(validation).markdown(),
        "## Which layout",
        "Rows of one job are layouts of the same model, GPUs, batch, sequence, precision and framework. Of jobs with "
        f"at least {LEAST_LAYOUTS} measured rows: regret is the part of the best measured throughput that is lost by "
        "running the row that is predicted fastest, or the mean of these parts where several rows are predicted "
        "equally fast. Kendall's tau-b compares the orders: 1 for the same, 0 for none. Rows that differ only in what "
        "no column holds (releases, submitters) tie in the prediction; where all do, there is no tau.",
        f"The {min(MOST_JOBS, len(jobs.rows))} worst of {len(jobs.rows)} jobs:",
        dataclasses.replace(jobs, rows=jobs.rows[:MOST_JOBS]).markdown(),
        *(section(validation.results) if ours else []),
        "## Does it fit",
        fit_table(validation).markdown(),
        "A row that leaves the micro batch open fits if any choice does. Sources count peak memory in several ways: "
        "it is compared with the bytes that torch has given out where a row's notes say `allocated`, with all that is "
        "taken of the device where they say `nvidia-smi` or name a share of it, and elsewhere with what torch has "
        "reserved. GB are turned into GiB where the notes say GB.",
        memory_table(validation).markdown(),
        "## What is assumed",
        "Cells that a source leaves empty are filled by the rules of its software (`reports/data/framework.toml`), "
        "the same for all rows of a stack. A micro batch that is not stated is the fastest that fits: its author will "
        "have tuned it. Where hidden / heads and the usual embedding miss the stated number of "
        "parameters, the usual head length or embedding that meets it holds.",
        assumptions_table(validation).markdown(),
        "## What is skipped",
        skipped_table(validation).markdown(),
        "## Who measured",
        "`source` of each row names the file, log, table or figure.",
        sources_table(validation).markdown(),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _noise(validation: Validation) -> str:
    """How far measurements differ that are the same to the simulator: no prediction can be nearer than half of that."""
    same: dict[tuple[str, int], list[float]] = {}
    for r in validation.compared:
        if r.measured:
            same.setdefault((r.row.text("job"), id(r.prediction)), []).append(r.measured)
    spreads = [max(found) / min(found) - 1 for found in same.values() if len(found) > 1]
    if not spreads:
        return ""
    spread = errors(spreads)
    alike = sum(len(found) for found in same.values() if len(found) > 1)
    return (
        f"{alike} rows are the same to the simulator as another of their job, for they differ in what no column holds: "
        "releases, submitters, settings. The fastest of such rows is measured "
        f"{_percent(spread.median_abs)} above the slowest (median of {len(spreads)} sets; 90th percentile "
        f"{_percent(spread.p90_abs)}): no prediction from these columns can be nearer than about half of that."
    )


def _fitted() -> list[str]:
    """What of the simulator was fitted to these rows: a section of its own where it is written."""
    if FITTED.is_file():
        return [FITTED.read_text(encoding="utf-8").strip()]
    return [
        "## In sample",
        "These rows are no unseen test: constants of GPUs and stacks were fitted to a part of them. The `source` of "
        "every constant in `simulator/data` says where it comes from; none is for one model, one row or one cluster "
        "size.",
    ]


def _time(result: Result) -> str:
    """The largest items of the step."""
    assert result.prediction
    spent = dataclasses.asdict(result.prediction.breakdown)
    largest = sorted(spent, key=lambda name: -spent[name])[:3]
    step = result.prediction.step_seconds
    return ", ".join(f"{name} {spent[name] / step:.0%}" for name in largest if spent[name] >= 0.005 * step)


def _cells(found: Errors) -> tuple[str, ...]:
    return (
        str(found.count), _percent(found.median_abs), _percent(found.p90_abs), _signed(found.bias),
        _signed(found.median),
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"
