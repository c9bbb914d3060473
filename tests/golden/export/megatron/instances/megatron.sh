# Written by layoutwise 0.0.0 for Megatron-LM (megatron-core 0.19.2).
# llama-3.1-70b on 8 x dgx-h100 (64 ranks), 64 x 8192 tokens a step, bf16
# layout: dp_replicate=2 dp_shard=2 tp=4 pp=4 zero_stage=1 micro_batch_size=2 schedule=Interleaved1F1B
# virtual_stages=2 stage_layers=9,10*6,11 recompute=selective sequence_parallel=true
# predicted for the stack megatron-core: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# source megatron.sh; torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HEAD:29500
# pretrain_gpt.py "${LAYOUT[@]}" and the flags of model, data and optimizer.

export CUDA_DEVICE_MAX_CONNECTIONS=1

LAYOUT=(
    --tensor-model-parallel-size 4
    --sequence-parallel
    --pipeline-model-parallel-size 4
    --context-parallel-size 1
    --pipeline-model-parallel-layout 'Et*9|(t*10|)*6t*11L'
    --recompute-granularity selective
    --recompute-modules core_attn
    --use-distributed-optimizer
    --num-distributed-optimizer-instances 2
    --overlap-grad-reduce
    --overlap-param-gather
    --micro-batch-size 2
    --global-batch-size 64
    --seq-length 8192
    --bf16
)
