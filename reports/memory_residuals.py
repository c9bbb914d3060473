"""How far published peaks of memory lie from predicted ones: what the simulator's probabilities rest on.

python -m reports.memory_residuals      # in half a minute; writes simulator/data/memory_residuals.toml anew
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from reports.published import published_rows
from reports.validation import Result, validate
from simulator.files import write_text
from simulator.risk import LEAST_COUNT, RESIDUALS, MemoryResiduals, Residuals


def residuals(results: Sequence[Result]) -> MemoryResiduals:
    """Mean and standard deviation of ln(measured / predicted peak), pooled and by stack.

    Runs of one job count one by one, although their errors are alike: the spread within a stack is a little too small.
    """
    by_stack: dict[str, list[float]] = {}
    for result in results:
        error = result.memory_error
        if result.counts and error is not None:
            by_stack.setdefault(result.stack, []).append(-math.log1p(error))
    every = [one for found in by_stack.values() for one in found]
    families = {name: found for name, found in sorted(by_stack.items()) if len(found) >= LEAST_COUNT}
    return MemoryResiduals(
        _residuals(every, "all stacks"), {name: _residuals(found, f"stack {name}") for name, found in families.items()}
    )


def _residuals(found: Sequence[float], whose: str) -> Residuals:
    source = f"published runs of {whose} with a measured peak (reports/data/published), as predicted here"
    return Residuals(len(found), statistics.stdev(found), statistics.fmean(found), source)


def as_toml(found: MemoryResiduals) -> str:
    """The file that simulator/risk.py reads."""
    lines = ["# Written by `python -m reports.memory_residuals`: ln(measured peak / predicted peak) of published runs."]
    tables = {"pooled": found.pooled, **{f"families.{name}": one for name, one in found.families.items()}}
    for name, one in tables.items():
        lines += ["", f"[{name}]", f"count = {one.count}"]
        lines += [f"log_sigma = {one.log_sigma:.4f}", f"log_bias = {one.log_bias:.4f}", f'source = "{one.source}"']
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(f"written to {write_text(RESIDUALS, as_toml(residuals(validate(published_rows()).results)))}")
