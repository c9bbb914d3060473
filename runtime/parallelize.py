"""Cut a stage as the layout says: tensor parallelism, then recompute, then data parallelism.

Every step is torch's own: DTensor's `parallelize_module`, `checkpoint_wrapper`, FSDP2's `fully_shard`, DDP.

    dp_replicate  dp_shard  tp      data parallelism
    > 1           1         1       DistributedDataParallel in fp32, fully_shard over (dp_replicate, 1) in bf16
    any           > 1       any     fully_shard; with dp_replicate over a two-dimensional mesh (HSDP)
    > 1           1         > 1     fully_shard over (dp_replicate, 1): DDP refuses models that mix DTensors and plain
                                    tensors, and HSDP with a shard of one is replication by public API
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from runtime.model import Attention, FeedForward, Transformer, init_weights, norms_behind
from simulator.job import Training
from simulator.layout import AXES, Layout

MESH_AXES = tuple(axis for axis in reversed(AXES) if axis != "cp")


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The ranks as a grid, pp outermost and tp innermost, so that a coordinate here is `Layout.coordinates`."""
    return init_device_mesh(device_type, tuple(getattr(layout, axis) for axis in MESH_AXES), mesh_dim_names=MESH_AXES)


def uses_ddp(layout: Layout, training: Training) -> bool:
    return layout.dp_replicate > 1 and not uses_fsdp(layout, training)


def uses_fsdp(layout: Layout, training: Training) -> bool:
    """Whether stages are FSDP modules. bf16 is always FSDP's mixed precision, over a shard of one where nothing is
    sharded: so every layout computes in the same precision, and the residual stream is bf16 in all of them."""
    return training.precision == "bf16" or layout.dp_shard > 1 or (layout.tp > 1 and layout.dp_replicate > 1)


def activation_dtype(layout: Layout, training: Training) -> torch.dtype:
    """Of the residual stream."""
    return torch.bfloat16 if training.precision == "bf16" else torch.float32


def parallelize(
    stage: Transformer, layout: Layout, training: Training, mesh: DeviceMesh, device: torch.device
) -> nn.Module:
    """The stage, built on the meta device, as this rank runs it: cut, with memory and with its initial weights."""
    if layout.tp > 1:
        apply_tensor_parallel(stage, mesh["tp"], layout.sequence_parallel)
    if layout.recompute == "full":
        apply_recompute(stage)
    if uses_fsdp(layout, training):
        apply_fsdp(stage, layout, training, mesh)
    init_weights(stage, training.seed, device)
    return apply_ddp(stage, mesh) if uses_ddp(layout, training) else stage


class ShardedPositions(ParallelStyle):
    """Position embedding under sequence parallelism: the table is replicated, each rank looks up its own positions.

    SequenceParallel is no use here, because it takes inputs that are cut already.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def cut_input(_: nn.Module, inputs: tuple[Any, ...], mesh: DeviceMesh) -> DTensor:
            return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False).redistribute(mesh, [Shard(0)])

        def to_local(_: nn.Module, output: DTensor, mesh: DeviceMesh) -> Tensor:
            return output.to_local()

        return distribute_module(module, device_mesh, None, cut_input, to_local)


def apply_tensor_parallel(stage: Transformer, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Heads, feed-forward width and vocabulary over the tensor axis (Megatron-LM, arXiv 1909.08053); with
    sequence_parallel the residual stream is cut along the sequence between them (arXiv 2205.05198).

    PrepareModuleInput makes the gather before attention and feed-forward one collective, and its backward too: the
    partial gradients of wq, wk, wv (w1, w3) are added before they are reduced.
    """
    stream = Shard(1) if sequence_parallel else Replicate()
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=stream),
        "output": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
    }
    # BERT's transform is cut by columns, and its output gathered again; T5's biases by heads.
    plan["transform"] = ColwiseParallel(input_layouts=stream, output_layouts=stream)
    plan |= dict.fromkeys(("encoder_bias", "decoder_bias"), ColwiseParallel())
    if sequence_parallel:
        local = SequenceParallel(use_local_output=True)
        plan["norm"] = SequenceParallel()
        plan |= {f"{side}embedding_norm": local for side in ("", "encoder_", "decoder_")} | {"encoder_norm": local}
        tables = ("pos_embeddings", "type_embeddings", "encoder_positions", "decoder_positions")
        plan |= dict.fromkeys(tables, ShardedPositions())
    present = {name: style for name, style in plan.items() if getattr(stage, name, None) is not None}
    parallelize_module(stage, mesh, present)
    stage.tie_weights()
    for block in stage.layers.values():
        parallelize_module(block, mesh, _block_plan(block, stream, norms_behind(stage.spec)))


