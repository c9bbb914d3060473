"""Megatron-Bridge 0.6.2: a function on a ConfigContainer, and a recipe named as its own are where it has the model.

Field names: NVIDIA-NeMo/Megatron-Bridge@067f987d, src/megatron/bridge/training/config.py and recipes/; those of `model`
are megatron-core's.
"""

from __future__ import annotations

from typing import Any

from planner.export import megatron
from planner.export.header import header
from planner.plan import Plan

WRITTEN_FOR = "Megatron-Bridge 0.6.2"
STACKS = ("megatron-bridge",)
PRECISION = {
    "bf16": "bf16_mixed",
    "fp16": "fp16_mixed",
    "fp8": "bf16_with_fp8_current_scaling_mixed",
    "mxfp8": "bf16_with_mxfp8_mixed",
    "nvfp4": "bf16_with_nvfp4_mixed",
}
# (layers, hidden size, vocabulary) of the Llama 3.1 models, and how its recipes call them.
_RECIPES = {
    (32, 4096, 128256): "llama31_8b",
    (80, 8192, 128256): "llama31_70b",
    (126, 16384, 128256): "llama31_405b",
}
_TEXT = """{header}
from megatron.bridge.recipes.llama import {base}
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import get_mixed_precision_config


def layout(cfg: ConfigContainer) -> ConfigContainer:
{body}

def {name}() -> ConfigContainer:
    return layout({base}())
"""


def problems(plan: Plan) -> list[str]:
    """What Megatron-Bridge cannot express."""
    found = megatron.shared_problems(plan)
    if plan.job.training.precision not in PRECISION:
        found.append(f"mixed_precision has no {plan.job.training.precision}; it has {', '.join(PRECISION)}")
    return found


def files(plan: Plan) -> dict[str, str]:
    """`layout(cfg)` for any recipe, and a recipe of Llama 3.1."""
    model, training = plan.job.model, plan.job.training
    family = _RECIPES.get((model.num_hidden_layers, model.hidden_size, model.vocab_size))
    kind = "pretrain" if training.peft == "none" else "peft"
    gpu = plan.job.cluster.gpu.name.split("-")[0].lower()
    name = f"{family}_{kind}_{plan.layout.world_size}gpu_{gpu}_{training.precision}_layout_config"
    note = () if family else (f"Call layout(cfg) on a recipe of {model.name}.",)
    top = header(plan, WRITTEN_FOR, STACKS, (*note, *megatron.notes(plan)))
    body = "".join(f"    {line}\n" for line in [*_body(plan), "return cfg"])
    text = _TEXT.format(header=top, base=f"{family}_{kind}_config", body=body, name=name)
    if family is None:
        text = text[: text.index("\n\ndef None_")].rstrip() + "\n"
        text = "".join(line for line in text.splitlines(keepends=True) if "recipes.llama" not in line)
    return {"layoutwise_megatron_bridge.py": text}


def _body(plan: Plan) -> list[str]:
    """Assignments. mixed_precision and comm_overlap overwrite fields of ddp when a run starts, so they agree."""
    fp32 = not megatron.reduces_in_bf16(plan)
    data = megatron.data_parallel(plan)
    fused = not data.pop("no_gradient_accumulation_fusion", False)
    checkpoint = data.pop("ckpt_format", None)
    model = _model(plan)
    mapping = model.pop("use_tp_pp_dp_mapping", False)
    batch = megatron.batch(plan)
    overlap = bool(plan.job.stack.overlap_tp and plan.layout.sequence_parallel)
    reduce, gather = bool(data.get("overlap_grad_reduce")), bool(data.get("overlap_param_gather"))
    sharded = bool(data.get("use_distributed_optimizer"))
    ddp = {
        "use_distributed_optimizer": sharded,
        "num_distributed_optimizer_instances": data.get("num_distributed_optimizer_instances", 1),
        "overlap_grad_reduce": reduce,
        "overlap_param_gather": gather,
        "grad_reduce_in_fp32": fp32,
        "use_megatron_fsdp": bool(data.get("use_megatron_fsdp")),
        "data_parallel_sharding_strategy": data.get("data_parallel_sharding_strategy", "no_shard"),
    }
    overlaps = f"tp_comm_overlap={overlap}, overlap_grad_reduce={reduce}, overlap_param_gather={gather}"
    lines = [f"cfg.model.{name} = {_shown(value)}" for name, value in model.items()]
    lines += [f"cfg.model.gradient_accumulation_fusion = {fused}"] if not fused else []
    lines += [f"cfg.ddp.{name} = {_shown(value)}" for name, value in ddp.items()]
    lines += [f"cfg.optimizer.use_distributed_optimizer = {sharded}"]
    lines += [f'cfg.checkpoint.ckpt_format = "{checkpoint}"'] if checkpoint else []
    lines += [
        f"cfg.dist.use_tp_pp_dp_mapping = {mapping}",
        f"cfg.train.micro_batch_size = {batch['micro_batch_size']}",
        f"cfg.train.global_batch_size = {batch['global_batch_size']}",
        f"cfg.model.seq_length = {batch['seq_length']}",
        f"cfg.dataset.seq_length = {batch['seq_length']}",
        f'cfg.mixed_precision = get_mixed_precision_config("{PRECISION[plan.job.training.precision]}")',
        f"cfg.mixed_precision.grad_reduce_in_fp32 = {fp32}",
        f"cfg.comm_overlap = CommOverlapConfig({overlaps})",
    ]
    return lines


def _model(plan: Plan) -> dict[str, Any]:
    """megatron-core's fields, all of them said: a recipe has values of its own, which a layout must not inherit."""
    layout, fields = plan.layout, megatron.parallel(plan)
    fields.pop("num_virtual_stages_per_pipeline_rank", None)
    modules = fields.pop("recompute_modules", None)
    fixed: dict[str, Any] = {
        "virtual_pipeline_model_parallel_size": layout.virtual_stages if layout.virtual_stages > 1 else None,
        "pipeline_model_parallel_layout": None,
        "microbatch_group_size_per_vp_stage": None,
        "recompute_granularity": None,
        "recompute_method": None,
        "recompute_num_layers": None,
        "recompute_modules": [modules] if modules else None,
    }
    return {**fixed, **fields}


def _shown(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value).replace("'", '"')
