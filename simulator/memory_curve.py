"""The memory of each rank over a step: the moments of its program, at the seconds when the engine ran its ops."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from simulator.results import MemoryMoment, MemorySample, Span


def memory_curve(ranks: Sequence[Sequence[MemoryMoment]], spans: Sequence[Span]) -> tuple[MemorySample, ...]:
    """Samples of every rank in the order of time, rank by rank.

    A step begins with what its last op leaves. What computes holds its memory from its begin to its end; what gathers,
    reduces and drops counts from where the program has it, because memory is given out when it is asked for.

    Args:
        ranks: the moments of each pipeline rank, in the order of its program.
        spans: of the same step.
    """
    times = {
        (s.rank, s.name.removeprefix("PP:")): (s.start, s.start + s.seconds) for s in spans if s.stream == "compute"
    }
    return tuple(
        sample for rank, moments in enumerate(ranks) for sample in _without_repeats(_samples(rank, moments, times))
    )


def _samples(
    rank: int, moments: Sequence[MemoryMoment], times: dict[tuple[int, str], tuple[float, float]]
) -> Iterator[MemorySample]:
    now = 0.0
    if moments:
        yield MemorySample(rank, now, "", moments[-1].after)
    for moment in moments:
        begin, end = times.get((rank, moment.op), (now, now))
        yield MemorySample(rank, max(now, begin), moment.op, moment.during)
        now = max(now, end)
        yield MemorySample(rank, now, moment.op, moment.after)


def _without_repeats(samples: Iterator[MemorySample]) -> Iterator[MemorySample]:
    """Only where something changes, and the last."""
    before = held = None
    for sample in samples:
        if before is None or sample.memory != before.memory:
            yield sample
            held = sample
        before = sample
    if before is not None and before is not held:
        yield before
