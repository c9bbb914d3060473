"""Cut a stage as the layout says: tensor, expert and context parallelism, recompute, compilation, data parallelism.

Every step is torch's own: DTensor's `parallelize_module`, `checkpoint_wrapper`, `compile`, FSDP2's `fully_shard`, DDP.

    dp_replicate  dp_shard  tp      data parallelism
    > 1           1         1       DistributedDataParallel in fp32, fully_shard over (dp_replicate, 1) in bf16
    any           > 1       any     fully_shard; with dp_replicate over a two-dimensional mesh (HSDP)
    > 1           1         > 1     fully_shard over (dp_replicate, 1): DDP refuses models that mix DTensors and plain
                                    tensors, and HSDP with a shard of one is replication by public API

A split backward (zero-bubble schedules) writes the gradients of weights itself, past autograd's hooks. DDP reduces in
those hooks, so that replicas would drift apart: there too it is fully_shard over (dp_replicate, 1).

The ranks of cp hold the same parameters: with zero_stage they are part of dp_shard here, without it of dp_replicate.
Routed experts under expert parallelism are FSDP modules of their own, over the ranks that hold the same ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from runtime.context import apply_context_parallel
from runtime.experts import spread_experts
from runtime.model import Transformer, init_weights
from runtime.recompute import apply_recompute
from runtime.tensor_parallel import apply_tensor_parallel
from simulator.axes import AXES
from simulator.data_parallel import uses_fsdp
from simulator.expert_parallel import expert_grid
from simulator.job import Job, Training
from simulator.layout import Layout

MESH_AXES = tuple(reversed(AXES))


def build_mesh(layout: Layout, device_type: str, ranks: Sequence[int] | None = None) -> DeviceMesh:
    """The ranks as a grid, pp outermost and tp innermost, so that a coordinate here is `Layout.coordinates`.

    Args:
        ranks: which ranks, where they are not all; every rank makes the meshes of all of them, in the same order.
    """
    return _grid(device_type, tuple(getattr(layout, axis) for axis in MESH_AXES), MESH_AXES, ranks)


def build_expert_mesh(
    job: Job, layout: Layout, device_type: str, ranks: Sequence[int] | None = None
) -> DeviceMesh | None:
    """The same ranks as routed experts see them under expert parallelism, ep innermost; None without it."""
    if layout.ep == 1:
        return None
    grid = expert_grid(layout, job.stack)
    names = ("pp", "expert_replicate", "expert_shard", "ep")
    return _grid(device_type, (layout.pp, grid.replicas, grid.shards, grid.ep), names, ranks)


def _grid(device_type: str, sizes: tuple[int, ...], names: tuple[str, ...], ranks: Sequence[int] | None) -> DeviceMesh:
    if ranks is None:
        return init_device_mesh(device_type, sizes, mesh_dim_names=names)
    return DeviceMesh(device_type, torch.tensor(ranks).view(sizes), mesh_dim_names=names)


def data_mesh(layout: Layout, mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that hold the same parameters, as FSDP takes them: (replicas, shards), or shards alone."""
    if layout.cp == 1:
        return mesh["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else mesh["dp_shard"]
    if not layout.zero_stage:
        return DeviceMesh._concatenate([replica_mesh(layout, mesh), mesh["dp_shard"]])
    shards = mesh["cp"] if layout.dp_shard == 1 else mesh["dp_shard", "cp"]._flatten("dp_shard_cp")
    return DeviceMesh._concatenate([mesh["dp_replicate"], shards]) if layout.dp_replicate > 1 else shards


def replica_mesh(layout: Layout, mesh: DeviceMesh) -> DeviceMesh:
    """The ranks that hold the same parameters where nothing is sharded."""
    if layout.cp == 1 or layout.dp_replicate == 1:
        return mesh["dp_replicate" if layout.cp == 1 else "cp"]
    return mesh["dp_replicate", "cp"]._flatten("dp_replicate_cp")


def uses_ddp(layout: Layout, job: Job) -> bool:
    """Replicas that are no FSDP modules. bf16 is always FSDP's mixed precision, over a shard of one where nothing is
    sharded: so every layout computes in the same precision, and the residual stream is bf16 in all of them."""
    return layout.dp_replicate * layout.cp > 1 and not uses_fsdp(job, layout)


def activation_dtype(layout: Layout, training: Training) -> torch.dtype:
    """Of the residual stream."""
    return torch.bfloat16 if training.precision == "bf16" else torch.float32


def parallelize(
    stage: Transformer,
    layout: Layout,
    job: Job,
    mesh: DeviceMesh,
    experts: DeviceMesh | None,
    device: torch.device,
) -> nn.Module:
    """The stage, built on the meta device, as this rank runs it: cut, with memory and with its initial weights."""
    training = job.training
    if layout.tp > 1:
        apply_tensor_parallel(stage, mesh["tp"], layout.sequence_parallel, layout.ep == 1)
    if experts is not None:
        apply_expert_parallel(stage, experts["ep"])
    if layout.cp > 1:
        apply_context_parallel(stage, mesh["cp"])
    if layout.recompute != "none":
        apply_recompute(stage, layout.recompute)
    if job.stack.compile:
        apply_compile(stage)
    if uses_fsdp(job, layout):
        apply_fsdp(stage, layout, training, mesh, experts)
    init_weights(stage, training.seed, device)
    return apply_ddp(stage, replica_mesh(layout, mesh)) if uses_ddp(layout, job) else stage


def apply_expert_parallel(stage: Transformer, mesh: DeviceMesh) -> None:
    """Routed experts over the ep axis (GShard, arXiv 2006.16668)."""
    for block in stage.layers.values():
        if block.moe is not None:
            spread_experts(block.moe.experts, mesh)


def apply_compile(stage: Transformer) -> None:
    """Compile each block for itself, before FSDP puts its hooks around it: blocks are alike, so that one compilation
    serves all of a stage, and what FSDP gathers stays outside of the graphs."""
    if stage.tok_embeddings is not None:
        # DTensor returns a result that is still on its way. As the input of a compiled block that loses its gradient's
        # placement (torch 2.13); a copy waits for it.
        stage.tok_embeddings.register_forward_hook(lambda module, inputs, output: output.clone())
    for block in stage.layers.values():
        block.compile()


def apply_fsdp(
    stage: Transformer, layout: Layout, training: Training, mesh: DeviceMesh, experts: DeviceMesh | None
) -> None:
    """Shard each block, and embedding, final norm and head as one group with the root (they may share a weight).

    zero_stage 3 frees a block's parameters after its forward and gathers them again for the backward; the root is
    needed first in the backward, so it stays. zero_stage 1 and 2 keep all of them until the step's last backward.

    With a split backward parameters must stay, so zero_stage is not 3 there: torch looks for the weights of a graph
    among the parameters that the stage has when its input gradient begins (stage_backward_input), and where they have
    been freed since the forward those are the shards, which are in no graph. Their gradients would be lost silently.
    """
    bf16 = training.precision == "bf16"
    # The rotary table is float32 on purpose, and the stream between blocks is bf16 already: nothing to cast.
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if bf16
        else MixedPrecisionPolicy()
    )
    over = data_mesh(layout, mesh)
    for block in stage.layers.values():
        if experts is not None and block.moe is not None:
            same = experts["expert_replicate", "expert_shard"]
            fully_shard(
                block.moe.experts,
                mesh=same if same.size(0) > 1 else experts["expert_shard"],
                mp_policy=policy,
                reshard_after_forward=layout.zero_stage == 3,
            )
        fully_shard(block, mesh=over, mp_policy=policy, reshard_after_forward=layout.zero_stage == 3)
    fully_shard(stage, mesh=over, mp_policy=policy, reshard_after_forward=False)


def apply_ddp(stage: Transformer, mesh: DeviceMesh) -> DistributedDataParallel:
    """Replicate. Replicas are equal from the start, so nothing is broadcast; gradients live in DDP's buckets."""
    group = mesh.get_group()
    return DistributedDataParallel(stage, process_group=group, init_sync=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(stage: nn.Module, layout: Layout, last: bool) -> Any:
    """Around forward and backward of one microbatch without a pipeline: what is reduced after it.

    From zero_stage 2 on gradients are reduce-scattered after every microbatch, so that they stay sharded; replicas
    agree once, after the last one. zero_stage 1 adds whole gradients up and reduces them once. Both keep the gathered
    parameters from one microbatch to the next.
    """
    if isinstance(stage, DistributedDataParallel):
        with contextlib.nullcontext() if last else stage.no_sync():
            yield
        return
    if isinstance(stage, FSDPModule):
        if layout.shards_gradients:
            stage.set_requires_all_reduce(last)
        else:
            stage.set_requires_gradient_sync(last)
        if layout.zero_stage != 3:
            stage.set_reshard_after_backward(last)
    yield
