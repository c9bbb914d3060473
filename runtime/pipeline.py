"""Pipeline stages of a rank, and the simulator's program over them, run by torch's schedule runtime."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import _Action, _add_send_recv, _PipelineScheduleRuntime

from runtime.encoder_decoder import EncoderDecoder
from runtime.model import Stage, Transformer
from runtime.parallelize import activation_dtype
from simulator.job import Training
from simulator.layout import Layout
from simulator.model import ModelSpec
from simulator.program import sharded_order
from simulator.schedules import compute_order

LossFunction = Callable[[Tensor, Tensor], Tensor]


def blocks_of(layout: Layout, num_hidden_layers: int, stage: int) -> range:
    """Indices of the blocks in a stage."""
    bounds = [0, *itertools.accumulate(layout.layers_per_stage(num_hidden_layers))]
    return range(bounds[stage], bounds[stage + 1])


def build_stage(spec: ModelSpec, layout: Layout, seq_len: int, stage: int) -> Transformer:
    """One stage of the model on the meta device; the whole model where the layout has no pipeline."""
    with torch.device("meta"):
        if spec.encoder_decoder:
            return EncoderDecoder(spec, seq_len)
        blocks = blocks_of(layout, spec.num_hidden_layers, stage)
        return Stage(spec, seq_len, blocks, first=stage == 0, last=stage == layout.stages - 1)


def build_schedule(
    modules: Sequence[nn.Module],
    spec: ModelSpec,
    layout: Layout,
    training: Training,
    mesh: DeviceMesh,
    device: torch.device,
    loss: LossFunction,
) -> Any:
    """Torch's schedule runtime over this rank's stages (in the order of `Layout.stages_of`), with the simulator's
    program.

    The loss is per microbatch and divided by their number already, so torch must not scale gradients again.
    """
    numbers = layout.stages_of(mesh["pp"].get_local_rank())
    stages = [
        _pipeline_stage(module, number, spec, layout, training, mesh, device)
        for module, number in zip(modules, numbers, strict=True)
    ]
    count = layout.microbatches(training.global_batch_size)
    schedule = _PipelineScheduleRuntime(stages, count, loss_fn=loss, scale_grads=False)
    schedule._prepare_schedule_with_comms(torch_program(layout, count), format="compute_comms")
    return schedule


def torch_program(layout: Layout, microbatches: int) -> dict[int, list[_Action]]:
    """The actions of every pipeline rank: the simulator's order of forwards, backwards, gathers and reductions, with
    torch's own sends and receives between them. Both write an action the same way, so that text carries it over.

    Torch posts a receive where the sender sends, early enough to overlap, and in an order in which nobody waits for
    each other; the simulator's program says only where it must have arrived.
    """
    shape = (layout.pp, layout.virtual_stages, microbatches)
    orders = {
        rank: [_Action.from_str(str(op)) for op in sharded_order(compute_order(layout.schedule, rank, *shape), layout)]
        for rank in range(layout.pp)
    }
    return _add_send_recv(orders, layout.rank_of_stage, layout.stages)


def _pipeline_stage(
    module: nn.Module,
    number: int,
    spec: ModelSpec,
    layout: Layout,
    training: Training,
    mesh: DeviceMesh,
    device: torch.device,
) -> PipelineStage:
    """A stage with the shapes of its inputs and outputs given.

    Without them torch finds the shapes by running a forward and a backward before the first step, which DDP does not
    survive with several stages on a rank (its reducer counts every parameter twice, torch 2.13).
    """
    batch, length = layout.micro_batch_size, training.seq_len // layout.cp
    share = length // (layout.tp if layout.sequence_parallel else 1)
    tokens = torch.empty(batch, length, dtype=torch.int64, device="meta")
    stream = torch.empty(
        (batch, share, spec.hidden_size),
        dtype=activation_dtype(layout, training),
        device="meta",
        requires_grad=True,
    )
    logits = torch.empty(
        (batch, length, spec.vocab_size),
        dtype=torch.bfloat16 if training.precision == "bf16" else torch.float32,
        device="meta",
        requires_grad=True,
    )
    return PipelineStage(
        module,
        number,
        layout.stages,
        device,
        input_args=(tokens if number == 0 else stream,),
        output_args=(logits if number == layout.stages - 1 else stream,),
        group=mesh["pp"].get_group(),
    )
