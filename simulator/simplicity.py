"""Which of two layouts is the simpler one, and which to recommend of layouts that are as fast as can be told."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.layout import Layout

AXES = ("tp", "cp", "pp", "ep")
STANDARD_SCHEDULES = ("1F1B", "Interleaved1F1B")


def complications(layout: Layout) -> tuple[str, ...]:
    """What a layout has that plain data parallelism has not, each of which is more to set up, to debug and to save:
    every axis of tp, cp, pp and ep above one, several virtual stages per rank, a schedule other than 1F1B and its
    interleaved form, stages of a split of their own, recomputation, replicas of shards (HSDP), ZeRO 3, an order of
    ranks or a way to synchronise other than the default."""
    found = [axis for axis in AXES if getattr(layout, axis) > 1]
    checks = {
        "virtual stages": layout.virtual_stages > 1,
        "schedule": layout.pp > 1 and layout.schedule not in STANDARD_SCHEDULES,
        "stage split": layout.stage_layers is not None,
        "recompute": layout.recompute != "none",
        "replicas of shards": layout.zero_stage > 0 and layout.dp_replicate > 1 and layout.dp_shard > 1,
        "ZeRO 3": layout.zero_stage == 3,
        "rank order": layout.rank_order != Layout.rank_order,
        "synchronisation": layout.sync != "all_reduce",
    }
    return (*found, *(name for name, there in checks.items() if there))


def simplicity(layout: Layout) -> tuple[int, int, int, int, int, str]:
    """Sorts layouts, the simplest first: a total order.

    By the number of complications, of axes above one among them, by tp x cp x pp x ep, by virtual stages, by ZeRO
    stage; what is then still equal goes by name.
    """
    axes = [getattr(layout, axis) for axis in AXES]
    found = complications(layout)
    product = axes[0] * axes[1] * axes[2] * axes[3]
    return (
        len(found), sum(size > 1 for size in axes), product, layout.virtual_stages, layout.zero_stage, layout.short(),
    )  # fmt: skip


def tied(values: Sequence[float], share: float) -> list[int]:
    """The places of the values that are at most `share` above the smallest one.

    >>> tied([2.0, 2.08, 2.3], 0.05)
    [0, 1]
    """
    least = min(values)
    return [place for place, value in enumerate(values) if value <= least * (1 + share)]


def recommended(values: Sequence[float], layouts: Sequence[Layout], share: float) -> int:
    """The place of the simplest layout among those tied with the best: of layouts with the same number of complications
    the best, since nothing is gained by a slower one.

    Args:
        values: what is minimised, of each layout.
        share: how much above the smallest value is a tie.
    """
    places = tied(values, share)
    return min(
        places, key=lambda place: (len(complications(layouts[place])), values[place], simplicity(layouts[place]))
    )
