# Written by layoutwise 0.0.0 for Megatron-Bridge 0.6.2.
# llama-3.1-405b on 16 x dgx-h100 (128 ranks), 24 x 8192 tokens a step, fp8
# layout: dp_shard=8 tp=8 pp=2 zero_stage=1 schedule=Interleaved1F1B virtual_stages=3 sequence_parallel=true
# rank_order=tp-cp-ep-pp-dp
# predicted for the stack megatron-bridge: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak

from megatron.bridge.recipes.llama import llama31_405b_pretrain_config
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import get_mixed_precision_config


def layout(cfg: ConfigContainer) -> ConfigContainer:
    cfg.model.virtual_pipeline_model_parallel_size = 3
    cfg.model.pipeline_model_parallel_layout = None
    cfg.model.microbatch_group_size_per_vp_stage = 3
    cfg.model.recompute_granularity = None
    cfg.model.recompute_method = None
    cfg.model.recompute_num_layers = None
    cfg.model.recompute_modules = None
    cfg.model.tensor_model_parallel_size = 8
    cfg.model.sequence_parallel = True
    cfg.model.pipeline_model_parallel_size = 2
    cfg.model.context_parallel_size = 1
    cfg.model.cp_comm_type = None
    cfg.ddp.use_distributed_optimizer = True
    cfg.ddp.num_distributed_optimizer_instances = 1
    cfg.ddp.overlap_grad_reduce = True
    cfg.ddp.overlap_param_gather = True
    cfg.ddp.grad_reduce_in_fp32 = False
    cfg.ddp.use_megatron_fsdp = False
    cfg.ddp.data_parallel_sharding_strategy = "no_shard"
    cfg.optimizer.use_distributed_optimizer = True
    cfg.dist.use_tp_pp_dp_mapping = True
    cfg.train.micro_batch_size = 1
    cfg.train.global_batch_size = 24
    cfg.model.seq_length = 8192
    cfg.dataset.seq_length = 8192
    cfg.mixed_precision = get_mixed_precision_config("bf16_with_fp8_current_scaling_mixed")
    cfg.mixed_precision.grad_reduce_in_fp32 = False
    cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=True, overlap_grad_reduce=True, overlap_param_gather=True)
    return cfg


def llama31_405b_pretrain_128gpu_h100_fp8_layout_config() -> ConfigContainer:
    return layout(llama31_405b_pretrain_config())
