"""DeepSpeed's JSON as fields of a Layout, the inverse of planner/export/deepspeed.py.

The JSON has no pipeline (that is code; its batches tell how long it is) and does not say whether the model recomputes.
Field names: deepspeed/runtime/config.py and runtime/zero/config.py of 0.19.8; `mics_shard_size` is of releases before.
"""

from __future__ import annotations

from typing import Any

from planner.imports.settings import Settings
from simulator.errors import UserError
from simulator.job import Job

MARKS = ("train_micro_batch_size_per_gpu", "train_batch_size", "zero_optimization.stage", "tensor_parallel.autotp_size")


def read(settings: Settings, job: Job) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(fields of the layout, what is said of the job, sentences on what a Layout has no word for)."""
    notes: list[str] = []
    tp = settings.integer("tensor_parallel.autotp_size", least=0) or 1
    cp = settings.integer("sequence_parallel_size") or 1
    if job.world_size % (tp * cp):
        raise UserError(
            f"autotp_size({tp}) * sequence_parallel_size({cp}) must divide the job's {job.world_size} ranks"
        )
    micro, steps, batch = _batch(settings)
    pp = _pipeline(micro, steps, batch, job.world_size // (tp * cp))
    dp = job.world_size // (tp * cp * pp)
    if pp > 1:
        notes.append(f"train_batch_size leaves {dp} data-parallel ranks of {dp * pp}: a pipeline of {pp} is taken")
    zero = settings.integer("zero_optimization.stage", least=0) or 0
    if zero > 3:
        raise UserError(f"'zero_optimization.stage' = {zero} must be 0, 1, 2 or 3")
    shards = dp
    mics = settings.integer("zero_optimization.mics_shard_size", least=-1) or -1
    if zero and mics > 0:
        if dp % mics:
            raise UserError(f"'zero_optimization.mics_shard_size' = {mics} must divide the {dp} data-parallel ranks")
        shards = mics
    if shards * cp == 1:
        zero = 0
    if micro is None and batch and steps and batch % (steps * dp) == 0:
        micro = batch // (steps * dp)
    for part in ("offload_param", "offload_optimizer"):
        offload = settings.value(f"zero_optimization.{part}")
        if isinstance(offload, dict) and offload.get("device", "none") != "none":
            notes.append(f"zero_optimization.{part}: a layout keeps everything on the device")
    if (settings.integer("zero_optimization.zero_hpz_partition_size") or 1) > 1:
        notes.append(
            "zero_optimization.zero_hpz_partition_size: a second copy of the weights inside a node is not modelled"
        )
    notes.append("the JSON does not say whether the model recomputes: recompute = none is taken")
    settings.value("zero_optimization.overlap_comm")
    enabled = {name: settings.value(f"{name}.enabled") is True for name in ("bf16", "fp16")}
    if all(enabled.values()):
        raise UserError("'bf16.enabled' and 'fp16.enabled' contradict each other: leave one out")
    precision = next(
        (name for name, on in enabled.items() if on), "fp32" if settings.has("bf16.enabled", "fp16.enabled") else None
    )
    fields = {
        "tp": tp, "cp": cp, "pp": pp, "zero_stage": zero, "dp_shard": shards if zero else 1,
        "dp_replicate": dp // shards if zero else dp, "sequence_parallel": False,
        **({"micro_batch_size": micro} if micro else {}),
    }  # fmt: skip
    said = {"global_batch_size": batch if steps is None or micro is None else micro * steps * dp}
    return fields, said | {"precision": precision}, notes


def _batch(settings: Settings) -> tuple[int | None, int | None, int | None]:
    """(sequences of a microbatch, accumulation steps, sequences of a step); "auto" is somebody else's to say."""
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
    micro, steps, batch = (None if settings.value(name) == "auto" else settings.integer(name) for name in names)
    return micro, steps, batch


def _pipeline(micro: int | None, steps: int | None, batch: int | None, ranks: int) -> int:
    """Ranks of a pipeline: DeepSpeed holds batch = micro batch * steps * data-parallel ranks, and what is left of the
    ranks can only be stages of a PipelineModule."""
    if not (micro and steps and batch):
        return 1
    dp, rest = divmod(batch, micro * steps)
    if rest or ranks % dp:
        raise UserError(
            f"train_batch_size = {batch} is not train_micro_batch_size_per_gpu({micro}) * gradient_accumulation_steps"
            f"({steps}) * data-parallel ranks, of which the job has {ranks} or a divisor of them"
        )
    return ranks // dp
