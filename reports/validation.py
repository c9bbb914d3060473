"""The exam: predict training runs that others published, and measure how wrong the predictions are.

Three questions. How fast: the error of tokens per second and GPU. Which layout: among the rows of one job, what the
row predicted fastest loses to the fastest measured one, and how well the orders agree. Does it fit: rows that ran out
of memory against rows that ran, and peak memory where it was published.
"""

from __future__ import annotations

import csv
import re
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from reports.cases import Case, SkippedError, interpret
from reports.published import Row, read_rows
from reports.scores import Errors, errors, kendall_tau, precision_recall, quantile, regret
from simulator.checks import MOST_DEVICES, MOST_LAYERS, MOST_SAMPLES, check_job
from simulator.errors import UserError
from simulator.files import plain
from simulator.job import Job
from simulator.layout import Layout
from simulator.memory import fragmented, memory_per_rank
from simulator.program import stage_costs
from simulator.results import Prediction
from simulator.risk import shortfall
from simulator.simulate import simulate

GIB = 2**30
# Rows of which at least this much is known count in the summary; the others are predicted and shown.
COUNTED = ("high", "medium")
# Measured layouts that a job must have before their order is an exam.
LEAST_LAYOUTS = 4
# No public run has more; what is larger is a slip of whoever wrote the row.
LARGEST = {"n_gpus": MOST_DEVICES, "layers": MOST_LAYERS, "gbs": MOST_SAMPLES}
LARGEST_SIZE = 10**8
LEAST_NUMBER, MOST_NUMBER = 1e-6, 1e12
# Zero in other columns is read as not stated.
ABOVE_ZERO = ("n_gpus", "layers", "hidden", "heads", "seq_len", "gbs")
MOST_OPS = 4_000_000


@dataclass(frozen=True)
class Result:
    """One row, predicted; or skipped with a reason.

    Of the layouts that the row may mean (`case.layouts`) `prediction` is the fastest that fits, or the fastest if
    none does.
    """

    row: Row
    prediction: Prediction | None
    case: Case | None
    skipped: str = ""

    @property
    def error(self) -> float | None:
        """Predicted over measured tokens per second and GPU, minus 1."""
        measured = self.measured
        if self.prediction is None or measured is None:
            return None
        return self.prediction.tokens_per_second_per_gpu / measured - 1

    @property
    def measured(self) -> float | None:
        """Tokens per second and GPU of a run that fitted; None where there is no such number."""
        return self.row.tokens_per_second_per_gpu or None if self.row.ran else None

    @property
    def counts(self) -> bool:
        """Whether the row counts in the summary."""
        return self.row.text("confidence") in COUNTED

    @property
    def stack(self) -> str:
        return self.case.job.stack.name if self.case else ""

    @property
    def measured_memory(self) -> float | None:
        """Published peak in GiB; notes say where it is in GB, but for software that is known to say GB and mean GiB."""
        peak = self.row.number("peak_mem_gib")
        if not peak or not self.row.ran:
            return None
        if self.case is not None and self.case.memory_unit:
            return peak if self.case.memory_unit == "GiB" else peak * 1e9 / GIB
        return peak * 1e9 / GIB if re.search(r"memory.{0,40}\bGB\b", self.row.text("notes"), re.I) else peak

    @property
    def predicted_memory(self) -> float | None:
        """Predicted peak in GiB, of what the source counts: notes that say `nvidia-smi`, or a share of the device's
        memory, mean all that is taken of it, `allocated`, and MLPerf's rows, what torch has given out, and others are
        taken to be what torch has reserved. It is that of the fullest rank, but for software that reports its first."""
        if self.prediction is None or self.case is None:
            return None
        memory, notes = self.prediction.memory, self.row.text("notes")
        if self.case.memory_rank == "first" and self.prediction.memory_per_stage:
            memory = self.prediction.memory_per_stage[0]
        if re.search(r"nvidia-smi|% of \d+ GB", notes):
            return memory.peak / GIB
        allocated = memory.peak - memory.overhead
        reserved = allocated + fragmented(self.case.job, memory.activations, memory.buffers)
        given_out = "allocated" in notes or "MLPerf" in self.row.text("framework")
        return (allocated if given_out else reserved) / GIB

    @property
    def memory_error(self) -> float | None:
        """Predicted over measured peak memory, minus 1."""
        predicted, measured = self.predicted_memory, self.measured_memory
        return predicted / measured - 1 if predicted is not None and measured else None


