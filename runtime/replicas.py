"""Replicas that keep together in another way than by all-reduce: each is a run of its own, over its own ranks.

What lies inside a replica (tp, cp, pp, dp_shard) is built as ever, with dp_replicate = 1 and its share of the global
batch; ranks with the same place in their replicas are peers. Inside, gradients are complete; what peers do with theirs
is the run's `update` (sync.py, local_sgd.py, parameter_server.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from runtime.optimizer import pieces
from runtime.parallelize import build_expert_mesh, build_mesh
from runtime.shards import local_tensor
from runtime.step import Run, build_on
from simulator.job import Job
from simulator.layout import Layout


@dataclass(frozen=True)
class Place:
    """Where a rank stands: `replica` of `replicas`, `rank` of the `ranks` in it."""

    replica: int
    replicas: int
    rank: int
    ranks: int


def ranks_of_replicas(layout: Layout) -> list[list[int]]:
    """The global ranks of each replica, in the order of the replica's own ranks."""
    found: list[list[int]] = [[] for _ in range(layout.dp_replicate)]
    for rank in range(layout.world_size):
        found[layout.coordinates(rank)["dp_replicate"]].append(rank)
    return found


def place_of(layout: Layout, rank: int) -> Place:
    replicas = ranks_of_replicas(layout)
    number = layout.coordinates(rank)["dp_replicate"]
    return Place(number, len(replicas), replicas[number].index(rank), len(replicas[number]))


def one_replica(layout: Layout) -> Layout:
    """The layout inside a replica."""
    return replace(
        layout, dp_replicate=1, sync="all_reduce", servers=0, staleness=0, sync_interval=1, outer_optimizer="none"
    )


def build_replica(job: Job, layout: Layout, device: torch.device) -> tuple[Run, dist.ProcessGroup]:
    """The run of this rank's replica, and the group of its peers. All ranks must call it."""
    inner, replicas = one_replica(layout), ranks_of_replicas(layout)
    share = job.training.global_batch_size // layout.dp_replicate
    training = replace(job.training, global_batch_size=share)
    place = place_of(layout, dist.get_rank())
    # Groups are made by all ranks, members or not, in the same order.
    meshes = [
        (build_mesh(inner, device.type, ranks), build_expert_mesh(job, inner, device.type, ranks)) for ranks in replicas
    ]
    insides = [dist.new_group(ranks) for ranks in replicas]
    peers = [dist.new_group(list(ranks)) for ranks in zip(*replicas, strict=True)]
    run = build_on(replace(job, training=training), inner, *meshes[place.replica], device)
    run.group = insides[place.replica]
    return run, peers[place.rank]


class FlatState:
    """The parameters that a rank holds, and their gradients, as one vector in fp32 on the processor or the device.

    Looked up anew each time: FSDP shows its shards only between steps.
    """

    def __init__(self, run: Run, device: torch.device) -> None:
        self.run, self.device = run, device
        self.sizes = [local_tensor(p.detach()).numel() for p in run.parameters()]
        self.buffer = torch.empty(sum(self.sizes), dtype=torch.float32, device=device)

    def _parts(self) -> Iterable[tuple[Tensor, torch.nn.Parameter]]:
        return zip(self.buffer.split(self.sizes), self.run.parameters(), strict=True)

    @torch.no_grad()
    def read_gradients(self) -> Tensor:
        """The vector of gradients, in the one buffer that all methods use; zero where there is none."""
        for part, parameter in self._parts():
            if parameter.grad is None:
                part.zero_()
                continue
            gradient = parameter.grad
            if isinstance(parameter, DTensor) and gradient.placements != parameter.placements:
                # Of an embedding that is cut over the tensor axis each rank has the gradient of all of it.
                gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
                parameter.grad = gradient
            part.copy_(local_tensor(gradient).flatten())
        return self.buffer

    @torch.no_grad()
    def write_gradients(self) -> None:
        """The buffer back to the gradients."""
        for part, parameter in self._parts():
            if parameter.grad is not None:
                gradient = local_tensor(parameter.grad)
                gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def read_parameters(self) -> Tensor:
        for part, parameter in self._parts():
            part.copy_(local_tensor(parameter.detach()).flatten())
        return self.buffer

    @torch.no_grad()
    def write_parameters(self) -> None:
        for part, parameter in self._parts():
            own = local_tensor(parameter.detach())
            own.copy_(part.view_as(own))

    def copies(self, ranks: int) -> list[tuple[int, int]]:
        """(length, copies): how many of the replica's ranks hold each piece of the vector, neighbours merged."""
        found: list[tuple[int, int]] = []
        per_stage = ranks // self.run.layout.pp
        for size, parameter in zip(self.sizes, self.run.parameters(), strict=True):
            count = per_stage // pieces(parameter)
            if found and found[-1][1] == count:
                found[-1] = (found[-1][0] + size, count)
            else:
                found.append((size, count))
        return found


def cut_pieces(found: Sequence[tuple[int, int]], begin: int, end: int) -> list[tuple[int, int]]:
    """The (length, copies) between two places of the vector.

    >>> cut_pieces([(4, 1), (6, 2)], 2, 7)
    [(2, 1), (3, 2)]
    """
    result, place = [], 0
    for length, count in found:
        inside = min(end, place + length) - max(begin, place)
        if inside > 0:
            result.append((inside, count))
        place += length
    return result


def holds_dtensors(run: Run) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in run.parameters())
