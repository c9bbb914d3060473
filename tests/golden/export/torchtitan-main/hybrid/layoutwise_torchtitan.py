# Written by layoutwise 0.0.0 for torchtitan main (f204eb63).
# llama-3.1-8b on 1 x dgx-h100 (8 ranks), 32 x 4096 tokens a step, bf16
# layout: dp_replicate=2 dp_shard=2 tp=2 zero_stage=3 recompute=full
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# torchrun --nnodes 1 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 -m torchtitan.train
# --module layoutwise_torchtitan --config llama3_8b_layout

from torchtitan.distributed.activation_checkpoint import FullAC
from torchtitan.models.llama3.config_registry import llama3_8b
from torchtitan.trainer import Trainer


def layout(config: Trainer.Config) -> Trainer.Config:
    config.training.num_tokens_per_microbatch_per_dp_rank = 4096
    config.training.num_tokens_per_train_step = 131072
    config.training.max_context_length = 4096
    config.training.dtype = "float32"
    config.training.mixed_precision_param = "bfloat16"
    config.parallelism.data_parallel_replicate_degree = 2
    config.parallelism.data_parallel_shard_degree = 2
    config.parallelism.fsdp_reshard_after_forward = "always"
    config.parallelism.context_parallel_degree = 1
    config.parallelism.tensor_parallel_degree = 2
    config.parallelism.enable_sequence_parallel = False
    config.parallelism.expert_parallel_degree = 1
    config.parallelism.pipeline_parallel_degree = 1
    config.activation_checkpoint = FullAC.Config()
    return config


def llama3_8b_layout() -> Trainer.Config:
    config = llama3_8b()
    return layout(config)
