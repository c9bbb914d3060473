"""What a rank sends in a step: collectives and messages, counted where torch issues them."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from runtime.step import Run
from simulator.results import Collective
from simulator.traffic import group_name

# DDP's own (torch 2.13): the first bucket is small so that the first reduction starts early.
FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20

_NAMES = {
    "allreduce": "all_reduce",
    "all_reduce": "all_reduce",
    "allgather": "all_gather",
    "_allgather_base": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "alltoall": "all_to_all",
    "alltoall_base": "all_to_all",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
    "send": "send",
    "recv": "recv",
}


class CollectiveLog(TorchDispatchMode):
    """Counts collectives and messages and their bytes: of the whole buffer that a collective gathers, reduces or
    scatters, of the tensor that a message moves."""

    def __init__(self) -> None:
        super().__init__()
        # (name, group, bytes) -> how many.
        self.counts: Counter[tuple[str, str, int]] = Counter()
        # Parameters whose gradients DDP would reduce where it is left out.
        self.at_the_end: list[nn.Parameter] = []

    def clear(self) -> None:
        self.counts.clear()

    def add(self, name: str, group: str, size: int) -> None:
        self.counts[name, group, size] += 1

    def reduce_bucket(self, bucket: dist.GradBucket) -> Future[Any]:
        """A hook for DDP, whose reducer no dispatch mode sees: count the bucket and give it back as it is."""
        self.add("all_reduce", "ddp", bucket.buffer().nbytes)
        done: Future[Any] = Future()
        done.set_result(bucket.buffer())
        return done

    def collectives(self, run: Run) -> tuple[Collective, ...]:
        """All of them by axis and name."""
        if self.at_the_end:
            for size in _buckets(self.at_the_end):
                self.add("all_reduce", "ddp", size)
        axes = _axes_of_groups(run)
        counts: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        for (name, group, size), count in self.counts.items():
            row = axes.get((name, group), axes.get(group, group)), name
            counts[row] += count
            sizes[row] += count * size
        return tuple(
            Collective(name, axis, counts[axis, name], float(sizes[axis, name])) for axis, name in sorted(counts)
        )

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            # DTensor takes the op apart into ops of plain tensors, which come back here.
            return NotImplemented
        result = function(*args, **(kwargs or {}))
        if (name := _name_of(function)) is not None:
            sizes = [sum(t.nbytes for t in tree_leaves(one) if isinstance(t, torch.Tensor)) for one in (*args, result)]
            self.add(name, _group_of([*args, *(kwargs or {}).values()]), max(sizes))
        return result


def _buckets(parameters: list[nn.Parameter]) -> list[int]:
    """Bytes of the buckets that DDP makes of gradients that are ready from the last parameter to the first."""
    # The function looks at sizes alone, but takes no fake tensors.
    sizes = [torch.empty((), dtype=p.dtype).expand(p.numel()) for p in reversed(parameters)]
    found, _ = dist._compute_bucket_assignment_by_size(sizes, [FIRST_BUCKET_BYTES, BUCKET_BYTES])
    return [sum(sizes[place].numel() * sizes[place].element_size() for place in places) for places in found]


def _name_of(function: Any) -> str | None:
    """The collective that an op is: `c10d::_allgather_base_`, `_c10d_functional::all_gather_into_tensor` ..."""
    namespace, _, name = str(function.name()).partition("::")
    if "c10d" not in namespace:
        return None
    return _NAMES.get(name.partition(".")[0].removesuffix("_").removesuffix("_out").removesuffix("_coalesced"))


def _group_of(args: list[Any]) -> str:
    """The name of the process group among the arguments of a collective."""
    for one in args:
        if isinstance(one, torch.ScriptObject):
            with contextlib.suppress(RuntimeError, TypeError):
                return str(dist.ProcessGroup.unbox(one).group_name)
        if isinstance(one, str) and one not in ("sum", "avg", "max", "min"):
            return one
    return "world"


def _axes_of_groups(run: Run) -> dict[object, str]:
    """What each process group of this rank is called, by its name in torch: routed experts' groups as their mesh calls
    them, all others by the axes of the layout along which their ranks differ.

    Whatever spans the world may use its group: there ep is known by what it does, an all-to-all.
    """
    found: dict[object, str] = {}
    for group, places in dist.distributed_c10d._world.pg_group_ranks.items():
        # Groups without this rank are listed as a number.
        if isinstance(group, dist.ProcessGroup):
            found[group.group_name] = group_name(run.layout, tuple(places))
    if run.experts is not None:
        names = ("ep", "expert_shard", "expert_replicate")
        groups = {run.experts.get_group(name).group_name: name for name in names}
        world = dist.distributed_c10d._get_default_group().group_name
        found |= {("all_to_all", group) if group == world else group: name for group, name in groups.items()}
    return found | {"ddp": group_name(run.layout, run.layout.group("dp_replicate", "cp"))}
