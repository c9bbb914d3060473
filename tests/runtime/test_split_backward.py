"""What torch keeps between the two parts of a split backward is what the simulator counts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from runtime.model import Stage
from simulator.activations import deferred_bytes
from simulator.job import build_job
from simulator.kernels import Cut, block_kernels


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt2"])
def test_gradients_kept_for_the_weights(model: str) -> None:
    """Two blocks, 128 tokens, fp32: the gradient of every matmul's and norm's output waits for the weight gradient."""
    training = {"global_batch_size": 8, "stack": "layoutwise-cuda"}
    job = build_job({"model": model, "cluster": "dgx-h100", "nodes": 1, "training": training}, "test")
    sizes = {"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "head_dim": 64, "vocab_size": 1000}
    groups = 2 if model.startswith("llama") else 4
    spec = dataclasses.replace(job.model, **sizes, intermediate_size=768, num_key_value_heads=groups)
    stage = Stage(spec, 128, range(1, 3), first=False, last=False)
    inputs = torch.randn(1, 128, 256, requires_grad=True)
    output = stage(inputs)
    _, waiting = stage_backward_input([output], [torch.ones_like(output)], [inputs], stage.parameters())
    kept = {}
    for gradient in (g for group in waiting for g in group["grads"]):
        for tensor in gradient if isinstance(gradient, tuple | list) else [gradient]:
            if tensor is not None:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    kernels = block_kernels(spec, spec.block_kind(1), True, Cut(1, 128, 1, False), job.stack)
    assert sum(kept.values()) == pytest.approx(2 * deferred_bytes(kernels, job.stack, "fp32"), rel=0.05)
    stage_backward_weight(stage.parameters(), waiting)
    assert all(parameter.grad is not None for parameter in stage.parameters())
