"""The layouts whose losses and gradient norms must be those of one process. A section for each kind; add yours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from simulator.layout import Layout

STEPS = 10


@dataclass(frozen=True)
class Case:
    """One layout of one model; its losses must be those of the reference with the same model and training."""

    layout: Layout
    model: str = "tiny-llama"
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changed = " ".join(f"{k}={v}" for k, v in self.training.items())
        return f"{self.model} {self.layout.short()} {changed}".strip()

    @property
    def reference(self) -> Case:
        return Case(Layout(micro_batch_size=8), self.model, self.training)


_REPLICATE = {"dp_replicate": 2}
_SHARD = {"dp_shard": 2, "zero_stage": 3}
_TENSOR = {"tp": 2, "sequence_parallel": True}
_INTERLEAVED = {"pp": 2, "schedule": "Interleaved1F1B", "virtual_stages": 2}
_SGD = {"optimizer": "sgd", "learning_rate": 0.5}

# One process: gradient accumulation and recompute.
_ONE = [
    Case(Layout(micro_batch_size=2)),
    Case(Layout(micro_batch_size=2, recompute="full")),
]
# Each axis alone, on two.
_TWO = [
    Case(Layout(**_REPLICATE, micro_batch_size=4)),
    Case(Layout(**_REPLICATE, micro_batch_size=2)),
    Case(Layout(**_REPLICATE, micro_batch_size=4, recompute="full"), "tiny-gpt"),
    Case(Layout(dp_shard=2, zero_stage=2, micro_batch_size=2)),
    Case(Layout(**_SHARD, micro_batch_size=4)),
    Case(Layout(**_SHARD, micro_batch_size=2, recompute="full"), "tiny-gpt"),
    Case(Layout(**_SHARD, micro_batch_size=2), training=_SGD),
    Case(Layout(tp=2, micro_batch_size=8)),
    Case(Layout(tp=2, micro_batch_size=4), "tiny-gpt"),
    Case(Layout(tp=2, micro_batch_size=4), "tiny-qwen"),
    Case(Layout(**_TENSOR, micro_batch_size=4)),
    Case(Layout(**_TENSOR, micro_batch_size=8, recompute="full")),
    Case(Layout(**_TENSOR, micro_batch_size=4), "tiny-gpt"),
    Case(Layout(**_TENSOR, micro_batch_size=8), "tiny-qwen"),
    Case(Layout(pp=2, schedule="GPipe", micro_batch_size=2)),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2, recompute="full"), "tiny-gpt-untied"),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=1, stage_layers=(3, 1))),
    Case(Layout(**_INTERLEAVED, micro_batch_size=2)),
]
# Two axes, on four.
_FOUR = [
    Case(Layout(dp_replicate=2, dp_shard=2, zero_stage=3, micro_batch_size=1)),
    Case(Layout(dp_replicate=2, dp_shard=2, zero_stage=2, micro_batch_size=2), "tiny-gpt"),
    Case(Layout(tp=4, sequence_parallel=True, micro_batch_size=8), "tiny-gpt"),
    Case(Layout(tp=2, **_REPLICATE, micro_batch_size=2)),
    Case(Layout(tp=2, dp_shard=2, zero_stage=2, micro_batch_size=4, recompute="full"), "tiny-gpt"),
    Case(Layout(**_TENSOR, **_SHARD, micro_batch_size=2)),
    Case(Layout(pp=2, **_REPLICATE, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(**_INTERLEAVED, **_REPLICATE, micro_batch_size=2)),
    Case(Layout(pp=2, **_SHARD, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(pp=2, **_SHARD, schedule="GPipe", micro_batch_size=1), "tiny-gpt-untied"),
    Case(Layout(pp=2, dp_shard=2, zero_stage=2, schedule="1F1B", micro_batch_size=1)),
    Case(Layout(**_INTERLEAVED, **_SHARD, micro_batch_size=2)),
    Case(Layout(pp=2, tp=2, schedule="1F1B", micro_batch_size=4)),
    Case(Layout(pp=2, **_TENSOR, schedule="1F1B", micro_batch_size=4, recompute="full"), "tiny-gpt-untied"),
    Case(Layout(**_INTERLEAVED, **_TENSOR, micro_batch_size=4)),
]
# Half precision, where only the size of the difference is known.
_HALF = [
    Case(Layout(**_SHARD, micro_batch_size=4), training={"precision": "bf16"}),
    Case(Layout(**_REPLICATE, micro_batch_size=4), training={"precision": "bf16"}),
    Case(Layout(**_TENSOR, micro_batch_size=8), training={"precision": "bf16"}),
    Case(Layout(pp=2, **_SHARD, micro_batch_size=2), training={"precision": "bf16"}),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2), training={"precision": "bf16"}),
]
_SPREAD = {**_SHARD, "ep": 2}
# Parts of a sequence: keys and values go round.
_CONTEXT = [
    Case(Layout(cp=2, micro_batch_size=4)),
    Case(Layout(cp=2, zero_stage=3, micro_batch_size=2, recompute="full"), "tiny-gpt"),
    Case(Layout(cp=2, **_TENSOR, zero_stage=2, micro_batch_size=4), "tiny-qwen"),
]
# Experts: every token on its rank, cut by width, spread over data parallel ranks, over a sequence.
_EXPERTS = [
    Case(Layout(micro_batch_size=2, recompute="full"), "tiny-shared-moe"),
    Case(Layout(**_TENSOR, micro_batch_size=4), "tiny-shared-moe"),
    Case(Layout(**_SPREAD, micro_batch_size=2), "tiny-moe", _SGD),
    Case(Layout(**_TENSOR, ep=2, micro_batch_size=4), "tiny-shared-moe"),
    Case(Layout(dp_shard=4, zero_stage=3, ep=2, micro_batch_size=1), "tiny-moe", _SGD),
    Case(Layout(pp=2, **_REPLICATE, ep=2, schedule="1F1B", micro_batch_size=2), "tiny-shared-moe"),
]
CASES = [*_ONE, *_TWO, *_FOUR, *_HALF, *_CONTEXT, *_EXPERTS]
# Three axes and more: too slow for every test run.
_LONG_CONTEXT = [
    Case(Layout(cp=2, zero_stage=2, micro_batch_size=4)),
    Case(Layout(cp=4, zero_stage=3, micro_batch_size=4)),
    Case(Layout(cp=2, **_TENSOR, micro_batch_size=4)),
    Case(Layout(cp=2, **_SHARD, micro_batch_size=2)),
    Case(Layout(cp=2, **_REPLICATE, micro_batch_size=2), "tiny-gpt"),
    Case(Layout(cp=2, **_REPLICATE, zero_stage=2, micro_batch_size=2)),
    Case(Layout(pp=2, cp=2, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(**_INTERLEAVED, cp=2, zero_stage=3, micro_batch_size=2)),
    Case(Layout(cp=2, **_SHARD, **_TENSOR, micro_batch_size=4)),
    Case(Layout(pp=2, cp=2, **_TENSOR, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(cp=2, **_SHARD, micro_batch_size=4), training={"precision": "bf16"}),
]
_LONG_EXPERTS = [
    Case(Layout(**_REPLICATE, ep=2, micro_batch_size=4), "tiny-shared-moe"),
    Case(Layout(cp=2, ep=2, micro_batch_size=4), "tiny-moe"),
    Case(Layout(dp_shard=4, zero_stage=3, ep=4, micro_batch_size=2), "tiny-moe", _SGD),
    Case(Layout(dp_replicate=4, ep=2, micro_batch_size=2), "tiny-moe"),
    Case(Layout(**_REPLICATE, **_SPREAD, micro_batch_size=1), "tiny-shared-moe"),
    Case(Layout(**_SHARD, tp=2, micro_batch_size=2), "tiny-moe"),
    Case(Layout(**_SPREAD, **_TENSOR, micro_batch_size=2), "tiny-shared-moe"),
    Case(Layout(**_SHARD, **_TENSOR, ep=4, micro_batch_size=2), "tiny-shared-moe"),
    Case(Layout(**_REPLICATE, **_TENSOR, ep=2, micro_batch_size=4), "tiny-moe"),
    Case(Layout(cp=2, **_TENSOR, ep=4, micro_batch_size=4), "tiny-moe"),
    Case(Layout(cp=2, **_SPREAD, micro_batch_size=2), "tiny-moe"),
    Case(Layout(pp=2, **_SPREAD, micro_batch_size=2), "tiny-moe"),
    Case(Layout(**_INTERLEAVED, **_REPLICATE, ep=2, micro_batch_size=2), "tiny-moe"),
    Case(Layout(pp=2, **_TENSOR, ep=2, recompute="full", micro_batch_size=2), "tiny-shared-moe"),
    Case(Layout(pp=2, cp=2, ep=2, zero_stage=3, micro_batch_size=2), "tiny-moe"),
    Case(Layout(pp=2, dp_shard=4, zero_stage=3, ep=2, micro_batch_size=1), "tiny-moe"),
    Case(Layout(**_INTERLEAVED, **_TENSOR, dp_shard=2, zero_stage=2, ep=4, micro_batch_size=2), "tiny-moe"),
    Case(Layout(**_SHARD, cp=2, **_TENSOR, ep=4, micro_batch_size=4), "tiny-moe", _SGD),
    Case(Layout(**_REPLICATE, **_SPREAD, **_TENSOR, micro_batch_size=2), "tiny-moe", _SGD),
    Case(Layout(**_SHARD, **_TENSOR, ep=4, micro_batch_size=4), "tiny-moe", {"precision": "bf16"}),
]
LONG_CASES = [*_LONG_CONTEXT, *_LONG_EXPERTS]
REFERENCES = list({case.reference.name: case.reference for case in CASES}.values())
