# Written by layoutwise 0.0.0 for Megatron-LM (megatron-core 0.19.2).
# qwen3-30b-a3b on 2 x dgx-h100 (16 ranks), 64 x 4096 tokens a step, bf16
# layout: dp_shard=8 tp=2 ep=8 zero_stage=3 sequence_parallel=true
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for torchtitan, not for Megatron-LM: plan with training.stack = "megatron-core" for one.
# source megatron.sh; torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500
# pretrain_gpt.py "${LAYOUT[@]}" and the flags of model, data and optimizer.

unset CUDA_DEVICE_MAX_CONNECTIONS

LAYOUT=(
    --tensor-model-parallel-size 2
    --sequence-parallel
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --expert-model-parallel-size 8
    --moe-token-dispatcher-type alltoall
    --expert-tensor-parallel-size 1
    --use-distributed-optimizer
    --use-megatron-fsdp
    --data-parallel-sharding-strategy optim_grads_params
    --ckpt-format fsdp_dtensor
    --no-gradient-accumulation-fusion
    --overlap-grad-reduce
    --overlap-param-gather
    --micro-batch-size 1
    --global-batch-size 64
    --seq-length 4096
    --bf16
)
