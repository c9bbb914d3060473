"""Layouts that were run on this machine in rounds, beside their predictions: the figures of `validate here`."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.plan import Plan
from reports.scores import kendall_tau, kendall_tau_within, quantile
from reports.tables import Comparison
from reports.timeline import COMPUTE, Total, join, kind_of, totals_by_kind
from simulator.errors import UserError
from simulator.files import STRICT, plain, read_json, to_dataclass
from simulator.results import MeasuredTimeline, Measurement, Prediction, Quantiles, Span

# Above this spread between rounds an error says little: the wish is a median of 8 %.
NOISY = 0.1
# Above this spread the rounds of a layout are as if by different machines.
RESTLESS = 0.25


@dataclass(frozen=True)
class Trial:
    """One layout of one job: what was predicted, with its timeline, and what every round measured. `timeline` is the
    profiled step of the last round, `label` what tables call the layout where that is not its name."""

    name: str
    plan: Plan
    prediction: Prediction
    rounds: tuple[Measurement, ...]
    timeline: MeasuredTimeline | None = None
    label: str = ""

    @property
    def measured(self) -> Measurement:
        return combined(self.rounds)

    @property
    def comparison(self) -> Comparison:
        return Comparison(self.label or self.name, self.prediction, self.measured)

    @property
    def noise(self) -> float | None:
        """How far rounds lie apart: (longest - shortest) / median of their median steps; None of one round."""
        if len(self.rounds) < 2:
            return None
        steps = [one.step_seconds.median for one in self.rounds]
        return (max(steps) - min(steps)) / statistics.median(steps)

    @property
    def ops(self) -> list[Total]:
        """Seconds by kind of op, predicted and measured, where a step was profiled."""
        return totals_by_kind(join(self.prediction, self.timeline)) if self.timeline else []


def combined(rounds: Sequence[Measurement]) -> Measurement:
    """What several runs of one layout measured together: the medians of their quantiles, the highest peak of each
    rank, and losses of the first, which all have."""
    steps = [one.step_seconds for one in rounds]
    step = Quantiles(*(statistics.median(getattr(s, name) for s in steps) for name in ("median", "p10", "p90")))
    first = rounds[0]
    tokens = first.tokens_per_second * first.step_seconds.median
    peaks = tuple(max(peak) for peak in zip(*(one.peak_memory for one in rounds), strict=True))
    return dataclasses.replace(first, step_seconds=step, tokens_per_second=tokens / step.median, peak_memory=peaks)


def waiting_share(spans: Sequence[Span], ranks: int, seconds: float) -> float:
    """The part of a step in which ranks do not compute: 1 - seconds of their ops / (ranks · step). What pipelines call
    a bubble, and whatever else keeps a rank from computing. The update is counted as computing."""
    busy = sum(span.seconds for span in spans if span.stream == "compute" and kind_of(span.name) in COMPUTE)
    return 1 - busy / (ranks * seconds) if ranks * seconds else 0.0


def bubbles(trial: Trial) -> tuple[float | None, float | None]:
    """Predicted and measured share of waiting of a pipeline; None where there is no pipeline or no profile."""
    layout, timeline = trial.prediction.layout, trial.timeline
    if layout.pp == 1:
        return None, None
    predicted = waiting_share(trial.prediction.timeline.spans, layout.pp, trial.prediction.step_seconds)
    if timeline is None:
        return predicted, None
    return predicted, waiting_share(timeline.spans, layout.world_size, timeline.seconds)


def row(trial: Trial) -> dict[str, Any]:
    """A layout as `validate here --json` shows it."""
    compared, measured = trial.comparison, trial.measured
    bubble = bubbles(trial)
    return {
        "name": trial.name,
        "model": trial.plan.job.model.name,
        "ranks": trial.prediction.layout.world_size,
        "layout": plain(trial.prediction.layout),
        "predicted": {
            "step_seconds": trial.prediction.step_seconds,
            "peak_memory": trial.prediction.memory.peak,
            "bubble": bubble[0],
        },
        "measured": {
            "step_seconds": measured.step_seconds.median,
            "peak_memory": max(measured.peak_memory),
            "bubble": bubble[1],
            "p10": measured.step_seconds.p10,
            "p90": measured.step_seconds.p90,
            "rounds": [one.step_seconds.median for one in trial.rounds],
        },
        "error": compared.error,
        "memory_error": compared.memory_error,
        "noise": trial.noise,
        "ops": [
            {"kind": one.name, "count": one.count, "predicted": one.predicted, "measured": one.measured}
            for one in trial.ops
        ],
    }


@dataclass(frozen=True)
class Summary:
    """Figures of merit of some layouts; None where there is nothing to say.

    Errors are predicted / measured - 1: their size at the median and the 90th percentile, and their mean with its
    sign. kendall_tau is between predicted and measured speed. regret is how much slower the recommended layout measured
    than the fastest one, of the latter's step. noise is the median over layouts of how far their
    rounds lie apart, where there are several, and repeated_tau the mean tau between two of these rounds, which is low
    where rounds do not fix the order; kendall_tau is to their medians and may be above it.
    """

    count: int
    median_abs_error: float | None
    p90_abs_error: float | None
    bias: float | None
    kendall_tau: float | None
    regret: float | None
    memory_median_abs_error: float | None
    noise: float | None
    repeated_tau: float | None = None

    __pydantic_config__ = {**STRICT, "extra": "ignore"}  # noqa: RUF012 (pydantic's own name)


def summary(trials: Sequence[Trial], recommended: str) -> Summary:
    """The figures of merit of the layouts of one job."""
    compared = [trial.comparison for trial in trials]
    sizes = [abs(one.error) for one in compared]
    predicted, steps = _seconds(compared)
    chosen = next((s for trial, s in zip(trials, steps, strict=True) if trial.name == recommended), None)
    return Summary(
        count=len(trials),
        median_abs_error=quantile(sizes, 0.5),
        p90_abs_error=quantile(sizes, 0.9),
        bias=statistics.fmean(one.error for one in compared) if compared else None,
        kendall_tau=kendall_tau(predicted, steps),
        regret=None if chosen is None else chosen / min(steps) - 1,
        memory_median_abs_error=quantile([abs(one.memory_error) for one in compared], 0.5),
        noise=quantile([trial.noise for trial in trials if trial.noise is not None], 0.5),
        repeated_tau=repeated_tau([trials]),
    )


def repeated_tau(jobs: Sequence[Sequence[Trial]]) -> float | None:
    """Kendall's tau between two rounds, over the pairs of layouts of one job, as the mean over all pairs of rounds."""
    steps = [[[one.step_seconds.median for one in trial.rounds] for trial in trials] for trials in jobs]
    rounds = min((len(one) for job in steps for one in job), default=0)
    found = [
        kendall_tau_within([([one[i] for one in job], [one[j] for one in job]) for job in steps])
        for i, j in itertools.combinations(range(rounds), 2)
    ]
    known = [one for one in found if one is not None]
    return statistics.fmean(known) if known else None


