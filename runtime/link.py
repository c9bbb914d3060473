"""Workers and parameter servers in one launch: who is which, and messages between them.

A launch starts world_size + servers processes. On every node the workers come first, as without servers, and the node's
servers behind them; server j sits on node j modulo the number of nodes, as the simulator places it. Workers form the
default process group, so that everything else runs as if there were no servers; servers form one of their own, over
which they agree on norms.

Messages are torch's point-to-point of gloo, on a group that workers and servers share. It is a ProcessGroupGloo of its
own and no `new_group`, which exists only inside a default group, and that one is the workers'. Not
torch.distributed.rpc: it is slower over TCP and no longer developed.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from simulator.errors import UserError
from simulator.layout import Layout

HEADER = 4


@dataclass(frozen=True)
class Seat:
    """What a process is: worker `number` of `workers`, or if it `serves` server `number` of `servers`. On its node it
    is worker local_rank of local_workers."""

    serves: bool
    number: int
    workers: int
    servers: int
    local_rank: int = 0
    local_workers: int = 1

    @property
    def peers(self) -> int:
        """Processes of the same kind."""
        return self.servers if self.serves else self.workers


def find_seat(layout: Layout, environment: Mapping[str, str]) -> Seat:
    """The seat of the process with these variables of torchrun.

    >>> environment = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "3"}
    >>> layout = Layout(dp_replicate=4, sync="parameter_server", servers=2)
    >>> find_seat(layout, environment)
    Seat(serves=True, number=1, workers=4, servers=2, local_rank=0, local_workers=2)

    Raises:
        UserError: servers do not spread evenly over the nodes.
    """
    workers, servers = layout.world_size, layout.servers
    rank, local = int(environment.get("RANK", 0)), int(environment.get("LOCAL_RANK", 0))
    per_node = int(environment.get("LOCAL_WORLD_SIZE", workers + servers))
    nodes = max(1, (workers + servers) // per_node)
    if servers % nodes or workers % nodes:
        raise UserError(f"{workers} workers and {servers} servers do not spread evenly over {nodes} nodes")
    node, local_workers = rank // per_node, workers // nodes
    if local >= local_workers:
        return Seat(True, (local - local_workers) * nodes + node, workers, servers, 0, local_workers)
    return Seat(False, node * local_workers + local, workers, servers, local, local_workers)


class Link:
    """Messages between workers and servers. A message is a header of four numbers, and tensors behind it on the
    processor; sender and receiver know their shapes. Every thread of a server speaks to one worker."""

    def __init__(self, store: dist.Store, seat: Seat, timeout: datetime.timedelta) -> None:
        self.seat = seat
        place = seat.number + (seat.workers if seat.serves else 0)
        store = dist.PrefixStore("parameter_servers", store)
        self.group = dist.ProcessGroupGloo(store, place, seat.workers + seat.servers, timeout)

    @property
    def servers(self) -> range:
        """Places of the servers; workers have their rank."""
        return range(self.seat.workers, self.seat.workers + self.seat.servers)

    def send(self, to: int, *numbers: float, tensors: tuple[Tensor, ...] = ()) -> None:
        header = torch.zeros(HEADER, dtype=torch.float64)
        header[: len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        for tensor in (header, *tensors):
            if tensor.numel():
                self.group.send([tensor], to, 0).wait()

    def receive(self, source: int) -> list[float]:
        header = torch.zeros(HEADER, dtype=torch.float64)
        self.group.recv([header], source, 0).wait()
        return header.tolist()

    def receive_into(self, tensor: Tensor, source: int) -> None:
        if tensor.numel():
            self.group.recv([tensor], source, 0).wait()


def share_bounds(length: int, servers: int) -> list[tuple[int, int]]:
    """Begin and end of each server's share of a vector, as even as possible.

    >>> share_bounds(7, 2)
    [(0, 3), (3, 7)]
    """
    return [(length * j // servers, length * (j + 1) // servers) for j in range(servers)]
