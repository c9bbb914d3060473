"""Measurements out of the logs of other software: lines of torchtitan and of Megatron-LM.

    torchtitan    step: 10  loss: 7.1  grad_norm: 1.2  memory: 60.15GiB(63.31%)  tps: 5,762  tflops: 297.1  mfu: 30.04%
                  (torchtitan/components/metrics.py; tps are tokens per second and device, memory is reserved)
    Megatron-LM   iteration  10/ 100 | ... | elapsed time per iteration (ms): 612.3 | ... | lm loss: 7.1E+00 | ...
                  (megatron/training/training.py; its "max allocated" is in MiB, megatron/training/utils.py)

Colours, times and ranks in front of a line are skipped; older lines without some of the fields are read too. A step
that several ranks log counts once, with their median.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from planner.plan import Plan
from simulator.errors import UserError
from simulator.results import Measurement, Quantiles

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_NUMBER = r"([-+]?[\d,]*\.?\d+(?:[eE][-+]?\d+)?|nan|inf)"
_TITAN = re.compile(r"\bstep:\s*([\d,]+)\s+(?=.*\btps:)")
_MEGATRON = re.compile(rf"\biteration\s+(\d+)\s*/\s*\d+\s*\|.*elapsed time per iteration \(ms\):\s*{_NUMBER}")
_MEGATRON_MEMORY = re.compile(rf"(?:\[rank\s*(\d+)\])?.*memory \(MB\).*max allocated:\s*{_NUMBER}", re.IGNORECASE)
_MEGATRON_RESERVED = re.compile(rf"max reserved:\s*{_NUMBER}", re.IGNORECASE)
GIB, MIB = 2.0**30, 2.0**20


@dataclass
class _Lines:
    """What a log says, by step."""

    software: str = ""
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    losses: dict[int, float] = field(default_factory=dict)
    norms: dict[int, float] = field(default_factory=dict)
    allocated: dict[int, float] = field(default_factory=dict)
    reserved: dict[int, float] = field(default_factory=dict)


def measurement_of(lines: Iterable[str], plan: Plan, warmup: int = 10, name: str = "log") -> Measurement:
    """What a log measured of a plan that another framework ran.

    Args:
        warmup: steps that do not count in the times; the last logged step always counts.

    Raises:
        UserError: there is no line of a step in it.
    """
    found = _read(lines, plan)
    if not found.seconds:
        raise UserError(
            f"log '{name}' has no step in it: neither a line of torchtitan ('step: 10  loss: ...  tps: ...') nor one "
            "of Megatron-LM ('iteration 10/ 100 | ... | elapsed time per iteration (ms): ...')"
        )
    steps = sorted(found.seconds)
    counted = [step for step in steps if step > warmup] or steps[-1:]
    times = [statistics.median(found.seconds[step]) for step in counted]
    tenths = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times * 9
    spread = Quantiles(statistics.median(times), tenths[0], tenths[-1])
    world = plan.layout.world_size
    reserved = tuple(found.reserved.values())
    return Measurement(
        layout=plan.layout,
        world_size=world,
        steps=steps[-1],
        warmup=min(warmup, steps[-1] - 1),
        step_seconds=spread,
        tokens_per_second=plan.job.tokens_per_step / spread.median,
        # torchtitan tells what is reserved alone, which is at least what is allocated.
        peak_memory=tuple(found.allocated.values()) or reserved,
        reserved_memory=reserved,
        losses=tuple(found.losses[step] for step in sorted(found.losses)),
        grad_norms=tuple(found.norms[step] for step in sorted(found.norms)),
        device=plan.job.cluster.gpu.name,
        versions={"software": found.software},
    )


def _read(lines: Iterable[str], plan: Plan) -> _Lines:
    found = _Lines()
    for coloured in lines:
        line = _COLOUR.sub("", coloured)
        if titan := _TITAN.search(line):
            _titan(line, int(titan[1].replace(",", "")), plan, found)
        elif megatron := _MEGATRON.search(line):
            _megatron(line, int(megatron[1]), _number(megatron[2]), found)
        elif memory := _MEGATRON_MEMORY.search(line):
            rank = int(memory[1] or 0)
            found.allocated[rank] = max(found.allocated.get(rank, 0.0), _number(memory[2]) * MIB)
            if reserved := _MEGATRON_RESERVED.search(line):
                found.reserved[rank] = max(found.reserved.get(rank, 0.0), _number(reserved[1]) * MIB)
    return found


def _titan(line: str, step: int, plan: Plan, found: _Lines) -> None:
    found.software = "torchtitan"
    tps = _after(line, "tps:")
    if tps is None or not 0 < tps < float("inf"):
        return
    found.seconds[step].append(plan.job.tokens_per_step / (tps * plan.layout.world_size))
    _loss(line, step, "loss:", "grad_norm:", found)
    memory = re.search(rf"memory:\s*{_NUMBER}\s*GiB", line)
    if memory:
        # Since the line before; the most of all lines is the run's.
        found.reserved[0] = max(found.reserved.get(0, 0.0), _number(memory[1]) * GIB)


def _megatron(line: str, step: int, milliseconds: float, found: _Lines) -> None:
    found.software = "Megatron-LM"
    if not 0 < milliseconds < float("inf"):
        return
    found.seconds[step].append(milliseconds / 1e3)
    _loss(line, step, "lm loss:", "grad norm:", found)


def _loss(line: str, step: int, loss: str, norm: str, found: _Lines) -> None:
    for key, values in ((loss, found.losses), (norm, found.norms)):
        value = _after(line, key)
        if value is not None:
            values[step] = value


def _after(line: str, key: str) -> float | None:
    match = re.search(rf"(?<!\w){re.escape(key)}\s*{_NUMBER}", line)
    return _number(match[1]) if match else None


def _number(text: str) -> float:
    return float(text.replace(",", ""))
