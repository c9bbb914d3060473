"""Megatron-LM (megatron-core 0.19.2): flags of pretrain_gpt.py and its siblings, as an array of the shell.

Flag names: NVIDIA/Megatron-LM@d98e8a64, megatron/training/arguments.py and megatron/core/model_parallel_config.py,
whose fields are flags by their own names. The data-parallel size is never said: it is what the other axes leave.
"""

from __future__ import annotations

from typing import Any

from planner.export import rules
from planner.export.header import header
from planner.plan import Plan
from simulator.axes import AXES
from simulator.expert_parallel import expert_tp, overlapped_share
from simulator.layout import Layout

WRITTEN_FOR = "Megatron-LM (megatron-core 0.19.2)"
STACKS = ("megatron-core",)
STRATEGY = {2: "optim_grads", 3: "optim_grads_params"}
_TP_PP_DP = ("tp", "cp", "pp", "dp_shard", "dp_replicate")
_CP_COMM = {"": "p2p", "ring": "p2p", "all_gather": "all_gather", "ulysses": "a2a"}
_PRECISION: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "fp16": {"fp16": True},
    "fp8": {"bf16": True, "fp8_format": "hybrid", "fp8_recipe": "tensorwise"},
    "mxfp8": {"bf16": True, "fp8_format": "e4m3", "fp8_recipe": "mxfp8"},
    "nvfp4": {"bf16": True, "fp4_format": "e2m1", "fp4_recipe": "nvfp4"},
}


def problems(plan: Plan) -> list[str]:
    """What Megatron-LM cannot express."""
    found = shared_problems(plan)
    if plan.job.training.peft != "none":
        found.append(f"no flag trains adapters: peft = '{plan.job.training.peft}'")
    return found


def shared_problems(plan: Plan) -> list[str]:
    """What no training loop around megatron-core can express."""
    layout, training, found = plan.layout, plan.job.training, []
    if layout.pp > 1:
        found += _pipeline_problems(plan)
    if layout.offload != "none" and layout.zero_stage != 1:
        found.append(
            f"optimizer-cpu-offload needs the distributed optimizer, and is not known to run with Megatron-FSDP: "
            f"zero_stage = {layout.zero_stage} must be 1"
        )
    if layout.zero_stage >= 2 and layout.pp > 1:
        found.append(
            f"data-parallel-sharding-strategy = {STRATEGY[layout.zero_stage]} is Megatron-FSDP's, which runs beside "
            f"tensor, context and expert parallelism, not beside pipeline-model-parallel-size = {layout.pp}"
        )
    if training.precision == "fp16" and layout.ep > 1:
        found.append(f"fp16 refuses expert-model-parallel-size = {layout.ep}")
    if layout.ep > 1 and layout.tp > 1 and not layout.sequence_parallel:
        found.append(
            f"expert-model-parallel-size = {layout.ep} with tensor-model-parallel-size needs sequence-parallel"
        )
    if not any(rules.same_order(layout, axes) for axes in (AXES, _TP_PP_DP)):
        found.append(
            f"rank_order = '{layout.rank_order}': the order is tp-cp-ep-dp-pp, or tp-cp-ep-pp-dp with "
            "use-tp-pp-dp-mapping"
        )
    return found


def _pipeline_problems(plan: Plan) -> list[str]:
    layout, found = plan.layout, rules.decoder_stages(plan, "pipeline-model-parallel-size")
    wanted = "Interleaved1F1B" if layout.virtual_stages > 1 else "1F1B"
    if layout.schedule != wanted:
        found.append(f"there are two schedules, 1F1B and interleaved: no {layout.schedule}")
    if layout.virtual_stages > 1 and group_size(plan) < layout.pp:
        found.append(
            f"microbatch-group-size-per-virtual-pipeline-stage = {group_size(plan)} must be at least "
            f"pipeline-model-parallel-size = {layout.pp}"
        )
    if plan.job.model.layer_pattern and len(set(_layers(plan))) > 1:
        found.append("pipeline-model-parallel-layout has letters for attention layers, not for hybrid ones")
    return found