def _block_plan(block: nn.Module, stream: Shard | Replicate, behind: bool) -> dict[str, ParallelStyle]:
    attention, feed_forward = block.attention, block.feed_forward
    assert isinstance(attention, Attention) and isinstance(feed_forward, FeedForward)
    plan: dict[str, ParallelStyle] = {
        "attention": PrepareModuleInput(input_layouts=(stream, None), desired_input_layouts=(Replicate(), None)),
        "feed_forward": PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),)),
        "attention.wo": RowwiseParallel(output_layouts=stream),
        "feed_forward.w2": RowwiseParallel(output_layouts=stream),
    }
    columns = ["attention.wq", "attention.wk", "attention.wv", "feed_forward.w1"]
    plan |= {name: ColwiseParallel() for name in columns + ["feed_forward.w3"] * (feed_forward.w3 is not None)}
    if hasattr(block, "cross_attention"):
        replicated = (Replicate(), Replicate())
        plan["cross_attention"] = PrepareModuleInput(input_layouts=(stream, stream), desired_input_layouts=replicated)
        plan["cross_attention.wo"] = RowwiseParallel(output_layouts=stream)
        plan |= {f"cross_attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")}
    if stream.is_shard():
        # A norm behind the sum gives the next residual stream, which is a plain tensor.
        names = [name for name, _ in block.named_children() if name.endswith("norm")]
        plan |= {name: SequenceParallel(use_local_output=behind) for name in names}
    if attention.q_norm is not None:
        # Over heads what sequence parallelism is over positions: one weight, each rank norms its own part.
        norm = SequenceParallel(sequence_dim=2, use_local_output=True)
        plan |= {"attention.q_norm": norm, "attention.k_norm": norm}
    return plan


def apply_recompute(stage: Transformer) -> None:
    """Keep only each block's input for the backward. There is no dropout, so no random state to restore."""
    for name, block in stage.layers.items():
        stage.layers[name] = checkpoint_wrapper(block, preserve_rng_state=False)


def apply_fsdp(stage: Transformer, layout: Layout, training: Training, mesh: DeviceMesh) -> None:
    """Shard each block, and embedding, final norm and head as one group with the root (they may share a weight).

    zero_stage 3 frees a block's parameters after its forward and gathers them again for the backward; the root is
    needed first in the backward, so it stays. zero_stage 2 keeps all of them until the step's last backward.
    """
    bf16 = training.precision == "bf16"
    # The rotary table is float32 on purpose, and the stream between blocks is bf16 already: nothing to cast.
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
        if bf16
        else MixedPrecisionPolicy()
    )
    over = mesh["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else mesh["dp_shard"]
    for block in stage.layers.values():
        fully_shard(block, mesh=over, mp_policy=policy, reshard_after_forward=layout.zero_stage == 3)
    fully_shard(stage, mesh=over, mp_policy=policy, reshard_after_forward=False)


def apply_ddp(stage: Transformer, mesh: DeviceMesh) -> DistributedDataParallel:
    """Replicate. Replicas are equal from the start, so nothing is broadcast; gradients live in DDP's buckets."""
    group = mesh["dp_replicate"].get_group()
    return DistributedDataParallel(stage, process_group=group, init_sync=False, gradient_as_bucket_view=True)


@contextlib.contextmanager
def gradient_sync(stage: nn.Module, layout: Layout, last: bool) -> Any:
    """Around forward and backward of one microbatch without a pipeline: what is reduced after it.

    Sharded gradients are reduce-scattered after every microbatch, so that they stay sharded; replicas agree once, after
    the last one. zero_stage 2 keeps the gathered parameters from one microbatch to the next.
    """
    if isinstance(stage, DistributedDataParallel):
        with contextlib.nullcontext() if last else stage.no_sync():
            yield
        return
    if isinstance(stage, FSDPModule):
        if layout.dp_shard > 1:
            stage.set_requires_all_reduce(last)
        else:
            stage.set_requires_gradient_sync(last)
        if layout.zero_stage != 3:
            stage.set_reshard_after_backward(last)
    yield
