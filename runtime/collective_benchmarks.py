"""Collectives and messages, timed as a step meets them: between computing, on ranks that are not quite together.

One behind the other on an idle machine they are up to half as long: then ranks wait for each other awake, and nothing
else wants the processors. A device that works beside its host has neither, and there they follow each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from runtime.benchmark_cases import Case, Grid, Operands, call_seconds, cycling, sample, together_seconds
from simulator.profile import Sample


@dataclass(frozen=True)
class Group:
    """The ranks that a collective joins: of all, or of neighbours while their siblings do the same."""

    ranks: int
    process_group: dist.ProcessGroup | None = None


def groups() -> list[Group]:
    """All ranks, and pairs of neighbours among more than two that share processors."""
    world = dist.get_world_size()
    found = [Group(world)]
    if world > 2 and world % 2 == 0 and not torch.cuda.is_available():
        pairs, _ = dist.new_subgroups(2)
        found.append(Group(2, pairs))
    return found


def collective_cases(grid: Grid, device: torch.device, group: Group) -> list[Case]:
    """Collectives of a group, by the bytes of the whole buffer; messages between ranks 0 and 1."""
    # torch 2.13 renames the two; older releases have only the long names.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    ranks, among = group.ranks, group.process_group
    shared = () if ranks == dist.get_world_size() else (dist.get_world_size(),)
    cases = []
    for size in grid.collective:
        elements = size // 4 // ranks * ranks
        # Zeros, so that summing them again and again stays finite.
        whole, part = torch.zeros(elements, device=device), torch.zeros(elements // ranks, device=device)
        other = torch.zeros_like(whole)
        calls: dict[str, Callable[[int], object]] = {
            "all_reduce": _among(among, dist.all_reduce, whole),
            "all_gather": _among(among, all_gather, whole, part),
            "reduce_scatter": _among(among, reduce_scatter, part, whole),
            "all_to_all": _among(among, dist.all_to_all_single, other, whole),
        }
        if dist.get_world_size() == 2:
            calls["send_recv"] = functools.partial(_message, whole)
        cases += [Case(kind, (ranks, 4.0 * elements, *shared), call) for kind, call in calls.items()]
    return cases


def _among(
    group: dist.ProcessGroup | None, function: Callable[..., object], *tensors: Tensor
) -> Callable[[int], object]:
    return lambda i: function(*tensors, group=group)


def _message(tensor: Tensor, i: int) -> None:
    """A message from rank 0 to rank 1, and back the next time: the receiver of one is the sender of the next."""
    operation = dist.isend if _sends(i) else dist.irecv
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, 1 - dist.get_rank())]):
        work.wait()


def _sends(i: int) -> bool:
    return dist.get_rank() == i % 2


class Between:
    """What a rank computes before each collective, as it does in a step: products of about `seconds`, on operands that
    are new to the caches. A collective then begins where the ranks are not quite together, its threads have slept, and
    the processors are at work for others.

    Args:
        seconds: of one rank alone; with 0 nothing is computed.
    """

    def __init__(self, seconds: float, grid: Grid, device: torch.device) -> None:
        operands = Operands(device, torch.float32, grid.pool)
        self.sets = operands.sets((256, 512), (512, 512))
        product = Case("", (), cycling(functools.partial(F.linear), self.sets))
        alone = min(call_seconds(product, 20, device) for _ in range(5)) if seconds else 1.0
        count = torch.tensor(seconds / alone)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        self.count, self.next = round(count.item()), 0

    def __call__(self) -> None:
        for _ in range(self.count):
            self.next += 1
            F.linear(*self.sets[self.next % len(self.sets)])

    def before(self, case: Case) -> Case:
        """The case with the computing before it. Of the two ranks of a message the one that sends computes: the other
        waits for it."""
        message = case.kind == "send_recv"

        def call(i: int) -> object:
            if not message or _sends(i):
                self()
            return case.call(i)

        return Case(case.kind, case.sizes, call)

    def seconds(self, device: torch.device) -> tuple[float, float]:
        """Seconds of the computing without a collective: of all ranks at once, by the mean of their rates as the
        speed of ranks that share processors is (concurrency_seconds), and of one while the others wait."""
        if not self.count:
            return 0.0, 0.0
        together = together_seconds(Case("", (), lambda i: self()), 8, device)
        first = together_seconds(Case("", (), lambda i: self() if dist.get_rank() == 0 else None), 8, device)
        rate, longest = torch.tensor(1 / together), torch.tensor(first)
        dist.all_reduce(rate)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return dist.get_world_size() / rate.item(), longest.item()


def collective_samples(grid: Grid, device: torch.device, group: Group) -> list[Sample]:
    """Median seconds of each case on the slowest rank: what it adds to computing, waiting for the others included.

    Never less than a quarter of what it takes when nothing else is done: computing is taken off, and where a
    collective is short next to it the rest is noise.
    """
    cases = collective_cases(grid, device, group)
    least = torch.tensor([[together_seconds(case, 2, device) for _ in range(3)] for case in cases]).amin(1)
    # All ranks must make the same number of calls; an even one, so that messages go there and back.
    dist.all_reduce(least, dist.ReduceOp.MAX)
    between = Between(grid.between if device.type == "cpu" else 0.0, grid, device)
    longest = 25 if not between.count else 4
    counts = [2 * max(1, min(longest, int(2 * grid.seconds / seconds))) for seconds in least.tolist()]
    rounds, computing = [], []
    for _ in range(grid.repeats):
        rounds.append([together_seconds(between.before(c), n, device) for c, n in zip(cases, counts, strict=True)])
        computing += [between.seconds(device) for _ in range(3)]
    slowest = torch.tensor(rounds)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    # Computing hardly changes from round to round: its median leaves less noise than each round's own.
    together, sending = np.median(computing, axis=0)
    found = []
    for case, times, seconds in zip(cases, slowest.T.tolist(), least.tolist(), strict=True):
        off = sending if case.kind == "send_recv" else together
        found.append(sample(case.kind, case.sizes, [max(time - off, 0.25 * seconds) for time in times]))
    return found
