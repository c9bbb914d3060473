"""One rank of a layout of any size, run by one process: what it computes, what it holds and what it would send.

torch's fake process group stands in for the other ranks: collectives return at once with numbers of the right shape
and no meaning, so that seconds are the rank's own work, and losses are not looked at. Where the rank's share is too
much for this machine, tensors are fake too (FakeTensorMode): then nothing is computed, no seconds are known, and
memory is what torch's MemTracker adds up from the same steps. Which experts fake tokens choose nobody can say: all get
as many.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining.schedules import _PipelineSchedule
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import _disable_current_modes

import runtime.experts
import runtime.parallelize
from planner.plan import Plan
from runtime.collective_log import CollectiveLog
from runtime.data import Batch, Batches
from runtime.experts import count_tokens, even_counts, even_sizes, message_sizes
from runtime.fake_group import fake_group
from runtime.here import check_alone
from runtime.machine import memory_bytes
from runtime.parallelize import apply_ddp
from runtime.rank_memory import Buckets, RankMemory
from runtime.step import Run, build_run
from runtime.trainer import find_device
from simulator.errors import UserError
from simulator.results import Alone
from simulator.traffic import communication

# Model FLOPs of a step that a processor is asked for: about a minute at 1e11 a second.
MOST_FLOPS = 6e12


def run_alone(plan: Plan, rank: int, steps: int, warmup: int, fake: bool) -> Alone:
    """Run this rank of the plan's layout and measure it. No process group may exist yet.

    Args:
        fake: compute nothing, only count: one step to create the optimizer's state, one that is tracked.

    Raises:
        UserError: the layout has no such rank, or the runtime cannot execute it.
    """
    check_alone(plan, rank)
    if fake and plan.job.model.num_experts and plan.job.training.precision == "fp32":
        raise UserError(
            f"training.precision = 'fp32': rank {rank} of a mixture ({plan.job.model.name}) cannot be counted with "
            f"fake tensors, for which torch knows grouped matmuls in bf16 alone; set training.precision = 'bf16'"
        )
    layout, device = plan.layout, find_device()
    # The loss is read as a number; with a ShapeEnv that is a symbol, where else it would be an error. Shapes are none.
    symbols = {"shape_env": ShapeEnv(), "static_shapes": True}
    mode = FakeTensorMode(allow_non_fake_inputs=True, **symbols) if fake else contextlib.nullcontext()
    log, buckets = CollectiveLog(), Buckets()
    with fake_group(rank, layout.world_size), _stand_ins(mode, log, buckets if fake else None):
        batches = Batches(plan.job, layout, rank, device)
        run = build_run(plan.job, layout, device)
        seconds = [_timed(run, batches.load(step), mode) for step in range(1 if fake else steps)]
        memory = RankMemory(run, buckets)
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
def _stand_ins(mode: Any, log: CollectiveLog, buckets: Buckets | None) -> Iterator[None]:
    """What a process group that hears nobody needs. Stages cannot agree on their shapes by messages, so they take
    those that they were built with; DDP's reducer, which no dispatch mode sees, is given a hook; and fake weights are
    materialised after the model is cut, because DTensor and FSDP cut real meta tensors only.

    Args:
        buckets: what stands in for DDP's where tensors are fake.
    """
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
        if buckets is not None:
            # The reducer is C++ and wants real memory.
            trained = [p for p in stage.parameters() if p.requires_grad]
            log.at_the_end += trained
            with mode:
                buckets.hold(trained)
            return stage
        wrapped = apply_ddp(stage, mesh)
        # DDP checks annotations, which are texts here: a lambda has none.
        wrapped.register_comm_hook(log, lambda log, bucket: log.reduce_bucket(bucket))
        return wrapped

    fake = isinstance(mode, FakeTensorMode)
    with (
        mock.patch.object(runtime.experts, "count_tokens", even_counts if fake else count_tokens),
        mock.patch.object(runtime.experts, "message_sizes", even_sizes if fake else message_sizes),
        mock.patch.object(_PipelineSchedule, "_warmup_p2p", static, create=True),
        mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
        mock.patch.object(runtime.parallelize, "init_weights", init_weights),
        mock.patch.object(runtime.parallelize, "apply_ddp", ddp),
    ):
        yield
