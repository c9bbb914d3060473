# Written by layoutwise 0.0.0 for Megatron-LM (megatron-core 0.19.2).
# gpt2 on 1 x dgx-a100 (8 ranks), 64 x 1024 tokens a step, bf16
# layout: dp_shard=4 pp=2 zero_stage=1 micro_batch_size=2 recompute=full
# predicted for the stack megatron-core: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# source megatron.sh; torchrun --nnodes 1 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500
# pretrain_gpt.py "${LAYOUT[@]}" and the flags of model, data and optimizer.

LAYOUT=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 2
    --context-parallel-size 1
    --recompute-granularity full
    --recompute-method uniform
    --recompute-num-layers 1
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --micro-batch-size 2
    --global-batch-size 64
    --seq-length 1024
    --bf16
)
