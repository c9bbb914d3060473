"""Layout: how one job is cut over the ranks, and the only place that knows which cuts are legal.

The world is a grid. With the rank order `tp-cp-ep-dp-pp` the tensor axis is innermost, so its ranks are neighbours
(one NVLink domain); pipeline stages are farthest apart, because they speak least. Other orders put other axes there.
ep is no axis of its own: it regroups the ranks of dp_shard, cp and tp.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from simulator.errors import nearest
from simulator.expert_parallel import expert_tp
from simulator.files import STRICT
from simulator.offload import Offload, offload_problems
from simulator.sync_rules import OuterOptimizer, Sync, sync_problems

if TYPE_CHECKING:
    from simulator.job import Job

Schedule = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
MULTI_STAGE = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
V_PLACEMENT = ("ZBVZeroBubble", "DualPipeV")
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
MOST_MICROBATCHES = 8192
AXES = ("tp", "cp", "dp_shard", "dp_replicate", "pp")  # innermost first: the rank order tp-cp-ep-dp-pp
RANK_ORDER = "tp-cp-ep-dp-pp"


@functools.lru_cache(maxsize=4096)
def _axes_in(rank_order: str) -> tuple[str, ...]:
    spelt = {"dp": ("dp_shard", "dp_replicate"), "ep": ()}
    named = [axis for name in rank_order.split("-") for axis in spelt.get(name, (name,))]
    return (*named, *(axis for axis in AXES if axis not in named))


@dataclass(frozen=True)
class Layout:
    """One way to cut a job. Field names are torchtitan's; a value is legal for a job if `problems(job)` is empty.

    zero_stage says what dp_shard shards: 0 nothing (then dp_shard is 1), 1 optimizer state, 2 also gradients,
    3 also parameters. stage_layers are the blocks of each stage in torch's global stage order; None means as even
    as possible. rank_order names the axes from the innermost, as Megatron-LM's RankGenerator does; dp stands for
    dp_shard inside dp_replicate, and axes of one rank may be left out.

    sync is how the dp_replicate replicas keep together (sync_rules.py). With "parameter_server" `servers` processes
    beside the ranks hold the parameters, one on every node in turn; staleness is how many updates a replica may be
    ahead of the slowest: 0 waits for all (synchronous), None for nobody (asynchronous). With "local_sgd" parameters
    are averaged every sync_interval steps, and outer_optimizer "nesterov" takes the average as a gradient (DiLoCo,
    arXiv 2311.08105).

    offload "optimizer" keeps the optimizer's state in host memory, where the host updates it (offload.py).
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    zero_stage: Literal[0, 1, 2, 3] = 0
    micro_batch_size: int = 1
    schedule: Schedule = "1F1B"
    virtual_stages: int = 1
    stage_layers: tuple[int, ...] | None = None
    recompute: Literal["none", "selective", "full"] = "none"
    sequence_parallel: bool = False
    rank_order: str = RANK_ORDER
    sync: Sync = "all_reduce"
    servers: int = 0
    staleness: int | None = 0
    sync_interval: int = 1
    outer_optimizer: OuterOptimizer = "none"
    offload: Offload = "none"

    __pydantic_config__ = STRICT

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes in this layout's rank order, innermost first.

        >>> Layout(rank_order="ep-dp-tp-cp-pp").axes
        ('dp_shard', 'dp_replicate', 'tp', 'cp', 'pp')
        """
        return _axes_in(self.rank_order)

    @property
    def dp(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def world_size(self) -> int:
        return self.dp * self.cp * self.tp * self.pp

    @property
    def reducing_replicas(self) -> tuple[str, ...]:
        """The axis along which replicas all-reduce within a step, empty where they keep together in another way."""
        return ("dp_replicate",) if self.sync == "all_reduce" else ()

    @property
    def shards(self) -> int:
        """Ranks that shard the state of everything but spread experts: cp ranks hold the same parameters too."""
        return self.dp_shard * self.cp if self.zero_stage else 1

    @property
    def stages(self) -> int:
        """Pipeline stages in torch's sense: pp ranks times the chunks that each of them holds."""
        return self.pp * self.virtual_stages

    @property
    def shards_gradients(self) -> bool:
        """Whether gradients are reduced to shards after every microbatch; under a pipeline torch waits for the last."""
        return self.zero_stage >= 2 and self.pp == 1

    def microbatches(self, global_batch_size: int) -> int:
        """Microbatches that one data-parallel rank runs in a step."""
        return global_batch_size // (self.dp * self.micro_batch_size)

    def layers_per_stage(self, num_hidden_layers: int) -> tuple[int, ...]:
        """Blocks of each stage; the remainder of an uneven division goes to the first stages, as torchtitan does. Up to
        two stages more than blocks are those of the head and the embedding alone (Llama 3, arXiv 2407.21783, 3.3.2).

        >>> Layout(pp=4).layers_per_stage(10), Layout(pp=4).layers_per_stage(2), Layout(pp=4).layers_per_stage(3)
        ((3, 3, 2, 2), (0, 1, 1, 0), (1, 1, 1, 0))
        """
        if self.stage_layers is not None:
            return self.stage_layers
        if self.pp > 1 and 0 < self.stages - num_hidden_layers <= 2:
            ends = (0,) * (self.stages - num_hidden_layers - 1)
            return (*ends, *[1] * num_hidden_layers, 0)
        share, rest = divmod(num_hidden_layers, self.stages)
        return tuple(share + (stage < rest) for stage in range(self.stages))

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """The stages that one pipeline rank holds, in the order of its chunks."""
        return tuple(chunk * self.pp + self._turned(chunk, pp_rank) for chunk in range(self.virtual_stages))

    def rank_of_stage(self, stage: int) -> int:
        """The pipeline rank that holds a stage: stage % pp (torch's loop placement), or back and forth for the V of
        ZBVZeroBubble and DualPipeV, where rank r holds stages r and 2·pp - 1 - r.

        >>> [Layout(pp=3, virtual_stages=2, schedule="ZBVZeroBubble").rank_of_stage(stage) for stage in range(6)]
        [0, 1, 2, 2, 1, 0]
        """
        return self._turned(*divmod(stage, self.pp))

    def _turned(self, chunk: int, place: int) -> int:
        """Every other chunk of a V runs from the last rank to the first; a stage's place and its rank mirror."""
        return self.pp - 1 - place if self.schedule in V_PLACEMENT and chunk % 2 else place

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a global rank stands on each axis."""
        result = {}
        for axis in self.axes:
            rank, result[axis] = divmod(rank, getattr(self, axis))
        return result

    def rank(self, **coordinates: int) -> int:
        """The global rank at these coordinates; axes not named are 0."""
        rank, stride = 0, 1
        for axis in self.axes:
            rank += stride * coordinates.get(axis, 0)
            stride *= getattr(self, axis)
        return rank

    def group(self, *axes: str, pp_rank: int = 0) -> tuple[int, ...]:
        """The ranks that differ from the first rank of a pipeline stage in these axes only."""
        ranks = [self.rank(pp=pp_rank)]
        stride = 1
        for axis in self.axes:
            size = getattr(self, axis)
            if axis in axes:
                ranks = [r + stride * i for i in range(size) for r in ranks]
            stride *= size
        return tuple(ranks)

    def sibling_starts(self, axis: str, domain: int) -> list[int]:
        """How far the groups of an axis lie from the first one, one of each way that they can lie in scale-up domains
        of this size. Sizes that divide each other leave one way; others make some groups straddle domains."""
        return self.starts(self.group(axis), domain)

    def starts(self, ranks: tuple[int, ...], domain: int) -> list[int]:
        """The same for any group of evenly spaced ranks and the siblings that fill its gaps and follow it."""
        if len(ranks) == 1:
            return [0]
        stride = ranks[1] - ranks[0]
        block = stride * len(ranks)
        stage = self.world_size // self.pp if self.axes[-1] == "pp" else self.world_size
        if all(domain % size == 0 or size % domain == 0 for size in (stride, block, stage)):
            return [0]
        firsts = itertools.product(range(min(stride, domain)), range(min(max(1, stage // block), domain)))
        return sorted({offset + number * block for offset, number in firsts})

    def problems(self, job: Job) -> list[str]:
        """Why this layout cannot run this job, in words with the arithmetic; empty if it can.

        Memory is not looked at here: a layout that does not fit is legal (simulator.memory).
        """
        bad_sizes = [f"{n} = {v} must be at least 1" for n, v in self._sizes().items() if v < 1]
        if bad_sizes:
            return bad_sizes
        if self._order_problems():
            return self._order_problems()
        return [
            *self._grid_problems(job),
            *self._batch_problems(job),
            *self._tensor_problems(job),
            *self._pipeline_problems(job),
            *self._stack_problems(job),
            *sync_problems(self, job),
            *offload_problems(self, job),
        ]

    def _sizes(self) -> dict[str, int]:
        names = (*AXES, "ep", "micro_batch_size", "virtual_stages")
        return {name: getattr(self, name) for name in names}

    def _order_problems(self) -> list[str]:
        names, known = self.rank_order.split("-"), RANK_ORDER.split("-")
        sizes = {"tp": self.tp, "cp": self.cp, "dp": self.dp, "pp": self.pp}
        left_out = [name for name, size in sizes.items() if size > 1 and name not in names]
        if len(set(names)) < len(names) or set(names) - set(known) or left_out:
            rule = "must name tp, cp, ep, dp and pp once each, or leave out those of one rank"
            return [f"rank_order = '{self.rank_order}' {rule}, like {RANK_ORDER}"]
        return []

    def _grid_problems(self, job: Job) -> list[str]:
        found = []
        grid = " * ".join(f"{axis}({getattr(self, axis)})" for axis in reversed(AXES))
        if job.cluster.oversubscribe > 1:
            most = int(job.world_size * job.cluster.oversubscribe)
            if self.world_size > most:
                found.append(f"{grid} = {self.world_size} ranks, more than the {most} that {job.cluster.name} takes")
        elif self.world_size != job.world_size:
            found.append(f"{grid} = {self.world_size} ranks, but {job.nodes} nodes have {job.world_size}")
        if self.zero_stage == 0 and self.dp_shard > 1:
            found.append(f"zero_stage = 0 shards nothing: dp_shard = {self.dp_shard} belongs into dp_replicate")
        if self.zero_stage > 0 and self.dp_shard * self.cp == 1:
            found.append(f"zero_stage = {self.zero_stage} needs dp_shard > 1: there is nobody to shard over")
        return found + self._context_problems(job) + self._expert_problems(job)

    def _context_problems(self, job: Job) -> list[str]:
        if self.cp == 1:
            return []
        found, stack, seq_len = [], job.stack, job.training.seq_len
        if not stack.context_parallel:
            found.append(f"stack {stack.name} has no context parallelism: cp = {self.cp} must be 1")
        if not job.model.causal:
            found.append(f"cp = {self.cp}: context parallelism is for decoder-only models, not {job.model.family}")
        if job.model.mamba_num_heads:
            found.append(f"cp = {self.cp}: the scan of Mamba blocks is not cut along the sequence")
        parts = 2 * self.cp * (self.tp if self.sequence_parallel else 1)
        if seq_len % parts:
            shown = "2 * cp * tp" if self.sequence_parallel else "2 * cp"
            found.append(f"cp = {self.cp}: {shown} = {parts} must divide seq_len = {seq_len}")
        if stack.context_precisions and job.training.precision not in stack.context_precisions:
            found.append(
                f"stack {stack.name} has no context parallelism in {job.training.precision}: cp = {self.cp} must be 1, "
                f"or precision one of {list(stack.context_precisions)}"
            )
        heads = job.model.num_attention_heads
        if stack.context_parallel == "ulysses" and heads % (self.tp * self.cp):
            found.append(f"tp({self.tp}) * cp({self.cp}) must divide num_attention_heads = {heads}")
        return found

    def _expert_problems(self, job: Job) -> list[str]:
        if self.ep == 1:
            return []
        model, stack, found = job.model, job.stack, []
        if not model.num_experts:
            return [f"ep = {self.ep}: {model.name} has no experts"]
        if not stack.expert_dispatch:
            found.append(f"stack {stack.name} has no expert parallelism: ep = {self.ep} must be 1")
        if model.num_experts % self.ep:
            found.append(f"ep = {self.ep} must divide num_experts = {model.num_experts}")
        if self.tp > 1 and not self.sequence_parallel:
            found.append(f"ep = {self.ep} with tp = {self.tp} needs sequence_parallel = true")
        axis = "dp_shard" if self.zero_stage else "dp_replicate"
        ranks, whole = getattr(self, axis) * self.cp * self.tp, expert_tp(self, stack) * self.ep
        if ranks % whole:
            split = " times tp" if whole > self.ep else ""
            found.append(
                f"ep = {self.ep}{split} must divide {axis}({getattr(self, axis)}) * cp({self.cp}) * tp({self.tp}) "
                f"= {ranks}"
            )
        links = [job.cluster.scale_up, *([job.cluster.scale_out] if job.cluster.scale_out else [])]
        if not all(link.collectives.get("all_to_all") for link in links):
            found.append(f"ep = {self.ep}: cluster {job.cluster.name} has no constants for all_to_all")
        return found

    def _batch_problems(self, job: Job) -> list[str]:
        batch, share = job.training.global_batch_size, self.dp * self.micro_batch_size
        if batch % share:
            return [
                f"global_batch_size = {batch} is not a multiple of dp({self.dp}) * "
                f"micro_batch_size({self.micro_batch_size}) = {share}"
            ]
        return []

    def _tensor_problems(self, job: Job) -> list[str]:
        model, found = job.model, []
        if self.sequence_parallel and self.tp == 1:
            found.append("sequence_parallel needs tp > 1: it shards over the tensor axis")
        if self.tp == 1:
            return found
        divided = {
            "num_attention_heads": model.num_attention_heads,
            "num_key_value_heads": model.num_key_value_heads,
            "intermediate_size": model.intermediate_size,
            "hidden_size": model.hidden_size,
        }
        if model.num_experts and expert_tp(self, job.stack) > 1:
            divided["moe_intermediate_size"] = model.moe_intermediate_size
        if model.num_shared_experts:
            width = model.num_shared_experts * model.moe_intermediate_size
            divided["num_shared_experts * moe_intermediate_size"] = width
        if model.mamba_num_heads:
            divided |= {"mamba_num_heads": model.mamba_num_heads, "mamba_n_groups": model.mamba_n_groups}
        for name, value in divided.items():
            if value % self.tp:
                best = max(d for d in range(1, min(self.tp, value) + 1) if value % d == 0)
                found.append(f"tp = {self.tp} must divide {name} = {value}; the nearest smaller tp is {best}")
        if self.sequence_parallel and self.cp == 1 and job.training.seq_len % self.tp:
            found.append(f"sequence_parallel: tp = {self.tp} must divide seq_len = {job.training.seq_len}")
        return found

    def _pipeline_problems(self, job: Job) -> list[str]:
        found, layers = [], job.model.num_hidden_layers
        if self.schedule not in SCHEDULES:
            return [f"schedule = '{self.schedule}' is not known{nearest(self.schedule, SCHEDULES)}"]
        bare = job.stack.bare_ends and self.virtual_stages > 1
        if self.stages > layers + 2 * bare:
            found.append(
                f"pp({self.pp}) * virtual_stages({self.virtual_stages}) = {self.stages} stages, "
                f"but the model has {layers} layers"
            )
        if self.stage_layers is not None:
            if len(self.stage_layers) != self.stages or sum(self.stage_layers) != layers:
                found.append(
                    f"stage_layers = {list(self.stage_layers)} must name {self.stages} stages that sum to {layers}"
                )
            elif min(self.stage_layers[bare : self.stages - bare]) < 1 or min(self.stage_layers) < 0:
                which = "every stage but the first and the last" if bare else "every stage"
                found.append(f"stage_layers = {list(self.stage_layers)}: {which} needs a layer")
        if self.virtual_stages > 1 and self.schedule not in MULTI_STAGE:
            found.append(f"schedule {self.schedule} has one stage per rank, but virtual_stages = {self.virtual_stages}")
        alone = self.virtual_stages == 1 and self.schedule not in job.stack.single_stage_schedules
        if self.schedule in MULTI_STAGE and (alone or self.pp == 1):
            found.append(f"schedule {self.schedule} needs virtual_stages > 1 and pp > 1")
        elif self.schedule in V_PLACEMENT and self.virtual_stages != 2:
            found.append(
                f"schedule {self.schedule} puts 2 stages on each rank, in a V: "
                f"virtual_stages = {self.virtual_stages} must be 2"
            )
        if self.schedule in SPLIT_BACKWARD and self.recompute != "none":
            found.append(
                f"recompute = '{self.recompute}' must be 'none' with {self.schedule}: its backward is split, and torch "
                f"would recompute a block for its input gradient and again for each of its weights"
            )
        return found + self._microbatch_problems(job)

    def _microbatch_problems(self, job: Job) -> list[str]:
        count, pp = self.microbatches(job.training.global_batch_size), self.pp
        if count > MOST_MICROBATCHES:
            return [f"{count} microbatches a step are more than the {MOST_MICROBATCHES} that are simulated"]
        if pp == 1:
            return []
        shown = (
            f"global_batch_size({job.training.global_batch_size}) / (dp({self.dp}) * "
            f"micro_batch_size({self.micro_batch_size})) = {count} microbatches"
        )
        if self.schedule == "1F1B" and count < pp:
            return [f"{shown}, but 1F1B over pp = {pp} needs at least {pp}"]
        rounds = max(1, count // pp)
        if self.schedule in ("Interleaved1F1B", "InterleavedZeroBubble") and count % rounds:
            return [f"{shown}, which {self.schedule} cannot split into {rounds} equal rounds"]
        if self.schedule == "DualPipeV" and count < 2 * pp:
            return [f"{shown}, but DualPipeV over 2 * pp({pp}) stages needs at least {2 * pp}"]
        return []

    def _stack_problems(self, job: Job) -> list[str]:
        stack, found = job.stack, []
        if stack.model_families and job.model.family not in stack.model_families:
            found.append(f"stack {stack.name} cannot train the {job.model.family} family yet")
        elif job.model.mamba_num_heads and "ssd" not in stack.elementwise:
            found.append(f"stack {stack.name} has no kernels for Mamba blocks")
        missing = stack.missing(job.model, expert_tp(self, stack))
        found += [f"stack {stack.name} cannot train {part}" for part in missing]
        found += self._model_problems(job)
        if job.training.peft != "none" and not stack.peft:
            found.append(f"stack {stack.name} cannot train with peft = '{job.training.peft}' yet")
        if self.zero_stage not in (0, *stack.zero_stages):
            found.append(f"stack {stack.name} has no zero_stage {self.zero_stage}; it has {list(stack.zero_stages)}")
        elif self.pp > 1 and self.zero_stage not in (0, *stack.pipeline_zero_stages):
            found.append(f"stack {stack.name} has no zero_stage {self.zero_stage} under a pipeline (pp = {self.pp})")
        elif self.schedule in SPLIT_BACKWARD and self.zero_stage not in (0, *stack.split_backward_zero_stages):
            found.append(
                f"stack {stack.name} has no zero_stage {self.zero_stage} with {self.schedule}, but "
                f"{list(stack.split_backward_zero_stages)}: torch loses gradients where a backward is split and "
                f"parameters are dropped before it"
            )
        if self.recompute not in stack.recompute:
            found.append(f"stack {stack.name} has no recompute = '{self.recompute}'; it has {list(stack.recompute)}")
        if self.schedule not in stack.schedules:
            found.append(f"stack {stack.name} has no schedule {self.schedule}; it has {list(stack.schedules)}")
        if self.sequence_parallel and not stack.sequence_parallel:
            found.append(f"stack {stack.name} has no sequence_parallel")
        if self.tp > 1 and not self.sequence_parallel and stack.sequence_parallel == "always":
            found.append(f"stack {stack.name} runs tp > 1 with sequence_parallel = true only")
        if not stack.pads_vocabulary and job.model.vocab_size % self.tp:
            found.append(f"stack {stack.name}: tp = {self.tp} must divide vocab_size = {job.model.vocab_size}")
        if not stack.ties_across_stages and self.pp > 1 and job.model.tie_word_embeddings:
            found.append(f"stack {stack.name} cannot run tie_word_embeddings with pp > 1: the two copies would drift")
        if stack.fixed_rank_order and self.rank_order != RANK_ORDER:
            found.append(f"stack {stack.name} has no other rank_order than {RANK_ORDER}")
        if self.dp_replicate > 1 and self.dp_shard > 1 and not stack.hybrid_shard:
            found.append(
                f"stack {stack.name} cannot replicate sharded data parallel groups (dp_replicate and dp_shard)"
            )
        return found

    def _model_problems(self, job: Job) -> list[str]:
        """What the stack does not do with the parts of this model."""
        model, stack, found = job.model, job.stack, []
        whole = set(stack.model_families) - set(stack.pipeline_families) if stack.pipeline_families else set()
        if self.pp > 1 and model.family in whole:
            found.append(f"stack {stack.name} does not cut the {model.family} family into stages: pp must be 1")
        scaling = model.rope_scaling
        if scaling is not None and stack.rope_scaling and scaling.rope_type not in stack.rope_scaling:
            found.append(
                f"stack {stack.name} has no rope_scaling of rope_type '{scaling.rope_type}'; "
                f"it has {list(stack.rope_scaling)}"
            )
        if self.cp > 1 and not stack.masked_context and (model.position == "alibi" or model.sliding_window):
            found.append(f"stack {stack.name}: cp = {self.cp} carries no masks: no alibi positions, no sliding_window")
        return found

    def short(self) -> str:
        """The fields that differ from the default, as `--layout` takes them: `dp_shard=4 tp=8 zero_stage=1`."""
        parts = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                parts.append(f"{field.name}={written(value)}")
        return " ".join(parts) or "one process"


def written(value: Any) -> str:
    """A field's value as `--layout` takes it; of a tuple four and more alike are written once.

    >>> written((1, 2, 2, 2, 2, 1))
    '1,2*4,1'
    """
    if not isinstance(value, tuple):
        return value if isinstance(value, str) else str(value).lower()
    runs = [(one, len(list(same))) for one, same in itertools.groupby(value)]
    return ",".join(f"{one}*{count}" if count > 3 else ",".join([str(one)] * count) for one, count in runs)
