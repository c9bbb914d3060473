"""Ways to keep replicas together: what each needs of a layout, and where the parameter servers sit.

    all_reduce        the replicas sum their gradients among each other (dp_replicate), every step
    reduce_broadcast  one replica, the centre, gets the sum of all gradients and sends it back, every step
    parameter_server  `servers` processes hold the parameters, each its share; replicas push gradients and pull
                      parameters; `staleness` says how far apart they may be
    local_sgd         replicas take `sync_interval` steps of their own, then average their parameters

All but the first keep whole replicas together: what lies inside one (tp, cp, pp, dp_shard) communicates as it always
does, and the way acts along dp_replicate alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from simulator.job import Job
    from simulator.layout import Layout

Sync = Literal["all_reduce", "reduce_broadcast", "parameter_server", "local_sgd"]
OuterOptimizer = Literal["none", "nesterov"]
SYNCS: tuple[str, ...] = get_args(Sync)
# Local steps between two averages: all of them are simulated.
MOST_STEPS_APART = 100_000


def server_nodes(servers: int, nodes: int) -> tuple[int, ...]:
    """The node of each server: one on every node in turn, beginning with the first. A server is a process of its own
    beside the ranks of its node, on the same network cards.

    >>> server_nodes(3, 2)
    (0, 1, 0)
    """
    return tuple(server % nodes for server in range(servers))


def changes_mathematics(layout: Layout) -> bool:
    """Whether training with this layout differs from synchronous training on the whole batch: gradients of older
    parameters, or optimizers that each see a part of it (with AdamW even when they average after every step). Such a
    layout may be faster at a step and not at learning."""
    return layout.sync == "local_sgd" or (layout.sync == "parameter_server" and layout.staleness != 0)


def sync_problems(layout: Layout, job: Job) -> list[str]:
    """What a layout breaks of the rules of its way to synchronise; sizes that make no sense come first."""
    found = []
    if not 1 <= layout.sync_interval <= MOST_STEPS_APART:
        found.append(f"sync_interval = {layout.sync_interval} must be from 1 to {MOST_STEPS_APART}")
    if layout.servers < 0:
        found.append(f"servers = {layout.servers} must be at least 0")
    if layout.staleness is not None and layout.staleness < 0:
        found.append(f"staleness = {layout.staleness} must be at least 0, or none for no bound")
    return found or [*_owned_fields(layout), *_replica_problems(layout, job)]


def _owned_fields(layout: Layout) -> list[str]:
    """Fields that belong to one way and are set with another."""
    found = []
    if layout.sync != "parameter_server":
        if layout.servers:
            found.append(f"servers = {layout.servers} needs sync = 'parameter_server', not '{layout.sync}'")
        if layout.staleness != 0:
            shown = "none" if layout.staleness is None else layout.staleness
            found.append(f"staleness = {shown} needs sync = 'parameter_server', not '{layout.sync}'")
    elif not layout.servers:
        found.append("sync = 'parameter_server' needs servers of at least 1")
    elif layout.servers > layout.world_size:
        found.append(f"servers = {layout.servers} are more than the {layout.world_size} ranks beside which they sit")
    if layout.sync != "local_sgd":
        if layout.sync_interval != 1:
            found.append(f"sync_interval = {layout.sync_interval} needs sync = 'local_sgd', not '{layout.sync}'")
        if layout.outer_optimizer != "none":
            found.append(f"outer_optimizer = '{layout.outer_optimizer}' needs sync = 'local_sgd', not '{layout.sync}'")
    return found


def _replica_problems(layout: Layout, job: Job) -> list[str]:
    """What lies in a replica must not need another one within a step."""
    if layout.sync == "all_reduce":
        return []
    found, named = [], f"sync = '{layout.sync}'"
    if layout.dp_replicate == 1:
        found.append(f"{named} needs dp_replicate > 1: there is no other replica to synchronise with")
    if layout.ep > 1 and not layout.zero_stage:
        found.append(
            f"{named} with ep = {layout.ep} needs the experts inside a replica: shard it (dp_shard > 1, zero_stage > 0)"
        )
    if layout.sync not in job.stack.syncs:
        found.append(f"stack {job.stack.name} has no {named}; it has {list(job.stack.syncs)}")
    if job.training.peft != "none":
        found.append(f"{named} trains whole models, not peft = '{job.training.peft}'")
    return found
