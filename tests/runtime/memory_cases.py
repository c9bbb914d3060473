"""The layouts whose predicted memory must be what torch's MemTracker counts of one of their ranks.

CASES run with every test, LONG_CASES with the slow ones and `make memory-oracle`, which writes the page docs/memory.md.
Widths, vocabularies and sequences are those of real models; some of their layers are left out, because a rank holds the
same kinds of tensors with fewer.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from tiny_jobs import tiny_plan

from planner.plan import Plan
from simulator import presets
from simulator.cluster import AttentionFit, AttentionKernel
from simulator.layout import Layout
from simulator.model import ModelSpec

# Qwen2.5-7B and Qwen3-8B (config.json of Qwen/Qwen2.5-7B and Qwen/Qwen3-8B): biases on q, k, v; norms over heads.
QWEN2 = ModelSpec(
    name="qwen2.5-7b", family="llama", num_hidden_layers=28, hidden_size=3584, num_attention_heads=28,
    num_key_value_heads=4, head_dim=128, intermediate_size=18944, vocab_size=152064, max_position_embeddings=32768,
    qkv_bias=True,
)  # fmt: skip
QWEN3 = ModelSpec(
    name="qwen3-8b", family="llama", num_hidden_layers=36, hidden_size=4096, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, intermediate_size=12288, vocab_size=151936, max_position_embeddings=32768,
    qk_norm=True,
)  # fmt: skip
_OWN = {model.name: model for model in (QWEN2, QWEN3)}
# A rate that the simulator asks for and bytes do not need.
_RATE = AttentionFit(1e11, 1.0, 1e11, 1.0)


@dataclass(frozen=True)
class Case:
    """One rank of a layout of a model with this many layers, `microbatches` of them in a step."""

    layout: Layout
    model: str = "llama-3.1-8b"
    layers: int = 4
    rank: int = 0
    microbatches: int = 2
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changed = " ".join(f"{k}={v}" for k, v in self.training.items())
        short = self.layout.short()
        return f"{self.model} ({self.layers} layers) {short} m={self.microbatches} rank {self.rank} {changed}".strip()

    def plan(self) -> Plan:
        model = _OWN.get(self.model) or presets.find_model(self.model, None)
        encoders = {"bert": self.layers, "t5": self.layers // 2}.get(model.family, 0)
        model = dataclasses.replace(model, num_hidden_layers=self.layers, num_encoder_layers=encoders)
        batch = self.microbatches * self.layout.dp * self.layout.micro_batch_size
        recipe = {"precision": "bf16", "seq_len": 4096} | self.training
        plan = tiny_plan(self.layout, model, global_batch_size=batch, **recipe)
        gpu = plan.job.cluster.gpu
        gpu = dataclasses.replace(gpu, attention={"sdpa": (AttentionKernel(128, _RATE, _RATE),)})
        cluster = dataclasses.replace(plan.job.cluster, gpu=gpu)
        return dataclasses.replace(plan, job=dataclasses.replace(plan.job, cluster=cluster))


_Z3 = {"dp_shard": 8, "zero_stage": 3}
_SP = {"sequence_parallel": True}
_FP32 = {"precision": "fp32"}
_EVEN = {"expert_load": 1.0}
_CHUNKS = {"pp": 4, "virtual_stages": 2}


def _split(schedule: Any, rank: int, **more: Any) -> Case:
    return Case(Layout(schedule=schedule, **_CHUNKS, **more), layers=16, rank=rank, microbatches=8)


CASES = [
    Case(Layout(**_Z3), rank=3),
    Case(Layout(dp_shard=8, zero_stage=1), rank=3),
    Case(Layout(dp_replicate=8), layers=2, training=_FP32),
    Case(Layout(**_Z3, recompute="full"), layers=8),
    Case(Layout(tp=4, **_SP), rank=1),
    Case(Layout(pp=4, dp_shard=4, zero_stage=3), layers=8, rank=4, microbatches=8),
    Case(Layout(tp=8, pp=16, dp_shard=8, zero_stage=3, **_SP), "llama-3.1-70b", 32, 1000, 16),
]
LONG_CASES = [
    # Data parallelism.
    Case(Layout(), layers=2),
    Case(Layout(), layers=2, training=_FP32),
    Case(Layout(dp_replicate=8), layers=2),
    Case(Layout(dp_shard=8, zero_stage=2), rank=3),
    Case(Layout(dp_shard=8, zero_stage=2), rank=3, microbatches=4),
    Case(Layout(**_Z3), rank=3, microbatches=1),
    Case(Layout(**_Z3), rank=3, training=_FP32),
    Case(Layout(**_Z3, micro_batch_size=2), rank=7),
    Case(Layout(dp_shard=64, zero_stage=3), layers=16, rank=63),
    Case(Layout(dp_shard=8, dp_replicate=2, zero_stage=3), rank=3),
    Case(Layout(dp_shard=8, dp_replicate=2, zero_stage=2), rank=3, microbatches=4),
    Case(Layout(**_Z3), "llama-3.1-8b", 4, 0, training={"optimizer": "sgd"}),
    # Short steps, in which the embedding and the head are most of what passes.
    Case(Layout(pp=2, dp_shard=2, zero_stage=1, schedule="GPipe"), microbatches=1, training={"seq_len": 512}),
    Case(
        Layout(pp=2, dp_shard=4, zero_stage=1, schedule="Interleaved1F1B", virtual_stages=2),
        microbatches=4,
        training={"seq_len": 512, "precision": "fp32"},
    ),
    Case(Layout(pp=4, dp_shard=2, zero_stage=1), layers=8, microbatches=8, training={"seq_len": 256}),
    Case(Layout(**_Z3), layers=16, rank=3, training={"seq_len": 512}),
    Case(Layout(**_Z3), layers=16, rank=3, microbatches=1, training={"seq_len": 64}),
    # Recomputation.
    Case(Layout(**_Z3, recompute="selective"), layers=8),
    Case(Layout(dp_shard=8, zero_stage=1, recompute="full"), layers=8),
    Case(Layout(dp_shard=8, zero_stage=1, recompute="selective"), layers=8),
    # Tensor and context parallelism.
    Case(Layout(tp=4), rank=1),
    Case(Layout(tp=8, **_SP, micro_batch_size=2), rank=7),
    Case(Layout(tp=2, dp_shard=4, zero_stage=3, **_SP, recompute="selective"), rank=5),
    Case(Layout(tp=2, dp_shard=4, zero_stage=3, recompute="full"), rank=5),
    Case(Layout(cp=4, dp_shard=2, zero_stage=3), rank=2, training={"seq_len": 16384}),
    Case(Layout(cp=2, tp=2, dp_shard=2, zero_stage=3, **_SP), rank=2, training={"seq_len": 8192}),
    # Pipelines.
    *(Case(Layout(pp=4), layers=8, rank=rank, microbatches=8) for rank in (0, 1, 3)),
    Case(Layout(pp=4, dp_shard=4, zero_stage=3), layers=8, rank=0, microbatches=8),
    Case(Layout(pp=4, dp_shard=4, zero_stage=3), layers=8, rank=12, microbatches=8),
    Case(Layout(pp=4, schedule="GPipe"), layers=8, rank=0, microbatches=8),
    Case(Layout(pp=4, schedule="GPipe"), layers=8, rank=3, microbatches=8),
    Case(Layout(pp=4, stage_layers=(5, 7, 7, 5), recompute="full"), layers=24, rank=2, microbatches=8),
    Case(Layout(pp=4, dp_shard=2, zero_stage=1), layers=8, rank=2, microbatches=8, training=_FP32),
    _split("Interleaved1F1B", 0),
    _split("Interleaved1F1B", 6, dp_shard=2, zero_stage=3),
    _split("LoopedBFS", 1),
    _split("LoopedBFS", 6, dp_shard=2, zero_stage=3),
    _split("InterleavedZeroBubble", 0),
    _split("InterleavedZeroBubble", 6, dp_shard=2, zero_stage=2),
    _split("ZBVZeroBubble", 0),
    _split("ZBVZeroBubble", 6, dp_shard=2, zero_stage=2),
    _split("DualPipeV", 0),
    _split("DualPipeV", 3),
    # Other models.
    Case(Layout(**_Z3), "llama-3.1-70b", 4),
    Case(Layout(tp=8, dp_shard=4, zero_stage=3, **_SP), "llama-3.1-70b", 8, 9),
    Case(Layout(tp=8, pp=8, dp_shard=2, zero_stage=1, **_SP), "llama-3.1-70b", 16, 40, 8),
    Case(Layout(tp=8, schedule="DualPipeV", dp_shard=4, zero_stage=2, **_SP, **_CHUNKS), "llama-3.1-70b", 16, 33, 8),
    Case(Layout(tp=8, dp_shard=2, zero_stage=3, **_SP), "gpt3-175b", 4, 3, training={"seq_len": 2048}),
    Case(Layout(dp_replicate=8, micro_batch_size=8), "gpt2", 12, training={"precision": "fp32", "seq_len": 1024}),
    Case(Layout(**_Z3, micro_batch_size=8), "gpt2", 12, training={"seq_len": 1024}),
    Case(Layout(dp_shard=4, zero_stage=2, micro_batch_size=4), "gpt2", 12, 1, 4, {"seq_len": 1024}),
    Case(Layout(**_Z3), "qwen2.5-7b", 4),
    Case(Layout(pp=2, tp=4, dp_shard=2, zero_stage=2, **_SP), "qwen3-8b", 8, 3, 4),
    Case(Layout(**_Z3, micro_batch_size=4), "bert-large", 24, training={"seq_len": 512}),
    Case(Layout(**_Z3, micro_batch_size=4), "t5-large", 12, training={"seq_len": 512}),
    # Mixtures: fake tokens choose all experts alike.
    Case(Layout(**_Z3, ep=8), "mixtral-8x7b", 2, 1, training=_EVEN),
    Case(Layout(**_Z3), "mixtral-8x7b", 2, 1, training=_EVEN),
    Case(Layout(dp_shard=8, ep=4, pp=2, zero_stage=2), "mixtral-8x7b", 4, 1, microbatches=4, training=_EVEN),
    Case(Layout(**_Z3, ep=8, recompute="full"), "mixtral-8x7b", 4, 1, training=_EVEN),
]
