"""What a worker says to parameter servers. The other side, and what the words mean: parameter_server.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.link import Link, share_bounds
from runtime.parameter_server import FIELDS, Word, optimizer_state
from runtime.replicas import FlatState, Place, cut_pieces
from runtime.shards import local_tensor
from runtime.step import Run

CPU = torch.device("cpu")


class ServerClient:
    """The servers as one rank of a replica sees them: they hold its parameters as one vector, a share each."""

    def __init__(self, run: Run, link: Link, place: Place) -> None:
        self.run, self.link, self.place = run, link, place
        self.flat = FlatState(run, CPU)
        self.bounds = share_bounds(len(self.flat.buffer), link.seat.servers)

    def begin(self) -> None:
        """Tell every server how long its share is, and give it the parameters as they are now."""
        pieces, vector = self.flat.copies(self.place.ranks), self.flat.read_parameters()
        for server, (first, last) in zip(self.link.servers, self.bounds, strict=True):
            own = torch.tensor(cut_pieces(pieces, first, last), dtype=torch.int64).reshape(-1, 2)
            self.link.send(server, Word.BEGIN, last - first, len(own), tensors=(own, vector[first:last]))

    def push(self, loss: float, norm: float) -> None:
        """Send the gradients."""
        vector = self.flat.read_gradients()
        for server, (first, last) in zip(self.link.servers, self.bounds, strict=True):
            self.link.send(server, Word.PUSH, loss, norm, tensors=(vector[first:last],))

    def receive(self) -> float:
        """Take the parameters that servers send; the number that they send with them."""
        number = 0.0
        for server, (first, last) in zip(self.link.servers, self.bounds, strict=True):
            number = self.link.receive(server)[0]
            self.link.receive_into(self.flat.buffer[first:last], server)
        self.flat.write_parameters()
        return number

    def pull(self) -> None:
        for server in self.link.servers:
            self.link.send(server, Word.PULL)
        self.receive()

    def may_go_on(self) -> bool:
        """Whether this replica is to compute another gradient; waits where it is too far ahead of the slowest. The
        first server decides, the replica's first rank asks it."""
        answer = torch.zeros(1, dtype=torch.int64, device=self.run.device)
        if self.place.rank == 0:
            self.link.send(self.link.servers[0], Word.NEXT)
            answer.fill_(int(self.link.receive(self.link.servers[0])[0]))
        if self.place.ranks > 1:
            dist.broadcast(answer, src=dist.get_global_rank(self.run.group, 0), group=self.run.group)
        return bool(answer.item())

    def read_log(self) -> Tensor:
        """One row for each update, with the columns FIELDS, from the first server."""
        self.link.send(self.link.servers[0], Word.LOG)
        rows = int(self.link.receive(self.link.servers[0])[0])
        log = torch.empty((rows, len(FIELDS)), dtype=torch.float64)
        self.link.receive_into(log, self.link.servers[0])
        return log

    def load_optimizer(self) -> None:
        """Copy the servers' optimizer state into this rank's own optimizer, for a checkpoint."""
        for server in self.link.servers:
            self.link.send(server, Word.STATE)
        steps, vectors = 0.0, [torch.empty_like(self.flat.buffer) for _ in self._names()]
        for server, (first, last) in zip(self.link.servers, self.bounds, strict=True):
            steps = self.link.receive(server)[0]
            for vector in vectors:
                self.link.receive_into(vector[first:last], server)
        with torch.no_grad():
            for place, parameter in enumerate(self.run.parameters()):
                state = self.run.optimizer.state[parameter]
                if "step" in state:
                    state["step"].fill_(steps)
                for name, vector in zip(self._names(), vectors, strict=True):
                    own = local_tensor(state[name])
                    own.copy_(vector.split(self.flat.sizes)[place].view_as(own))

    def store_optimizer(self) -> None:
        """The other way round, after a checkpoint was loaded."""
        states = [self.run.optimizer.state[p] for p in self.run.parameters()]
        steps = next((state["step"].item() for state in states if "step" in state), 0.0)
        vectors = [
            torch.cat([local_tensor(state[name]).detach().flatten().to(CPU, torch.float32) for state in states])
            for name in self._names()
        ]
        for server, (first, last) in zip(self.link.servers, self.bounds, strict=True):
            self.link.send(server, Word.SET_STATE, steps, tensors=tuple(v[first:last] for v in vectors))
            self.link.receive(server)

    def _names(self) -> tuple[str, ...]:
        return optimizer_state(self.run.training)

    def end(self) -> None:
        for server in self.link.servers:
            self.link.send(server, Word.END)


class Synchronous:
    """`update` of a run whose servers wait for the gradients of all replicas (staleness = 0)."""

    def __init__(self, client: ServerClient) -> None:
        self.client = client

    def begin(self, step: int) -> None:
        self.client.begin()
        if step:
            self.client.store_optimizer()

    def __call__(self, run: Run, loss: Tensor) -> tuple[Tensor, Tensor]:
        self.client.push(0.0, 0.0)
        norm = self.client.receive()
        run.optimizer.zero_grad(set_to_none=True)
        total = loss.double() / (run.layout.dp * run.layout.cp * run.layout.tp * self.client.place.replicas)
        dist.all_reduce(total)
        return total, torch.tensor(norm, dtype=torch.float64)

    def finish(self) -> None:
        self.client.end()
