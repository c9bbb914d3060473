#!/usr/bin/env bash
# tiny-llama on 1 x 4 ranks (gloo): dp_replicate=4
# Predicted: 1 s a step, 1 tokens/s, 0.0 GiB on the fullest rank.
# Run on the node:  ./launch.sh
set -euo pipefail
cd "$(dirname "$0")"
export OMP_NUM_THREADS=1
export MALLOC_MMAP_MAX_=0
export MALLOC_TRIM_THRESHOLD_=1099511627776
export MALLOC_ARENA_MAX=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun \
    --standalone \
    --nproc-per-node=4 \
    --max-restarts=3 \
    -m runtime plan.json \
    --steps=1000 --warmup=10 --output=measurement.json '--checkpoint=/shared/my run' --checkpoint-every=50
