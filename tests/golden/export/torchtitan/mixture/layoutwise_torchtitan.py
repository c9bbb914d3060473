# Written by layoutwise 0.0.0 for torchtitan 0.3.0.
# qwen3-30b-a3b on 2 x dgx-h100 (16 ranks), 64 x 4096 tokens a step, bf16
# layout: dp_shard=8 tp=2 ep=8 zero_stage=3 sequence_parallel=true
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500 -m torchtitan.train
# --module layoutwise_torchtitan --config qwen3_30b_a3b_layout

from torchtitan.models.qwen3 import model_registry
from torchtitan.models.qwen3.config_registry import qwen3_30b_a3b
from torchtitan.trainer import Trainer


def layout(config: Trainer.Config) -> Trainer.Config:
    config.training.local_batch_size = 1
    config.training.global_batch_size = 64
    config.training.seq_len = 4096
    config.training.dtype = "float32"
    config.training.mixed_precision_param = "bfloat16"
    config.training.disable_cuda_graphs = True
    config.parallelism.data_parallel_replicate_degree = 1
    config.parallelism.data_parallel_shard_degree = 8
    config.parallelism.fsdp_reshard_after_forward = "always"
    config.parallelism.context_parallel_degree = 1
    config.parallelism.tensor_parallel_degree = 2
    config.parallelism.enable_sequence_parallel = True
    config.parallelism.expert_parallel_degree = 8
    config.parallelism.pipeline_parallel_degree = 1
    config.compile.enable = False
    config.compile.enable_async_tensor_parallel = False
    config.activation_checkpoint = None
    return config


def qwen3_30b_a3b_layout() -> Trainer.Config:
    config = qwen3_30b_a3b()
    config.model_spec = model_registry("30B-A3B")
    return layout(config)
