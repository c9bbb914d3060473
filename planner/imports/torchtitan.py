"""torchtitan's flags, TOML and recipes as fields of a Layout: 0.3.0, main, and the names before [parallelism].

The inverse of planner/export/torchtitan.py and torchtitan_main.py. Where stages lie: torchtitan 0.3.0,
torchtitan/distributed/pipeline_parallel.py (generate_llm_fqn_per_model_part); when FSDP frees parameters:
torchtitan/distributed/fsdp.py (get_fsdp_reshard_after_forward_policy).
"""

from __future__ import annotations

import json
from typing import Any

from planner.export import torchtitan as written
from planner.imports import launch
from planner.imports.settings import Settings
from simulator.errors import UserError
from simulator.job import Job
from simulator.schedules import MULTI_STAGE, SCHEDULES

# Names that torchtitan alone has, old ones ([training], [experimental]) among them.
_AXES = {
    "tp": ("tensor_parallel_degree",),
    "cp": ("context_parallel_degree",),
    "pp": ("pipeline_parallel_degree",),
    "ep": ("expert_parallel_degree",),
    "dp_replicate": ("data_parallel_replicate_degree",),
    "dp_shard": ("data_parallel_shard_degree", "data_parallel_degree"),
}
MARKS = tuple(name for names in _AXES.values() for name in names)
_RESHARD = {word: stage for stage, word in written.RESHARD.items() if stage}
_PRECISIONS = {"bfloat16": "bf16", "float32": "fp32"}


