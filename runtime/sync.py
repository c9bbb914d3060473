"""How replicas keep together, executed: the run of a layout with any `sync`.

all_reduce        torch's own: DDP, or FSDP over two dimensions (parallelize.py)
reduce_broadcast  here: gradients to the first replica, their mean back to all
local_sgd         local_sgd.py
parameter_server  parameter_server.py, as seen by a worker: server_client.py
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.link import Link
from runtime.local_sgd import LocalSgd
from runtime.replicas import FlatState, build_replica, place_of
from runtime.server_client import ServerClient, Synchronous
from runtime.step import Run, build_run
from simulator.job import Job
from simulator.layout import Layout


class Synchroniser(Protocol):
    """What follows the gradients of a step."""

    def __call__(self, run: Run, loss: Tensor) -> tuple[Tensor, Tensor]: ...

    def begin(self, step: int) -> None:
        """Called once before the first step, when `step` are done and weights are loaded."""

    def finish(self) -> None:
        """Called after the last step."""


class AllReduce:
    """Gradients are complete when the backward ends."""

    def __call__(self, run: Run, loss: Tensor) -> tuple[Tensor, Tensor]:
        return run.apply(loss)

    def begin(self, step: int) -> None: ...

    def finish(self) -> None: ...


class ReduceBroadcast(AllReduce):
    """The first replica sums the gradients of all and sends the mean back. Every replica then takes the same step, as
    under DDP, so that parameters need not travel."""

    def __init__(self, run: Run, layout: Layout, peers: dist.ProcessGroup) -> None:
        self.flat, self.peers, self.replicas = FlatState(run, run.device), peers, layout.dp_replicate
        self.centre = dist.get_global_rank(peers, 0)

    def __call__(self, run: Run, loss: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.flat.read_gradients()
        mean /= self.replicas
        dist.reduce(mean, dst=self.centre, group=self.peers)
        dist.broadcast(mean, src=self.centre, group=self.peers)
        self.flat.write_gradients()
        loss, norm = run.apply(loss)
        dist.all_reduce(loss, group=self.peers)
        return loss / self.replicas, norm


def build_synchronised(
    job: Job, layout: Layout, device: torch.device, link: Link | None
) -> tuple[Run, Synchroniser | ServerClient]:
    """The run of this rank, and how its replicas keep together; `run.update` is set to that.

    Args:
        link: to the servers, for parameter_server.
    """
    if layout.sync == "all_reduce":
        return build_run(job, layout, device), AllReduce()
    run, peers = build_replica(job, layout, device)
    sync: Synchroniser
    if layout.sync == "parameter_server":
        assert link is not None, "parameter servers need a link to them"
        client = ServerClient(run, link, place_of(layout, dist.get_rank()))
        if layout.staleness != 0:
            return run, client
        sync = Synchronous(client)
    else:
        sync = (LocalSgd if layout.sync == "local_sgd" else ReduceBroadcast)(run, layout, peers)
    run.update = sync
    return run, sync
