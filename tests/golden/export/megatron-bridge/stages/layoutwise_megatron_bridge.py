# Written by layoutwise 0.0.0 for Megatron-Bridge 0.6.2.
# gpt2 on 1 x dgx-a100 (8 ranks), 64 x 1024 tokens a step, bf16
# layout: dp_shard=4 pp=2 zero_stage=1 micro_batch_size=2 recompute=full
# predicted for the stack megatron-core: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for megatron-core, not for Megatron-Bridge: plan with training.stack = "megatron-bridge" for
# one.
# Call layout(cfg) on a recipe of gpt2.

from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import get_mixed_precision_config


def layout(cfg: ConfigContainer) -> ConfigContainer:
    cfg.model.virtual_pipeline_model_parallel_size = None
    cfg.model.pipeline_model_parallel_layout = None
    cfg.model.microbatch_group_size_per_vp_stage = None
    cfg.model.recompute_granularity = "full"
    cfg.model.recompute_method = "uniform"
    cfg.model.recompute_num_layers = 1
    cfg.model.recompute_modules = None
    cfg.model.tensor_model_parallel_size = 1
    cfg.model.sequence_parallel = False
    cfg.model.pipeline_model_parallel_size = 2
    cfg.model.context_parallel_size = 1
    cfg.model.cp_comm_type = None
    cfg.ddp.use_distributed_optimizer = True
    cfg.ddp.num_distributed_optimizer_instances = 1
    cfg.ddp.overlap_grad_reduce = True
    cfg.ddp.overlap_param_gather = True
    cfg.ddp.grad_reduce_in_fp32 = True
    cfg.ddp.use_megatron_fsdp = False
    cfg.ddp.data_parallel_sharding_strategy = "no_shard"
    cfg.optimizer.use_distributed_optimizer = True
    cfg.dist.use_tp_pp_dp_mapping = False
    cfg.train.micro_batch_size = 2
    cfg.train.global_batch_size = 64
    cfg.model.seq_length = 1024
    cfg.dataset.seq_length = 1024
    cfg.mixed_precision = get_mixed_precision_config("bf16_mixed")
    cfg.mixed_precision.grad_reduce_in_fp32 = True
    cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=False, overlap_grad_reduce=True, overlap_param_gather=True)
    return cfg