@dataclass(frozen=True)
class Known:
    """What rows share: predictions by job and layouts, graphs by cluster."""

    predictions: dict[str, Prediction] = field(default_factory=dict)
    graphs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class JobScore:
    """How the layouts of one job are ordered. tau is None where all are predicted, or measured, the same."""

    job: str
    layouts: int
    regret: float
    tau: float | None


@dataclass(frozen=True)
class Summary:
    """The figures over rows of high and medium confidence, None where no row has them. Errors are relative
    (predicted / measured - 1); bias is their mean with its sign. fit_precision and fit_recall are of the statement
    "does not fit". seconds is what the exam took, of all rows."""

    count: int
    skipped: int
    median_abs_error: float | None
    mean_abs_error: float | None
    p90_abs_error: float | None
    bias: float | None
    memory_median_abs_error: float | None
    jobs: int
    regret_median: float | None
    regret_p90: float | None
    kendall_tau_median: float | None
    fit_precision: float | None
    fit_recall: float | None
    seconds: float


@dataclass(frozen=True)
class Validation:
    """The results of all rows, in their order, and the seconds that it took to have them."""

    results: tuple[Result, ...]
    seconds: float

    @cached_property
    def counted(self) -> list[Result]:
        """The results that count in the summary."""
        return [result for result in self.results if result.counts]

    @cached_property
    def compared(self) -> list[Result]:
        """Those of them that have an error."""
        return [result for result in self.counted if result.error is not None]

    @cached_property
    def jobs(self) -> list[JobScore]:
        """Jobs of which at least four layouts were measured and predicted. Rows with the same layout and the same
        prediction (the same run under another release, or of another submitter) are one layout, measured as their
        median: between them there is nothing to choose."""
        by_job: dict[str, list[Result]] = {}
        for result in self.compared:
            if result.row.text("job"):
                by_job.setdefault(result.row.text("job"), []).append(result)
        scores = (_score(job, rows) for job, rows in by_job.items())
        return [score for score in scores if score.layouts >= LEAST_LAYOUTS]

    def errors_by(self, key: Callable[[Result], str]) -> dict[str, Errors]:
        """Errors of the rows that count, by a word of theirs; the largest group first."""
        groups: dict[str, list[float]] = {}
        for result in self.compared:
            groups.setdefault(key(result), []).append(_error(result))
        return {name: errors(groups[name]) for name in sorted(groups, key=lambda name: (-len(groups[name]), name))}

    @cached_property
    def summary(self) -> Summary:
        speed = errors([_error(result) for result in self.compared])
        memory = [abs(e) for e in (result.memory_error for result in self.counted) if e is not None]
        regrets = [job.regret for job in self.jobs]
        taus = [job.tau for job in self.jobs if job.tau is not None]
        judged = [result for result in self.counted if result.prediction]
        precision, recall = precision_recall(
            [not result.prediction.fits for result in judged if result.prediction],
            [not result.row.ran for result in judged],
        )
        return Summary(
            count=len(self.counted),
            skipped=sum(bool(result.skipped) for result in self.counted),
            median_abs_error=speed.median_abs,
            mean_abs_error=speed.mean_abs,
            p90_abs_error=speed.p90_abs,
            bias=speed.bias,
            memory_median_abs_error=quantile(memory, 0.5),
            jobs=len(self.jobs),
            regret_median=quantile(regrets, 0.5),
            regret_p90=quantile(regrets, 0.9),
            kendall_tau_median=quantile(taus, 0.5),
            fit_precision=precision,
            fit_recall=recall,
            seconds=self.seconds,
        )


def read(path: Path | str) -> list[Row]:
    """Rows that the project has never seen, in the columns of its own.

    Raises:
        UserError: the file is no CSV with these columns, or has no rows.
    """
    try:
        rows = read_rows(path)
    except csv.Error as error:
        raise UserError(f"rows '{path}' is not a CSV file: {error}") from None
    if not rows:
        raise UserError(f"rows '{path}' has no rows below its header")
    return rows