def files(plan: Plan) -> dict[str, str]:
    """A script that sets LAYOUT, for `source` before one's own torchrun line."""
    flags = {**parallel(plan), **data_parallel(plan), **offload(plan), **batch(plan), **_precision(plan)}
    if plan.job.stack.overlap_tp and plan.layout.sequence_parallel:
        flags["tp_comm_overlap"] = True
    launch = (
        f"source megatron.sh; torchrun --nnodes {plan.job.nodes} --nproc-per-node "
        f"{plan.layout.world_size // plan.job.nodes} --rdzv-backend c10d --rdzv-endpoint HEAD:29500 pretrain_gpt.py "
        '"${LAYOUT[@]}" and the flags of model, data and optimizer.'
    )
    lines = [f"    {_flag(name, value)}" for name, value in flags.items() if value is not None and value is not False]
    return {
        "megatron.sh": header(plan, WRITTEN_FOR, STACKS, (launch, *notes(plan)))
        + _connections(plan.layout)
        + "\nLAYOUT=(\n"
        + "\n".join(lines)
        + "\n)\n"
    }


def notes(plan: Plan) -> tuple[str, ...]:
    """Where the words of the plan and of Megatron mean different things."""
    found = []
    if plan.layout.recompute == "selective" and plan.job.stack.name.startswith("torchtitan"):
        found.append(
            "core_attn recomputes the attention core, the plan's stack every second matmul and pointwise kernels."
        )
    if overlapped_share(plan.job, plan.layout):
        found.append("The prediction hides the exchange of tokens, as overlap-moe-expert-parallel-comm does.")
    if plan.job.stack.expert_dispatch == "forwarded" and plan.layout.ep > 1:
        found.append("It sends a token once to each node, as the flex dispatcher with DeepEP or HybridEP does.")
    return tuple(found)


def parallel(plan: Plan) -> dict[str, Any]:
    """The model's axes, stages and recomputation, by the fields of megatron-core's configuration."""
    layout = plan.layout
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_model_parallel_size": layout.pp,
        "context_parallel_size": layout.cp,
        "cp_comm_type": _CP_COMM[plan.job.stack.context_parallel] if layout.cp > 1 else None,
    }
    if plan.job.model.num_experts:
        fields["expert_model_parallel_size"] = layout.ep
        fields["moe_token_dispatcher_type"] = "alltoall"
        fields["expert_tensor_parallel_size"] = expert_tp(layout, plan.job.stack)
    if layout.pp > 1:
        fields |= _stages(plan)
    if not rules.same_order(layout, AXES):
        fields["use_tp_pp_dp_mapping"] = True
    if layout.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if layout.recompute == "selective":
        fields |= {"recompute_granularity": "selective", "recompute_modules": "core_attn"}
    return fields


def data_parallel(plan: Plan) -> dict[str, Any]:
    """What data parallelism shards. Replicas of sharded groups are instances of the distributed optimizer."""
    layout = plan.layout
    fields: dict[str, Any] = {}
    if layout.zero_stage:
        fields["use_distributed_optimizer"] = True
        if layout.dp_replicate > 1:
            fields["num_distributed_optimizer_instances"] = layout.dp_replicate
    if layout.zero_stage >= 2:
        fields |= {
            "use_megatron_fsdp": True,
            "data_parallel_sharding_strategy": STRATEGY[layout.zero_stage],
            "outer_dp_sharding_strategy": "no_shard" if layout.dp_replicate > 1 else None,
            "ckpt_format": "fsdp_dtensor",
            "no_gradient_accumulation_fusion": True,
        }
    if layout.dp * layout.cp > 1:
        fields["overlap_grad_reduce"] = True
        fields["overlap_param_gather"] = layout.zero_stage > 0
    return fields


