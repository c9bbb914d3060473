"""One rank of a layout of any size, run by one process: what it computes, what it holds and what it would send.

torch's fake process group stands in for the other ranks: collectives return at once with numbers of the right shape
and no meaning, so that seconds are the rank's own work, and losses are not looked at. Where the rank's share is too
much for this machine, tensors are fake too (FakeTensorMode): then nothing is computed, no seconds are known, and
memory is what torch's MemTracker adds up from the same steps.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

import runtime.parallelize
from planner.plan import Plan
from runtime.collective_log import CollectiveLog
from runtime.data import Batch, Batches
from runtime.here import check_alone
from runtime.machine import memory_bytes
from runtime.parallelize import apply_ddp
from runtime.step import Run, build_run
from runtime.trainer import find_device
from simulator.errors import UserError
from simulator.results import Alone, TrackedMemory
from simulator.traffic import communication

# Model FLOPs of a step that a processor is asked for: about a minute at 1e11 a second.
MOST_FLOPS = 6e12
# What MemTracker calls the kinds of memory, and what we do.
_KINDS = {"Parameter": "parameters", "Gradient": "gradients", "Optstate": "optimizer", "Activation": "activations"}


def run_alone(plan: Plan, rank: int, steps: int, warmup: int, fake: bool) -> Alone:
    """Run this rank of the plan's layout and measure it. No process group may exist yet.

    Args:
        fake: compute nothing, only count: one step to create the optimizer's state, one that is tracked.

    Raises:
        UserError: the layout has no such rank, or the runtime cannot execute it.
    """
    check_alone(plan, rank)
    if fake and plan.job.model.num_experts:
        raise UserError(
            f"rank {rank} of a mixture ({plan.job.model.name}) cannot be counted with fake tensors, because which "
            f"tokens go to which expert is found by computing; choose a job whose share of a rank fits this machine"
        )
    layout, device = plan.layout, find_device()
    # The loss is read as a number; with a ShapeEnv that is a symbol, where else it would be an error. Shapes are none.
    symbols = {"shape_env": ShapeEnv(), "static_shapes": True}
    mode = FakeTensorMode(allow_non_fake_inputs=True, **symbols) if fake else contextlib.nullcontext()
    log = CollectiveLog()
    with _fake_group(rank, layout.world_size), _stand_ins(mode, log, fake):
        batches = Batches(plan.job, layout, rank, device)
        run = build_run(plan.job, layout, device)
        seconds = [_timed(run, batches.load(step), mode) for step in range(1 if fake else steps)]
        memory = RankMemory(run)
        log.clear()
        batch = batches.load(len(seconds))
        with mode, memory, log:
            run.step(_faked(batch, mode))
        collectives = log.collectives(run)
    return Alone(
        layout=layout,
        rank=rank,
        coordinates=layout.coordinates(rank),
        fake=fake,
        step_seconds=None if fake else statistics.median(seconds[warmup:]),
        memory=memory.peak(),
        collectives=collectives,
        communication=communication(plan.job, layout, rank),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions={"torch": torch.__version__},
    )


@contextlib.contextmanager
def _fake_group(rank: int, world_size: int) -> Iterator[None]:
    """A world whose other ranks are not there. What DTensor remembers of an op holds the mesh that it saw first, and
    with it groups of a world that this process had before."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    _clear_sharding_prop_cache()
    try:
        yield
    finally:
        dist.destroy_process_group()


def needs_fake(plan: Plan, rank: int, device: torch.device) -> bool:
    """Whether the rank's share is too much for this machine: predicted to take nine tenths of its memory, or on a
    processor minutes for every step."""
    predicted = plan.best.memory_per_stage[plan.layout.coordinates(rank)["pp"]]
    if device.type == "cuda":
        return predicted.peak > 0.9 * torch.cuda.get_device_properties(device).total_memory
    flops = plan.job.model.flops_per_token(plan.job.training.seq_len) * plan.job.tokens_per_step
    too_long = flops / plan.layout.world_size > MOST_FLOPS
    return too_long or predicted.peak - predicted.overhead > 0.9 * memory_bytes()


def _timed(run: Run, batch: Batch, mode: Any) -> float:
    begin = time.perf_counter()
    with mode:
        run.step(_faked(batch, mode))
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)
    return time.perf_counter() - begin


def _faked(batch: Batch, mode: Any) -> Batch:
    if not isinstance(mode, FakeTensorMode):
        return batch
    return Batch(tuple(mode.from_tensor(tensor) for tensor in batch.inputs), mode.from_tensor(batch.targets))


@contextlib.contextmanager
def _stand_ins(mode: Any, log: CollectiveLog, fake: bool) -> Iterator[None]:
    """What a process group that hears nobody needs. Stages cannot agree on their shapes by messages, so they take
    those that they were built with; DDP's reducer, which no dispatch mode sees, is given a hook; and fake weights are
    materialised after the model is cut, because DTensor and FSDP cut real meta tensors only."""
    from torch.distributed.pipelining._utils import InferenceMode

    def static(schedule: _PipelineSchedule, stages: list[Any], *_: object) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    tensor_meta = ShardingPropagator._propagate_tensor_meta_non_cached

    def unseen(propagator: ShardingPropagator, schema: Any) -> Any:
        # DTensor finds shapes by running an op on tensors of the global size, which no rank ever holds.
        with _disable_current_modes():
            return tensor_meta(propagator, schema)

    original = runtime.parallelize.init_weights

    def init_weights(*arguments: Any) -> None:
        with mode:
            original(*arguments)

    def ddp(stage: nn.Module, mesh: Any) -> nn.Module:
        if fake:
            # The reducer is C++ and wants real memory.
            log.at_the_end = [p for p in stage.parameters() if p.requires_grad]
            return stage
        wrapped = apply_ddp(stage, mesh)
        # DDP checks annotations, which are texts here: a lambda has none.
        wrapped.register_comm_hook(log, lambda log, bucket: log.reduce_bucket(bucket))
        return wrapped

    with (
        mock.patch.object(_PipelineSchedule, "_warmup_p2p", static, create=True),
        mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
        mock.patch.object(runtime.parallelize, "init_weights", init_weights),
        mock.patch.object(runtime.parallelize, "apply_ddp", ddp),
    ):
        yield


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

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._mod_tracker = _NoModules()
        self.run = run
        self.track_external(*run.stages, run.optimizer)

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
