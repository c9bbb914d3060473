"""The end of a step: the optimizer's update and the gradient norm that all ranks agree on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from simulator.cluster import group_shape
from simulator.collectives import collective_seconds
from simulator.compute import host_optimizer_seconds, optimizer_seconds
from simulator.layout import Layout
from simulator.placement import known_to

if TYPE_CHECKING:
    from simulator.job import Job


def update_seconds(job: Job, parameters: Any, ranks_per_node: Any, offloaded: Any) -> Any:
    """Seconds of the update of a rank's share of the parameters, numbers or arrays; frozen weights have none.

    Args:
        offloaded: whether the layout keeps the optimizer in host memory, where the ranks of a node share its bandwidth.
    """
    if job.training.peft != "none":
        return 0.0 * parameters
    if job.stack.host_optimizer_bandwidth:
        return host_optimizer_seconds(job.stack.host_optimizer_bandwidth, parameters * ranks_per_node)
    device = optimizer_seconds(job.cluster.gpu, job.stack, job.training.optimizer, parameters)
    if not job.stack.offload_bandwidth or not np.any(offloaded):
        return device
    host = host_optimizer_seconds(job.stack.offload_bandwidth, parameters * ranks_per_node)
    return np.where(offloaded, host, device) if np.ndim(offloaded) else host


def norm_seconds(job: Job, layout: Layout) -> float:
    """Seconds of the all-reduce of the gradient norm over the world, or over a replica that does not reduce with
    others."""
    known, key = known_to(job, "norms"), (layout.world_size, layout.reducing_replicas or layout)
    if key not in known:
        axes = ("tp", "cp", "dp_shard", *layout.reducing_replicas, "pp")
        world = group_shape(job.graph, layout.group(*axes), sharing=job.cluster.sharing(layout.world_size))
        known[key] = collective_seconds("all_reduce", 4.0, world, job.cluster)
    found: float = known[key]
    return found
