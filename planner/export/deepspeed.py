"""DeepSpeed 0.19.8: its JSON, and the launch line with what the JSON does not say.

Field names and rules: deepspeed/runtime/config.py, runtime/zero/config.py, runtime/tensor_parallel/config.py and
runtime/pipe/ of the 0.19.8 source release. JSON has no comments: the header stands in the script.
"""

from __future__ import annotations

import json
from typing import Any

from planner.export import rules
from planner.export.header import header
from planner.plan import Plan

WRITTEN_FOR = "DeepSpeed 0.19.8"
CONFIG = "ds_config.json"
_PIPELINE = '''
from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn


def pipeline(layers: list[nn.Module], block: type[nn.Module], loss: nn.Module) -> PipelineModule:
    """The model as a row of layers, embedding and head among them, cut so that every stage has as many blocks."""
    return PipelineModule(
        layers,
        topology=PipeModelDataParallelTopology(num_pp={pp}, num_mp=1, num_dp={dp}),
        loss_fn=loss,
        partition_method=f"type:{{block.__name__}}",
        activation_checkpoint_interval={interval},
    )
'''


def problems(plan: Plan) -> list[str]:
    """What DeepSpeed cannot express."""
    layout, found = plan.layout, []
    if layout.pp > 1:
        found += _pipeline_problems(plan)
    if layout.zero_stage and layout.dp_replicate > 1:
        found.append(
            f"zero_optimization shards over all ranks: no dp_replicate = {layout.dp_replicate} of sharded groups "
            "(mics_shard_size is gone, and zero_hpz_partition_size only keeps a second copy of the weights)"
        )
    if layout.ep > 1:
        found.append(f"ep = {layout.ep} stands in the model's code (deepspeed.moe.layer.MoE), not in {CONFIG}")
    if layout.sequence_parallel:
        found.append("tensor_parallel.autotp_size knows no sequence_parallel: it must be false")
    heads = plan.job.model.num_attention_heads
    if layout.cp > 1 and heads % (layout.cp * layout.tp):
        found.append(
            f"sequence_parallel_size = {layout.cp} is Ulysses: cp({layout.cp}) * tp({layout.tp}) must divide "
            f"num_attention_heads = {heads}"
        )
    if layout.cp > 1 and layout.tp > 1:
        found.append(
            f"sequence_parallel_size = {layout.cp} beside tensor_parallel.autotp_size = {layout.tp}: one of them"
        )
    if layout.recompute == "selective":
        found.append("activation_checkpointing recomputes whole layers: no selective recompute")
    if layout.offload != "none" and not layout.zero_stage:
        found.append(f"zero_optimization.offload_optimizer needs a stage of at least 1, not {layout.zero_stage}")
    found += rules.rank_order(layout, "[pipe, data, model]")
    return found + rules.precision(plan, ("bf16", "fp16", "fp32"), "bf16.enabled or fp16.enabled")


def _pipeline_problems(plan: Plan) -> list[str]:
    layout, found = plan.layout, rules.decoder_stages(plan, "PipelineModule.num_stages")
    if layout.zero_stage >= 2:
        found.append(f"PipelineModule runs with zero_optimization.stage 0 and 1 only, not {layout.zero_stage}")
    if layout.schedule != "1F1B" or layout.virtual_stages > 1:
        found.append(f"PipelineModule has one schedule, 1F1B with a stage per rank: no {layout.schedule}")
    if layout.tp > 1 or layout.cp > 1:
        found.append("PipelineModule does not run with tensor_parallel.autotp_size or sequence_parallel_size")
    if len(set(layout.layers_per_stage(plan.job.model.num_hidden_layers))) > 1:
        found.append("PipelineModule's partition_method only makes even stages")
    return found


def files(plan: Plan) -> dict[str, str]:
    """The JSON, the launch script, and for a pipeline the module that builds it."""
    layout, training = plan.layout, plan.job.training
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.microbatches(training.global_batch_size),
        "train_batch_size": training.global_batch_size,
        "bf16": {"enabled": training.precision == "bf16"},
        "fp16": {"enabled": training.precision == "fp16"},
        "zero_optimization": {"stage": layout.zero_stage, "overlap_comm": layout.zero_stage > 0},
    }
    if layout.offload == "optimizer":
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if layout.tp > 1:
        config["tensor_parallel"] = {"autotp_size": layout.tp}
    if layout.cp > 1:
        config["sequence_parallel_size"] = layout.cp
    texts = {CONFIG: json.dumps(config, indent=2) + "\n", "deepspeed.sh": _script(plan)}
    if layout.pp > 1:
        body = _PIPELINE.format(pp=layout.pp, dp=layout.dp, interval=int(layout.recompute == "full"))
        texts["layoutwise_deepspeed.py"] = header(plan, WRITTEN_FOR) + body
    return texts


def _script(plan: Plan) -> str:
    job, layout = plan.job, plan.layout
    notes = [f"The script's data: sequences of {job.training.seq_len} tokens."]
    if layout.recompute == "full" and layout.pp == 1:
        notes.append("Recompute is the model's business: model.gradient_checkpointing_enable() in the script.")
    if layout.cp > 1:
        notes.append(
            "Sequences are cut by Ulysses, with all-to-alls around attention; the plan's stack may do otherwise."
        )
    if layout.tp > 1 and layout.zero_stage == 3:
        notes.append("Older releases train with AutoTP up to stage 2 only.")
    nodes = ""
    if job.nodes > 1:
        nodes = f" --hostfile hostfile --num_nodes {job.nodes}"
        notes.append("Lines of hostfile: NAME slots=GPUS.")
    command = (
        f"deepspeed{nodes} --num_gpus {layout.world_size // job.nodes} "
        f'"${{SCRIPT:?the training script}}" --deepspeed --deepspeed_config {CONFIG} "$@"'
    )
    return header(plan, WRITTEN_FOR, (), tuple(notes)) + command + "\n"
