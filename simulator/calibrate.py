"""What measured steps say about the constants of a profile: which of them they determine, and how those change.

The unknowns are logarithms of factors on a profile's constants, the observations are logarithms of measured step times
(and, where a step was profiled, of its forwards, backwards and update). A constant is fitted only if the measurements
leave less than half of the doubt that there was about it before; every other constant stays bit by bit as it was.

Rule: the factors x minimise sum ((J x - r) / sigma)^2 + sum (x / prior)^2, where r is log(measured / predicted) and J
the change of log(predicted) with the logarithm of each constant, by differences of `simulate` (Tikhonov
regularisation, which is the most probable x under normal errors; Tarantola, Inverse Problem Theory, 2005, section 3.2).
Ignored: correlated errors of the measurements, and shapes of the formulas (sides of products, half lengths, ramps),
which stay.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from simulator.cluster import CollectiveFit
from simulator.errors import UserError
from simulator.job import Job
from simulator.layout import Layout
from simulator.profile import Calibration, Changed, Profile, cluster_of
from simulator.results import MeasuredTimeline, Measurement, Timeline
from simulator.simulate import simulate

# How far a constant within a training step may lie from the same constant in a microbenchmark (standard deviation of
# its logarithm): caches are as the step leaves them, and neighbours compete.
PRIOR_SPREAD = 0.25
# What the formulas err although every constant is right.
MODEL_SPREAD = 0.03
# A constant is determined if this share of the doubt about it, or less, is left.
DOUBT_LEFT = 0.5
# A change of less than so many standard deviations is none: the measurements agree with the profile.
SIGNIFICANT = 2.0
# A factor beyond this means another machine, not another constant.
MOST_CHANGE = 3.0
# Below this a step does not depend on a constant: d log(step) / d log(constant).
UNSEEN = 0.003
_STEP = 0.03

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Run:
    """A measured run. Seconds of a step with the standard deviation of their logarithm; `ops` are shares of the step
    that one rank spends in forwards ("F"), backwards ("B", "I", "W") and the update ("OPTIMIZER"), mean over ranks."""

    name: str
    job: Job
    layout: Layout
    seconds: float
    spread: float
    ops: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Checked:
    """A run and how far its step is predicted off, before and by constants that were fitted without it."""

    name: str
    layout: Layout
    measured: float
    before: float
    after: float


@dataclass(frozen=True)
class Outcome:
    """A profile's calibration: the new profile, what changed, why other constants stayed, and the runs left out in
    turn. `worse` says that the median error of these rose; the profile is then the one there was."""

    profile: Profile
    changed: tuple[Changed, ...]
    refused: dict[str, str]
    agreed: tuple[str, ...]
    checked: tuple[Checked, ...]
    before: float
    after: float
    worse: bool


def run_of(name: str, job: Job, measured: Measurement, timeline: MeasuredTimeline | None = None) -> Run:
    """A run as it was measured; a profiled step of it gives shares of the step, which the profiler slows alike."""
    low, high = measured.step_seconds.p10, measured.step_seconds.p90
    # The distance of the 10th from the 90th percentile of a normal distribution is 2.563 standard deviations.
    spread = math.log(high / low) / 2.563 if 0 < low < high else 0.0
    seconds = measured.step_seconds.median
    if not 0 < seconds < math.inf:
        raise UserError(f"measurement '{name}': step_seconds.median = {seconds:g} must be above zero")
    ops = {} if timeline is None or timeline.seconds <= 0 else _shares(Timeline(timeline.spans), timeline.seconds)
    return Run(name, job, measured.layout, seconds, spread, ops)


def constants(profile: Profile) -> dict[str, float]:
    """The constants of a profile that can be fitted, by name."""
    found = {f"matmul.{precision}.rate": fit.rate for precision, fit in profile.matmul.items()}
    found["memory_bandwidth"] = profile.memory_bandwidth
    if profile.attention:
        kernel = profile.attention[0]
        found |= {"attention.forward": kernel.forward.causal_rate, "attention.backward": kernel.backward.causal_rate}
    found |= {f"host.{name}": value for name, value in dataclasses.asdict(profile.host).items()}
    for kind, fits in profile.collectives.items():
        for fit in fits:
            found[f"collectives.{kind}.{_group(fit)}.latency"] = fit.latency
            found[f"collectives.{kind}.{_group(fit)}.efficiency"] = fit.efficiency
    found |= {f"concurrency.{k}": v for k, v in enumerate(profile.concurrency, start=1) if k > 1}
    # A constant of zero has no logarithm: the samples found nothing there to change.
    return {name: value for name, value in found.items() if value > 0}


def _group(fit: CollectiveFit) -> str:
    """The ranks of a collective's constants: "2", or "2-of-4" where four share the processors."""
    return f"{fit.ranks}" if fit.active in (0, fit.ranks) else f"{fit.ranks}-of-{fit.active}"