def read(settings: Settings, job: Job) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(fields of the layout, what is said of the job, sentences on what a Layout has no word for)."""
    notes: list[str] = []
    fields: dict[str, Any] = {
        axis: settings.integer(*names) or 1 for axis, names in _AXES.items() if axis != "dp_shard"
    }
    shards = settings.integer(*_AXES["dp_shard"], least=-1)
    inner = fields["tp"] * fields["cp"] * fields["pp"] * fields["dp_replicate"]
    if shards in (None, -1):
        if job.world_size % inner:
            raise UserError(f"the degrees of tp, cp, pp and dp_replicate = {inner} must divide {job.world_size} ranks")
        shards = job.world_size // inner
    fields["dp_shard"] = max(1, shards or 1)
    fields["zero_stage"] = _zero_stage(settings, fields)
    parallel = settings.value("enable_sequence_parallel")
    fields["sequence_parallel"] = fields["tp"] > 1 and (parallel is None or settings.flag("enable_sequence_parallel"))
    if fields["pp"] > 1:
        fields |= _stages(settings, job, fields["pp"])
    fields["recompute"] = _recompute(settings, notes)
    seq_len = settings.integer("seq_len", "max_context_length")
    fields["micro_batch_size"] = _micro_batch_size(settings, fields["pp"], seq_len or job.training.seq_len)
    experts = settings.integer("expert_tensor_parallel_degree")
    if (experts or 1) > 1:
        notes.append(f"expert_tensor_parallel_degree = {experts}: a layout leaves experts as the stack cuts them")
    for name in ("dtype", "disable_cuda_graphs", "enable_async_tensor_parallel", "enable", "components",
                 "num_pp_microbatches"):  # fmt: skip
        settings.value(name)
    said = {
        "ranks": launch.ranks(settings),
        "global_batch_size": _batch(settings, seq_len or job.training.seq_len),
        "seq_len": seq_len,
        "precision": _precision(settings),
    }
    return fields, said, notes


def _zero_stage(settings: Settings, fields: dict[str, Any]) -> int:
    policy = settings.choice("fsdp_reshard_after_forward", {"default": 0, **_RESHARD})
    if fields["dp_shard"] * fields["cp"] == 1:
        return 0
    # By default parameters stay gathered under a pipeline, whose microbatches would gather them again.
    return int(policy) if policy else 3 if fields["pp"] == 1 else 2


def _stages(settings: Settings, job: Job, pp: int) -> dict[str, Any]:
    given = settings.value("pipeline_parallel_schedule") or "1F1B"
    schedule = next((name for name in SCHEDULES if name.lower() == str(given).lower()), None)
    if schedule is None:
        raise UserError(f"'pipeline_parallel_schedule' = '{given}' is not one of {', '.join(SCHEDULES)}")
    if settings.value("pipeline_parallel_schedule_csv"):
        raise UserError("'pipeline_parallel_schedule_csv': a layout has schedules by name, not by a file")
    modules = settings.value("module_fqns_per_model_part", "pipeline_parallel_module_fqns_per_model_part")
    each = settings.integer("pipeline_parallel_layers_per_stage")
    first = settings.integer("pipeline_parallel_first_stage_less_layers", least=0)
    last = settings.integer("pipeline_parallel_last_stage_less_layers", least=0)
    listed = settings.value("LAYERS")
    less = (1 if first is None else first, 1 if last is None else last)
    if isinstance(modules, list) or (modules is not None and listed is None):
        counts = _module_counts(modules)
    elif listed is not None:
        if not isinstance(listed, tuple | list) or not all(type(count) is int for count in listed):
            raise UserError(f"'LAYERS' = {str(listed)[:40]} must be the layers of every stage, like (8, 8)")
        counts = tuple(listed)
    else:
        effective = job.model.num_hidden_layers + sum(less)
        stages = -(-effective // each) if each else pp * (2 if schedule in MULTI_STAGE else 1)
        counts = _spread(job.model.num_hidden_layers, stages, less)
    if len(counts) % pp:
        raise UserError(f"{len(counts)} stages are no multiple of pipeline_parallel_degree = {pp}")
    return {"schedule": schedule, "virtual_stages": len(counts) // pp, "stage_layers": counts}


def _module_counts(modules: Any) -> tuple[int, ...]:
    """Layers of every stage; a command line has the lists as JSON.

    >>> _module_counts('[["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]')
    (1, 1)
    """
    try:
        parts = json.loads(modules) if isinstance(modules, str) else modules
        return tuple(sum(name.startswith("layers.") for name in part) for part in parts)
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(
            f"module_fqns_per_model_part = {str(modules)[:60]} must list the modules of every stage, like "
            '[["tok_embeddings", "layers.0"], ["layers.1", "norm", "output"]]'
        ) from None


def _spread(layers: int, stages: int, less: tuple[int, int]) -> tuple[int, ...]:
    """torchtitan's own stages: embedding and head count as so many layers of the first and the last one.

    >>> _spread(32, 4, (1, 1))
    (8, 9, 8, 7)
    """
    share, extra = divmod(layers + sum(less), stages)
    counts = [share + (stage < extra) for stage in range(stages)]
    counts[0] -= less[0]
    counts[-1] -= less[1]
    if min(counts) < 0:
        raise UserError(f"{layers} layers are too few for {stages} pipeline stages")
    return tuple(counts)


def _recompute(settings: Settings, notes: list[str]) -> str:
    mode = settings.value("mode")
    if mode is None:
        policy = str(settings.value("activation_checkpoint") or "")
        for word, name in (("FullAC", "full"), ("SelectiveAC", "selective"), ("MemoryBudgetAC", "selective")):
            if word in policy:
                if word == "MemoryBudgetAC":
                    notes.append("MemoryBudgetAC: the layout's recompute = selective is the stack's own")
                return name
        return "none"
    if mode not in ("none", "selective", "full"):
        if mode == "memory_budget":
            notes.append(
                "activation_checkpoint.mode = memory_budget: the layout's recompute = selective is the stack's"
            )
            return "selective"
        raise UserError(f"'{settings.shown['mode']}' = '{mode}' is not one of none, selective, full")
    option = settings.value("selective_ac_option")
    if mode == "selective" and option not in (None, "op"):
        notes.append(f"selective_ac_option = {option}: the layout's recompute = selective is the stack's own")
    return str(mode)


def _micro_batch_size(settings: Settings, pp: int, seq_len: int) -> int:
    tokens = settings.integer("num_tokens_per_microbatch_per_dp_rank")
    local = settings.integer("local_batch_size", "batch_size")
    micro = settings.integer("pipeline_parallel_microbatch_size")
    count = settings.integer("pipeline_parallel_microbatches")
    if tokens is not None:
        if tokens % seq_len:
            raise UserError(
                f"'num_tokens_per_microbatch_per_dp_rank' = {tokens} is no multiple of sequences of {seq_len} tokens"
            )
        return tokens // seq_len
    if pp == 1:
        return local or 1
    if count and local:
        if local % count:
            raise UserError(f"'pipeline_parallel_microbatches' = {count} must divide the batch of {local}")
        return local // count
    return micro or 1


def _batch(settings: Settings, seq_len: int) -> int | None:
    tokens, batch = (
        settings.integer("num_tokens_per_train_step"),
        settings.integer("global_batch_size", least=-1),
    )
    if tokens is not None:
        return tokens // seq_len
    return None if batch == -1 else batch


def _precision(settings: Settings) -> str | None:
    converters = str(settings.value("converters") or "")
    text = str(settings.value("model_spec") or "") + converters + str(settings.value("converter") or "")
    if "float8" in text.lower() or "converters=[converter]" in text:
        settings.value("mixed_precision_param")
        return "fp8"
    value = settings.value("mixed_precision_param")
    return _PRECISIONS.get(str(value)) if value else None
