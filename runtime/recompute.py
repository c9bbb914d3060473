"""Which activations of a block are kept for its backward, and which are computed again.

    full       the block's input is kept and the whole forward runs again
    selective  besides its input a block keeps the outputs of matmuls, of attention and of tensor-parallel reductions;
               the rest (norms, rotary embedding, activation functions, sums, gathers) runs again

Selective is torch's own (`create_selective_checkpoint_contexts`); the stacks that run here describe the same to the
simulator: `selective_recompute = { pointwise = 1.0 }` and `selective_keeps_outputs`.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, create_selective_checkpoint_contexts

from runtime.model import Stage

aten, collectives = torch.ops.aten, torch.ops._c10d_functional
KEPT = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._grouped_mm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        collectives.all_reduce.default,
        collectives.reduce_scatter_tensor.default,
    }
)

# Marks for a profiler are no work. FSDP of experts, which lie within a block, sets one more when the block runs again,
# and torch 2.13 would look for what it had kept of it.
SAC_IGNORED_OPS.update(
    getattr(getattr(torch.ops.profiler, name), overload)
    for name in ("_record_function_enter", "_record_function_enter_new", "_record_function_exit")
    for overload in getattr(torch.ops.profiler, name).overloads()
)


def apply_recompute(stage: Stage, kind: str) -> None:
    """Wrap each block of the stage. There is no dropout, so no random state to restore."""
    options = {"context_fn": functools.partial(create_selective_checkpoint_contexts, _policy)}
    for name, block in stage.layers.items():
        stage.layers[name] = checkpoint_wrapper(
            block, preserve_rng_state=False, **(options if kind == "selective" else {})
        )


def _policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in KEPT else CheckpointPolicy.PREFER_RECOMPUTE
