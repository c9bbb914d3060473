"""How far peak memory is off, as a distribution: what a probability of running out of memory rests on.

    measured = predicted · exp(e),  e ~ Normal(log_bias, log_sigma),  P(out of memory) = P(predicted · exp(e) > memory)

Published peaks say what e was; runs that fitted and runs that did not say on which side of the device's memory it was.
Both are fitted at once by maximum likelihood, for all runs together and for each stack that has enough of them.

`python -m reports.memory_residuals` predicts all published runs, writes simulator/data/memory_residuals.toml and prints
how well probabilities from one half of the jobs hold for the other.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from reports.published import published_rows
from reports.validation import Result, validate
from simulator.files import write_text
from simulator.memory import capacity

FILE = Path(__file__).parents[1] / "simulator" / "data" / "memory_residuals.toml"
# Runs that a stack must have for numbers of its own, and as how many peaks those of all stacks count beside them.
LEAST_RUNS = 10
PRIOR_PEAKS = 10
# The share of rows whose verdict is not that of the layout they state: slips, other settings, failures of other kinds.
SLIPS = 0.02
BINS = 5


@dataclass(frozen=True)
class Run:
    """A published run: log(measured / predicted) peak if its peak is known, log(predicted / memory of the device), and
    whether it ran."""

    job: str
    stack: str
    residual: float | None
    load: float
    ran: bool


@dataclass(frozen=True)
class Spread:
    """log(measured / predicted) peak memory: a normal distribution, from `count` runs."""

    count: int
    bias: float
    sigma: float

    def out_of_memory(self, load: float) -> float:
        """The probability that a layout runs out of memory whose predicted peak is exp(load) of what there is."""
        return 0.5 * math.erfc(-(load + self.bias) / self.sigma / math.sqrt(2))


@dataclass(frozen=True)
class Calibration:
    """How probabilities agree with what happened: the Brier score, that of always saying the mean, and for bins of
    equal width (runs, mean probability, share that ran out of memory)."""

    count: int
    brier: float
    brier_of_mean: float
    bins: tuple[tuple[int, float, float], ...]


def runs(results: Iterable[Result]) -> list[Run]:
    """The runs of an exam, each of those that are the same to the simulator and were measured the same once."""
    found: dict[tuple[object, ...], Run] = {}
    for result in results:
        if not result.counts or result.prediction is None or result.case is None:
            continue
        prediction, error = result.prediction, result.memory_error
        load = math.log(prediction.memory.peak / capacity(result.case.job, prediction.layout))
        residual = None if error is None else -math.log1p(error)
        run = Run(result.row.text("job"), result.stack, residual, load, result.row.ran)
        found[run.stack, repr(result.case.job.model), prediction.layout, load, residual, run.ran] = run
    return list(found.values())


def fit(found: Sequence[Run], prior: Spread | None = None) -> Spread:
    """The bias and sigma that make the runs likeliest.

    Rule: a peak counts with the density of its residual, a run without one with the probability of its verdict, which
    for SLIPS of the rows is a coin's. `prior` counts as PRIOR_PEAKS peaks that are spread as it says.
    Method: a grid, made finer around its best point until it changes nothing.
    """
    residuals = np.array([run.residual for run in found if run.residual is not None])
    verdicts = [run for run in found if run.residual is None]
    loads = np.array([run.load for run in verdicts])
    ran = np.array([run.ran for run in verdicts], dtype=bool)

    def log_likelihood(bias: float, sigma: float) -> float:
        total = -float(np.sum(((residuals - bias) / sigma) ** 2)) / 2 - len(residuals) * math.log(sigma)
        failed = _normal((loads + bias) / sigma)
        total += float(np.sum(np.log(SLIPS / 2 + (1 - SLIPS) * np.where(ran, 1 - failed, failed))))
        if prior:
            spread = (prior.sigma**2 + (prior.bias - bias) ** 2) / sigma**2
            total -= PRIOR_PEAKS * (spread / 2 + math.log(sigma))
        return total

    bias, log_sigma, step = 0.0, math.log(0.1), (0.1, 0.5)
    for _ in range(20):
        grid = [(bias + i * step[0], log_sigma + j * step[1]) for i in range(-4, 5) for j in range(-4, 5)]
        bias, log_sigma = max(grid, key=lambda point: log_likelihood(point[0], math.exp(point[1])))
        step = (step[0] / 2, step[1] / 2)
    return Spread(len(found), bias, math.exp(log_sigma))


def families(found: Sequence[Run], pooled: Spread) -> dict[str, Spread]:
    """The spread of each stack with enough runs."""
    by_stack: dict[str, list[Run]] = {}
    for run in found:
        by_stack.setdefault(run.stack, []).append(run)
    return {name: fit(group, pooled) for name, group in sorted(by_stack.items()) if len(group) >= LEAST_RUNS}


def held_out(found: Sequence[Run]) -> Calibration:
    """Each half of the jobs judged by what is fitted to the other. Halves go by a hash of the job's name."""
    said, true = [], []
    for half in (0, 1):
        known = [run for run in found if _half(run) != half]
        pooled = fit(known)
        own = families(known, pooled)
        for run in found:
            if _half(run) == half:
                said.append(own.get(run.stack, pooled).out_of_memory(run.load))
                true.append(not run.ran)
    return calibration(said, true)


