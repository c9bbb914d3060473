"""Which layouts of a job are legal: the only place that knows, with sync_rules.py and offload.py.

Every rule says in words, with the arithmetic, what a layout breaks of it; nothing if it is kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.axes import AXES, RANK_ORDER
from simulator.errors import nearest
from simulator.expert_parallel import expert_tp
from simulator.offload import offload_problems
from simulator.schedules import MULTI_STAGE, SCHEDULES, SPLIT_BACKWARD, V_PLACEMENT
from simulator.sync_rules import sync_problems

if TYPE_CHECKING:
    from simulator.job import Job
    from simulator.layout import Layout

MOST_MICROBATCHES = 8192


def layout_problems(layout: Layout, job: Job) -> list[str]:
    """Why this layout cannot run this job; empty if it can. Sizes and order come first: the other rules
    rely on them."""
    names = (*AXES, "ep", "micro_batch_size", "virtual_stages")
    sizes = {name: getattr(layout, name) for name in names}
    if bad_sizes := [f"{name} = {size} must be at least 1" for name, size in sizes.items() if size < 1]:
        return bad_sizes
    if bad_order := order_problems(layout, job):
        return bad_order
    return [
        *grid_problems(layout, job),
        *batch_problems(layout, job),
        *tensor_problems(layout, job),
        *pipeline_problems(layout, job),
        *stack_problems(layout, job),
        *sync_problems(layout, job),
        *offload_problems(layout, job),
    ]


def order_problems(layout: Layout, job: Job) -> list[str]:
    """Axes that rank_order names twice, does not know or leaves out."""
    names, known = layout.rank_order.split("-"), RANK_ORDER.split("-")
    sizes = {"tp": layout.tp, "cp": layout.cp, "dp": layout.dp, "pp": layout.pp}
    left_out = [name for name, size in sizes.items() if size > 1 and name not in names]
    if len(set(names)) < len(names) or set(names) - set(known) or left_out:
        rule = "must name tp, cp, ep, dp and pp once each, or leave out those of one rank"
        return [f"rank_order = '{layout.rank_order}' {rule}, like {RANK_ORDER}"]
    return []


def grid_problems(layout: Layout, job: Job) -> list[str]:
    """Ranks that the job has not, and axes that do not go together."""
    found = []
    grid = " * ".join(f"{axis}({getattr(layout, axis)})" for axis in reversed(AXES))
    if job.cluster.oversubscribe > 1:
        most = int(job.world_size * job.cluster.oversubscribe)
        if layout.world_size > most:
            found.append(f"{grid} = {layout.world_size} ranks, more than the {most} that {job.cluster.name} takes")
    elif layout.world_size != job.world_size:
        found.append(f"{grid} = {layout.world_size} ranks, but {job.nodes} nodes have {job.world_size}")
    if layout.zero_stage == 0 and layout.dp_shard > 1:
        found.append(f"zero_stage = 0 shards nothing: dp_shard = {layout.dp_shard} belongs into dp_replicate")
    if layout.zero_stage > 0 and layout.dp_shard * layout.cp == 1:
        found.append(f"zero_stage = {layout.zero_stage} needs dp_shard > 1: there is nobody to shard over")
    return found + _context_problems(layout, job) + _expert_problems(layout, job)


def _context_problems(layout: Layout, job: Job) -> list[str]:
    if layout.cp == 1:
        return []
    found, stack, seq_len = [], job.stack, job.training.seq_len
    if not stack.context_parallel:
        found.append(f"stack {stack.name} has no context parallelism: cp = {layout.cp} must be 1")
    if not job.model.causal:
        found.append(f"cp = {layout.cp}: context parallelism is for decoder-only models, not {job.model.family}")
    if job.model.mamba_num_heads:
        found.append(f"cp = {layout.cp}: the scan of Mamba blocks is not cut along the sequence")
    parts = 2 * layout.cp * (layout.tp if layout.sequence_parallel else 1)
    if seq_len % parts:
        shown = "2 * cp * tp" if layout.sequence_parallel else "2 * cp"
        found.append(f"cp = {layout.cp}: {shown} = {parts} must divide seq_len = {seq_len}")
    if stack.context_precisions and job.training.precision not in stack.context_precisions:
        found.append(
            f"stack {stack.name} has no context parallelism in {job.training.precision}: cp = {layout.cp} must be 1, "
            f"or precision one of {list(stack.context_precisions)}"
        )
    heads = job.model.num_attention_heads
    if stack.context_parallel == "ulysses" and heads % (layout.tp * layout.cp):
        found.append(f"tp({layout.tp}) * cp({layout.cp}) must divide num_attention_heads = {heads}")
    return found


def _expert_problems(layout: Layout, job: Job) -> list[str]:
    if layout.ep == 1:
        return []
    model, stack, found = job.model, job.stack, []
    if not model.num_experts:
        return [f"ep = {layout.ep}: {model.name} has no experts"]
    if not stack.expert_dispatch:
        found.append(f"stack {stack.name} has no expert parallelism: ep = {layout.ep} must be 1")
    if model.num_experts % layout.ep:
        found.append(f"ep = {layout.ep} must divide num_experts = {model.num_experts}")
    if layout.tp > 1 and not layout.sequence_parallel:
        found.append(f"ep = {layout.ep} with tp = {layout.tp} needs sequence_parallel = true")
    axis = "dp_shard" if layout.zero_stage else "dp_replicate"
    ranks, whole = getattr(layout, axis) * layout.cp * layout.tp, expert_tp(layout, stack) * layout.ep
    if ranks % whole:
        split = " times tp" if whole > layout.ep else ""
        found.append(
            f"ep = {layout.ep}{split} must divide {axis}({getattr(layout, axis)}) * cp({layout.cp}) * tp({layout.tp}) "
            f"= {ranks}"
        )
    links = [job.cluster.scale_up, *([job.cluster.scale_out] if job.cluster.scale_out else [])]
    if not all(link.collectives.get("all_to_all") for link in links):
        found.append(f"ep = {layout.ep}: cluster {job.cluster.name} has no constants for all_to_all")
    return found


def batch_problems(layout: Layout, job: Job) -> list[str]:
    """A batch that replicas and micro-batches do not divide."""
    batch, share = job.training.global_batch_size, layout.dp * layout.micro_batch_size
    if batch % share:
        return [
            f"global_batch_size = {batch} is not a multiple of dp({layout.dp}) * "
            f"micro_batch_size({layout.micro_batch_size}) = {share}"
        ]
    return []


def tensor_problems(layout: Layout, job: Job) -> list[str]:
    """Widths of the model that tp does not divide."""
    model, found = job.model, []
    if layout.sequence_parallel and layout.tp == 1:
        found.append("sequence_parallel needs tp > 1: it shards over the tensor axis")
    if layout.tp == 1:
        return found
    divided = {
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "intermediate_size": model.intermediate_size,
        "hidden_size": model.hidden_size,
    }
    if model.num_experts and expert_tp(layout, job.stack) > 1:
        divided["moe_intermediate_size"] = model.moe_intermediate_size
    if model.num_shared_experts:
        width = model.num_shared_experts * model.moe_intermediate_size
        divided["num_shared_experts * moe_intermediate_size"] = width
    if model.mamba_num_heads:
        divided |= {"mamba_num_heads": model.mamba_num_heads, "mamba_n_groups": model.mamba_n_groups}
    for name, value in divided.items():
        if value % layout.tp:
            best = max(d for d in range(1, min(layout.tp, value) + 1) if value % d == 0)
            found.append(f"tp = {layout.tp} must divide {name} = {value}; the nearest smaller tp is {best}")
    if layout.sequence_parallel and layout.cp == 1 and job.training.seq_len % layout.tp:
        found.append(f"sequence_parallel: tp = {layout.tp} must divide seq_len = {job.training.seq_len}")
    return found


def pipeline_problems(layout: Layout, job: Job) -> list[str]:
    """Stages, schedules and microbatches that do not go together."""
    found, layers = [], job.model.num_hidden_layers
    if layout.schedule not in SCHEDULES:
        return [f"schedule = '{layout.schedule}' is not known{nearest(layout.schedule, SCHEDULES)}"]
    bare = job.stack.bare_ends and layout.virtual_stages > 1
    if layout.stages > layers + 2 * bare:
        found.append(
            f"pp({layout.pp}) * virtual_stages({layout.virtual_stages}) = {layout.stages} stages, "
            f"but the model has {layers} layers"
        )
    if layout.stage_layers is not None:
        if len(layout.stage_layers) != layout.stages or sum(layout.stage_layers) != layers:
            found.append(
                f"stage_layers = {list(layout.stage_layers)} must name {layout.stages} stages that sum to {layers}"
            )
        elif min(layout.stage_layers[bare : layout.stages - bare]) < 1 or min(layout.stage_layers) < 0:
            which = "every stage but the first and the last" if bare else "every stage"
            found.append(f"stage_layers = {list(layout.stage_layers)}: {which} needs a layer")
    if layout.virtual_stages > 1 and layout.schedule not in MULTI_STAGE:
        found.append(f"schedule {layout.schedule} has one stage per rank, but virtual_stages = {layout.virtual_stages}")
    alone = layout.virtual_stages == 1 and layout.schedule not in job.stack.single_stage_schedules
    if layout.schedule in MULTI_STAGE and (alone or layout.pp == 1):
        found.append(f"schedule {layout.schedule} needs virtual_stages > 1 and pp > 1")
    elif layout.schedule in V_PLACEMENT and layout.virtual_stages != 2:
        found.append(
            f"schedule {layout.schedule} puts 2 stages on each rank, in a V: "
            f"virtual_stages = {layout.virtual_stages} must be 2"
        )
    if layout.schedule in SPLIT_BACKWARD and layout.recompute != "none":
        found.append(
            f"recompute = '{layout.recompute}' must be 'none' with {layout.schedule}: its backward is split, and torch "
            f"would recompute a block for its input gradient and again for each of its weights"
        )
    return found + _microbatch_problems(layout, job)


def _microbatch_problems(layout: Layout, job: Job) -> list[str]:
    count, pp = layout.microbatches(job.training.global_batch_size), layout.pp
    if count > MOST_MICROBATCHES:
        return [f"{count} microbatches a step are more than the {MOST_MICROBATCHES} that are simulated"]
    if pp == 1:
        return []
    shown = (
        f"global_batch_size({job.training.global_batch_size}) / (dp({layout.dp}) * "
        f"micro_batch_size({layout.micro_batch_size})) = {count} microbatches"
    )
    if layout.schedule == "1F1B" and count < pp:
        return [f"{shown}, but 1F1B over pp = {pp} needs at least {pp}"]
    rounds = max(1, count // pp)
    if layout.schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and count % rounds:
        return [f"{shown}, which {layout.schedule} cannot split into {rounds} equal rounds"]
    if layout.schedule == "DualPipeV" and count < 2 * pp:
        return [f"{shown}, but DualPipeV over 2 * pp({pp}) stages needs at least {2 * pp}"]
    return []


def stack_problems(layout: Layout, job: Job) -> list[str]:
    """What the software of the job does not do."""
    stack, found = job.stack, []
    if stack.model_families and job.model.family not in stack.model_families:
        found.append(f"stack {stack.name} cannot train the {job.model.family} family yet")
    elif job.model.mamba_num_heads and "ssd" not in stack.elementwise:
        found.append(f"stack {stack.name} has no kernels for Mamba blocks")
    missing = stack.missing(job.model, expert_tp(layout, stack))
    found += [f"stack {stack.name} cannot train {part}" for part in missing]
    found += _model_problems(layout, job)
    if job.training.peft != "none" and not stack.peft:
        found.append(f"stack {stack.name} cannot train with peft = '{job.training.peft}' yet")
    if layout.zero_stage not in (0, *stack.zero_stages):
        found.append(f"stack {stack.name} has no zero_stage {layout.zero_stage}; it has {list(stack.zero_stages)}")
    elif layout.pp > 1 and layout.zero_stage not in (0, *stack.pipeline_zero_stages):
        found.append(f"stack {stack.name} has no zero_stage {layout.zero_stage} under a pipeline (pp = {layout.pp})")
    elif layout.schedule in SPLIT_BACKWARD and layout.zero_stage not in (0, *stack.split_backward_zero_stages):
        found.append(
            f"stack {stack.name} has no zero_stage {layout.zero_stage} with {layout.schedule}, but "
            f"{list(stack.split_backward_zero_stages)}: torch loses gradients where a backward is split and "
            f"parameters are dropped before it"
        )
    if layout.recompute not in stack.recompute:
        found.append(f"stack {stack.name} has no recompute = '{layout.recompute}'; it has {list(stack.recompute)}")
    if layout.schedule not in stack.schedules:
        found.append(f"stack {stack.name} has no schedule {layout.schedule}; it has {list(stack.schedules)}")
    if layout.sequence_parallel and not stack.sequence_parallel:
        found.append(f"stack {stack.name} has no sequence_parallel")
    if layout.tp > 1 and not layout.sequence_parallel and stack.sequence_parallel == "always":
        found.append(f"stack {stack.name} runs tp > 1 with sequence_parallel = true only")
    if not stack.pads_vocabulary and job.model.vocab_size % layout.tp:
        found.append(f"stack {stack.name}: tp = {layout.tp} must divide vocab_size = {job.model.vocab_size}")
    if not stack.ties_across_stages and layout.pp > 1 and job.model.tie_word_embeddings:
        found.append(f"stack {stack.name} cannot run tie_word_embeddings with pp > 1: the two copies would drift")
    if stack.fixed_rank_order and layout.rank_order != RANK_ORDER:
        found.append(f"stack {stack.name} has no other rank_order than {RANK_ORDER}")
    if layout.dp_replicate > 1 and layout.dp_shard > 1 and not stack.hybrid_shard:
        found.append(f"stack {stack.name} cannot replicate sharded data parallel groups (dp_replicate and dp_shard)")
    return found


def _model_problems(layout: Layout, job: Job) -> list[str]:
    """What the stack does not do with the parts of this model."""
    model, stack, found = job.model, job.stack, []
    whole = set(stack.model_families) - set(stack.pipeline_families) if stack.pipeline_families else set()
    if layout.pp > 1 and model.family in whole:
        found.append(f"stack {stack.name} does not cut the {model.family} family into stages: pp must be 1")
    scaling = model.rope_scaling
    if scaling is not None and stack.rope_scaling and scaling.rope_type not in stack.rope_scaling:
        found.append(
            f"stack {stack.name} has no rope_scaling of rope_type '{scaling.rope_type}'; "
            f"it has {list(stack.rope_scaling)}"
        )
    if layout.cp > 1 and not stack.masked_context and (model.position == "alibi" or model.sliding_window):
        found.append(f"stack {stack.name}: cp = {layout.cp} carries no masks: no alibi positions, no sliding_window")
    return found
