"""Does a layout fit, and how sure is that: bytes that it needs against bytes that there are.

A predicted peak errs. How far, published runs say (data/memory_residuals.toml, written by
`python -m reports.memory_residuals`): ln(measured / predicted) has a mean and a standard deviation for every stack with
enough of them, and pooled over all.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from simulator.files import STRICT, read_toml, to_dataclass
from simulator.layout import Layout
from simulator.memory import capacity, fullest
from simulator.results import MemoryBreakdown

if TYPE_CHECKING:
    from simulator.job import Job

RESIDUALS = Path(__file__).parent / "data" / "memory_residuals.toml"
# Runs that a stack needs to be judged by its own residuals: the standard deviation of ten errs by a quarter.
LEAST_COUNT = 10
# From here on a plan says what would make it safer.
HIGH_RISK = 0.1


@dataclass(frozen=True)
class Residuals:
    """Mean and standard deviation of ln(measured peak / predicted peak) over `count` runs."""

    count: int
    log_sigma: float
    log_bias: float
    source: str

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class MemoryResiduals:
    """Of all runs, and of the stacks with at least LEAST_COUNT of them, by name."""

    pooled: Residuals
    families: dict[str, Residuals] = field(default_factory=dict)

    __pydantic_config__ = STRICT

    def of(self, stack: str) -> Residuals:
        """Those of a stack, pooled ones where it has too few of its own."""
        own = self.families.get(stack)
        return own if own is not None and own.count >= LEAST_COUNT else self.pooled


@functools.cache
def memory_residuals() -> MemoryResiduals:
    """The residuals that come with the simulator."""
    return to_dataclass(MemoryResiduals, read_toml(RESIDUALS, "memory residuals"), f"memory residuals '{RESIDUALS}'")


def needed(job: Job, layout: Layout, ranks: tuple[MemoryBreakdown, ...]) -> float:
    """Bytes to hold against `capacity`: the peak of the fullest rank.

    Ranks that share a machine's memory run out together: theirs is the mean peak of the ranks on the fullest node,
    which is that node's sum over that node's memory in the unit of `capacity`. Ignored: they need not peak at the same
    moment, so this is an upper bound.

    Args:
        ranks: by pipeline rank.
    """
    if job.cluster.gpu.kind == "gpu":
        return fullest(ranks).peak
    per_node = -(-layout.world_size // job.nodes)
    stages = [layout.coordinates(rank)["pp"] for rank in range(layout.world_size)]
    nodes = [stages[first : first + per_node] for first in range(0, len(stages), per_node)]
    return max(sum(ranks[stage].peak for stage in node) for node in nodes) / per_node


def out_of_memory_probability(need: float, room: float, stack: str) -> float:
    """The probability that a run needs more than `room` bytes where `need` is predicted, from 0 to 1.

    Rule: ln(true / predicted) ~ Normal(log_bias, log_sigma), so P = 1 - Phi((ln(room / need) - log_bias) / log_sigma).
    Ignored: the tails of the distribution, which slips and other settings make heavier than a normal one's; and other
    processes on the device.

    Args:
        stack: the name of the software stack, whose own residuals count where it has enough.

    >>> out_of_memory_probability(need=1e9, room=80e9, stack="megatron-core")
    0.0
    """
    if need <= 0 or room <= 0:
        return float(need > 0)
    known = memory_residuals().of(stack)
    margin = math.log(room / need) - known.log_bias
    if known.log_sigma == 0:
        return float(margin < 0)
    found = 0.5 * math.erfc(margin / known.log_sigma / math.sqrt(2))
    # What is less than a millionth is a number of this model only.
    return round(found, 6)


def shortfall(job: Job, layout: Layout, ranks: tuple[MemoryBreakdown, ...]) -> str:
    """Why a layout does not fit, with its largest items; empty if it fits."""
    need, limit = needed(job, layout, ranks), capacity(job, layout)
    over = need - limit
    if over <= 0:
        return ""
    memory = fullest(ranks)
    items = {f.name: getattr(memory, f.name) for f in fields(memory) if f.name != "peak"}
    largest = sorted(items, key=lambda name: -items[name])[:2]
    shown = ", ".join(f"{name} {items[name] / 2**30:.1f}" for name in largest)
    return f"needs {need / 2**30:.1f} GiB of {limit / 2**30:.1f}: {over / 2**30:.1f} GiB too much (mostly {shown} GiB)"
