#!/usr/bin/env bash
# llama-3.1-8b on 2 x 8 ranks (NCCL): dp_shard=8 tp=2 zero_stage=3 sequence_parallel=true
# Predicted: 1 s a step, 1 tokens/s, 0.0 GiB on the fullest rank.
# Run on each of the 2 nodes, with the name of one of them:  ./launch.sh HEAD_NODE
set -euo pipefail
head=${1:?name the node that the others meet at: ./launch.sh HEAD_NODE}
cd "$(dirname "$0")"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --nnodes=2 \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$head:29500" \
    --nproc-per-node=8 \
    --max-restarts=3 \
    -m runtime plan.json \
    --steps=1000 --warmup=10 --output=measurement.json '--checkpoint=/shared/my run' --checkpoint-every=50
