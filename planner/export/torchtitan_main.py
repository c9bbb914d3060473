"""torchtitan's main branch after 0.3.0: batches are counted in tokens, and pipelines in microbatches.

Field names: torchtitan/config/training.py at pytorch/torchtitan@f204eb63 and torchtitan/config/parallelism.py at
pytorch/torchtitan@15e24313. Every field is set on a dataclass with slots: a name that has changed since then is an
AttributeError, not a setting that is lost.
"""

from __future__ import annotations

from planner.export import torchtitan
from planner.export.header import header
from planner.plan import Plan

WRITTEN_FOR = "torchtitan main (f204eb63)"


def problems(plan: Plan) -> list[str]:
    """What main cannot express."""
    layout, found = plan.layout, torchtitan.shared_problems(plan)
    if plan.job.training.precision == "fp8":
        found.append("Float8LinearConverter is a transform of the model's config, which a recipe's fields do not reach")
    if plan.job.model.num_experts and layout.tp > max(1, layout.ep):
        found.append(
            f"expert_parallel_degree = {layout.ep} must be at least tensor_parallel_degree = {layout.tp} for a mixture"
        )
    return found


def files(plan: Plan) -> dict[str, str]:
    """The recipe, as for 0.3.0."""
    layout, training = plan.layout, plan.job.training
    settings = {
        "training.num_tokens_per_microbatch_per_dp_rank": layout.micro_batch_size * training.seq_len,
        "training.num_tokens_per_train_step": plan.job.tokens_per_step,
        "training.max_context_length": training.seq_len,
        **torchtitan.training_settings(plan),
        **torchtitan.parallelism_settings(plan, "pipeline_parallel_module_fqns_per_model_part"),
    }
    if layout.pp > 1:
        settings["parallelism.num_pp_microbatches"] = layout.microbatches(training.global_batch_size)
    base = _base(plan)
    notes = torchtitan.notes(plan, base)
    if layout.cp > 1:
        notes += (
            "The prediction gives every context-parallel rank equal work; main cuts sequences into contiguous parts "
            "unless parallelism.context_parallel_load_balancer says otherwise.",
        )
    text = torchtitan.recipe_text(plan, header(plan, WRITTEN_FOR, torchtitan.STACKS, notes), settings, base)
    return {torchtitan.FILE: text}


def _base(plan: Plan) -> list[str]:
    """The body of the recipe; none on top of the one of 405B, which brings 8-bit layers of its own."""
    own = torchtitan.own_recipe(plan.job.model)
    return [f"config = {own[1]}()", "return layout(config)"] if own and own[1] != "llama3_405b" else []