def scaled(profile: Profile, factors: dict[str, float]) -> Profile:
    """The profile with some constants times a factor; all others are the same objects."""
    for name, factor in factors.items():
        profile = _scaled(profile, name.split("."), factor)
    return profile


def _scaled(profile: Profile, path: list[str], factor: float) -> Profile:
    if path[0] == "memory_bandwidth":
        return dataclasses.replace(profile, memory_bandwidth=profile.memory_bandwidth * factor)
    if path[0] == "matmul":
        fit = profile.matmul[path[1]]
        return dataclasses.replace(
            profile, matmul=profile.matmul | {path[1]: dataclasses.replace(fit, rate=fit.rate * factor)}
        )
    if path[0] == "host":
        value = getattr(profile.host, path[1]) * factor
        return dataclasses.replace(profile, host=dataclasses.replace(profile.host, **{path[1]: value}))
    if path[0] == "attention":
        kernels = []
        for kernel in profile.attention:
            fit_ = getattr(kernel, path[1])
            fit_ = dataclasses.replace(fit_, rate=fit_.rate * factor, causal_rate=fit_.causal_rate * factor)
            kernels.append(dataclasses.replace(kernel, **{path[1]: fit_}))
        return dataclasses.replace(profile, attention=tuple(kernels))
    if path[0] == "collectives":
        _, kind, group, what = path
        fits = tuple(
            dataclasses.replace(fit, **{what: getattr(fit, what) * factor}) if _group(fit) == group else fit
            for fit in profile.collectives[kind]
        )
        return dataclasses.replace(profile, collectives=profile.collectives | {kind: fits})
    index = int(path[1]) - 1
    speeds = list(profile.concurrency)
    speeds[index] = min(1.0, speeds[index] * factor)
    return dataclasses.replace(profile, concurrency=tuple(speeds))


