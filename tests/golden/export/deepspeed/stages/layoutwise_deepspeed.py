# Written by layoutwise 0.0.0 for DeepSpeed 0.19.8.
# gpt2 on 1 x dgx-a100 (8 ranks), 64 x 1024 tokens a step, bf16
# layout: dp_shard=4 pp=2 zero_stage=1 micro_batch_size=2 recompute=full
# predicted for the stack megatron-core: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak
# That prediction is for megatron-core, not for DeepSpeed.

from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn


def pipeline(layers: list[nn.Module], block: type[nn.Module], loss: nn.Module) -> PipelineModule:
    """The model as a row of layers, embedding and head among them, cut so that every stage has as many blocks."""
    return PipelineModule(
        layers,
        topology=PipeModelDataParallelTopology(num_pp=2, num_mp=1, num_dp=4),
        loss_fn=loss,
        partition_method=f"type:{block.__name__}",
        activation_checkpoint_interval=1,
    )
