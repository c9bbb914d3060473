"""The axes of a layout, and the order in which ranks run through them."""

from __future__ import annotations

import functools

AXES = ("tp", "cp", "dp_shard", "dp_replicate", "pp")  # innermost first: the rank order tp-cp-ep-dp-pp
RANK_ORDER = "tp-cp-ep-dp-pp"


@functools.lru_cache(maxsize=4096)
def axes_in(rank_order: str) -> tuple[str, ...]:
    """The axes in a rank order, innermost first; those that it leaves out come last."""
    spelt = {"dp": ("dp_shard", "dp_replicate"), "ep": ()}
    named = [axis for name in rank_order.split("-") for axis in spelt.get(name, (name,))]
    return (*named, *(axis for axis in AXES if axis not in named))
