"""Collectives and messages, timed as a step meets them: between computing, on ranks that are not quite together.

One behind the other on an idle machine they are up to half as long: then ranks wait for each other awake, and nothing
else wants the processors. A device that works beside its host has neither, and there they follow each other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """Collectives of a group, by the bytes of the whole buffer, and messages of pairs: both ways at once, as in the
    middle of a pipeline, where ranks compute between them, else one way and back."""
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
        if ranks == 2:
            message = _exchange if computes_between(grid, device) else _message
            calls["send_recv"] = functools.partial(message, whole, other)
        cases += [Case(kind, (ranks, 4.0 * elements, *shared), call) for kind, call in calls.items()]
    return cases


def _among(
    group: dist.ProcessGroup | None, function: Callable[..., object], *tensors: Tensor
) -> Callable[[int], object]:
    return lambda i: function(*tensors, group=group)


def _message(given: Tensor, taken: Tensor, i: int) -> None:
    """A message from rank 0 to rank 1, and back the next time: the receiver of one is the sender of the next."""
    rank = dist.get_rank()
    operation = dist.P2POp(dist.isend, given, 1 - rank) if rank == i % 2 else dist.P2POp(dist.irecv, taken, 1 - rank)
    for work in dist.batch_isend_irecv([operation]):
        work.wait()


def _exchange(given: Tensor, taken: Tensor, i: int) -> None:
    """A message to the neighbour and one from it."""
    peer = dist.get_rank() ^ 1
    for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, given, peer), dist.P2POp(dist.irecv, taken, peer)]):
        work.wait()


def computes_between(grid: Grid, device: torch.device) -> bool:
    """Whether ranks compute between collectives; a GPU does not move bytes with what it computes with."""
    return grid.between > 0 and device.type == "cpu"


class Between:
    """What a rank computes before each collective, as it does in a step: products of about `seconds`, on operands that
    are new to the caches. A collective then begins where the ranks are not quite together, its threads have slept, and
    the processors are at work for others.

    Args:
        seconds: of one rank alone.
    """

    def __init__(self, seconds: float, grid: Grid, device: torch.device) -> None:
        operands = Operands(device, torch.float32, grid.pool)
        self.sets = operands.sets((256, 512), (512, 512))
        product = Case("", (), cycling(F.linear, self.sets))
        count = torch.tensor(seconds / min(call_seconds(product, 20, device) for _ in range(5)))
        dist.all_reduce(count, dist.ReduceOp.MAX)
        self.count, self.next = round(count.item()), 0

    def __call__(self, i: int = 0) -> None:
        for _ in range(self.count):
            self.next += 1
            F.linear(*self.sets[self.next % len(self.sets)])

    def before(self, case: Case) -> Case:
        """The case with the computing before it."""

        def call(i: int) -> object:
            self()
            return case.call(i)

        return Case(case.kind, case.sizes, call)


def collective_samples(grid: Grid, device: torch.device, group: Group) -> list[Sample]:
    """Median seconds of each case: what it adds, on the slowest rank, to the computing that ranks do on the average, so
    that waiting for the others is a part of it.

    Never less than a quarter of what it takes when nothing else is done: computing is taken off, and where a
    collective is short next to it the rest is noise.
    """
    cases = collective_cases(grid, device, group)
    least = torch.tensor([[together_seconds(case, 2, device) for _ in range(3)] for case in cases]).amin(1)
    # All ranks must make the same number of calls; an even one, so that messages go there and back.
    dist.all_reduce(least, dist.ReduceOp.MAX)
    if not computes_between(grid, device):
        rounds = _slowest(_rounds(cases, least, 25, grid, device))
        return [sample(case.kind, case.sizes, times) for case, times in zip(cases, rounds.T.tolist(), strict=True)]
    between = Between(grid.between, grid, device)
    # Computing alone, three times in every round: its median over all leaves less noise than that of each.
    plain = [Case("", (), between)] * 3
    rounds = _rounds([*map(between.before, cases), *plain], torch.cat([least, torch.zeros(3)]), 2, grid, device)
    computing = rounds[:, -3:].clone()
    dist.all_reduce(computing)
    beyond = _slowest(rounds[:, :-3].contiguous()) - computing.median() / dist.get_world_size()
    found = []
    for case, times, seconds in zip(cases, beyond.T.tolist(), least.tolist(), strict=True):
        found.append(sample(case.kind, case.sizes, [max(time, 0.25 * seconds) for time in times]))
    return found


def _rounds(cases: Sequence[Case], least: Tensor, longest: int, grid: Grid, device: torch.device) -> Tensor:
    """Seconds of each case in turn on this rank, round after round: (rounds, cases). Each is called up to 2 · `longest`
    times, by its `least` seconds."""
    counts = [2 * max(1, min(longest, int(2 * grid.seconds / max(seconds, 1e-9)))) for seconds in least.tolist()]
    # The first round meets what is loaded and taken once.
    return torch.tensor(
        [
            [together_seconds(case, count, device) for case, count in zip(cases, counts, strict=True)]
            for _ in range(1 + grid.repeats)
        ]
    )[1:]


def _slowest(seconds: Tensor) -> Tensor:
    """Of all ranks."""
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds
