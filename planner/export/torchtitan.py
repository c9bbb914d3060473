"""torchtitan 0.3.0: a recipe, which is a Python function that returns `Trainer.Config`.

Field names: torchtitan/config/configs.py and torchtitan/trainer.py of the 0.3.0 wheel. Its command line flags are
frozen and will go (torchtitan/config/README.md), so that a recipe is the only form that lasts.
"""

from __future__ import annotations

from typing import Any

from planner.export import rules
from planner.export.header import header
from planner.plan import Plan
from simulator.model import ModelSpec

WRITTEN_FOR = "torchtitan 0.3.0"
STACKS = ("torchtitan", "torchtitan-compile")
FILE = "layoutwise_torchtitan.py"
_PRECISIONS = {"bf16": "bfloat16", "fp32": "float32", "fp8": "bfloat16"}
_RECOMPUTE = {"none": "None", "selective": "SelectiveAC.Config()", "full": "FullAC.Config()"}
RESHARD = {0: "default", 2: "never", 3: "always"}
# Stacks whose kernels are PyTorch's, one by one; the others fuse them, as torch.compile does.
_EAGER = ("torchtitan", "layoutwise-cpu", "layoutwise-cuda")
# (layers, hidden size, vocabulary, experts) of the models that torchtitan has a recipe for: module, recipe, flavor.
_RECIPES = {
    (32, 4096, 128256, 0): ("llama3", "llama3_8b", "8B"),
    (80, 8192, 128256, 0): ("llama3", "llama3_70b", "70B"),
    (126, 16384, 128256, 0): ("llama3", "llama3_405b", "405B"),
    (48, 2048, 151936, 128): ("qwen3", "qwen3_30b_a3b", "30B-A3B"),
    (61, 7168, 129280, 256): ("deepseek_v3", "deepseek_v3_671b", "671B"),
    (36, 2880, 201088, 128): ("gpt_oss", "gpt_oss_120b", "120b"),
}


def problems(plan: Plan) -> list[str]:
    """What torchtitan 0.3.0 cannot express."""
    found = shared_problems(plan)
    if plan.job.training.precision == "fp8":
        if own_recipe(plan.job.model) is None:
            found.append(f"Float8LinearConverter belongs to a model_spec, and there is none of {plan.job.model.name}")
        if plan.job.model.num_experts:
            found.append("Float8LinearConverter leaves grouped experts in 16 bits: precision = 'fp8' would not hold")
    return found


def shared_problems(plan: Plan) -> list[str]:
    """What no version of torchtitan can express."""
    layout, found = plan.layout, []
    if layout.zero_stage == 1:
        found.append("fsdp_reshard_after_forward shards gradients and parameters at least: no zero_stage 1")
    if layout.zero_stage == 0 and layout.cp > 1:
        found.append(f"context_parallel_degree = {layout.cp} always shards parameters over its ranks: no zero_stage 0")
    dense = layout.dp_shard * layout.cp * layout.tp
    if layout.ep > 1 and dense % layout.ep:
        found.append(
            f"expert_parallel_degree = {layout.ep} must divide data_parallel_shard_degree({layout.dp_shard}) * "
            f"context_parallel_degree({layout.cp}) * tensor_parallel_degree({layout.tp}) = {dense}"
        )
    if plan.job.training.peft != "none":
        found.append(f"peft = '{plan.job.training.peft}' is a converter of the model_spec, not a field of a recipe")
    return [
        *found,
        *rules.rank_order(layout, "[pp, dp_replicate, dp_shard, cp, tp]"),
        *rules.precision(plan, _PRECISIONS, "training.mixed_precision_param"),
        *rules.decoder_stages(plan, "pipeline_parallel_degree"),
    ]


def files(plan: Plan) -> dict[str, str]:
    """The recipe: `layout(config)` for any model, and a whole recipe where torchtitan has the model."""
    layout, training = plan.layout, plan.job.training
    microbatches = layout.microbatches(training.global_batch_size)
    batch = layout.micro_batch_size * (microbatches if layout.pp > 1 else 1)
    settings = {
        "training.local_batch_size": batch,
        "training.global_batch_size": training.global_batch_size,
        "training.seq_len": training.seq_len,
        **training_settings(plan),
        **parallelism_settings(plan, "module_fqns_per_model_part"),
        **({"parallelism.pipeline_parallel_microbatch_size": layout.micro_batch_size} if layout.pp > 1 else {}),
        "compile.enable": plan.job.stack.name not in _EAGER,
        "compile.enable_async_tensor_parallel": False,
    }
    base = _base(plan)
    return {FILE: recipe_text(plan, header(plan, WRITTEN_FOR, STACKS, notes(plan, base)), settings, base)}


def notes(plan: Plan, base: list[str]) -> tuple[str, ...]:
    """How to run the recipe, and what its words mean where they differ."""
    job, layout = plan.job, plan.layout
    module, name = FILE.removesuffix(".py"), recipe_name(job.model)
    found = []
    if base:
        found.append(
            f"torchrun --nnodes {job.nodes} --nproc-per-node {layout.world_size // job.nodes} --rdzv-backend c10d "
            f"--rdzv-endpoint HEAD:29500 -m torchtitan.train --module {module} --config {name}"
        )
    else:
        found.append(f"Call layout(config) on a recipe of yours for {job.model.name}.")
    if layout.recompute == "selective" and job.stack.name not in STACKS:
        found.append("SelectiveAC recomputes every second matmul, the plan's stack the attention core.")
    return tuple(found)


def training_settings(plan: Plan) -> dict[str, Any]:
    """Precision and CUDA graphs, which are on by default and refuse pipelines and most dispatchers of experts."""
    settings: dict[str, Any] = {
        "training.dtype": "float32",
        "training.mixed_precision_param": _PRECISIONS[plan.job.training.precision],
    }
    if plan.layout.pp > 1 or plan.layout.ep > 1:
        settings["training.disable_cuda_graphs"] = True
    return settings


def parallelism_settings(plan: Plan, stage_modules: str) -> dict[str, Any]:
    """The axes; `stage_modules` is the field that takes the modules of every stage."""
    layout = plan.layout
    settings: dict[str, Any] = {
        "data_parallel_replicate_degree": layout.dp_replicate,
        "data_parallel_shard_degree": layout.dp_shard,
        "fsdp_reshard_after_forward": RESHARD[layout.zero_stage],
        "context_parallel_degree": layout.cp,
        "tensor_parallel_degree": layout.tp,
        "enable_sequence_parallel": layout.sequence_parallel,
        "expert_parallel_degree": layout.ep,
        "pipeline_parallel_degree": layout.pp,
    }
    if layout.pp > 1:
        settings |= {
            "pipeline_parallel_schedule": layout.schedule,
            "pipeline_parallel_layers_per_stage": None,
            stage_modules: _Code("stage_modules()"),
        }
    return {f"parallelism.{name}": value for name, value in settings.items()}


def recipe_text(plan: Plan, top: str, settings: dict[str, Any], base: list[str]) -> str:
    """The module: imports, the layout as a function on a config, and the recipe on top of torchtitan's own."""
    layers = plan.layout.layers_per_stage(plan.job.model.num_hidden_layers)
    own = own_recipe(plan.job.model)
    policy = _RECOMPUTE[plan.layout.recompute]
    imports = ["from torchtitan.trainer import Trainer"]
    if policy != "None":
        kind = policy.split(".")[0]
        imports.insert(0, f"from torchtitan.distributed.activation_checkpoint import {kind}")
    if own and base:
        package, function, _ = own
        imports[-1:-1] = [
            *(
                ["from torchtitan.components.quantization import Float8LinearConverter"]
                if "Float8" in "".join(base)
                else []
            ),
            *([f"from torchtitan.models.{package} import model_registry"] if "model_registry" in "".join(base) else []),
            f"from torchtitan.models.{package}.config_registry import {function}",
        ]
    parts = [top, "\n".join(sorted(imports)) + "\n"]
    if plan.layout.pp > 1:
        parts.append(_STAGES.format(layers=layers))
    lines = [f"config.{name} = {_shown(value)}" for name, value in settings.items()]
    lines += [f"config.activation_checkpoint = {policy}", "return config"]
    parts.append("\ndef layout(config: Trainer.Config) -> Trainer.Config:\n" + _indented(lines))
    if base:
        parts.append(f"\ndef {recipe_name(plan.job.model)}() -> Trainer.Config:\n" + _indented(base))
    return "\n".join(parts)


class _Code(str):
    """A value that is written as it is, not quoted."""


_STAGES = '''# Decoder layers of every stage, in torch's order of stages.
LAYERS = {layers}


def stage_modules() -> list[list[str]]:
    """Its decoder layers; the first stage has the embedding too, the last one the norm and the head."""
    numbers = iter(range(sum(LAYERS)))
    first, *middle, last = [[f"layers.{{next(numbers)}}" for _ in range(count)] for count in LAYERS]
    return [["tok_embeddings", *first], *middle, [*last, "norm", "lm_head"]]
'''


def own_recipe(model: ModelSpec) -> tuple[str, str, str] | None:
    """torchtitan's module, recipe and flavor of a model, None if it has none."""
    return _RECIPES.get((model.num_hidden_layers, model.hidden_size, model.vocab_size, model.num_experts))


def recipe_name(model: ModelSpec) -> str:
    """The name of the recipe that we write."""
    own = own_recipe(model)
    return f"{own[1]}_layout" if own else "layout"


def _base(plan: Plan) -> list[str]:
    """The body of the recipe. The model is built anew, because the recipe of 405B brings 8-bit layers of its own."""
    own = own_recipe(plan.job.model)
    if own is None:
        return []
    quantised = ", converters=[converter]" if plan.job.training.precision == "fp8" else ""
    compiled = plan.job.stack.name not in _EAGER
    converter = f'Float8LinearConverter.Config(filter_fqns=["lm_head"], model_compile_enabled={compiled})'
    registry = f'config.model_spec = model_registry("{own[2]}"{quantised})'
    return [
        f"config = {own[1]}()",
        *([f"converter = {converter}"] if quantised else []),
        registry,
        "return layout(config)",
    ]


def _shown(value: Any) -> str:
    if isinstance(value, _Code):
        return str(value)
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _indented(lines: list[str]) -> str:
    return "".join(f"    {line}\n" for line in lines)
