# Written by layoutwise 0.0.0 for torchtitan main (f204eb63).
# mixtral-8x7b on 2 x dgx-h100 (16 ranks), 64 x 4096 tokens a step, bf16
# layout: dp_shard=16 ep=8 zero_stage=3
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# Call layout(config) on a recipe of yours for mixtral-8x7b.

from torchtitan.trainer import Trainer


def layout(config: Trainer.Config) -> Trainer.Config:
    config.training.num_tokens_per_microbatch_per_dp_rank = 4096
    config.training.num_tokens_per_train_step = 262144
    config.training.max_context_length = 4096
    config.training.dtype = "float32"
    config.training.mixed_precision_param = "bfloat16"
    config.training.disable_cuda_graphs = True
    config.parallelism.data_parallel_replicate_degree = 1
    config.parallelism.data_parallel_shard_degree = 16
    config.parallelism.fsdp_reshard_after_forward = "always"
    config.parallelism.context_parallel_degree = 1
    config.parallelism.tensor_parallel_degree = 1
    config.parallelism.enable_sequence_parallel = False
    config.parallelism.expert_parallel_degree = 8
    config.parallelism.pipeline_parallel_degree = 1
    config.activation_checkpoint = None
    return config
