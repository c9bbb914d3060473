# Written by layoutwise 0.0.0 for Megatron-LM (megatron-core 0.19.2).
# llama-3.1-8b on 1 x dgx-h100 (8 ranks), 64 x 8192 tokens a step, bf16
# layout: dp_shard=4 cp=2 zero_stage=3 micro_batch_size=2 recompute=full
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for torchtitan, not for Megatron-LM: plan with training.stack = "megatron-core" for one.
# source megatron.sh; torchrun --nnodes 1 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500
# pretrain_gpt.py "${LAYOUT[@]}" and the flags of model, data and optimizer.

unset CUDA_DEVICE_MAX_CONNECTIONS

LAYOUT=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --context-parallel-size 2
    --cp-comm-type all_gather
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
    --use-distributed-optimizer
    --use-megatron-fsdp
    --data-parallel-sharding-strategy optim_grads_params
    --ckpt-format fsdp_dtensor
    --no-gradient-accumulation-fusion
    --overlap-grad-reduce
    --overlap-param-gather
    --micro-batch-size 2
    --global-batch-size 64
    --seq-length 8192
    --bf16
)
