# Written by layoutwise 0.0.0 for Megatron-LM (megatron-core 0.19.2).
# llama-3.1-8b on 1 x dgx-h100 (8 ranks), 32 x 4096 tokens a step, bf16
# layout: dp_replicate=2 dp_shard=2 tp=2 zero_stage=3 recompute=full
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for torchtitan, not for Megatron-LM: plan with training.stack = "megatron-core" for one.
# source megatron.sh; torchrun --nnodes 1 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500
# pretrain_gpt.py "${LAYOUT[@]}" and the flags of model, data and optimizer.

unset CUDA_DEVICE_MAX_CONNECTIONS

LAYOUT=(
    --tensor-model-parallel-size 2
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
    --use-distributed-optimizer
    --num-distributed-optimizer-instances 2
    --use-megatron-fsdp
    --data-parallel-sharding-strategy optim_grads_params
    --outer-dp-sharding-strategy no_shard
    --ckpt-format fsdp_dtensor
    --no-gradient-accumulation-fusion
    --overlap-grad-reduce
    --overlap-param-gather
    --micro-batch-size 1
    --global-batch-size 32
    --seq-length 4096
    --bf16
)