def validate(rows: Sequence[Row], progress: Callable[[str, float], None] | None = None) -> Validation:
    """Predict every row. Rows that mean the same job and layouts are simulated once.

    A row that cannot be predicted is skipped with its reason. `progress` is told what is done, and how much of all.
    """
    start = time.perf_counter()
    known = Known()
    results = []
    for place, row in enumerate(rows):
        if progress:
            progress(f"row {place + 1} of {len(rows)}", place / len(rows))
        results.append(predict(row, known))
    return Validation(tuple(results), time.perf_counter() - start)


def predict(row: Row, known: Known | None = None) -> Result:
    """Predict one row, with what is known from others."""
    known = known or Known()
    try:
        _check_cells(row)
        case = interpret(row)
        check_job(case.job, "row")
        # The graph of a large cluster takes longer to build than most steps to simulate.
        cluster = repr((case.job.cluster, case.job.nodes))
        if cluster in known.graphs:
            vars(case.job)["graph"] = known.graphs[cluster]
        known.graphs[cluster] = case.job.graph
        same = repr((case.job, case.layouts))
        if same not in known.predictions:
            known.predictions[same] = _fastest(case)
    except (SkippedError, UserError) as reason:
        return Result(row, None, None, " ".join(str(reason).split()))
    return Result(row, known.predictions[same], case)


def _check_cells(row: Row) -> None:
    """Numbers that no run has: what interprets and simulates rows divides by them and counts up to them."""
    for column, value in row.counts.items():
        most = LARGEST.get(column, LARGEST_SIZE)
        if value is not None and not (column in ABOVE_ZERO) <= value <= most:
            raise SkippedError(f"{column} = {value:g} must be from {int(column in ABOVE_ZERO)} to {most}")
    for name, number in row.numbers.items():
        if number is not None and not LEAST_NUMBER <= number <= MOST_NUMBER:
            raise SkippedError(f"{name} = {number:g} must be from {LEAST_NUMBER:g} to {MOST_NUMBER:g}")


def _fastest(case: Case) -> Prediction:
    ops = max(2 * p.stages * p.microbatches(case.job.training.global_batch_size) for p in case.layouts)
    if ops > MOST_OPS:
        raise SkippedError(f"a step of {ops} forwards and backwards is too long to simulate")
    fitting = [layout for layout in case.layouts if _fits(case.job, layout)] if len(case.layouts) > 1 else []
    predictions = [simulate(case.job, layout) for layout in fitting or case.layouts]
    return max(predictions, key=lambda p: p.tokens_per_second)


def _fits(job: Job, layout: Layout) -> bool:
    """What `simulate` says too, but without the simulation."""
    return not shortfall(job, layout, memory_per_rank(job, layout, stage_costs(job, layout)))


def _error(result: Result) -> float:
    assert result.error is not None
    return result.error


def _score(job: str, rows: Iterable[Result]) -> JobScore:
    candidates: dict[tuple[float, Layout], list[float]] = {}
    for r in rows:
        if r.prediction and r.measured:
            key = (r.prediction.tokens_per_second_per_gpu, r.prediction.layout)
            candidates.setdefault(key, []).append(r.measured)
    predicted = [throughput for throughput, _ in candidates]
    measured = [statistics.median(found) for found in candidates.values()]
    return JobScore(job, len(candidates), regret(predicted, measured), kendall_tau(predicted, measured))


def validation_json(validation: Validation) -> dict[str, Any]:
    """What `layoutwise validate published --json` prints (docs/files.md)."""
    return {"rows": [_row_json(result) for result in validation.results], "summary": plain(validation.summary)}


def _row_json(result: Result) -> dict[str, Any]:
    row, prediction = result.row, result.prediction
    return {
        **{column: row.text(column) for column in ("id", "job", "confidence", "gpu", "arch", "framework", "status")},
        "fits": prediction.fits if prediction else None,
        "measured": {"tokens_per_second_per_gpu": result.measured, "peak_memory_gib": result.measured_memory},
        "predicted": {
            "tokens_per_second_per_gpu": prediction.tokens_per_second_per_gpu if prediction else None,
            "peak_memory_gib": result.predicted_memory,
        },
        "error": result.error,
        "memory_error": result.memory_error,
        "skipped": result.skipped or None,
        "stack": result.stack or None,
        "layout": plain(prediction.layout) if prediction else None,
        "breakdown": plain(prediction.breakdown) if prediction else None,
        "assumptions": list(result.case.assumptions) if result.case else [],
    }
