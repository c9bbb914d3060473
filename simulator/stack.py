"""Stack: what a training software does, as data: kernels, fusion, overlap, gradient dtype, and what it cannot do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Literal

from simulator.cluster import HostFit
from simulator.files import STRICT
from simulator.model import ModelSpec
from simulator.schedules import SCHEDULES
from simulator.sync_rules import Sync
from simulator.units import BANDWIDTH


@dataclass(frozen=True)
class Recipe:
    """Bytes per parameter for one precision. `compute` is the width of the weights that kernels read; `update` what the
    optimizer's step holds besides, such as gradients in fp32 where others are narrower.

    kept_wide is the share of the matmuls that the recipe leaves in 16 bits.

    dispatch is the width in which tokens go to their experts, matmul_inputs that in which the input of a quantised
    matmul is kept for the backward; without them it is the activations' own.
    """

    compute: int
    parameters: float
    gradients: float
    optimizer: dict[str, float]
    gradient_reduce: float
    kept_wide: float = 0.0
    dispatch: float | None = None
    matmul_inputs: float | None = None
    update: float = 0.0

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Elementwise:
    """One memory-bound operation as this stack runs it: how often it reads or writes each element, in how many
    kernels, forward and backward; and how many copies of the element it keeps for the backward, in the width of
    activations and in fp32. With in_place the backward writes the gradients of its inputs over what was kept."""

    forward: float
    backward: float
    kernels_forward: int
    kernels_backward: int
    saved: float = 0.0
    in_place: bool = False
    saved_fp32: float = 0.0
    working_fp32: float = 0.0

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Stack:
    """A software stack. Lists name what it can do; `Layout.problems` turns what is missing into a reason.

    context_parallel and expert_dispatch name how the two are done, "" if not at all: "deduplicated" dispatch sends
    a token once to each rank with a chosen expert, "forwarded" once to each domain with one, which forwards it.
    expert_tensor_parallel splits routed experts over tp although ep spreads them; overlap_ep runs dispatch and combine
    beside another microbatch's kernels, where there is one (expert_parallel.overlapped_share);
    grouped_experts multiplies all experts of a rank in one kernel instead of a call each; that kernel takes sizes that
    are multiples of expert_alignment.

    lacks are the parts of attention that it cannot train; context_precisions those that its context parallelism has
    kernels for, all if empty; overlap_cp says whether a ring's messages run beside the attention; with
    ring_gradients_apart the gradients of keys and values go round in fp32 and in messages of their own, where others
    send them with the keys and values.

    host is the host's work per kernel: on a GPU it runs beside the device and counts where the device is faster;
    on a CPU it adds to each kernel. A measured device brings its own. overlaps_in_pair is the communication that
    runs beside computation where a schedule pairs a forward with a backward (DualPipeV).

    overlap_tp: pieces into which tensor-parallel collectives are cut so that all but one run beside the matmul that
    makes or takes their data; 0 if they wait for each other.

    gathers_per_unit: collectives in which ZeRO-3 gathers a block and scatters its gradients, 1 if it is one flat
    tensor.

    host_optimizer_bandwidth: where the optimizer's state lies in host memory, what its update moves there per second
    and node.

    offload_bandwidth: the same where a layout chooses that (Layout.offload), as it may with offload_zero_stages; None
    where the software cannot move the optimizer alone.

    recompute_stops_early: a recomputed block ends where everything that its backward needs is there, so before its last
    matmul (torch's non-reentrant checkpoint).

    reduces_every_projection: each of q, k, v (gate, up) is a column-parallel layer with collectives of its own, where
    others have one for their common input.

    model_families and rope_scaling are what can be trained, everything where empty; pipeline_families those that can be
    cut into stages. masked_context says whether context parallelism carries masks and biases (windows, alibi).

    selective_recompute says what recompute = "selective" runs again: the share of the kernels of a name ("q_b",
    "rmsnorm") or of a kind ("attention", "matmul", "pointwise"). What is kept are the inputs of the rest, or with
    selective_keeps_outputs (torch's selective checkpoint) the block's input, the outputs of the rest and those of
    tensor-parallel reductions; gathers and exchanges are then done again.

    replicates_by_fsdp: where nothing or only the optimizer's state is sharded, FSDP2 holds parameters too: sharded over
    the group, which may be one rank, and gathered for the length of a step.

    split_backward_zero_stages: with schedules that split the backward, where others lose gradients.

    fuses_learned_bias: the attention kernel takes biases on the scores that have a gradient (T5).

    loss_in_place: the loss keeps the logits as they are and writes their gradient in their place, working on
    loss_piece_bytes at a time; else it holds logits_bytes per logit, 4 of them from its forward on.

    preallocates_gradients: gradients have their memory from the start, else from a stage's first backward to the
    optimizer's step.

    compile: blocks run through torch.compile.

    gathers_logits: every tensor-parallel rank gathers all logits and computes the loss of the whole vocabulary.

    logits_bytes: bytes per logit that are alive at once in the loss; parallel_logits_bytes those where tp cuts the
    vocabulary, if they are others.

    fragmentation: the share of what comes and goes within a step that PyTorch's allocator holds besides and cannot give
    out, where it is not the device's.

    reduce_buffer_bytes: a buffer that is allocated once for gradients on their way to the reduction.

    loss_makes_gradients: the forward of the loss computes the gradient of the head's weights (Liger's fused linear
    cross entropy), which then lives until the backward.

    offloaded_blocks: blocks of a stage whose activations are kept in host memory from their forward to their backward.

    frees_after_input_gradient: a split backward keeps, until the weight gradients, the inputs of what has weights and
    the gradients of its outputs (zero-bubble's patches of Megatron-LM), where torch keeps everything.

    single_stage_schedules: schedules of several stages per rank that also run with one.

    copies_gate_input: where tp cuts gate and up, each of the two keeps an input of its own.

    buckets_apart: replicas reduce gradients in buckets that are there all the time, in the width of matmuls, beside
    the gradients (DistributedDataParallel without gradient_as_bucket_view).

    adds_after_backward: gradients come in the width of matmuls and are added to those of other microbatches when the
    whole backward of a microbatch has ended.

    gather_buffers: buffers, there all the time, for the whole of a tensor that sequence parallelism gathers.

    gather_copies, reduce_copies: how often weights are copied behind a gather of data parallelism, and gradients ahead
    of a reduction, as torch's FSDP and DDP do (split_with_sizes_copy, chunk_cat, the views of a bucket); others work
    in place.

    bare_ends: with several stages per rank the first stage may be the embedding alone, and the last the head.

    syncs: the ways in which it keeps replicas together (sync_rules.py). server_piece_bytes is what goes to a parameter
    server, and comes back, at a time, so that the ways overlap; 0 if all of it, pushed first and then pulled.
    """

    name: str
    source: str
    recipes: dict[str, Recipe]
    attention: tuple[str, ...]
    elementwise: dict[str, Elementwise]
    host: HostFit
    zero_stages: tuple[int, ...]
    pipeline_zero_stages: tuple[int, ...]
    default_zero_stage: int
    recompute: tuple[str, ...]
    schedules: tuple[str, ...]
    sequence_parallel: Literal["", "optional", "always"]
    hybrid_shard: bool
    overlap_grad_reduce: bool
    overlap_param_gather: bool
    bucket_bytes: float
    overlap_p2p: bool
    overlap_tp: int
    scatters_messages: bool
    preallocates_receives: bool
    optimizer_traffic: dict[str, float]
    fused_projections: bool
    regathers_inputs: bool
    fused_accumulation: bool
    gathers_per_unit: int = 1
    host_optimizer_bandwidth: Annotated[float, BANDWIDTH] | None = None
    offload_bandwidth: Annotated[float, BANDWIDTH] | None = None
    offload_zero_stages: tuple[int, ...] = ()
    reduces_every_projection: bool = False
    recompute_stops_early: bool = False
    overlaps_in_pair: tuple[Literal["tp", "cp", "ep", "dp"], ...] = ()
    replicates_by_fsdp: bool = False
    pads_vocabulary: bool = True
    ties_across_stages: bool = True
    fixed_rank_order: bool = False
    dropout: bool = False
    logits_bytes: float = 8.0
    gathers_logits: bool = False
    copies_gate_input: bool = False
    buckets_apart: bool = False
    adds_after_backward: bool = False
    gather_buffers: int = 0
    bare_ends: bool = False
    gather_copies: float = 0.0
    reduce_copies: float = 0.0
    parallel_logits_bytes: float | None = None
    fragmentation: float | None = None
    reduce_buffer_bytes: float = 0.0
    loss_makes_gradients: bool = False
    offloaded_blocks: int = 0
    frees_after_input_gradient: bool = False
    single_stage_schedules: tuple[str, ...] = ()
    loss_in_place: bool = False
    fuses_learned_bias: bool = True
    loss_piece_bytes: float = 0.0
    preallocates_gradients: bool = True
    selective_recompute: dict[str, float] = field(default_factory=lambda: {"attention": 1.0})
    selective_keeps_outputs: bool = False
    split_backward_zero_stages: tuple[int, ...] = (1, 2, 3)
    compile: bool = False
    context_parallel: Literal["", "ring", "all_gather", "ulysses"] = ""
    expert_dispatch: Literal["", "all_to_all", "deduplicated", "forwarded"] = ""
    expert_tensor_parallel: bool = False
    overlap_ep: bool = False
    grouped_experts: bool = True
    expert_alignment: int = 1
    lacks: tuple[Literal["latent_attention", "attention_sinks"], ...] = ()
    context_precisions: tuple[str, ...] = ()
    overlap_cp: bool = True
    ring_gradients_apart: bool = False
    peft: bool = True
    model_families: tuple[str, ...] = field(default_factory=tuple)
    pipeline_families: tuple[str, ...] = field(default_factory=tuple)
    rope_scaling: tuple[str, ...] = field(default_factory=tuple)
    masked_context: bool = True
    syncs: tuple[Sync, ...] = ("all_reduce",)
    server_piece_bytes: float = 0.0

    __pydantic_config__ = STRICT

    def without_limits(self) -> Stack:
        """The same software as if it could run every layout: its costs, without what it refuses."""
        return dataclasses.replace(
            self,
            zero_stages=(1, 2, 3),
            pipeline_zero_stages=(1, 2, 3),
            schedules=SCHEDULES,
            sequence_parallel="optional",
            hybrid_shard=True,
            recompute=("none", "selective", "full"),
            context_parallel=self.context_parallel or "ring",
            expert_dispatch=self.expert_dispatch or "all_to_all",
            model_families=(),
            pads_vocabulary=True,
            ties_across_stages=True,
        )

    def missing(self, model: ModelSpec, expert_tp: int) -> list[str]:
        """Parts of a model that this stack has no modules for, with what asks for them; experts are cut over expert_tp
        ranks."""
        asked: dict[str, tuple[int | bool, str]] = {
            "latent_attention": (model.kv_lora_rank, f"latent attention yet (kv_lora_rank = {model.kv_lora_rank})"),
            "attention_sinks": (model.attention_sinks, "attention sinks yet (attention_sinks = true)"),
        }
        found = [words for part, (used, words) in asked.items() if part in self.lacks and used]
        if model.num_experts:
            sizes = {
                "hidden_size": model.hidden_size,
                "moe_intermediate_size": model.moe_intermediate_size // expert_tp,
            }
            found += [
                f"experts of {name} = {size} on a rank, which must be a multiple of {self.expert_alignment}"
                for name, size in sizes.items()
                if size % self.expert_alignment
            ]
        return found
