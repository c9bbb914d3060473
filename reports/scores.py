"""Figures of merit: how far predictions are off, whether they order layouts as measurements do, whether they say what
fits. Numbers in, numbers out; None where there is nothing to measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Predictions this near to each other are one: sums in another order differ in the last digits.
TIE = 1e-9


@dataclass(frozen=True)
class Errors:
    """Spread of relative errors e = predicted / measured - 1.

    median_abs, mean_abs and p90_abs are of |e|; bias is the mean of e, which one wild row can move, median that of e.
    """

    count: int
    median_abs: float | None = None
    mean_abs: float | None = None
    p90_abs: float | None = None
    bias: float | None = None
    median: float | None = None


def errors(values: Sequence[float]) -> Errors:
    """The spread of some errors.

    >>> errors([-0.1, 0.3])
    Errors(count=2, median_abs=0.2, mean_abs=0.2, p90_abs=0.28, bias=0.1, median=0.1)
    """
    if not values:
        return Errors(0)
    signed = np.asarray(values, dtype=float)
    size = np.abs(signed)
    found = (np.median(size), size.mean(), np.quantile(size, 0.9), signed.mean(), np.median(signed))
    return Errors(len(values), *(round(float(value), 12) for value in found))


def quantile(values: Sequence[float], share: float) -> float | None:
    """The value that `share` of the values stay below, between neighbours in proportion; None of nothing."""
    return float(np.quantile(np.asarray(values, dtype=float), share)) if values else None


def regret(predicted: Sequence[float], measured: Sequence[float]) -> float:
    """Throughput lost by running the layout that is predicted fastest instead of the one that is.

    Rule: 1 - measured[pick] / max(measured), both in tokens per second. Of layouts that are predicted equally fast any
    may be picked: the mean of their regrets.

    >>> regret([9, 7, 5], [80, 100, 50])
    0.2
    """
    fastest, best = max(predicted), max(measured)
    picked = [m for p, m in zip(predicted, measured, strict=True) if p >= fastest * (1 - TIE)]
    return round(1 - sum(picked) / len(picked) / best, 12)


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Kendall's rank correlation with ties, tau-b: 1 for the same order, -1 for the opposite one.

    Rule: (C - D) / sqrt((n - t1) · (n - t2)) over n pairs, C of them in the same order in both, D in the opposite one,
    t1 and t2 tied in the first and in the second (Kendall, Biometrika 33, 1945; scipy.stats.kendalltau's default).
    None where one of them is all ties: then there is no order to compare.

    >>> kendall_tau([1, 2, 3, 4], [1, 2, 4, 3])
    0.666666666667
    """
    return kendall_tau_within([(first, second)])


def kendall_tau_within(groups: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float | None:
    """The same over the pairs within each group; pairs across groups are not compared.

    >>> kendall_tau_within([([1, 2, 3], [1, 2, 3]), ([1, 2], [2, 1])])
    0.5
    """
    signs = [np.concatenate([_signs(group[side]) for group in groups]) for side in (0, 1)] if groups else [np.zeros(0)]
    untied = [np.count_nonzero(sign) for sign in signs]
    if not all(untied):
        return None
    return round(float((signs[0] * signs[1]).sum() / np.sqrt(float(untied[0]) * float(untied[1]))), 12)


def _signs(values: Sequence[float]) -> np.ndarray:
    """Of each pair of values, which is larger: -1, 0 or 1."""
    array = np.asarray(values, dtype=float)
    i, j = np.triu_indices(len(array), 1)
    difference = array[i] - array[j]
    difference[np.abs(difference) <= TIE * np.maximum(np.abs(array[i]), np.abs(array[j]))] = 0.0
    return np.sign(difference)


def precision_recall(said: Sequence[bool], true: Sequence[bool]) -> tuple[float | None, float | None]:
    """(part of what was said that is true, part of what is true that was said).

    >>> precision_recall([True, True, False, False], [True, False, True, True])
    (0.5, 0.3333333333333333)
    """
    right = sum(s and t for s, t in zip(said, true, strict=True))
    return right / sum(said) if any(said) else None, right / sum(true) if any(true) else None