def calibration(said: Sequence[float], true: Sequence[bool]) -> Calibration:
    """How probabilities agree with what happened.

    >>> calibration([0.1, 0.9], [False, True]).brier
    0.01
    """
    p, y = np.asarray(said, dtype=float), np.asarray(true, dtype=float)
    place = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = tuple(
        (int((place == i).sum()), float(p[place == i].mean()), float(y[place == i].mean()))
        for i in range(BINS)
        if (place == i).any()
    )
    return Calibration(len(p), round(float(np.mean((p - y) ** 2)), 12), float(y.mean() * (1 - y.mean())), bins)


def residuals_toml(pooled: Spread, by_stack: dict[str, Spread]) -> str:
    """simulator/data/memory_residuals.toml."""
    rule = "bias and sigma by maximum likelihood over peaks and verdicts of published runs"
    lines = [
        "# log(measured / predicted) peak memory: a normal distribution, for all published runs and by stack.",
        "# Written by `python -m reports.memory_residuals`; count is of runs that differ, log_bias is the mean.",
        "",
        *_table("pooled", pooled, f"{rule} (reports/data/published)"),
    ]
    for name, spread in by_stack.items():
        source = f"{rule} of this stack, those of all stacks counting as {PRIOR_PEAKS} peaks"
        lines += ["", *_table(f"families.{name}", spread, source)]
    return "\n".join(lines) + "\n"


def calibration_lines(found: Calibration) -> list[str]:
    """For a terminal: the Brier score and the reliability of each bin."""
    lines = [
        f"held out: {found.count} runs, Brier score {found.brier:.4f} (always the mean: {found.brier_of_mean:.4f})"
    ]
    lines += [f"  {count:4d} runs  said {said:.3f}  happened {true:.3f}" for count, said, true in found.bins]
    return lines


def _table(name: str, spread: Spread, source: str) -> list[str]:
    return [
        f"[{name}]",
        f"count = {spread.count}",
        f"log_sigma = {spread.sigma:.4f}",
        f"log_bias = {spread.bias:.4f}",
        f'source = "{source}"',
    ]


def _normal(values: np.ndarray) -> np.ndarray:
    """The normal distribution function."""
    return np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in values])


def _half(run: Run) -> int:
    return hashlib.sha256(run.job.encode()).digest()[0] % 2


def main() -> None:
    """Write the file, print the calibration."""
    found = runs(validate(published_rows()).results)
    pooled = fit(found)
    write_text(FILE, residuals_toml(pooled, families(found, pooled)))
    sys.stdout.write("\n".join([f"wrote {FILE}", *calibration_lines(held_out(found))]) + "\n")


if __name__ == "__main__":
    main()
