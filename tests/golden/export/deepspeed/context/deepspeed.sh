# Written by layoutwise 0.0.0 for DeepSpeed 0.19.8.
# llama-3.1-8b on 1 x dgx-h100 (8 ranks), 64 x 8192 tokens a step, bf16
# layout: dp_shard=4 cp=2 zero_stage=3 micro_batch_size=2 recompute=full
# predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for torchtitan, not for DeepSpeed.
# The script's data: sequences of 8192 tokens.
# Recompute is the model's business: model.gradient_checkpointing_enable() in the script.
# Sequences are cut by Ulysses, with all-to-alls around attention; the plan's stack may do otherwise.
deepspeed --num_gpus 8 "${SCRIPT:?the training script}" --deepspeed --deepspeed_config ds_config.json "$@"
