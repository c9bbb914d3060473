# Written by layoutwise 0.0.0 for torchtitan 0.3.0.
# llama-3.1-8b on 1 x dgx-h100 (8 ranks), 64 x 4096 tokens a step, fp8
# layout: dp_shard=2 pp=4 zero_stage=2 schedule=DualPipeV virtual_stages=2
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# torchrun --nnodes 1 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 -m torchtitan.train
# --module layoutwise_torchtitan --config llama3_8b_layout

from torchtitan.components.quantization import Float8LinearConverter
from torchtitan.models.llama3 import model_registry
from torchtitan.models.llama3.config_registry import llama3_8b
from torchtitan.trainer import Trainer

# Decoder layers of every stage, in torch's order of stages.
LAYERS = (4, 4, 4, 4, 4, 4, 4, 4)


def stage_modules() -> list[list[str]]:
    """Its decoder layers; the first stage has the embedding too, the last one the norm and the head."""
    numbers = iter(range(sum(LAYERS)))
    first, *middle, last = [[f"layers.{next(numbers)}" for _ in range(count)] for count in LAYERS]
    return [["tok_embeddings", *first], *middle, [*last, "norm", "lm_head"]]


def layout(config: Trainer.Config) -> Trainer.Config:
    config.training.local_batch_size = 32
    config.training.global_batch_size = 64
    config.training.seq_len = 4096
    config.training.dtype = "float32"
    config.training.mixed_precision_param = "bfloat16"
    config.training.disable_cuda_graphs = True
    config.parallelism.data_parallel_replicate_degree = 1
    config.parallelism.data_parallel_shard_degree = 2
    config.parallelism.fsdp_reshard_after_forward = "never"
    config.parallelism.context_parallel_degree = 1
    config.parallelism.tensor_parallel_degree = 1
    config.parallelism.enable_sequence_parallel = False
    config.parallelism.expert_parallel_degree = 1
    config.parallelism.pipeline_parallel_degree = 4
    config.parallelism.pipeline_parallel_schedule = "DualPipeV"
    config.parallelism.pipeline_parallel_layers_per_stage = None
    config.parallelism.module_fqns_per_model_part = stage_modules()
    config.parallelism.pipeline_parallel_microbatch_size = 1
    config.compile.enable = False
    config.compile.enable_async_tensor_parallel = False
    config.activation_checkpoint = None
    return config


def llama3_8b_layout() -> Trainer.Config:
    config = llama3_8b()
    converter = Float8LinearConverter.Config(filter_fqns=["lm_head"], model_compile_enabled=False)
    config.model_spec = model_registry("8B", converters=[converter])
    return layout(config)
