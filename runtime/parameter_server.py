"""Parameter servers: processes that hold parameters and optimizer, to which replicas push gradients (Li et al., OSDI
2014).

Each rank of a replica has a vector of parameters; each server holds its share of the vectors of all ranks. A server has
a thread for every worker, which waits for a word of it and answers:

    BEGIN n, k       lengths (of the share, and of the k pieces that so many ranks hold), then the share itself
    PUSH loss, norm  a gradient
    PULL             -> the share
    NEXT             -> 1 or 0: whether the replica is to go on; the first server alone is asked
    STATE, SET_STATE optimizer state, to a checkpoint and back
    LOG              -> rows of FIELDS, of the first server
    END

staleness = 0: a server waits for the gradients of all, clips and applies their mean, and answers every PUSH with the
norm and the new share: the same mathematics as an all-reduce. Otherwise a gradient, clipped by its replica, is applied
at once, and the first server keeps count: a replica may be `staleness` updates ahead of the slowest (stale synchronous
parallel, Ho et al., NIPS 2013), or with None any number (Hogwild's way, Recht et al., NIPS 2011; Dean et al., NIPS
2012). Servers apply in the order in which gradients reach them, so that with several the orders may differ.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.link import Link
from runtime.optimizer import build_optimizer
from runtime.replicas import place_of
from simulator.job import Training
from simulator.layout import Layout

# What the first server notes of every update. lead: how many updates its replica was ahead of the slowest when it began
# to compute, which `staleness` of the layout bounds. staleness: updates of others between its pull and its push.
# seconds: since the first replica began.
FIELDS = ("replica", "loss", "norm", "lead", "staleness", "seconds")


class Word(IntEnum):
    BEGIN, PUSH, PULL, NEXT, STATE, SET_STATE, LOG, END = range(8)


def optimizer_state(training: Training) -> tuple[str, ...]:
    """Names of what an optimizer keeps for each weight."""
    return ("exp_avg", "exp_avg_sq") if training.optimizer == "adamw" else ()


@dataclass(frozen=True)
class Update:
    """One row of FIELDS."""

    replica: int
    loss: float
    norm: float
    lead: int
    staleness: int
    seconds: float


class Ledger:
    """Which replica has done how many updates, and who may begin another one. For threads.

    Args:
        bound: how far a replica may be ahead; None without bound.
        total: updates in all, of whomever.
        note: called after each update with all so far.
    """

    def __init__(
        self, replicas: int, bound: int | None, total: int, note: Callable[[list[Update]], None] | None = None
    ) -> None:
        self.bound, self.left, self.note = bound, total, note
        self.clocks, self.log = [0] * replicas, []  # type: tuple[list[int], list[Update]]
        self.working = [True] * replicas
        self.began: dict[int, tuple[int, int]] = {}
        self.start: float | None = None
        self.changed = threading.Condition()

    def next(self, replica: int) -> bool:
        """Wait until the replica may begin an update; False if there are none left."""
        with self.changed:
            self.changed.wait_for(lambda: self.left == 0 or self._allowed(replica))
            self.start = time.perf_counter() if self.start is None else self.start
            if self.left == 0:
                self.working[replica] = False
                self.changed.notify_all()
                return False
            self.left -= 1
            if self.left == 0:
                self.changed.notify_all()
            self.began[replica] = (self._ahead(replica), len(self.log))
            return True

    def add(self, replica: int, loss: float, norm: float) -> None:
        """An update has been applied. One whose loss is no number is the last."""
        with self.changed:
            lead, version = self.began.pop(replica)
            assert self.start is not None
            seconds = time.perf_counter() - self.start
            self.log.append(Update(replica, loss, norm, lead, len(self.log) - version, seconds))
            self.clocks[replica] += 1
            if not math.isfinite(loss) or not math.isfinite(norm):
                self.left = 0
            if self.note is not None:
                self.note(self.log)
            self.changed.notify_all()

    def _ahead(self, replica: int) -> int:
        """Of the slowest that is still at work."""
        return self.clocks[replica] - min(
            (clock for clock, working in zip(self.clocks, self.working, strict=True) if working),
            default=self.clocks[replica],
        )

    def _allowed(self, replica: int) -> bool:
        return self.bound is None or self._ahead(replica) <= self.bound


@dataclass
class _Share:
    """This server's part of the vector of one rank of every replica."""

    parameter: nn.Parameter
    optimizer: torch.optim.Optimizer
    pieces: list[tuple[int, int]]
    gradients: dict[int, Tensor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def mean(self) -> Tensor:
        """Of the gradients of all replicas, in their order, so that a run repeats bit by bit."""
        total = self.gradients[0].clone()
        for replica in range(1, len(self.gradients)):
            total += self.gradients[replica]
        return total / len(self.gradients)

    def squared_norm(self, gradient: Tensor) -> Tensor:
        """Each weight counts once, however many ranks hold it."""
        parts = gradient.split([length for length, _ in self.pieces])
        squares = [
            torch.linalg.vector_norm(part, dtype=torch.float64).square() / copies
            for part, (_, copies) in zip(parts, self.pieces, strict=True)
        ]
        return torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64)


