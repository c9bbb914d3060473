"""Pipeline schedules: the order of forwards and backwards on each pipeline rank, in PyTorch's own notation.

An op prints as torch writes it: `2F0` is stage 2, forward, microbatch 0; `2B0` its full backward. Each order equals
the one that torch.distributed.pipelining generates (tests/simulator/test_schedules.py compares them).

In the drawings, time runs to the right, a row is a rank, capitals are backwards; P ranks, m microbatches.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple


class Op(NamedTuple):
    """One action of one pipeline rank. `stage` and `microbatch` are None where the action has none."""

    kind: str
    stage: int | None = None
    microbatch: int | None = None

    def __str__(self) -> str:
        stage = "" if self.stage is None else self.stage
        return f"{stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"


def gpipe(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965). Bubble (P-1)/m of the ideal step.

    rank 0  0 1 2 3 . . 0 0 1 1 2 2 3 3
    rank 1  . 0 1 2 3 0 0 1 1 2 2 3 3 .
    """
    return [Op("F", rank, i) for i in range(microbatches)] + [Op("B", rank, i) for i in range(microbatches)]


def one_forward_one_backward(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """1F1B (PipeDream-flush, arXiv 2104.04473): the bubble of GPipe, but at most P - r microbatches alive.

    rank 0  0 1 . 0 0 2 1 1 3 2 2 . 3 3
    rank 1  . 0 0 0 1 1 1 2 2 2 3 3 3 .      (m = 4, P = 2; a backward takes two slots)
    """
    warmup = min(ranks - 1 - rank, microbatches)
    order = [Op("F", rank, i) for i in range(warmup)]
    for i in range(microbatches - warmup):
        order += [Op("F", rank, warmup + i), Op("B", rank, i)]
    return order + [Op("B", rank, i) for i in range(microbatches - warmup, microbatches)]


def interleaved_1f1b(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2) as torch runs it, depth first over v chunks per rank.

    Bubble (P-1)/(v·m) of the ideal step, for v times the messages. Stage of chunk c on rank r is r + c·P. Rounds of
    R = m / max(1, m // P) microbatches go through a chunk before the next one's turn.

    rank 0  a0 a1 b0 b1 a2 B0 a3 B1 b2 A0 b3 A1 B2 B3 A2 A3      (P = 2, v = 2: chunks a and b, m = 4)
    """
    rounds = max(1, microbatches // ranks)
    per_round = microbatches // rounds
    total = chunks * microbatches
    warmup = min((chunks - 1) * per_round + 2 * (ranks - 1 - rank), total)
    counts: dict[tuple[str, int], int] = {}

    def next_op(kind: str, step: int) -> Op:
        chunk = (step // per_round) % chunks
        stage = rank + ranks * (chunk if kind == "F" else chunks - 1 - chunk)
        microbatch = counts.get((kind, stage), 0)
        counts[kind, stage] = microbatch + 1
        return Op(kind, stage, microbatch)

    order = [next_op("F", step) for step in range(warmup)]
    for step in range(total - warmup):
        order += [next_op("F", warmup + step), next_op("B", step)]
    return order + [next_op("B", step) for step in range(total - warmup, total)]


_ORDERS: dict[str, Callable[[int, int, int, int], list[Op]]] = {
    "GPipe": gpipe,
    "1F1B": one_forward_one_backward,
    "Interleaved1F1B": interleaved_1f1b,
}


@functools.lru_cache(maxsize=4096)
def compute_order(schedule: str, rank: int, ranks: int, chunks: int, microbatches: int) -> tuple[Op, ...]:
    """The forwards and backwards of one pipeline rank in the order in which it runs them."""
    return tuple(_ORDERS[schedule](rank, ranks, chunks, microbatches))


@functools.lru_cache(maxsize=65536)
def peak_in_flight(schedule: str, rank: int, ranks: int, chunks: int, microbatches: int) -> tuple[tuple[int, int], ...]:
    """(stage, microbatches alive) of a rank's stages at the moment when the rank holds the most in total.

    A microbatch lives from its forward to its backward.
    """
    order = compute_order(schedule, rank, ranks, chunks, microbatches)
    alive: dict[int, int] = {}
    peak, total, most = dict(alive), 0, -1
    for op in order:
        assert op.stage is not None
        step = 1 if op.kind == "F" else -1
        alive[op.stage] = alive.get(op.stage, 0) + step
        total += step
        if total > most:
            most, peak = total, dict(alive)
    return tuple(peak.items())
