"""What a recomputed block keeps for its backward is what the simulator counts."""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from tiny_jobs import MODELS, tiny_plan

from runtime.model import Stage, init_weights
from runtime.recompute import apply_recompute
from simulator import presets
from simulator.layout import Layout
from simulator.stage import StageCosts

BATCH, LENGTH = 2, 64


def storages() -> dict[int, int]:
    """Bytes of every tensor that is alive, by where they lie."""
    gc.collect()
    found = {}
    for tensor in gc.get_objects():
        if type(tensor) is torch.Tensor and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def kept_for_backward(model: str, recompute: str) -> float:
    """Bytes per block that are there after the forward of three blocks and were not before; without recomputation
    they are autograd's own, which are seen on their way to it."""
    spec = MODELS[model]
    stage = Stage(spec, LENGTH, range(3), first=False, last=False)
    init_weights(stage, 0, torch.device("cpu"))
    if recompute != "none":
        apply_recompute(stage, recompute)
    inputs = torch.randn(BATCH, LENGTH, spec.hidden_size, requires_grad=True)
    before, seen = storages(), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = stage(inputs)
    kept = storages() | seen
    kept.pop(output.untyped_storage().data_ptr(), None)
    # The input of the first block was there before: it stands for the output of the last.
    new = sum(size for place, size in kept.items() if place not in before)
    assert output.requires_grad
    return (new + inputs.untyped_storage().nbytes()) / 3


@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt"])
def test_a_recomputed_block_keeps_what_the_simulator_counts(model: str, recompute: str) -> None:
    layout = Layout(micro_batch_size=BATCH, recompute=recompute)
    job = tiny_plan(layout, MODELS[model], "layoutwise-cuda", seq_len=LENGTH).job
    # The test cluster has no rate of attention.
    job = dataclasses.replace(job, cluster=presets.find_cluster("dgx-h100"))
    costs = StageCosts(job, layout)
    block = costs.units.block("dense", True, 0, costs.groups[0])
    assert kept_for_backward(model, recompute) == pytest.approx(block.saved, rel=1e-6)


def test_selective_keeps_less_than_nothing_recomputed_and_more_than_full() -> None:
    """tiny-llama, in elements of the stream's width 64 per token: input, q, k and v (half as wide), attention, out,
    gate and up (2.5 each), down; with a row sum per head and token (1/16)."""
    full, selective, none = (kept_for_backward("tiny-llama", kind) for kind in ("full", "selective", "none"))
    element = 4 * BATCH * LENGTH * 64
    assert full == element
    assert selective == pytest.approx((1 + 2 + 1 + 1 + 5 + 1 + 1 / 16) * element)
    assert none > 1.4 * selective


def test_the_runtimes_stacks_describe_one_rule() -> None:
    for stack in ("layoutwise-cpu", "layoutwise-cuda", "layoutwise-cuda-compile"):
        found = tiny_plan(Layout(), stack=stack).job.stack
        assert dict(found.selective_recompute) == {"pointwise": 1.0} and found.selective_keeps_outputs