class Server:
    """Serves the workers of one run until all have said END.

    Args:
        note: of the first server: called after each update with all so far, where staleness is not 0.
    """

    def __init__(
        self,
        layout: Layout,
        training: Training,
        link: Link,
        steps: int,
        note: Callable[[list[Update]], None] | None = None,
    ) -> None:
        self.layout, self.training, self.link = layout, training, link
        self.ledger = Ledger(layout.dp_replicate, layout.staleness, steps * layout.dp_replicate, note)
        self.shares: dict[int, _Share] = {}
        self.lock = threading.Lock()
        self.turn = threading.Condition()
        self.arrived = self.rounds = 0
        self.norm = 0.0

    def serve(self) -> None:
        threads = [
            threading.Thread(target=self._guard, args=(worker,), daemon=True)
            for worker in range(self.layout.world_size)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _guard(self, worker: int) -> None:
        """A thread that fails ends the process: workers would wait for it."""
        try:
            self._serve(worker)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def _serve(self, worker: int) -> None:
        place, link = place_of(self.layout, worker), self.link
        while True:
            word, *numbers = link.receive(worker)
            if word == Word.BEGIN:
                share = self._begin(worker, place.rank, int(numbers[0]), int(numbers[1]))
                gradient = torch.empty_like(share.parameter)
            elif word == Word.PUSH:
                link.receive_into(gradient, worker)
                if self.layout.staleness == 0:
                    self._apply_together(share, place.replica, gradient)
                    link.send(worker, self.norm, tensors=(share.parameter.detach(),))
                else:
                    self._apply_alone(share, gradient)
                    if place.rank == 0 and self.link.seat.number == 0:
                        self.ledger.add(place.replica, numbers[0], numbers[1])
            elif word == Word.PULL:
                with share.lock:
                    now = share.parameter.detach().clone()
                link.send(worker, tensors=(now,))
            elif word == Word.NEXT:
                link.send(worker, float(self.ledger.next(place.replica)))
            elif word == Word.STATE:
                state = share.optimizer.state[share.parameter]
                names = optimizer_state(self.training)
                vectors = tuple(state[n] if n in state else torch.zeros_like(share.parameter) for n in names)
                link.send(worker, float(state.get("step", torch.zeros(())).item()), tensors=vectors)
            elif word == Word.SET_STATE:
                self._set_state(share, worker, numbers[0])
                link.send(worker)
            elif word == Word.LOG:
                rows = [[float(getattr(update, name)) for name in FIELDS] for update in self.ledger.log]
                link.send(worker, len(rows), tensors=(torch.tensor(rows, dtype=torch.float64),))
            else:
                return

    def _begin(self, worker: int, rank: int, length: int, count: int) -> _Share:
        """The first replica's parameters count; those of the others are the same."""
        pieces, values = torch.empty((count, 2), dtype=torch.int64), torch.empty(length)
        self.link.receive_into(pieces, worker)
        self.link.receive_into(values, worker)
        with self.lock:
            if rank not in self.shares:
                parameter = nn.Parameter(values)
                found = [(int(size), int(copies)) for size, copies in pieces.tolist()]
                self.shares[rank] = _Share(parameter, build_optimizer([parameter], self.training), found)
            return self.shares[rank]

    def _apply_alone(self, share: _Share, gradient: Tensor) -> None:
        with share.lock:
            share.parameter.grad = gradient
            share.optimizer.step()
            share.parameter.grad = None

    def _apply_together(self, share: _Share, replica: int, gradient: Tensor) -> None:
        """Returns when the gradients of all workers have been applied."""
        with self.turn:
            share.gradients[replica] = gradient
            self.arrived += 1
            if self.arrived == self.layout.world_size:
                self._step()
                self.arrived = 0
                self.rounds += 1
                self.turn.notify_all()
            else:
                before = self.rounds
                self.turn.wait_for(lambda: self.rounds > before)

    def _step(self) -> None:
        """Mean, clip, update; the norm is that of all servers' shares."""
        means = {rank: share.mean() for rank, share in sorted(self.shares.items())}
        square = torch.stack([self.shares[rank].squared_norm(mean) for rank, mean in means.items()]).sum()
        if self.link.seat.servers > 1:
            dist.all_reduce(square)
        norm = square.sqrt()
        scale = (self.training.max_grad_norm / (norm + 1e-6)).clamp(max=1.0).float()
        for rank, mean in means.items():
            share = self.shares[rank]
            share.parameter.grad = mean * scale
            share.optimizer.step()
            share.parameter.grad = None
        self.norm = norm.item()

    def _set_state(self, share: _Share, worker: int, steps: float) -> None:
        vectors = {name: torch.empty_like(share.parameter.detach()) for name in optimizer_state(self.training)}
        for vector in vectors.values():
            self.link.receive_into(vector, worker)
        with share.lock:
            if vectors:
                share.optimizer.state[share.parameter] = {"step": torch.tensor(steps), **vectors}