def together(jobs: Sequence[tuple[Sequence[Trial], str]]) -> Summary:
    """Figures of merit over several jobs: errors over all layouts, tau over the pairs of layouts of one job, because
    layouts of different jobs are no choice, and the worst regret of a job."""
    regrets = [one.regret for one in (summary(*job) for job in jobs) if one.regret is not None]
    every = summary([trial for trials, _ in jobs for trial in trials], "")
    groups = [_seconds([trial.comparison for trial in trials]) for trials, _ in jobs]
    return dataclasses.replace(
        every,
        kendall_tau=kendall_tau_within(groups),
        regret=max(regrets, default=None),
        repeated_tau=repeated_tau([trials for trials, _ in jobs]),
    )


def _seconds(compared: Sequence[Comparison]) -> tuple[list[float], list[float]]:
    """Predicted and measured seconds of steps."""
    return (
        [one.prediction.step_seconds for one in compared], [one.measurement.step_seconds.median for one in compared]
    )  # fmt: skip


def sentences(s: Summary, warnings: Sequence[str] = ()) -> list[str]:
    """The figures of merit in words, and what speaks against them."""

    def shown(value: float | None, spec: str) -> str:
        return "unknown" if value is None else f"{value:{spec}}"

    agreement = "" if s.repeated_tau is None else f" (two rounds agree among themselves at {s.repeated_tau:.2f})"
    found = [
        f"{s.count} layouts: step time off by {shown(s.median_abs_error, '.1%')} at the median, "
        f"{shown(s.p90_abs_error, '.1%')} at the 90th percentile, {shown(s.bias, '+.1%')} with its sign; peak "
        f"memory by {shown(s.memory_median_abs_error, '.1%')}.",
        f"Order: Kendall's tau {shown(s.kendall_tau, '.2f')}{agreement}; the recommended layout measured "
        f"{shown(s.regret, '.1%')} slower than the fastest (regret).",
    ]
    if s.noise is None and s.count:
        found.append("One round does not show how noisy the machine is: two and more do (--rounds 2).")
    if s.noise is not None and s.noise > NOISY:
        found.append(
            f"Rounds of one layout lie {s.noise:.0%} apart at the median (more than {NOISY:.0%}): the machine is "
            "too noisy to trust these errors; run it again when nothing else runs."
        )
    return [*found, *warnings]


def restless(trials: Sequence[Trial]) -> list[str]:
    """A sentence naming the layouts whose rounds lie too far apart to say anything of them, the widest first."""
    found = sorted((one for one in trials if (one.noise or 0.0) > RESTLESS), key=lambda one: -(one.noise or 0.0))
    if not found:
        return []
    named = ", ".join(f"{one.plan.job.model.name} {one.name} ({one.noise:.0%})" for one in found)
    return [f"Rounds of {named} lie more than {RESTLESS:.0%} apart: their errors say little."]


def read_sentences(path: Path) -> list[str]:
    """The same of a here.json. Raises UserError if the file is something else."""
    data = read_json(path, "validation")
    warnings = data.get("warnings", [])
    if not isinstance(data.get("summary"), dict) or not isinstance(warnings, list):
        raise UserError(f"validation '{path}' has no 'summary'; write it with `layoutwise validate here -o DIR`")
    found = to_dataclass(Summary, data["summary"], f"validation '{path}', summary")
    return sentences(found, [str(one) for one in warnings])


def ops_of_all(trials: Sequence[Trial]) -> list[Total]:
    """Seconds by kind of op over all layouts: where predictions err in a pattern."""
    found: dict[str, Total] = {}
    for one in (one for trial in trials for one in trial.ops):
        before = found.get(one.name, Total(one.name, 0, 0.0, 0.0))
        found[one.name] = Total(
            one.name, before.count + one.count, before.predicted + one.predicted, before.measured + one.measured
        )
    return list(found.values())
