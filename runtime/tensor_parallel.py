"""Tensor and sequence parallelism of a stage, in DTensor's parallel styles."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from runtime.experts import MixtureOfExperts, replicate_weights, split_experts
from runtime.model import Attention, FeedForward, Transformer, norms_behind
from runtime.shards import local_tensor


class VocabularyParallel(ParallelStyle):
    """Token embedding cut by rows (Megatron-LM, arXiv 1909.08053): each rank looks up the ids of its own rows, takes 0
    for the others, and the ranks' summands are reduced to `stream`.

    torch's RowwiseParallel does the same forward, but has no rule for a backward into rows: there the gradient of a
    rank's rows is as large as the whole vocabulary until it is reduced (torch 2.13, _embedding_ops.py).
    """

    def __init__(self, stream: Shard | Replicate) -> None:
        super().__init__()
        self.stream = stream

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_parameter(
            "weight", nn.Parameter(distribute_tensor(module.get_parameter("weight"), device_mesh, [Shard(0)]))
        )
        module.forward = functools.partial(self._look_up, module, device_mesh)
        return module

    def _look_up(self, module: nn.Module, mesh: DeviceMesh, ids: Tensor) -> Tensor:
        rows = local_tensor(module.get_parameter("weight"))
        places = ids - mesh.get_local_rank() * rows.shape[0]
        elsewhere = (places < 0) | (places >= rows.shape[0])
        summand = F.embedding(places.masked_fill(elsewhere, 0), rows).masked_fill(elsewhere.unsqueeze(-1), 0.0)
        partial = DTensor.from_local(summand, mesh, [Partial()], run_check=False)
        return partial.redistribute(mesh, [self.stream]).to_local()


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


def apply_tensor_parallel(
    stage: Transformer, mesh: DeviceMesh, sequence_parallel: bool, cut_experts: bool = True
) -> None:
    """Heads, feed-forward width and vocabulary over the tensor axis (Megatron-LM, arXiv 1909.08053); with
    sequence_parallel the residual stream is cut along the sequence between them (arXiv 2205.05198).

    PrepareModuleInput makes the gather before attention and feed-forward one collective, and its backward too: the
    partial gradients of wq, wk, wv (w1, w3) are added before they are reduced.

    Args:
        cut_experts: cut routed experts by their width too; else each rank routes its share of the sequence.
    """
    stream = Shard(1) if sequence_parallel else Replicate()
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": VocabularyParallel(stream),
        "output": ColwiseParallel(input_layouts=stream, output_layouts=Shard(-1), use_local_output=False),
    }
    # BERT's transform is cut by columns, and its output gathered again; T5's biases are cut by heads.
    plan["transform"] = ColwiseParallel(output_layouts=Replicate())
    plan |= dict.fromkeys(("encoder_bias", "decoder_bias"), ColwiseParallel())
    if sequence_parallel:
        local = SequenceParallel(use_local_output=True)
        plan["norm"] = SequenceParallel()
        # A matrix of h² is less than to exchange what it is cut by, twice.
        plan["transform"] = local
        plan |= {f"{side}embedding_norm": local for side in ("", "encoder_", "decoder_")} | {"encoder_norm": local}
        tables = ("pos_embeddings", "type_embeddings", "encoder_positions", "decoder_positions")
        plan |= dict.fromkeys(tables, ShardedPositions())
    present = {name: style for name, style in plan.items() if getattr(stage, name, None) is not None}
    parallelize_module(stage, mesh, present)
    stage.tie_weights()
    for block in stage.layers.values():
        parallelize_module(block, mesh, _block_plan(block, stream, norms_behind(stage.spec)))
        if block.moe is not None:
            _cut_mixture(block.moe, mesh, stream, cut_experts)
        else:
            assert block.feed_forward is not None
            _cut_feed_forward(block.feed_forward, mesh, stream)


def _cut_feed_forward(feed_forward: FeedForward, mesh: DeviceMesh, stream: Shard | Replicate) -> None:
    columns = ["w1"] + ["w3"] * (feed_forward.w3 is not None)
    plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
    plan["w2"] = RowwiseParallel(output_layouts=stream)
    parallelize_module(feed_forward, mesh, plan)
    PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))._apply(feed_forward, mesh)


def _cut_mixture(mixture: MixtureOfExperts, mesh: DeviceMesh, stream: Shard | Replicate, split: bool) -> None:
    """Experts that are split take the whole sequence, as a feed-forward does; the sum of routed and shared experts is
    reduced at once. Experts that are spread over ep take the tokens from the stream as it is."""
    shared = mixture.shared_experts
    replicate_weights(mixture.router, mesh)
    if not split:
        if shared is not None:
            _cut_feed_forward(shared, mesh, stream)
        return
    split_experts(mixture.experts, mesh)
    if shared is not None:
        columns = ["w1"] + ["w3"] * (shared.w3 is not None)
        plan: dict[str, ParallelStyle] = {name: ColwiseParallel() for name in columns}
        parallelize_module(shared, mesh, plan | {"w2": RowwiseParallel(output_layouts=Partial())})
    PrepareModuleInput(input_layouts=(stream,), desired_input_layouts=(Replicate(),))._apply(mixture, mesh)
    PrepareModuleOutput(output_layouts=(Partial(),), desired_output_layouts=(stream,))._apply(mixture, mesh)


def _block_plan(block: nn.Module, stream: Shard | Replicate, behind: bool) -> dict[str, ParallelStyle]:
    attention = block.attention
    assert isinstance(attention, Attention)
    plan: dict[str, ParallelStyle] = {
        "attention": PrepareModuleInput(input_layouts=(stream, None), desired_input_layouts=(Replicate(), None)),
        "attention.wo": RowwiseParallel(output_layouts=stream),
    }
    plan |= {name: ColwiseParallel() for name in ("attention.wq", "attention.wk", "attention.wv")}
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
