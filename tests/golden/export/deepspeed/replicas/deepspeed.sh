# Written by layoutwise 0.0.0 for DeepSpeed 0.19.8.
# gpt2 on 1 x dgx-a100 (8 ranks), 64 x 1024 tokens a step, fp16
# layout: dp_replicate=8 micro_batch_size=4
# predicted for the stack megatron-core: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for megatron-core, not for DeepSpeed.
# The script's data: sequences of 1024 tokens.
deepspeed --num_gpus 8 "${SCRIPT:?the training script}" --deepspeed --deepspeed_config ds_config.json "$@"
