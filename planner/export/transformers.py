"""Hugging Face transformers 5.23.0: `DistributedConfig` as JSON, and what the Trainer needs beside it as Python.

Field names and rules: transformers/distributed/configuration_utils.py, fsdp.py and pipeline_parallel.py of the 5.23.0
wheel.
"""

from __future__ import annotations

import json
from typing import Any

from planner.export import rules
from planner.export.header import header
from planner.plan import Plan

WRITTEN_FOR = "transformers 5.23.0"
_LOAD = '''
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments
from transformers.distributed import DistributedConfig

# Tokens of a sequence: cut or pack the data to this length.
SEQ_LEN = {seq_len}


def load(name: str) -> PreTrainedModel:
    """The model on this rank, cut as planned."""
    with open("{config}", encoding="utf-8") as file:
        config = DistributedConfig.from_dict(json.load(file))
    return AutoModelForCausalLM.from_pretrained(name, distributed_config=config)


def training_arguments(output_dir: str) -> TrainingArguments:
    """The batch, precision and recomputation of the plan, for the Trainer."""
    return TrainingArguments(
        output_dir=output_dir,
{arguments}    )
'''
CONFIG = "distributed_config.json"


def problems(plan: Plan) -> list[str]:
    """What transformers cannot express."""
    layout, found = plan.layout, []
    if layout.pp > 1:
        found.append(
            f"pp_size = {layout.pp} is for inference: it has no schedule of microbatches, no {layout.schedule}"
        )
    if layout.pp > 1 and layout.dp > 1:
        found.append(f"pp_size = {layout.pp} cannot stand beside fsdp_size or dp_replicate_size")
    found += rules.missing(layout, {"cp": "DistributedConfig has no context parallelism"})
    if layout.sequence_parallel:
        found.append("enable_sequence_parallel is reserved and not wired yet: sequence_parallel must be false")
    if layout.zero_stage in (1, 2):
        found.append(f"fsdp_size shards parameters and frees them after use: no zero_stage {layout.zero_stage}")
    if layout.ep > 1 and layout.ep % layout.tp:
        found.append(f"ep_size = {layout.ep} must be a multiple of tp_size = {layout.tp}")
    if layout.ep > 1 and (layout.dp_shard * layout.tp) % layout.ep:
        found.append(f"ep_size = {layout.ep} must divide fsdp_size({layout.dp_shard}) * tp_size({layout.tp})")
    if layout.recompute == "selective":
        found.append("gradient_checkpointing recomputes whole layers: no selective recompute")
    found += rules.offload(layout, "fsdp_cpu_offload moves parameters and gradients to the host as well")
    found += rules.rank_order(layout, "(pp, dp_replicate, fsdp, tp)")
    return found + rules.precision(plan, ("bf16", "fp32"), "fsdp_mixed_precision")


def files(plan: Plan) -> dict[str, str]:
    """The JSON of `DistributedConfig.from_dict`, and a module that loads a model with it."""
    layout, training = plan.layout, plan.job.training
    mixed = training.precision == "bf16"
    config = {
        "tp_size": layout.tp,
        "fsdp_size": layout.dp_shard,
        "dp_replicate_size": layout.dp_replicate,
        "pp_size": 1,
        "ep_size": layout.ep,
        "enable_sequence_parallel": False,
        "fsdp_cpu_offload": False,
        "fsdp_mixed_precision": mixed,
    }
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": layout.micro_batch_size,
        "gradient_accumulation_steps": layout.microbatches(training.global_batch_size),
        "bf16": mixed,
        "gradient_checkpointing": layout.recompute == "full",
    }
    lines = "".join(f"        {name}={value!r},\n" for name, value in arguments.items())
    body = _LOAD.format(seq_len=training.seq_len, config=CONFIG, arguments=lines)
    top = header(plan, WRITTEN_FOR)
    return {CONFIG: json.dumps(config, indent=2) + "\n", "layoutwise_transformers.py": f"{top}\nimport json\n{body}"}
