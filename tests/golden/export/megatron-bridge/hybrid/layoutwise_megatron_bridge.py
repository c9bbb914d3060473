# Written by layoutwise 0.0.0 for Megatron-Bridge 0.6.2.
# llama-3.1-8b on 1 x dgx-h100 (8 ranks), 32 x 4096 tokens a step, bf16
# layout: dp_replicate=2 dp_shard=2 tp=2 zero_stage=3 recompute=full
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for torchtitan, not for Megatron-Bridge: plan with training.stack = "megatron-bridge" for
# one.

from megatron.bridge.recipes.llama import llama31_8b_pretrain_config
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
    cfg.model.tensor_model_parallel_size = 2
    cfg.model.sequence_parallel = False
    cfg.model.pipeline_model_parallel_size = 1
    cfg.model.context_parallel_size = 1
    cfg.model.cp_comm_type = None
    cfg.model.gradient_accumulation_fusion = False
    cfg.ddp.use_distributed_optimizer = True
    cfg.ddp.num_distributed_optimizer_instances = 2
    cfg.ddp.overlap_grad_reduce = True
    cfg.ddp.overlap_param_gather = True
    cfg.ddp.grad_reduce_in_fp32 = True
    cfg.ddp.use_megatron_fsdp = True
    cfg.ddp.data_parallel_sharding_strategy = "optim_grads_params"
    cfg.optimizer.use_distributed_optimizer = True
    cfg.checkpoint.ckpt_format = "fsdp_dtensor"
    cfg.dist.use_tp_pp_dp_mapping = False
    cfg.train.micro_batch_size = 1
    cfg.train.global_batch_size = 32
    cfg.model.seq_length = 4096
    cfg.dataset.seq_length = 4096
    cfg.mixed_precision = get_mixed_precision_config("bf16_mixed")
    cfg.mixed_precision.grad_reduce_in_fp32 = True
    cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=False, overlap_grad_reduce=True, overlap_param_gather=True)
    return cfg


def llama31_8b_pretrain_8gpu_h100_bf16_layout_config() -> ConfigContainer:
    return layout(llama31_8b_pretrain_config())
