#!/usr/bin/env bash
# llama-3.1-8b on 1 x 8 ranks (NCCL): dp_shard=4 tp=2 zero_stage=3 sequence_parallel=true
# Predicted: 1 s a step, 1 tokens/s, 0.0 GiB on the fullest rank.
# Run on the node:  ./launch.sh
set -euo pipefail
cd "$(dirname "$0")"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --standalone \
    --nproc-per-node=8 \
    --max-restarts=3 \
    -m runtime plan.json \
    --steps=1000 --warmup=10 --output=measurement.json '--checkpoint=/shared/my run' --checkpoint-every=50
