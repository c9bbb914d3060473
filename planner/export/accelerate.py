"""accelerate 1.15.0: the file of `accelerate launch --config_file`.

Field names and rules: accelerate/commands/config/config_args.py, commands/launch.py and parallelism_config.py of the
1.15.0 wheel. Unknown keys are errors there, so that what the file cannot hold stands in its header.
"""

from __future__ import annotations

from typing import Any

import yaml

from planner.export import rules
from planner.export.header import header
from planner.plan import Plan

WRITTEN_FOR = "accelerate 1.15.0"
FILE = "accelerate.yaml"
_PRECISIONS = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}


def problems(plan: Plan) -> list[str]:
    """What accelerate cannot express."""
    layout = plan.layout
    found = rules.missing(
        layout, {"pp": "parallelism_config has no pipeline", "ep": "parallelism_config has no expert parallelism"}
    )
    if layout.sequence_parallel:
        found.append("parallelism_config_tp_size knows no sequence_parallel: it must be false")
    if layout.zero_stage == 1:
        found.append("fsdp_reshard_after_forward shards gradients and parameters at least: no zero_stage 1")
    if layout.zero_stage == 0 and layout.cp > 1:
        found.append("parallelism_config_cp_size always shards parameters over its ranks: no zero_stage 0")
    if layout.dp_replicate > 1 and layout.dp_shard == 1 and layout.tp * layout.cp > 1:
        found.append(
            f"parallelism_config_dp_replicate_size = {layout.dp_replicate} beside tp or cp needs "
            "parallelism_config_dp_shard_size > 1"
        )
    if layout.recompute == "selective":
        found.append("fsdp_activation_checkpointing recomputes whole layers: no selective recompute")
    if layout.recompute == "full" and not layout.zero_stage:
        found.append("fsdp_activation_checkpointing needs FSDP: no full recompute with zero_stage 0")
    found += rules.offload(layout, "fsdp_offload_params moves parameters and gradients to the host as well")
    found += rules.rank_order(layout, "[dp_replicate, dp_shard, cp, sp, tp]")
    return found + rules.precision(plan, _PRECISIONS, "mixed_precision")


def files(plan: Plan) -> dict[str, str]:
    """The configuration of node 0; on the others `--machine_rank` says which they are."""
    job, layout = plan.job, plan.layout
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _distributed_type(plan),
        "mixed_precision": _PRECISIONS[job.training.precision],
        "num_machines": job.nodes,
        "num_processes": layout.world_size,
        "machine_rank": 0,
        "main_training_function": "main",
        "rdzv_backend": "static",
        "same_network": True,
        "use_cpu": job.cluster.gpu.kind == "cpu",
        "fsdp_config": _fsdp(plan) if layout.zero_stage else {},
        # Empty and absent are not the same: `accelerate launch` takes an absent one for a request.
        "parallelism_config": _axes(plan),
    }
    steps = layout.microbatches(job.training.global_batch_size)
    launch = (
        f"accelerate launch --config_file {FILE} --gradient_accumulation_steps {steps} "
        + ("--main_process_ip HEAD --main_process_port 29500 --machine_rank N " if job.nodes > 1 else "")
        + "YOUR_SCRIPT"
    )
    data = f"The script's data loader: {layout.micro_batch_size} sequences of {job.training.seq_len} tokens per device."
    return {FILE: header(plan, WRITTEN_FOR, (), (launch, data)) + yaml.safe_dump(config, sort_keys=False)}


def _distributed_type(plan: Plan) -> str:
    if plan.layout.zero_stage:
        return "FSDP"
    if plan.layout.world_size == 1:
        return "NO"
    return "MULTI_CPU" if plan.job.cluster.gpu.kind == "cpu" else "MULTI_GPU"


def _fsdp(plan: Plan) -> dict[str, Any]:
    return {
        "fsdp_version": 2,
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_reshard_after_forward": plan.layout.zero_stage == 3,
        "fsdp_activation_checkpointing": plan.layout.recompute == "full",
        "fsdp_offload_params": False,
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    }


def _axes(plan: Plan) -> dict[str, Any]:
    """Sizes of the axes; plain data parallelism has none."""
    layout = plan.layout
    if not layout.zero_stage and layout.tp == 1:
        return {}
    sizes: dict[str, Any] = {axis: getattr(layout, axis) for axis in ("dp_replicate", "dp_shard", "tp", "cp")}
    fields = {f"parallelism_config_{axis}_size": size for axis, size in sizes.items()}
    if layout.cp > 1:
        fields["parallelism_config_cp_comm_strategy"] = (
            "alltoall" if plan.job.stack.context_parallel == "ring" else "allgather"
        )
    return fields
