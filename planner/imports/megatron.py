"""Megatron-LM's flags, and the same names in Megatron-Bridge's recipes, as fields of a Layout.

The inverse of planner/export/megatron.py; what its flags mean where they do not name a field of ours:
NVIDIA/Megatron-LM@d98e8a64, megatron/training/arguments.py (validate_args), megatron/core/transformer/
transformer_block.py (get_num_layers_to_build), pipeline_parallel_layer_layout.py.
"""

from __future__ import annotations

import re
from typing import Any

from planner.export import megatron as written
from planner.export import megatron_bridge
from planner.imports import launch
from planner.imports.settings import Settings
from simulator.errors import UserError
from simulator.expert_parallel import expert_tp
from simulator.job import Job
from simulator.layout import Layout

MARKS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "micro_batch_size",
    "use_distributed_optimizer",
    "use_megatron_fsdp",
    "expert_model_parallel_size",
    "context_parallel_size",
)
_ZERO = {"no_shard": 0, "optim": 1, **{word: stage for stage, word in written.STRATEGY.items()}}
# How a layout is run, not what it is.
_STACK_FLAGS = (
    "cp_comm_type", "overlap_grad_reduce", "overlap_param_gather", "moe_token_dispatcher_type", "tp_comm_overlap",
    "comm_overlap", "ckpt_format", "no_gradient_accumulation_fusion", "gradient_accumulation_fusion",
    "outer_dp_sharding_strategy", "microbatch_group_size_per_virtual_pipeline_stage",
    "microbatch_group_size_per_vp_stage", "grad_reduce_in_bf16", "grad_reduce_in_fp32", "overlap_cpu_optimizer_d2h_h2d",
    "use_precision_aware_optimizer",
)  # fmt: skip
# Blocks of a pipeline written out; nested repetitions reach any number.
_MOST_ITEMS = 100_000
_ITEM = re.compile(r"[EtmL]|\||\*\d+|\(|\)|,")