class _Problem:
    """Observations, their doubt, and the Jacobian at the profile there is."""

    def __init__(self, profile: Profile, runs: Sequence[Run], report: Progress) -> None:
        self.profile, self.runs = profile, runs
        self.names = list(constants(profile))
        observed: list[float] = []
        sigmas: list[float] = []
        self.owner: list[int] = []
        self.base = [self._predicted(profile, run) for run in runs]
        # Fits so far: by the names of their constants the solution, and what it predicts.
        self.tried: dict[tuple[str, ...], tuple[np.ndarray, np.ndarray]] = {}
        for index, run in enumerate(runs):
            sigma = math.hypot(run.spread, MODEL_SPREAD)
            for measured in _observations(run, self.base[index]):
                observed.append(math.log(measured))
                sigmas.append(sigma)
                self.owner.append(index)
        self.observed, self.sigma = np.array(observed), np.array(sigmas)
        self.at_profile = self.predict({})
        columns = []
        for place, name in enumerate(self.names):
            report(f"sensitivity to {name}", 0.7 * place / len(self.names))
            columns.append((self.predict({name: math.exp(-_STEP)}) - self.at_profile) / -_STEP)
        self.jacobian = np.array(columns).T

    def _predicted(self, profile: Profile, run: Run) -> dict[str, float]:
        job = dataclasses.replace(run.job, cluster=cluster_of(profile))
        found = simulate(job, run.layout, trace=bool(run.ops))
        shares = _shares(found.timeline, found.step_seconds) if run.ops else {}
        return {"": found.step_seconds} | shares

    def predict(self, factors: dict[str, float]) -> np.ndarray:
        """Logarithms of what each observation is predicted to be."""
        profile = scaled(self.profile, factors)
        values: list[float] = []
        for run, base in zip(self.runs, self.base, strict=True):
            found = self._predicted(profile, run)
            values += [math.log(found.get(key) or base[key]) for key in _keys(run, base)]
        return np.array(values)

    def rows(self, without: frozenset[int] = frozenset()) -> np.ndarray:
        return np.array([owner not in without for owner in self.owner])

    def doubt(self, rows: np.ndarray, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Covariance of the active factors after the measurements, in units of the prior's variance, and J / sigma."""
        weighted = self.jacobian[np.ix_(rows, active)] / self.sigma[rows, None] * PRIOR_SPREAD
        return np.linalg.inv(weighted.T @ weighted + np.eye(len(active))), weighted

    def determined(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, str]]:
        """Of the constants that steps depend on: their numbers, their most probable factors' logarithms and standard
        deviations, all fitted together, so that each carries the doubt about the others; and for every constant that
        stays in doubt the reason."""
        most = np.abs(self.jacobian[rows]).max(axis=0, initial=0.0)
        refused = {name: _unseen(name, m) for name, m in zip(self.names, most.tolist(), strict=True) if m < UNSEEN}
        seen = np.flatnonzero(most >= UNSEEN)
        covariance, weighted = self.doubt(rows, seen)
        x = PRIOR_SPREAD * covariance @ weighted.T @ self.residual(self.at_profile)[rows]
        doubts = np.sqrt(np.diag(covariance))
        for place in np.flatnonzero(doubts > DOUBT_LEFT):
            refused[self.names[seen[place]]] = self._unclear(rows, seen, int(place), covariance)
        clear = doubts <= DOUBT_LEFT
        return seen[clear], x[clear], PRIOR_SPREAD * doubts[clear], refused

    def _unclear(self, rows: np.ndarray, seen: np.ndarray, place: int, covariance: np.ndarray) -> str:
        """Why a constant that steps depend on is not determined."""
        column, sigma = self.jacobian[rows, seen[place]], self.sigma[rows]
        alone = 1 / math.sqrt(1 + float(((column / sigma) ** 2).sum()) * PRIOR_SPREAD**2)
        if alone > DOUBT_LEFT or len(seen) == 1:
            moves = float(np.abs(column).max()) / 10
            known = f"and they are known to {sigma.min():.1%}"
            return f"a change of 10 % moves no measured step by more than {moves:.2%}, {known}"
        scale = np.sqrt(np.diag(covariance))
        related = np.abs(covariance[place] / scale / scale[place])
        related[place] = 0.0
        other = self.names[seen[int(related.argmax())]]
        return f"the measured steps cannot tell it from {other}; measure layouts in which the two differ"

    def fit(self, rows: np.ndarray) -> Fit:
        """The constants that these rows determine and that they say are others."""
        clear, x, spread, refused = self.determined(rows)
        moved = np.abs(x) >= SIGNIFICANT * spread
        agreed = tuple(self.names[index] for index in clear[~moved])
        active = clear[moved]
        return Fit([self.names[i] for i in active], self._solve(rows, active), spread[moved], refused, agreed)

    def _solve(self, rows: np.ndarray, active: np.ndarray) -> np.ndarray:
        """Logarithms of factors: Gauss-Newton with the Jacobian of the profile; rounds simulate every run with the
        factors found so far, but for factors that an earlier fit of the same constants has tried."""
        names = tuple(self.names[index] for index in active)
        if not names:
            return np.zeros(0)
        x, predicted = self.tried.get(names, (np.zeros(len(names)), self.at_profile))
        covariance, weighted = self.doubt(rows, active)
        for _ in range(1 if names in self.tried else 8):
            gradient = weighted.T @ self.residual(predicted)[rows] - x / PRIOR_SPREAD
            # Far from the profile its Jacobian says only in which direction to go.
            move = np.clip(PRIOR_SPREAD * covariance @ gradient, -0.3, 0.3)
            x = x + move
            if names in self.tried or np.abs(move).max() < 1e-3:
                break
            predicted = self.predict({name: math.exp(value) for name, value in zip(names, x, strict=True)})
        self.tried.setdefault(names, (x, predicted))
        return x

    def residual(self, predicted: np.ndarray) -> np.ndarray:
        return (self.observed - predicted) / self.sigma


@dataclass(frozen=True)
class Fit:
    """Constants that measurements change: logarithms of their factors, with standard deviations; others with the reason
    why they are in doubt, or in agreement with the profile."""

    names: list[str]
    logarithms: np.ndarray
    spreads: np.ndarray
    refused: dict[str, str]
    agreed: tuple[str, ...]

    def factors(self) -> dict[str, float]:
        """Raises UserError for a factor that no calibration explains."""
        for name, value in zip(self.names, self.logarithms, strict=True):
            if abs(value) > math.log(MOST_CHANGE):
                raise UserError(
                    f"{name} would have to change by a factor of {math.exp(value):.2f}, which is no calibration: "
                    "profile and measurements are of different machines, or the machine was busy; measure again"
                )
        return {name: math.exp(value) for name, value in zip(self.names, self.logarithms, strict=True)}


