"""Layouts whose predicted collectives and messages must be those that the runtime issues: real widths, few blocks.

CASES run with every test, LONG_CASES with the slow ones; `make communication` writes all of them down.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tiny_jobs import tiny_plan

from planner.plan import Plan
from runtime.alone import run_alone
from simulator.layout import Layout
from simulator.presets import find_model
from simulator.results import Collective
from simulator.traffic import communication

Rows = dict[tuple[str, str], tuple[int, float]]

# A mixture is counted with real tensors, which takes small widths: which tokens go where is found by computing.
SMALL = {
    "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 1024,
    "intermediate_size": 128, "moe_intermediate_size": 64,
}  # fmt: skip
SHARED = SMALL | {"num_shared_experts": 2, "first_k_dense_replace": 1, "router_bias": True, "mlp_bias": True}


@dataclass(frozen=True)
class Case:
    """One rank of one layout. `changes` are fields of the model that differ from the preset's, `training` of the
    recipe: bf16, 512 tokens and two microbatches a step."""

    layout: Layout
    model: str = "llama-3.1-8b"
    layers: int = 2
    rank: int = 0
    changes: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changed = "".join(f" {key}={value}" for key, value in self.training.items())
        return f"{self.model} {self.layout.short()}{changed} rank {self.rank}"

    def plan(self) -> Plan:
        model = dataclasses.replace(find_model(self.model, None), num_hidden_layers=self.layers, **self.changes)
        batch = 2 * self.layout.dp * self.layout.micro_batch_size
        recipe = {"global_batch_size": batch, "seq_len": 512, "precision": "bf16"} | self.training
        return tiny_plan(self.layout, model, **recipe)

    def predicted(self) -> Rows:
        return _rows(communication(self.plan().job, self.layout, self.rank))

    def counted(self) -> Rows:
        """With real tensors DDP says in the second step how it changes its buckets, so that the third one counts."""
        fake = not self.plan().job.model.num_experts
        return _rows(run_alone(self.plan(), self.rank, steps=2, warmup=0, fake=fake).collectives)


def _rows(found: tuple[Collective, ...]) -> Rows:
    return {(one.axis, one.name): (one.count, one.bytes) for one in found}


def _pipeline(schedule: Any, rank: int, stages: int = 1, layers: int = 4, **changes: Any) -> Case:
    layout = Layout(pp=4, schedule=schedule, virtual_stages=stages, **changes)
    return Case(layout, layers=layers, rank=rank, training={"global_batch_size": 16})


_SP = {"sequence_parallel": True}
_FULL, _SELECTIVE = {"recompute": "full"}, {"recompute": "selective"}
_FP32 = {"precision": "fp32"}
_BERT = {"num_encoder_layers": 2, "vocab_size": 30720}
_T5 = {"num_encoder_layers": 1}
_BART = {"num_encoder_layers": 1, "vocab_size": 50264}
_QWEN = {"qk_norm": True, "qkv_bias": True}

CASES = [
    Case(Layout(dp_shard=8, zero_stage=3)),
    Case(Layout(dp_replicate=2, dp_shard=8, zero_stage=2)),
    Case(Layout(dp_replicate=8), "gpt2", 4, training=_FP32),
    Case(Layout(tp=4, dp_shard=2, zero_stage=3, **_SP, **_FULL)),
    Case(Layout(cp=4, dp_shard=2, zero_stage=3)),
    _pipeline("1F1B", 6, dp_shard=2, zero_stage=3),
    _pipeline("ZBVZeroBubble", 2, 2, 8, dp_shard=2, zero_stage=2),
    Case(Layout(tp=2, dp_shard=4, zero_stage=3, ep=4, **_SP), "mixtral-8x7b", changes=SMALL),
]
_DATA = [
    *(Case(Layout(dp_shard=8, zero_stage=zero)) for zero in (1, 2)),
    Case(Layout(dp_shard=1024, zero_stage=3), rank=777),
    Case(Layout(dp_replicate=2, dp_shard=8, zero_stage=3)),
    Case(Layout(dp_replicate=128, dp_shard=8, zero_stage=1), "llama-3.1-70b", 3, rank=1000),
    Case(Layout(dp_replicate=8)),
    Case(Layout(dp_replicate=8), training=_FP32),
    # Dims that shards do not divide are filled up: 50,257 rows over 8 ranks, 1,024 biases over 1,000.
    Case(Layout(dp_shard=8, zero_stage=3), "gpt2", 4),
    Case(Layout(dp_shard=1000, zero_stage=3), "bert-large", 4, changes={"num_encoder_layers": 4}),
]
_TENSOR = [
    Case(Layout(tp=8)),
    Case(Layout(tp=8), training=_FP32),
    Case(Layout(tp=8, **_SP)),
    Case(Layout(tp=8, **_SP), training=_FP32),
    Case(Layout(tp=4, dp_shard=2, zero_stage=1, **_SP)),
    Case(Layout(tp=4, dp_shard=2, zero_stage=3, **_FULL)),
    Case(Layout(tp=4, dp_shard=2, zero_stage=3, **_SELECTIVE)),
    Case(Layout(tp=4, dp_shard=2, zero_stage=3, **_SP, **_SELECTIVE)),
    Case(Layout(tp=2, dp_shard=4, zero_stage=2), changes=_QWEN),
    Case(Layout(tp=2, dp_shard=4, zero_stage=2, **_SP), changes=_QWEN),
    Case(Layout(tp=8, dp_replicate=4, **_SP), "gpt3-175b", rank=9),
    Case(Layout(tp=8, dp_shard=128, zero_stage=3, **_SP, **_FULL), "llama-3.1-70b", 4, rank=1001),
    *(
        Case(Layout(tp=2, dp_shard=4, zero_stage=2, **parallel, **again), model, changes=changes)
        for model, changes in (("bert-large", _BERT), ("t5-large", _T5), ("bart-large", _BART))
        for parallel in ({}, _SP)
        for again in ({}, _FULL)
    ),
]
_CONTEXT = [
    Case(Layout(cp=4, dp_replicate=2)),
    Case(Layout(cp=4, dp_shard=2, zero_stage=3, **_FULL)),
    Case(Layout(cp=2, dp_replicate=4, **_SELECTIVE), training=_FP32),
    Case(Layout(cp=2, tp=4, dp_shard=2, zero_stage=3, **_SP), rank=5),
]
_PIPELINE = [
    *(_pipeline("GPipe", 2, dp_shard=2, zero_stage=zero) for zero in (1, 3)),
    *(_pipeline("1F1B", rank, dp_shard=2, zero_stage=3) for rank in (0, 2)),
    *(_pipeline("Interleaved1F1B", 4, 4, 16, dp_shard=2, zero_stage=zero) for zero in (2, 3)),
    *(_pipeline("LoopedBFS", 6, 4, 16, dp_shard=2, zero_stage=zero) for zero in (2, 3)),
    _pipeline("InterleavedZeroBubble", 0, 2, 8, dp_replicate=2),
    _pipeline("InterleavedZeroBubble", 6, 2, 8, dp_shard=2, zero_stage=2),
    _pipeline("ZBVZeroBubble", 0, 2, 8, dp_replicate=2),
    _pipeline("DualPipeV", 2, 2, 8, dp_shard=2, zero_stage=1),
    _pipeline("1F1B", 3, dp_replicate=2, **_FULL),
]
_HYBRID = [
    Case(
        Layout(dp_replicate=4, dp_shard=8, tp=8, pp=4, zero_stage=3, **_SP, **_FULL),
        "llama-3.1-70b", 8, rank=1023, training={"global_batch_size": 256},
    ),
    Case(
        Layout(dp_shard=8, tp=8, pp=16, zero_stage=1, schedule="Interleaved1F1B", virtual_stages=2, **_SP),
        "llama-3.1-405b", 32, rank=500, training={"global_batch_size": 128},
    ),
    Case(
        Layout(dp_shard=4, cp=2, tp=4, pp=2, zero_stage=2, **_SP, **_SELECTIVE),
        layers=4, rank=37, training={"global_batch_size": 32},
    ),
    Case(
        Layout(dp_shard=2, tp=2, pp=4, zero_stage=2, schedule="DualPipeV", virtual_stages=2, **_SP),
        layers=8, rank=12, training={"global_batch_size": 16},
    ),
]  # fmt: skip
_EXPERTS = [
    Case(Layout(**layout), "mixtral-8x7b", changes=changes, rank=rank)
    for layout, changes, rank in (
        ({"dp_shard": 8, "zero_stage": 3, "ep": 4, **_FULL}, SMALL, 0),
        ({"dp_shard": 8, "zero_stage": 3, "ep": 4, **_SELECTIVE}, SMALL, 0),
        ({"dp_replicate": 2, "dp_shard": 8, "zero_stage": 2, "ep": 2}, SMALL, 0),
        ({"dp_replicate": 8, "ep": 8}, SMALL, 0),
        ({"tp": 2, "dp_shard": 4, "zero_stage": 3}, SMALL, 0),
        ({"tp": 4, "dp_shard": 2, "zero_stage": 1, **_SP, **_FULL}, SMALL, 0),
        ({"tp": 2, "dp_shard": 4, "zero_stage": 3, "ep": 4, **_SP, **_SELECTIVE}, SHARED, 0),
        ({"tp": 2, "dp_shard": 4, "zero_stage": 2, **_SP, **_FULL}, SHARED, 0),
        ({"cp": 2, "dp_shard": 4, "zero_stage": 2, "ep": 8}, SHARED, 0),
        ({"pp": 2, "dp_shard": 4, "zero_stage": 3, "ep": 4}, SHARED, 4),
        ({"pp": 2, "dp_replicate": 4, "ep": 2}, SHARED, 0),
    )
]
LONG_CASES = [*_DATA, *_TENSOR, *_CONTEXT, *_PIPELINE, *_HYBRID, *_EXPERTS]
