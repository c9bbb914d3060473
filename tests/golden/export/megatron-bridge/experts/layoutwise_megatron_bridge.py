# Written by layoutwise 0.0.0 for Megatron-Bridge 0.6.2.
# mixtral-8x7b on 2 x dgx-h100 (16 ranks), 64 x 4096 tokens a step, bf16
# layout: dp_shard=16 ep=8 zero_stage=3
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for torchtitan, not for Megatron-Bridge: plan with training.stack = "megatron-bridge" for
# one.
# Call layout(cfg) on a recipe of mixtral-8x7b.

from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import get_mixed_precision_config


def layout(cfg: ConfigContainer) -> ConfigContainer:
    cfg.model.virtual_pipeline_model_parallel_size = None
    cfg.model.pipeline_model_parallel_layout = None
    cfg.model.microbatch_group_size_per_vp_stage = None
    cfg.model.recompute_granularity = None
    cfg.model.recompute_method = None
    cfg.model.recompute_num_layers = None
    cfg.model.recompute_modules = None
    cfg.model.tensor_model_parallel_size = 1
    cfg.model.sequence_parallel = False
    cfg.model.pipeline_model_parallel_size = 1
    cfg.model.context_parallel_size = 1
    cfg.model.cp_comm_type = None
    cfg.model.expert_model_parallel_size = 8
    cfg.model.moe_token_dispatcher_type = "alltoall"
    cfg.model.expert_tensor_parallel_size = 1
    cfg.model.gradient_accumulation_fusion = False
    cfg.ddp.use_distributed_optimizer = True
    cfg.ddp.num_distributed_optimizer_instances = 1
    cfg.ddp.overlap_grad_reduce = True
    cfg.ddp.overlap_param_gather = True
    cfg.ddp.grad_reduce_in_fp32 = True
    cfg.ddp.use_megatron_fsdp = True
    cfg.ddp.data_parallel_sharding_strategy = "optim_grads_params"
    cfg.optimizer.use_distributed_optimizer = True
    cfg.checkpoint.ckpt_format = "fsdp_dtensor"
    cfg.dist.use_tp_pp_dp_mapping = False
    cfg.train.micro_batch_size = 1
    cfg.train.global_batch_size = 64
    cfg.model.seq_length = 4096
    cfg.dataset.seq_length = 4096
    cfg.mixed_precision = get_mixed_precision_config("bf16_mixed")
    cfg.mixed_precision.grad_reduce_in_fp32 = True
    cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=False, overlap_grad_reduce=True, overlap_param_gather=True)
    return cfg
