"""What a rank holds in a step, counted by torch's MemTracker from the tensors that the step makes, real or fake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker, _MemRefType
from torch.nn.parallel import DistributedDataParallel

from runtime.step import Run
from simulator.results import TrackedMemory

# What MemTracker calls the kinds of memory, and what we do.
_KINDS = {"Parameter": "parameters", "Gradient": "gradients", "Optstate": "optimizer", "Activation": "activations"}


class Buckets:
    """Stands in for DDP's buckets (`gradient_as_bucket_view`): memory for all gradients that is there from the start,
    into which each is copied as it comes and of which it is a view from then on (torch's reducer.cpp). How the buckets
    are cut does not matter to their sum."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def hold(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            bucket = torch.zeros_like(parameter)
            self.tensors.append(bucket)
            parameter.register_post_accumulate_grad_hook(lambda p, bucket=bucket: _into(bucket, p))


def _into(bucket: Tensor, parameter: Tensor) -> None:
    if parameter.grad is not bucket:
        assert parameter.grad is not None
        bucket.copy_(parameter.grad)
        parameter.grad = bucket


def _receive_buffers(run: Run) -> Iterator[Tensor]:
    """What torch's pipeline stages have allocated for the tensors of their neighbours, for all microbatches."""
    for stage in run.schedule._stages if run.schedule is not None else ():
        for received in (*stage.args_recv_info.values(), *stage.grad_recv_info.values()):
            buffers = (getattr(one, "buffer", None) for one in received)
            yield from (buffer for buffer in buffers if isinstance(buffer, Tensor))


class _NoModules:
    """Stands in for MemTracker's tracker of modules, whose hooks forbid a split backward."""

    parents = frozenset({"Global"})

    @property
    def is_bw(self) -> bool:
        return torch._C._current_graph_task_id() != -1

    def __enter__(self) -> _NoModules:
        return self

    def __exit__(self, *error: object) -> None: ...

    def register_user_hooks(self, *hooks: object) -> None: ...

    def clear_user_hooks(self) -> None: ...


class RankMemory(MemTracker):
    """torch's MemTracker over whole steps: what there is before counts from the begin, and modules are not told apart
    (a stage runs once for every microbatch, which the tracker refuses to attribute)."""

    def __init__(self, run: Run, buckets: Buckets) -> None:
        super().__init__()
        self._mod_tracker = _NoModules()
        self.run = run
        self.track_external(*run.stages, run.optimizer)
        for tensor in buckets.tensors:
            self._update_and_maybe_create_winfos(tensor, _MemRefType.GRAD)
        for buffer in _receive_buffers(run):
            self._update_and_maybe_create_winfos(buffer, _MemRefType.ACT)

    def __enter__(self) -> RankMemory:
        for stage in self.run.stages:
            hooks = not isinstance(stage, DistributedDataParallel)
            self._track_module_params_and_buffers(stage, install_grad_hooks=hooks)
        super().__enter__()
        return self

    def peak(self) -> TrackedMemory:
        """Bytes by kind at the fullest moment."""
        snapshots = self.get_tracker_snapshot("peak")
        device = max(snapshots, key=lambda one: snapshots[one]["Total"])
        items: Counter[str] = Counter()
        for kind, size in snapshots[device].items():
            name = getattr(kind, "value", kind)
            if name != "Total":
                items[_KINDS.get(str(name), "temporary")] += size
        known = {name: float(items[name]) for name in (*_KINDS.values(), "temporary")}
        return TrackedMemory(**known, peak=sum(known.values()))
