# Written by layoutwise 0.0.0 for torchtitan main (f204eb63).
# llama-3.1-70b on 8 x dgx-h100 (64 ranks), 64 x 8192 tokens a step, bf16
# layout: dp_shard=4 tp=4 pp=4 zero_stage=3 schedule=Interleaved1F1B virtual_stages=2 stage_layers=9,10*6,11
# recompute=full sequence_parallel=true
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 -m torchtitan.train
# --module layoutwise_torchtitan --config llama3_70b_layout

from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.llama3.config_registry import llama3_70b
from torchtitan.trainer import Trainer

# Decoder layers of every stage, in torch's order of stages.
LAYERS = (9, 10, 10, 10, 10, 10, 10, 11)


def stage_modules() -> list[list[str]]:
    """Its decoder layers; the first stage has the embedding too, the last one the norm and the head."""
    numbers = iter(range(sum(LAYERS)))
    first, *middle, last = [[f"layers.{next(numbers)}" for _ in range(count)] for count in LAYERS]
    return [["tok_embeddings", *first], *middle, [*last, "norm", "lm_head"]]


def layout(config: Trainer.Config) -> Trainer.Config:
    config.training.num_tokens_per_microbatch_per_dp_rank = 8192
    config.training.num_tokens_per_train_step = 524288
    config.training.max_context_length = 8192
    config.training.dtype = "float32"
    config.training.mixed_precision_param = "bfloat16"
    config.training.disable_cuda_graphs = True
    config.parallelism.data_parallel_replicate_degree = 1
    config.parallelism.data_parallel_shard_degree = 4
    config.parallelism.fsdp_reshard_after_forward = "always"
    config.parallelism.context_parallel_degree = 1
    config.parallelism.tensor_parallel_degree = 4
    config.parallelism.enable_sequence_parallel = True
    config.parallelism.expert_parallel_degree = 1
    config.parallelism.pipeline_parallel_degree = 4
    config.parallelism.pipeline_parallel_schedule = "Interleaved1F1B"
    config.parallelism.pipeline_parallel_layers_per_stage = None
    config.parallelism.pipeline_parallel_module_fqns_per_model_part = stage_modules()
    config.parallelism.num_pp_microbatches = 16
    config.activation_checkpoint = FullAC.Config()
    return config


def llama3_70b_layout() -> Trainer.Config:
    config = llama3_70b()
    return layout(config)
