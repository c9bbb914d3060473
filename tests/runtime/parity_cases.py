"""The layouts whose losses and gradient norms must be those of one process. A section for each kind; add yours.

CASES run with every test; LONG_CASES, on up to 8 ranks, with the slow tests and `make parity`, which writes the
differences of all of them down (docs/parity.md). A case may use any model of tiny_jobs.MODELS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tiny_jobs import MODELS

from simulator.layout import Layout

STEPS = 5


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
        return Case(Layout(micro_batch_size=self.training.get("global_batch_size", 8)), self.model, self.training)


_REPLICATE = {"dp_replicate": 2}
_SHARD = {"dp_shard": 2, "zero_stage": 3}
_TENSOR = {"tp": 2, "sequence_parallel": True}
_INTERLEAVED = {"pp": 2, "schedule": "Interleaved1F1B", "virtual_stages": 2}
_ZBV = {"pp": 2, "schedule": "ZBVZeroBubble", "virtual_stages": 2}
_ZB1P = {"pp": 2, "schedule": "InterleavedZeroBubble", "virtual_stages": 2}
_DUAL = {"pp": 2, "schedule": "DualPipeV", "virtual_stages": 2}
_BREADTH = {"pp": 2, "schedule": "LoopedBFS", "virtual_stages": 2}
_OPTIMIZER_STATE = {"dp_shard": 2, "zero_stage": 1}
_SGD = {"optimizer": "sgd", "learning_rate": 0.5}
_SELECTIVE = {"recompute": "selective"}

# One process: gradient accumulation and recompute.
_ONE = [
    Case(Layout(micro_batch_size=2)),
    Case(Layout(micro_batch_size=2, recompute="full")),
    Case(Layout(micro_batch_size=4, recompute="selective")),
]
# Each axis alone, on two.
_TWO = [
    Case(Layout(**_REPLICATE, micro_batch_size=4)),
    Case(Layout(**_REPLICATE, micro_batch_size=2)),
    Case(Layout(**_REPLICATE, micro_batch_size=4, recompute="full"), "tiny-gpt"),
    Case(Layout(**_OPTIMIZER_STATE, micro_batch_size=1)),
    Case(Layout(dp_shard=2, zero_stage=2, micro_batch_size=2)),
    Case(Layout(**_SHARD, micro_batch_size=4)),
    Case(Layout(**_SHARD, micro_batch_size=2, recompute="full"), "tiny-gpt"),
    Case(Layout(tp=2, micro_batch_size=8)),
    Case(Layout(**_TENSOR, micro_batch_size=4)),
    Case(Layout(**_TENSOR, micro_batch_size=8), "tiny-qwen"),
    Case(Layout(pp=2, schedule="GPipe", micro_batch_size=2)),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2, recompute="full"), "tiny-gpt-untied"),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=1, stage_layers=(3, 1))),
    # Ends that hold the embedding and the head alone.
    Case(Layout(**_INTERLEAVED, micro_batch_size=2, stage_layers=(0, 2, 2, 0))),
    Case(Layout(**_INTERLEAVED, micro_batch_size=2)),
    Case(Layout(**_BREADTH, micro_batch_size=2)),
    Case(Layout(**_ZB1P, micro_batch_size=2)),
    Case(Layout(**_ZBV, micro_batch_size=2)),
    Case(Layout(**_DUAL, micro_batch_size=1), "tiny-gpt-untied"),
]
# Two axes, on four.
_FOUR = [
    Case(Layout(dp_replicate=2, dp_shard=2, zero_stage=3, micro_batch_size=1)),
    Case(Layout(dp_replicate=2, dp_shard=2, zero_stage=2, micro_batch_size=2), "tiny-gpt"),
    Case(Layout(tp=2, **_REPLICATE, micro_batch_size=2)),
    Case(Layout(**_TENSOR, **_SHARD, micro_batch_size=2)),
    Case(Layout(pp=2, **_REPLICATE, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(**_INTERLEAVED, **_REPLICATE, micro_batch_size=2)),
    Case(Layout(pp=2, **_SHARD, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(pp=2, dp_shard=2, zero_stage=2, schedule="1F1B", micro_batch_size=1)),
    Case(Layout(**_INTERLEAVED, **_TENSOR, micro_batch_size=4)),
    # Gradients that a split backward finds: replicated without DDP, sharded, gathered once for the step.
    Case(Layout(**_ZB1P, **_REPLICATE, micro_batch_size=1)),
    Case(Layout(**_ZBV, dp_shard=2, zero_stage=2, micro_batch_size=1)),
    Case(Layout(**_DUAL, **_OPTIMIZER_STATE, micro_batch_size=1)),
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
]
# Experts: every token on its rank, cut by width, spread over data parallel ranks, over a sequence.
_EXPERTS = [
    Case(Layout(micro_batch_size=2, recompute="full"), "tiny-shared-moe"),
    Case(Layout(**_SPREAD, micro_batch_size=2), "tiny-moe", _SGD),
    Case(Layout(**_TENSOR, ep=2, micro_batch_size=4), "tiny-shared-moe"),
    Case(Layout(**_SPREAD, micro_batch_size=2, **_SELECTIVE), "tiny-moe"),
    Case(Layout(pp=2, **_REPLICATE, ep=2, schedule="1F1B", micro_batch_size=2), "tiny-shared-moe"),
]
# Other families and other positions. Alibi's slopes and T5's biases are cut by heads, BERT's transform by columns.
# BART's norms behind the sums make a large step unstable: rounding differences of 1e-7 grow a hundredfold in ten.
_GENTLE = {"tiny-bart": {"learning_rate": 3e-3}}
_MODELS = [
    Case(Layout(**_REPLICATE, micro_batch_size=2), "tiny-bert"),
    Case(Layout(**_TENSOR, micro_batch_size=8), "tiny-bert"),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2), "tiny-bert-untied"),
    Case(Layout(**_SHARD, micro_batch_size=2, recompute="full"), "tiny-t5"),
    Case(Layout(**_TENSOR, micro_batch_size=8), "tiny-t5"),
    Case(Layout(**_TENSOR, micro_batch_size=4), "tiny-bart", _GENTLE["tiny-bart"]),
    Case(Layout(**_TENSOR, micro_batch_size=8), "tiny-bloom"),
]
CASES = [*_ONE, *_TWO, *_FOUR, *_HALF, *_CONTEXT, *_EXPERTS, *_MODELS]

_LONG_TWO = [
    Case(Layout(**_REPLICATE, micro_batch_size=1, **_SELECTIVE), "tiny-gpt"),
    Case(Layout(**_SHARD, micro_batch_size=2, **_SELECTIVE)),
    Case(Layout(tp=2, micro_batch_size=4, **_SELECTIVE), "tiny-gpt"),
    Case(Layout(**_TENSOR, micro_batch_size=4, **_SELECTIVE), "tiny-qwen"),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2, **_SELECTIVE)),
    Case(Layout(**_OPTIMIZER_STATE, micro_batch_size=2), "tiny-gpt", _SGD),
    Case(Layout(**_OPTIMIZER_STATE, micro_batch_size=2), training={"precision": "bf16"}),
    Case(Layout(**_SHARD, micro_batch_size=2, **_SELECTIVE), training={"precision": "bf16"}),
    Case(Layout(pp=2, schedule="GPipe", micro_batch_size=1, stage_layers=(5, 3)), "tiny-deep"),
    Case(Layout(**_INTERLEAVED, micro_batch_size=2, stage_layers=(3, 2, 2, 1)), "tiny-deep"),
    Case(Layout(**_BREADTH, micro_batch_size=2, stage_layers=(1, 3, 2, 2)), "tiny-deep"),
    Case(Layout(**_ZB1P, micro_batch_size=2, stage_layers=(1, 2, 2, 3)), "tiny-deep"),
    Case(Layout(**_ZBV, micro_batch_size=2, stage_layers=(2, 1, 3, 2)), "tiny-deep"),
    Case(Layout(**_ZBV, micro_batch_size=2, stage_layers=(0, 4, 4, 0)), "tiny-deep"),
    Case(Layout(**_DUAL, micro_batch_size=1, stage_layers=(2, 3, 1, 2)), "tiny-deep"),
    # Three microbatches, which no number of stages divides.
    Case(Layout(**_ZBV, micro_batch_size=1), training={"global_batch_size": 3}),
    Case(Layout(**_ZBV, micro_batch_size=2), training={"precision": "bf16"}),
    Case(Layout(**_DUAL, micro_batch_size=1), training={"precision": "bf16"}),
]
_LONG_FOUR = [
    Case(Layout(dp_replicate=2, **_OPTIMIZER_STATE, micro_batch_size=1)),
    Case(Layout(**_TENSOR, **_OPTIMIZER_STATE, micro_batch_size=2)),
    Case(Layout(pp=2, **_OPTIMIZER_STATE, schedule="1F1B", micro_batch_size=1)),
    Case(Layout(**_BREADTH, **_SHARD, micro_batch_size=1)),
    Case(Layout(**_ZBV, **_REPLICATE, micro_batch_size=1), "tiny-gpt-untied"),
    Case(Layout(**_DUAL, **_REPLICATE, micro_batch_size=1)),
    Case(Layout(**_ZB1P, dp_shard=2, zero_stage=2, micro_batch_size=1)),
    Case(Layout(**_ZBV, **_TENSOR, micro_batch_size=2)),
    Case(Layout(**_INTERLEAVED, **_SHARD, micro_batch_size=1, stage_layers=(0, 2, 2, 0))),
    Case(Layout(**_DUAL, tp=2, micro_batch_size=2), "tiny-gpt-untied"),
    Case(Layout(pp=4, schedule="1F1B", micro_batch_size=1, stage_layers=(1, 3, 2, 2)), "tiny-deep"),
    Case(Layout(pp=4, schedule="ZBVZeroBubble", virtual_stages=2, micro_batch_size=1), "tiny-deep"),
    Case(Layout(pp=4, schedule="DualPipeV", virtual_stages=2, micro_batch_size=1), "tiny-deep"),
    # Four stages on a rank: torch drops the parameters of those that are needed last.
    Case(
        Layout(pp=2, schedule="Interleaved1F1B", virtual_stages=4, dp_shard=2, zero_stage=2, micro_batch_size=1),
        "tiny-deep",
    ),
    Case(
        Layout(pp=2, schedule="InterleavedZeroBubble", virtual_stages=4, dp_shard=2, zero_stage=2, micro_batch_size=1),
        "tiny-deep",
    ),
    Case(Layout(**_ZBV, **_REPLICATE, micro_batch_size=1), training={"precision": "bf16"}),
    Case(Layout(**_ZB1P, dp_shard=2, zero_stage=2, micro_batch_size=1), training={"precision": "bf16"}),
]
_LONG_EIGHT = [
    Case(Layout(dp_replicate=8, micro_batch_size=1)),
    Case(Layout(dp_shard=8, zero_stage=1, micro_batch_size=1)),
    Case(Layout(dp_shard=8, zero_stage=2, micro_batch_size=1), "tiny-gpt"),
    Case(Layout(dp_shard=8, zero_stage=3, micro_batch_size=1)),
    Case(Layout(dp_replicate=2, dp_shard=4, zero_stage=3, micro_batch_size=1), training={"global_batch_size": 16}),
    Case(Layout(dp_replicate=4, dp_shard=2, zero_stage=1, micro_batch_size=1), training={"global_batch_size": 16}),
    Case(Layout(tp=4, dp_replicate=2, sequence_parallel=True, micro_batch_size=2), "tiny-gpt"),
    Case(Layout(**_TENSOR, dp_replicate=2, dp_shard=2, zero_stage=3, micro_batch_size=2)),
    Case(Layout(pp=8, schedule="1F1B", micro_batch_size=1), "tiny-deep"),
    Case(Layout(pp=4, dp_replicate=2, schedule="GPipe", micro_batch_size=1)),
    Case(Layout(pp=4, dp_shard=2, zero_stage=3, schedule="Interleaved1F1B", virtual_stages=2), "tiny-deep"),
    Case(Layout(**_ZBV, dp_replicate=2, dp_shard=2, zero_stage=2), training={"global_batch_size": 16}),
    Case(Layout(pp=2, **_TENSOR, **_SHARD, schedule="1F1B", micro_batch_size=2, **_SELECTIVE)),
    Case(Layout(**_BREADTH, **_TENSOR, **_REPLICATE, micro_batch_size=2)),
    Case(Layout(**_ZB1P, **_TENSOR, **_REPLICATE, micro_batch_size=2)),
    Case(Layout(**_ZBV, **_TENSOR, dp_shard=2, zero_stage=2, micro_batch_size=1)),
    Case(Layout(**_DUAL, **_TENSOR, **_OPTIMIZER_STATE, micro_batch_size=1)),
    Case(Layout(**_ZBV, **_TENSOR, dp_shard=2, zero_stage=2, micro_batch_size=1), training={"precision": "bf16"}),
]
# Three axes and more with parts of a sequence and with experts.
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
# What meets seldom: a split backward or selective recomputation with parts of a sequence and with experts.
_LONG_MEETINGS = [
    Case(Layout(**_ZBV, cp=2, micro_batch_size=2)),
    Case(Layout(**_DUAL, cp=2, zero_stage=2, micro_batch_size=1)),
    Case(Layout(**_ZBV, dp_shard=2, zero_stage=2, ep=2, micro_batch_size=2), "tiny-moe"),
    Case(Layout(**_ZB1P, **_REPLICATE, ep=2, micro_batch_size=2), "tiny-moe"),
    Case(Layout(**_DUAL, **_TENSOR, ep=2, micro_batch_size=1), "tiny-shared-moe"),
    Case(Layout(cp=2, micro_batch_size=4, **_SELECTIVE)),
    Case(Layout(cp=2, **_TENSOR, zero_stage=3, micro_batch_size=4, **_SELECTIVE), "tiny-gpt"),
    Case(Layout(**_TENSOR, ep=2, micro_batch_size=4, **_SELECTIVE), "tiny-shared-moe"),
    Case(Layout(**_TENSOR, micro_batch_size=4, **_SELECTIVE), "tiny-shared-moe"),
    Case(Layout(dp_shard=2, zero_stage=1, ep=2, micro_batch_size=2), "tiny-moe"),
    Case(Layout(cp=2, zero_stage=1, micro_batch_size=2)),
]
_WHOLE = ["tiny-bert", "tiny-t5", "tiny-bart"]
_CUT = ["tiny-bert-untied", "tiny-neox", "tiny-mistral", "tiny-llama3"]
_LONG_MODELS = [
    *(
        Case(layout, model, _GENTLE.get(model, {}))
        for model in [*_WHOLE, "tiny-neox", "tiny-bloom", "tiny-mistral", "tiny-llama3"]
        for layout in (
            Layout(tp=2, micro_batch_size=4),
            Layout(**_SHARD, micro_batch_size=4),
            Layout(**_TENSOR, micro_batch_size=4, recompute="full"),
            Layout(**_TENSOR, **_SHARD, micro_batch_size=2),
            Layout(dp_replicate=2, dp_shard=2, tp=2, zero_stage=3, sequence_parallel=True, micro_batch_size=2),
        )
        if layout.tp <= MODELS[model].num_key_value_heads
    ),
    *(
        Case(layout, model)
        for model in _CUT
        for layout in (
            Layout(pp=2, schedule="GPipe", micro_batch_size=2),
            Layout(**_INTERLEAVED, **_TENSOR, micro_batch_size=4),
        )
    ),
    *(
        Case(layout, model, {"precision": "bf16"} | _GENTLE.get(model, {}))
        for model in [*_WHOLE, "tiny-bloom"]
        for layout in (Layout(**_SHARD, micro_batch_size=4), Layout(**_TENSOR, micro_batch_size=8))
    ),
]
# As the fast ones, in other pairs.
_LONG_PAIRS = [
    Case(Layout(**_SHARD, micro_batch_size=2), training=_SGD),
    Case(Layout(tp=2, micro_batch_size=4), "tiny-gpt"),
    Case(Layout(tp=2, micro_batch_size=4), "tiny-qwen"),
    Case(Layout(**_TENSOR, micro_batch_size=8, recompute="full")),
    Case(Layout(**_TENSOR, micro_batch_size=4), "tiny-gpt"),
    Case(Layout(tp=4, sequence_parallel=True, micro_batch_size=8), "tiny-gpt"),
    Case(Layout(tp=2, dp_shard=2, zero_stage=2, micro_batch_size=4, recompute="full"), "tiny-gpt"),
    Case(Layout(pp=2, tp=2, schedule="1F1B", micro_batch_size=4)),
    Case(Layout(pp=2, **_TENSOR, schedule="1F1B", micro_batch_size=4, recompute="full"), "tiny-gpt-untied"),
    Case(Layout(cp=2, **_TENSOR, zero_stage=2, micro_batch_size=4), "tiny-qwen"),
    Case(Layout(**_TENSOR, micro_batch_size=4), "tiny-shared-moe"),
    Case(Layout(dp_shard=4, zero_stage=3, ep=2, micro_batch_size=1), "tiny-moe", _SGD),
    Case(Layout(**_TENSOR, micro_batch_size=8), "tiny-neox"),
    Case(Layout(tp=2, micro_batch_size=8), "tiny-mistral"),
    Case(Layout(**_INTERLEAVED, **_SHARD, micro_batch_size=2)),
    Case(Layout(pp=2, **_SHARD, schedule="GPipe", micro_batch_size=1), "tiny-gpt-untied"),
]
LONG_CASES = [
    *_LONG_PAIRS,
    *_LONG_MEETINGS,
    *_LONG_TWO,
    *_LONG_FOUR,
    *_LONG_EIGHT,
    *_LONG_CONTEXT,
    *_LONG_EXPERTS,
    *_LONG_MODELS,
]


def with_references(cases: Sequence[Case]) -> list[Case]:
    """The cases and what each is held against, every one once."""
    return list({case.name: case for case in (*cases, *(case.reference for case in cases))}.values())
