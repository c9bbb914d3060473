# Written by layoutwise 0.0.0 for Megatron-LM (megatron-core 0.19.2).
# gpt2 on 1 x dgx-a100 (8 ranks), 64 x 1024 tokens a step, fp16
# layout: dp_replicate=8 micro_batch_size=4
# predicted for the stack megatron-core: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# source megatron.sh; torchrun --nnodes 1 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500
# pretrain_gpt.py "${LAYOUT[@]}" and the flags of model, data and optimizer.

LAYOUT=(
    --tensor-model-parallel-size 1
    --pipeline-model-parallel-size 1
    --context-parallel-size 1
    --overlap-grad-reduce
    --micro-batch-size 4
    --global-batch-size 64
    --seq-length 1024
    --fp16
)
