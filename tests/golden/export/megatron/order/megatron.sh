# Written by layoutwise 0.0.0 for Megatron-LM (megatron-core 0.19.2).
# llama-3.1-405b on 16 x dgx-h100 (128 ranks), 24 x 8192 tokens a step, fp8
# layout: dp_shard=8 tp=8 pp=2 zero_stage=1 schedule=Interleaved1F1B virtual_stages=3 sequence_parallel=true
# rank_order=tp-cp-ep-pp-dp
# predicted for the stack megatron-bridge: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for megatron-bridge, not for Megatron-LM: plan with training.stack = "megatron-core" for one.
# source megatron.sh; torchrun --nnodes 16 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500
# pretrain_gpt.py "${LAYOUT[@]}" and the flags of model, data and optimizer.

export CUDA_DEVICE_MAX_CONNECTIONS=1

LAYOUT=(
    --tensor-model-parallel-size 8
    --sequence-parallel
    --pipeline-model-parallel-size 2
    --context-parallel-size 1
    --num-virtual-stages-per-pipeline-rank 3
    --microbatch-group-size-per-virtual-pipeline-stage 3
    --use-tp-pp-dp-mapping
    --use-distributed-optimizer
    --overlap-grad-reduce
    --overlap-param-gather
    --micro-batch-size 1
    --global-batch-size 24
    --seq-length 8192
    --bf16
    --fp8-format hybrid
    --fp8-recipe tensorwise
    --grad-reduce-in-bf16
    --tp-comm-overlap
)
