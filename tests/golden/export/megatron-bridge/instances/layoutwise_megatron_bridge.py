# Written by layoutwise 0.0.0 for Megatron-Bridge 0.6.2.
# llama-3.1-70b on 8 x dgx-h100 (64 ranks), 64 x 8192 tokens a step, bf16
# layout: dp_replicate=2 dp_shard=2 tp=4 pp=4 zero_stage=1 micro_batch_size=2 schedule=Interleaved1F1B
# virtual_stages=2 stage_layers=9,10*6,11 recompute=selective sequence_parallel=true
# predicted for the stack megatron-core: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for megatron-core, not for Megatron-Bridge: plan with training.stack = "megatron-bridge" for
# one.

from megatron.bridge.recipes.llama import llama31_70b_pretrain_config
from megatron.bridge.training.comm_overlap import CommOverlapConfig
from megatron.bridge.training.config import ConfigContainer
from megatron.bridge.training.mixed_precision import get_mixed_precision_config


def layout(cfg: ConfigContainer) -> ConfigContainer:
    cfg.model.virtual_pipeline_model_parallel_size = 2
    cfg.model.pipeline_model_parallel_layout = "Et*9|(t*10|)*6t*11L"
    cfg.model.microbatch_group_size_per_vp_stage = None
    cfg.model.recompute_granularity = "selective"
    cfg.model.recompute_method = None
    cfg.model.recompute_num_layers = None
    cfg.model.recompute_modules = ["core_attn"]
    cfg.model.tensor_model_parallel_size = 4
    cfg.model.sequence_parallel = True
    cfg.model.pipeline_model_parallel_size = 4
    cfg.model.context_parallel_size = 1
    cfg.model.cp_comm_type = None
    cfg.ddp.use_distributed_optimizer = True
    cfg.ddp.num_distributed_optimizer_instances = 2
    cfg.ddp.overlap_grad_reduce = True
    cfg.ddp.overlap_param_gather = True
    cfg.ddp.grad_reduce_in_fp32 = True
    cfg.ddp.use_megatron_fsdp = False
    cfg.ddp.data_parallel_sharding_strategy = "no_shard"
    cfg.optimizer.use_distributed_optimizer = True
    cfg.dist.use_tp_pp_dp_mapping = False
    cfg.train.micro_batch_size = 2
    cfg.train.global_batch_size = 64
    cfg.model.seq_length = 8192
    cfg.dataset.seq_length = 8192
    cfg.mixed_precision = get_mixed_precision_config("bf16_mixed")
    cfg.mixed_precision.grad_reduce_in_fp32 = True
    cfg.comm_overlap = CommOverlapConfig(tp_comm_overlap=False, overlap_grad_reduce=True, overlap_param_gather=True)
    return cfg


def llama31_70b_pretrain_64gpu_h100_bf16_layout_config() -> ConfigContainer:
    return layout(llama31_70b_pretrain_config())
