"""What the launcher's flags say: how many ranks there are."""

from __future__ import annotations

from planner.imports.settings import Settings


def ranks(settings: Settings) -> int | None:
    """nnodes times nproc-per-node, where both are numbers (torchrun); None where the launcher does not say."""
    nodes, here = settings.value("nnodes"), settings.value("nproc_per_node")
    if str(nodes).isdigit() and str(here).isdigit():
        return int(nodes) * int(here)
    return None