def recalibrate(
    profile: Profile, runs: Sequence[Run], created: str, report: Progress = lambda what, done: None
) -> Outcome:
    """Fit the constants of a profile that measured runs determine, and check them on runs left out in turn.

    Runs of the same layout of the same job are left out together.

    Args:
        created: the date, for the new profile.

    Raises:
        UserError: runs of another machine than the profile's, or too few layouts to leave one out.
    """
    for run in runs:
        if run.job.cluster.name != "this-machine" or run.job.cluster.gpu.name != profile.name:
            raise UserError(
                f"measurement '{run.name}' is of a plan for {run.job.cluster.name} ({run.job.cluster.gpu.name}), but "
                f"the profile is of {profile.name}; plan with cluster = 'this-machine' and this profile"
            )
    groups = _groups(runs)
    if len(groups) < 2:
        raise UserError(
            f"{len(runs)} measurement{'s' if len(runs) != 1 else ''} of one layout: none is left to check the fit "
            "with; give those of at least two layouts"
        )
    problem = _Problem(profile, runs, report)
    found = problem.fit(problem.rows())
    factors = found.factors()
    checked: list[Checked] = []
    for place, group in enumerate(groups):
        report("leaving out each layout in turn", 0.7 + 0.25 * place / len(groups))
        fitted = scaled(profile, problem.fit(problem.rows(frozenset(group))).factors())
        for index in group:
            run = runs[index]
            after = float(problem._predicted(fitted, run)[""])
            before = float(problem.base[index][""])
            checked.append(
                Checked(run.name, run.layout, run.seconds, before / run.seconds - 1, after / run.seconds - 1)
            )
    before = float(np.median([abs(one.before) for one in checked]))
    after = float(np.median([abs(one.after) for one in checked]))
    worse = after > before
    fitted = scaled(profile, factors)
    known, new, spreads = constants(profile), constants(fitted), dict(zip(found.names, found.spreads, strict=True))
    changed = tuple(Changed(name, known[name], new[name], float(spreads[name])) for name in factors)
    if factors and not worse:
        note = Calibration(created, len(runs), changed, before, after)
        fitted = dataclasses.replace(fitted, calibrations=(*profile.calibrations, note))
    else:
        fitted = profile
    return Outcome(fitted, changed, found.refused, found.agreed, tuple(checked), before, after, worse)


def _groups(runs: Sequence[Run]) -> list[list[int]]:
    """Numbers of runs, those of one layout of one job together."""
    found: list[tuple[Job, Layout, list[int]]] = []
    for index, run in enumerate(runs):
        for job, layout, members in found:
            if layout == run.layout and (job.model, job.training, job.nodes) == (
                run.job.model, run.job.training, run.job.nodes,
            ):  # fmt: skip
                members.append(index)
                break
        else:
            found.append((run.job, run.layout, [index]))
    return [members for _, _, members in found]


def _keys(run: Run, predicted: dict[str, float]) -> list[str]:
    """What of a run is compared: the step, and the ops that both sides have."""
    return ["", *(key for key in sorted(run.ops) if predicted.get(key, 0.0) > 0 and run.ops[key] > 0)]


def _observations(run: Run, predicted: dict[str, float]) -> list[float]:
    return [run.ops[key] if key else run.seconds for key in _keys(run, predicted)]


def _shares(timeline: Timeline, seconds: float) -> dict[str, float]:
    """Mean over ranks of the part of a step that computes forwards, backwards and the update."""
    spans = [span for span in timeline.spans if span.stream == "compute"]
    ranks = len({span.rank for span in spans})
    found: dict[str, float] = {}
    for span in spans:
        name = span.name.removeprefix("PP:")
        kind = name if name == "OPTIMIZER" else "".join(c for c in name if c.isalpha())
        if kind in ("F", "B", "I", "W", "OPTIMIZER"):
            found[kind] = found.get(kind, 0.0) + span.seconds / seconds / ranks
    return found


def _unseen(name: str, most: float) -> str:
    """Why no measured step depends on a constant, in words."""
    path = name.split(".")
    if path[0] == "matmul":
        return f"no measured run multiplies in {path[1]}"
    if name == "host.dtensor":
        return "no measured layout has tensor parallelism"
    if path[0] == "collectives":
        spelt = path[1].replace("_", "-")
        article = "an" if spelt[0] in "aeiou" else "a"
        kind = "a message between pipeline stages" if path[1] == "send_recv" else f"{article} {spelt}"
        if most == 0:
            return f"no measured layout waits for {kind} among {path[2].replace('-', ' ')} ranks"
    if path[0] == "concurrency" and most == 0:
        return f"in no measured layout {path[1]} ranks compute at once"
    if path[0] == "attention" and most == 0:
        return "no measured run has attention"
    return f"a change of 10 % moves no measured step by more than {most / 10:.2%}"