def offload(plan: Plan) -> dict[str, Any]:
    """The optimizer in host memory, by the fields of megatron-core's OptimizerConfig: it reuses the code path of the
    precision-aware optimizer, which keeps fp32 if nothing else is said. Copies run beside the host's update."""
    if plan.layout.offload == "none":
        return {}
    return {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 1.0,
        "use_precision_aware_optimizer": True,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }


def batch(plan: Plan) -> dict[str, Any]:
    """The batch, in sequences; the microbatches of a step follow from it."""
    training = plan.job.training
    return {
        "micro_batch_size": plan.layout.micro_batch_size,
        "global_batch_size": training.global_batch_size,
        "seq_length": training.seq_len,
    }


def group_size(plan: Plan) -> int:
    """Microbatches that a stage runs before the rank's next one: torch makes as many equal rounds as pp ranks allow,
    Megatron takes the length of a round."""
    count = plan.layout.microbatches(plan.job.training.global_batch_size)
    return count // max(1, count // plan.layout.pp)


def reduces_in_bf16(plan: Plan) -> bool:
    """Whether the plan's stack adds gradients up over ranks in 16 bits."""
    recipe = plan.job.stack.recipes[plan.job.training.precision]
    return plan.job.training.precision not in ("fp32", "fp16") and recipe.gradient_reduce == 2.0


def _stages(plan: Plan) -> dict[str, Any]:
    """Even stages by their number, others by a layout: E embedding, t a layer, | the next stage, L the loss."""
    layout, layers = plan.layout, _layers(plan)
    fields: dict[str, Any] = {}
    if len(set(layers)) > 1:
        fields["pipeline_model_parallel_layout"] = stage_letters(layers)
    elif layout.virtual_stages > 1:
        fields["num_virtual_stages_per_pipeline_rank"] = layout.virtual_stages
    if layout.virtual_stages > 1 and group_size(plan) != layout.pp:
        fields["microbatch_group_size_per_vp_stage"] = group_size(plan)
    return fields


def stage_letters(layers: tuple[int, ...]) -> str:
    """Megatron's notation of a pipeline.

    >>> stage_letters((3, 4, 4, 4, 2))
    'Et*3|(t*4|)*3t*2L'
    >>> stage_letters((2, 1))
    'Et*2|tL'
    >>> stage_letters((0, 1, 1, 0))
    'E|(t|)*2L'
    """
    words = [f"t*{count}" if count > 1 else "t" * count for count in layers]
    middle, place = "", 1
    while place < len(words) - 1:
        run = next((n for n in range(place, len(words) - 1) if words[n] != words[place]), len(words) - 1) - place
        middle += f"({words[place]}|)*{run}" if run > 1 else f"{words[place]}|"
        place += run
    return f"E{words[0]}|{middle}{words[-1]}L"


def _layers(plan: Plan) -> tuple[int, ...]:
    return plan.layout.layers_per_stage(plan.job.model.num_hidden_layers)


def _precision(plan: Plan) -> dict[str, Any]:
    fields = dict(_PRECISION[plan.job.training.precision])
    if reduces_in_bf16(plan):
        fields["grad_reduce_in_bf16"] = True
    return fields


def _connections(layout: Layout) -> str:
    """Up to Hopper, Megatron asks for one hardware queue with tp or cp, and Megatron-FSDP for more."""
    if layout.zero_stage >= 2:
        return "\nunset CUDA_DEVICE_MAX_CONNECTIONS\n"
    return "\nexport CUDA_DEVICE_MAX_CONNECTIONS=1\n" if layout.tp * layout.cp > 1 else ""


# Flags that are not their field in kebab case.
_FLAGS = {"microbatch_group_size_per_vp_stage": "microbatch-group-size-per-virtual-pipeline-stage"}


def _flag(name: str, value: Any) -> str:
    flag = "--" + _FLAGS.get(name, name.replace("_", "-"))
    if value is True:
        return flag
    return f"{flag} '{value}'" if isinstance(value, str) and not value.replace("_", "").isalnum() else f"{flag} {value}"
