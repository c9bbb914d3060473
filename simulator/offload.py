"""Offload: the optimizer's state and its update in the memory of the host, as a choice of a layout."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from simulator.job import Job
    from simulator.layout import Layout

Offload = Literal["none", "optimizer"]


def offload_problems(layout: Layout, job: Job) -> list[str]:
    """Why the optimizer's state of this layout cannot lie in host memory, in words; empty if it can or need not."""
    if layout.offload == "none":
        return []
    stack, training = job.stack, job.training
    if stack.offload_bandwidth is None:
        return [f"stack {stack.name} cannot keep the optimizer alone in host memory: offload must be 'none'"]
    found = []
    if layout.zero_stage not in stack.offload_zero_stages:
        found.append(
            f"offload = '{layout.offload}' needs zero_stage in {list(stack.offload_zero_stages)} with stack "
            f"{stack.name}, not {layout.zero_stage}"
        )
    if job.cluster.gpu.kind != "gpu":
        found.append(f"offload = '{layout.offload}': the ranks of {job.cluster.name} compute in host memory already")
    if training.optimizer != "adamw":
        found.append(f"offload = '{layout.offload}' is for optimizer = 'adamw', not '{training.optimizer}'")
    if training.peft != "none":
        found.append(f"offload = '{layout.offload}': peft = '{training.peft}' has next to no optimizer state to move")
    return found
