"""The layouts whose losses and gradient norms must be those of one process. A section for each kind; add yours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tiny_jobs import MODELS

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
    Case(Layout(**_TENSOR, micro_batch_size=8), "tiny-neox"),
    Case(Layout(**_TENSOR, micro_batch_size=8), "tiny-bloom"),
    Case(Layout(tp=2, micro_batch_size=8), "tiny-mistral"),
]
_WHOLE = ["tiny-bert", "tiny-t5", "tiny-bart"]
_CUT = ["tiny-bert-untied", "tiny-neox", "tiny-mistral", "tiny-llama3"]
LONG_CASES = [
    *(
        Case(layout, model, _GENTLE.get(model, {}))
        for model in [*_WHOLE, "tiny-neox", "tiny-bloom", "tiny-mistral", "tiny-llama3"]
        for layout in (
            Layout(tp=2, micro_batch_size=4),
            Layout(micro_batch_size=2, recompute="full"),
            Layout(**_REPLICATE, micro_batch_size=2, recompute="full"),
            Layout(**_SHARD, micro_batch_size=4),
            Layout(dp_shard=2, zero_stage=2, micro_batch_size=2),
            Layout(tp=2, micro_batch_size=4, recompute="full"),
            Layout(**_TENSOR, micro_batch_size=4, recompute="full"),
            Layout(tp=4, sequence_parallel=True, micro_batch_size=8),
            Layout(dp_replicate=2, dp_shard=2, zero_stage=3, micro_batch_size=2),
            Layout(**_TENSOR, **_SHARD, micro_batch_size=2),
            Layout(tp=2, **_REPLICATE, micro_batch_size=2),
            Layout(dp_replicate=2, dp_shard=2, tp=2, zero_stage=3, sequence_parallel=True, micro_batch_size=2),
        )
        if layout.tp <= MODELS[model].num_key_value_heads
    ),
    *(
        Case(layout, model)
        for model in _CUT
        for layout in (
            Layout(pp=2, schedule="1F1B", micro_batch_size=2),
            Layout(**_INTERLEAVED, **_TENSOR, micro_batch_size=4),
        )
    ),
    *(
        Case(layout, model, {"precision": "bf16"} | _GENTLE.get(model, {}))
        for model in [*_WHOLE, "tiny-bloom"]
        for layout in (Layout(**_SHARD, micro_batch_size=4), Layout(**_TENSOR, micro_batch_size=8))
    ),
]
CASES = [*_ONE, *_TWO, *_FOUR, *_HALF, *_MODELS]
REFERENCES = list({case.reference.name: case.reference for case in CASES}.values())
