"""Plans of models so small that many layouts of them train within seconds."""

from __future__ import annotations

import dataclasses
from typing import Any

from planner.plan import Certificate, Plan
from simulator import presets
from simulator.cluster import ClusterSpec, CollectiveFit, Gpu, Link, MatmulFit
from simulator.job import Job, Training
from simulator.layout import Layout
from simulator.model import ModelSpec, RopeScaling
from simulator.results import Breakdown, MemoryBreakdown, Prediction

LLAMA = ModelSpec(
    name="tiny-llama",
    family="llama",
    num_hidden_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=160,
    vocab_size=256,
    max_position_embeddings=64,
)
GPT = ModelSpec(
    name="tiny-gpt",
    family="gpt",
    num_hidden_layers=4,
    hidden_size=64,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=256,
    vocab_size=256,
    max_position_embeddings=48,
    tie_word_embeddings=True,
    norm="layernorm",
    activation="gelu_tanh",
    gated_mlp=False,
    position="learned",
    qkv_bias=True,
    attention_out_bias=True,
    mlp_bias=True,
)
# Query-key norms and biases on the queries, keys and values, as Qwen has them.
QWEN = dataclasses.replace(LLAMA, name="tiny-qwen", qk_norm=True, qkv_bias=True)
GPT_UNTIED = dataclasses.replace(GPT, name="tiny-gpt-untied", tie_word_embeddings=False)
# Enough blocks for eight stages.
DEEP = dataclasses.replace(LLAMA, name="tiny-deep", num_hidden_layers=8)
# Mixtral's block, and DeepSeek's: a dense block first, a router with a bias, experts that every token passes.
MOE = dataclasses.replace(
    LLAMA, name="tiny-moe", family="moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96
)
SHARED_MOE = dataclasses.replace(
    MOE, name="tiny-shared-moe", num_shared_experts=2, first_k_dense_replace=1, moe_intermediate_size=48,
    router_bias=True, mlp_bias=True,
)  # fmt: skip
# Llama 3.1's scaled frequencies, whose context is so short here that all three rules for wavelengths occur.
LLAMA3 = dataclasses.replace(
    LLAMA, name="tiny-llama3", rope_scaling=RopeScaling("llama3", 8.0, 1.0, 4.0, original_max_position_embeddings=64)
)
MISTRAL = dataclasses.replace(LLAMA, name="tiny-mistral", sliding_window=9)
# Parallel residuals and partial rotation, as GPT-NeoX has them; alibi and a norm behind the embedding, as BLOOM.
NEOX = dataclasses.replace(
    GPT_UNTIED, name="tiny-neox", family="neox", position="rope", partial_rotary_factor=0.25, parallel_residual=True
)
BLOOM = dataclasses.replace(GPT, name="tiny-bloom", family="neox", position="alibi", embedding_norm=True)
BERT = dataclasses.replace(GPT, name="tiny-bert", family="bert", num_encoder_layers=4, type_vocab_size=2)
BERT_UNTIED = dataclasses.replace(BERT, name="tiny-bert-untied", tie_word_embeddings=False)
BART = dataclasses.replace(GPT, name="tiny-bart", family="bart", num_encoder_layers=2)
T5 = dataclasses.replace(
    LLAMA,
    name="tiny-t5",
    family="t5",
    num_encoder_layers=2,
    num_key_value_heads=4,
    position="relative",
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    tie_word_embeddings=True,
    gated_mlp=False,
    activation="relu",
)
_DECODERS = (LLAMA, GPT, QWEN, GPT_UNTIED, DEEP, MOE, SHARED_MOE, LLAMA3, MISTRAL, NEOX, BLOOM)
MODELS = {model.name: model for model in (*_DECODERS, BERT, BERT_UNTIED, BART, T5)}

_FITS = {
    name: (CollectiveFit(2, 1e-4, 1.0),)
    for name in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
}
_NOWHERE = Link("memory", 1e9, 1e-6, _FITS)
_RATES = {"fp32": 1e11, "bf16": 1e11, "fp8": 1e11}
_CPU = Gpu("cpu", "cpu", 8e9, 1e10, _RATES, {name: MatmulFit(rate) for name, rate in _RATES.items()}, source="test")


def tiny_plan(layout: Layout, model: ModelSpec = LLAMA, stack: str = "layoutwise-cpu", **training: Any) -> Plan:
    """A plan with this layout, as if the planner had made it; `training` overrides fields of the recipe."""
    cluster = ClusterSpec("test", _CPU, layout.world_size, _NOWHERE, source="test")
    recipe = {"global_batch_size": 8, "seq_len": 32, "precision": "fp32", "learning_rate": 1e-2, "seed": 1}
    job = Job(model, cluster, 1, Training(**recipe | training), presets.find_stack(stack))
    memory = MemoryBreakdown(0, 0, 0, 0, 0, 0, 0)
    prediction = Prediction(layout, True, (), 1, 1, 1, 0, 0, Breakdown(compute=1), memory, (memory,) * layout.pp, 0.0)
    return Plan(job, prediction, (), prediction, Certificate(1, 0, 0, 0, 1, 0, 0), {})