def read(settings: Settings, job: Job) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(fields of the layout, what is said of the job, sentences on what a Layout has no word for)."""
    notes: list[str] = []
    tp = settings.integer("tensor_model_parallel_size") or 1
    fields: dict[str, Any] = {
        "tp": tp,
        "pp": settings.integer("pipeline_model_parallel_size") or 1,
        "cp": settings.integer("context_parallel_size") or 1,
        "ep": settings.integer("expert_model_parallel_size") or 1,
        # Megatron turns it off itself where there is nothing to shard over.
        "sequence_parallel": settings.flag("sequence_parallel") and tp > 1,
        "micro_batch_size": settings.integer("micro_batch_size") or 1,
    }
    if settings.flag("use_tp_pp_dp_mapping"):
        fields["rank_order"] = "tp-cp-ep-pp-dp"
    fields |= _data_parallel(settings, job, fields)
    fields |= _stages(settings, job, fields["pp"])
    fields["recompute"] = _recompute(settings, notes)
    fields["offload"] = _offload(settings, job, notes)
    experts = settings.integer("expert_tensor_parallel_size")
    ours = expert_tp(Layout(tp=tp, ep=fields["ep"]), job.stack)
    if experts is not None and job.model.num_experts and experts != ours:
        name = settings.shown["expert_tensor_parallel_size"]
        notes.append(f"it says {name} = {experts}, the stack {job.stack.name} has {ours}: the stack's holds")
    for name in _STACK_FLAGS:
        settings.value(name)
    said = {
        "ranks": launch.ranks(settings),
        "global_batch_size": settings.integer("global_batch_size"),
        "seq_len": settings.integer("seq_length"),
        "precision": _precision(settings),
        "num_hidden_layers": settings.integer("num_layers"),
        "hidden_size": settings.integer("hidden_size"),
        "num_attention_heads": settings.integer("num_attention_heads"),
        "num_experts": settings.integer("num_experts"),
    }
    return fields, said, notes


def _data_parallel(settings: Settings, job: Job, fields: dict[str, Any]) -> dict[str, Any]:
    """dp is what the other axes leave; instances of the distributed optimizer are replicas of sharded groups."""
    inner = fields["tp"] * fields["cp"] * fields["pp"]
    if job.world_size % inner:
        raise UserError(
            f"tensor({fields['tp']}) * context({fields['cp']}) * pipeline({fields['pp']}) parallel sizes = {inner} "
            f"must divide the job's {job.world_size} ranks"
        )
    dp = job.world_size // inner
    sharded = settings.flag("use_distributed_optimizer")
    strategy = settings.choice("data_parallel_sharding_strategy", _ZERO)
    fsdp = settings.flag("use_megatron_fsdp", "use_custom_fsdp")
    zero = (strategy if strategy is not None else 0) if fsdp else int(sharded)
    if settings.flag("use_torch_fsdp2"):
        if sharded or fsdp:
            raise UserError("'use-torch-fsdp2' runs neither with the distributed optimizer nor with Megatron-FSDP")
        zero = 3
    instances = settings.integer("num_distributed_optimizer_instances") or 1
    if dp % instances:
        raise UserError(f"num-distributed-optimizer-instances = {instances} must divide the {dp} data-parallel ranks")
    shards = dp // instances
    if shards * fields["cp"] == 1:
        zero = 0
    return {"zero_stage": zero, "dp_shard": shards if zero else 1, "dp_replicate": instances if zero else dp}


def _stages(settings: Settings, job: Job, pp: int) -> dict[str, Any]:
    layers = job.model.num_hidden_layers
    each = settings.integer("num_layers_per_virtual_pipeline_stage")
    virtual = settings.integer("num_virtual_stages_per_pipeline_rank", "virtual_pipeline_model_parallel_size")
    letters = settings.value("pipeline_model_parallel_layout")
    ends = _ends(settings)
    ways = [
        name
        for name, there in (
            ("num-layers-per-virtual-pipeline-stage", each), ("num-virtual-stages-per-pipeline-rank", virtual),
            ("pipeline-model-parallel-layout", letters),
        )
        if there is not None
    ]  # fmt: skip
    # A recipe of Megatron-Bridge names the number of stages beside their layout.
    if len(ways) > 1 and not (letters is not None and each is None):
        raise UserError(f"{' and '.join(ways)} say the same in two ways: leave one out")
    if letters is not None and any(ends):
        raise UserError("pipeline-model-parallel-layout already says where layers lie: leave the other flags out")
    if pp == 1:
        return {}
    if letters is not None:
        counts = stage_counts(str(letters))
        if len(counts) % pp:
            raise UserError(f"pipeline-model-parallel-layout has {len(counts)} stages, no multiple of pp = {pp}")
        if virtual is not None and virtual * pp != len(counts):
            raise UserError(f"pipeline-model-parallel-layout has {len(counts)} stages, not {virtual} on each of {pp}")
        return _scheduled(len(counts) // pp) | {"stage_layers": counts}
    if each is not None:
        if layers % (pp * each):
            raise UserError(
                f"num-layers-per-virtual-pipeline-stage = {each} times pipeline-model-parallel-size = {pp} must divide "
                f"the {layers} layers"
            )
        virtual = layers // (pp * each)
    fields = _scheduled(virtual or 1)
    if any(ends):
        fields["stage_layers"] = _uneven(layers, pp, virtual or 1, ends)
    return fields


def _scheduled(virtual: int) -> dict[str, Any]:
    return {"virtual_stages": virtual, "schedule": "Interleaved1F1B" if virtual > 1 else "1F1B"}


def _ends(settings: Settings) -> tuple[int, int, bool, bool]:
    """Layers of the first and of the last rank, and whether embedding and loss count as layers."""
    first = settings.integer("decoder_first_pipeline_num_layers") or 0
    last = settings.integer("decoder_last_pipeline_num_layers") or 0
    embedding = settings.flag("account_for_embedding_in_pipeline_split")
    loss = settings.flag("account_for_loss_in_pipeline_split")
    if (first or last) and (embedding or loss):
        raise UserError(
            "decoder-first/last-pipeline-num-layers and account-for-embedding/loss-in-pipeline-split contradict each "
            "other: leave one out"
        )
    return first, last, embedding, loss


def _uneven(layers: int, pp: int, virtual: int, ends: tuple[int, int, bool, bool]) -> tuple[int, ...]:
    """Layers of every stage, in torch's order of stages."""
    first, last, embedding, loss = ends
    middle = pp - bool(first) - bool(last)
    rest = layers + embedding + loss - first - last
    if rest < 0 or (middle and rest % middle) or (not middle and rest):
        raise UserError(f"{rest} layers do not spread evenly over the {middle} pipeline ranks that are left for them")
    share = rest // middle if middle else 0
    ranks = [first or share, *[share] * (pp - 2), last or share]
    if any(count % virtual for count in ranks):
        raise UserError(f"{ranks} layers on the pipeline ranks are no multiples of {virtual} virtual stages")
    stages = [count // virtual for _ in range(virtual) for count in ranks]
    stages[0] -= embedding
    stages[-1] -= loss
    return tuple(stages)


def stage_counts(letters: str) -> tuple[int, ...]:
    """Decoder layers of every stage in Megatron's notation of a pipeline.

    >>> stage_counts("Et*3|(t*4|)*3t*2L")
    (3, 4, 4, 4, 2)
    """
    tokens = _ITEM.findall(letters.replace(" ", ""))
    if len(tokens) > 1000:
        raise UserError(f"pipeline-model-parallel-layout = '{letters[:40]}...' has {len(tokens)} signs, 1,000 at most")
    if "".join(tokens) != letters.replace(" ", "") or tokens.count("(") != tokens.count(")"):
        raise UserError(f"pipeline-model-parallel-layout = '{letters}' is not like Et*3|(t*4|)*3t*2L")
    plain, _ = _expanded(tokens, 0)
    return tuple(stage.count("t") for stage in plain.split("|"))


def _expanded(tokens: list[str], place: int) -> tuple[str, int]:
    """The text without repetitions, from a place to the end or to the bracket that closes."""
    text = ""
    while place < len(tokens) and tokens[place] != ")":
        token = tokens[place]
        item, place = _expanded(tokens, place + 1) if token == "(" else (token, place)
        place += 1
        if place < len(tokens) and tokens[place].startswith("*"):
            times = tokens[place][1:]
            if len(times) > 6 or len(text) + len(item) * int(times) > _MOST_ITEMS:
                raise UserError(f"pipeline-model-parallel-layout has more than {_MOST_ITEMS:,} items")
            item *= int(times)
            place += 1
        text += "" if item == "," else item
    return text, place


def _recompute(settings: Settings, notes: list[str]) -> str:
    old = settings.flag("checkpoint_activations")
    granularity = settings.choice("recompute_granularity", {"full": "full", "selective": "selective"})
    selective = settings.flag("recompute_activations")
    if granularity == "full" and selective:
        raise UserError("'--recompute-activations' is selective and '--recompute-granularity' says full: leave one out")
    method, number = settings.value("recompute_method"), settings.integer("recompute_num_layers")
    modules = settings.value("recompute_modules")
    if granularity == "full" or old:
        if method == "block" or (number or 1) > 1:
            notes.append(
                f"recompute-method {method or 'uniform'} with recompute-num-layers {number or 1}: the layout's "
                "recompute = full runs every layer again, one at a time"
            )
        return "full"
    if granularity == "selective" or selective:
        words = modules if isinstance(modules, list) else str(modules or "core_attn").split()
        if words != ["core_attn"]:
            notes.append(f"recompute-modules {' '.join(words)}: the layout's recompute = selective is the stack's own")
        return "selective"
    return "none"


def _offload(settings: Settings, job: Job, notes: list[str]) -> str:
    """All of the optimizer in host memory, or nothing; the flag's fraction is 1 if it is not said."""
    on, said = settings.flag("optimizer_cpu_offload"), settings.value("optimizer_offload_fraction")
    if not on:
        return "none"
    try:
        fraction = 1.0 if said is None else float(said)
    except ValueError:
        raise UserError(f"optimizer-offload-fraction = '{said}' must be a number from 0 to 1") from None
    if fraction != 1.0:
        notes.append(f"optimizer-offload-fraction = {fraction:g}: a layout offloads all of it or nothing, here nothing")
        return "none"
    if job.stack.offload_bandwidth is None:
        notes.append(f"optimizer-cpu-offload: the stack {job.stack.name} cannot, so the optimizer stays here")
        return "none"
    return "optimizer"


def _precision(settings: Settings) -> str | None:
    """None where no flag says: a recipe's precision is an object of its own."""
    bf16, fp16 = settings.flag("bf16"), settings.flag("fp16")
    if bf16 and fp16:
        raise UserError("'--bf16' and '--fp16' contradict each other: leave one out")
    fp8, recipe = settings.value("fp8_format", "fp8"), str(settings.value("fp8_recipe"))
    settings.value("fp4_recipe")
    if settings.value("mixed_precision") is not None:
        names = {word: name for name, word in megatron_bridge.PRECISION.items()}
        return next((names[word] for word in names if f"'{word}'" in str(settings.values["mixed_precision"])), None)
    if settings.value("fp4_format") is not None:
        return "nvfp4"
    if fp8 is not None:
        return "mxfp8" if recipe == "mxfp8" else "fp8"
    return "bf16" if bf16 else "fp16" if fp16 else None
