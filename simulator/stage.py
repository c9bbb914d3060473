"""What one pipeline stage costs one rank: seconds of a forward and a backward by kind, bytes, and its collectives.

A stage is the embedding (first), some blocks, the head (last). All ranks of a stage cost the same.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from simulator.activations import (
    deferred_bytes,
    kept_kinds,
    kept_logits,
    kept_outputs,
    norm_working,
    recomputed_share,
    saved_bytes,
    score_bytes,
    weight_input_bytes,
    working_bytes,
)
from simulator.compute import KernelTime, accumulation_seconds, kernel_time
from simulator.context_parallel import context_seconds
from simulator.data_parallel import DataParallel
from simulator.expert_parallel import expert_grid, expert_seconds, overlapped_share, per_shard
from simulator.kernels import (
    Attention,
    Cut,
    Kernel,
    Matmul,
    block_kernels,
    embedding_kernels,
    head_kernels,
)
from simulator.layout import RANK_ORDER, Layout
from simulator.model import BlockKind
from simulator.placement import Groups, known_to, layout_groups
from simulator.tensor_parallel import (
    HEAD_CUTS,
    block_cuts,
    embedding_cuts,
    exposed_seconds,
    hidden_seconds,
    loss_transfers,
    repeated_transfers,
    tensor_seconds,
    tensor_transfers,
)

if TYPE_CHECKING:
    from simulator.job import Job


@dataclass(frozen=True)
class Work:
    """Seconds that one op keeps its rank busy, by what they are spent on; the fields are those of Breakdown."""

    compute: float = 0.0
    recompute: float = 0.0
    tp: float = 0.0
    cp: float = 0.0
    ep: float = 0.0
    dp: float = 0.0
    host: float = 0.0

    @functools.cached_property
    def total(self) -> float:
        return self.compute + self.recompute + self.tp + self.cp + self.ep + self.dp + self.host

    def __add__(self, other: Work) -> Work:
        return Work(
            self.compute + other.compute,
            self.recompute + other.recompute,
            self.tp + other.tp,
            self.cp + other.cp,
            self.ep + other.ep,
            self.dp + other.dp,
            self.host + other.host,
        )

    @property
    def computation(self) -> float:
        """Seconds on the device and its host, without communication."""
        return self.compute + self.recompute + self.host

    def spent_on(self, names: Collection[str]) -> float:
        """Seconds of these fields."""
        return sum(getattr(self, name) for name in _WORK if name in names)

    def without(self, hidden: float, names: Collection[str]) -> Work:
        """The same work with this many seconds of these fields beside other work."""
        spent = self.spent_on(names)
        kept = 1 - hidden / spent if spent else 1.0
        return Work(**{name: getattr(self, name) * (kept if name in names else 1.0) for name in _WORK})

    def __sub__(self, part: Work) -> Work:
        return Work(**{name: getattr(self, name) - getattr(part, name) for name in _WORK})


_WORK = tuple(field.name for field in dataclasses.fields(Work))


@dataclass(frozen=True)
class UnitCost:
    """One block, the embedding or the head: the unit that FSDP shards and gathers as a whole.

    parameters are elements on this rank after tensor parallelism, of them experts those of routed experts under expert
    parallelism; saved is bytes kept from a forward to its backward, working is bytes alive only within the unit's own
    backward, growing the same where the gradients of its weights stay in the width of matmuls until its end.
    """

    forward: Work
    backward: Work
    parameters: float
    saved: float
    working: float
    growing: float
    # FSDP's root group (embedding and head) is not resharded between its forward and its backward.
    stays_gathered: bool = False
    backward_weight: Work = Work()
    deferred: float = 0.0
    experts: float = 0.0
    norm_working: float = 0.0
    # Bytes of `saved` by what they are.
    kinds: tuple[tuple[str, float], ...] = ()

    @property
    def forward_seconds(self) -> float:
        return self.forward.total

    @property
    def backward_seconds(self) -> float:
        return self.backward.total


@dataclass(frozen=True)
class StageCost:
    """A stage as the engine sees it. reduce and gather are the seconds of its data-parallel collectives where they
    happen once a step; where they happen in every microbatch they are part of forward and backward. backward_weight
    is the part of backward that a schedule may put off: the gradients of weights and their adding up; deferred is the
    bytes that are kept for it besides saved once the rest is done. blocks are its units in order with how many of them
    follow each other."""

    forward: Work
    backward: Work
    parameters: float
    saved: float
    working: float
    units: int
    reduce: float
    gather: float
    backward_weight: Work = Work()
    deferred: float = 0.0
    blocks: tuple[tuple[UnitCost, int], ...] = ()

    @functools.cached_property
    def known_bytes(self) -> dict[object, Any]:
        """What memory.py has found about this stage."""
        return {}

    @property
    def backward_input(self) -> Work:
        """The rest of the backward, which the stage before waits for: recomputation and the input gradient."""
        return self.backward - self.backward_weight

    experts: float = 0.0


def _runs(units: list[UnitCost]) -> tuple[tuple[UnitCost, int], ...]:
    """Units in order, with how many of the same follow each other."""
    runs = [list(same) for _, same in itertools.groupby(units, key=id)]
    return tuple((run[0], len(run)) for run in runs)


def _unit_key(job: Job, layout: Layout) -> tuple[object, ...]:
    """What the cost of a unit depends on besides its groups."""
    plain = dataclasses.replace(
        layout, dp_replicate=1, dp_shard=1, zero_stage=0, pp=min(layout.pp, 2), schedule="1F1B", virtual_stages=1,
        stage_layers=None, rank_order=RANK_ORDER,
    )  # fmt: skip
    if job.stack.fused_accumulation:
        return (plain,)
    sharded = (layout.dp_replicate, layout.dp_shard, layout.zero_stage) if layout.shards_gradients else ()
    return plain, layout.microbatches(job.training.global_batch_size), sharded


class StageCosts:
    """Costs of all stages of one layout. Blocks of a kind, and stages of the same blocks, are costed once."""

    def __init__(self, job: Job, layout: Layout, overlapped: float | None = None) -> None:
        """overlapped: the share of passes that hide exchanges of tokens, if it is not the layout's own."""
        self.job, self.layout = job, layout
        self.overlapped = overlapped_share(job, layout) if overlapped is None else overlapped
        self.recipe = job.stack.recipes[job.training.precision]
        self.grid = expert_grid(layout, job.stack)
        self.cut = Cut(
            layout.micro_batch_size, job.training.seq_len, layout.tp, layout.sequence_parallel, layout.cp, layout.ep,
            self.grid.tp,
        )  # fmt: skip
        self.groups = layout_groups(job, layout)
        # Most layouts of a job differ in what does not change what a unit costs.
        self._units: dict[object, UnitCost] = known_to(job, "units").setdefault(
            (_unit_key(job, layout), self.overlapped), {}
        )
        self._stages: dict[tuple[object, ...], StageCost] = {}

    def stages(self) -> tuple[StageCost, ...]:
        """The costs of all stages, in torch's global stage order."""
        model, layout = self.job.model, self.layout
        known = known_to(self.job, "blocks")
        if not known:
            known["all"] = [
                (model.block_kind(i), model.block_is_causal(i), model.block_window(i))
                for i in range(model.num_hidden_layers)
            ]
        blocks: list[tuple[BlockKind, bool, int]] = known["all"]
        found, first = [], 0
        for index, count in enumerate(layout.layers_per_stage(len(blocks))):
            found.append(self._stage(index, tuple(blocks[first : first + count])))
            first += count
        return tuple(found)

    def stage(self, index: int) -> StageCost:
        """The cost of one stage."""
        return self.stages()[index]

    def _stage(self, index: int, blocks: tuple[tuple[BlockKind, bool, int], ...]) -> StageCost:
        groups = self.groups[self.layout.rank_of_stage(index)]
        ends = index == 0, index == self.layout.stages - 1
        # Equal groups of a layout are one object.
        key = (blocks, *ends, id(groups))
        if key not in self._stages:
            units = self._offloaded([self.block(*block, groups) for block in blocks])
            if index == 0:
                units.insert(0, self.embedding(groups))
            if index == self.layout.stages - 1:
                units.append(self.head(groups))
            cost = self._sum(units, groups)
            # Nobody waits for an input gradient of the first stage: torch runs its whole backward in the weights' turn.
            if index == 0:
                cost = dataclasses.replace(cost, backward_weight=cost.backward, deferred=0.0)
            self._stages[key] = cost
        return self._stages[key]

    def _offloaded(self, blocks: list[UnitCost]) -> list[UnitCost]:
        """The blocks of a stage, the first of them with their activations in host memory.

        Two blocks at least stay: the one whose backward runs and the one before it, on its way back. The peak is the
        end of the forward, when what is offloaded has left.
        Reference: Transformer Engine's activation offloading (NVIDIA/Megatron-LM@d98e8a64, cpu_offloading_num_layers).
        Ignored: copies that PCIe or NVLink-C2C cannot hide.
        """
        count = min(self.job.stack.offloaded_blocks, len(blocks) - 2)
        gone = (dataclasses.replace(block, saved=0.0, kinds=()) for block in blocks[: max(0, count)])
        return [*gone, *blocks[max(0, count) :]]

    def _sum(self, units: list[UnitCost], groups: Groups) -> StageCost:
        data = DataParallel(
            self.job, self.layout, groups.shard, groups.replicate, groups.expert_shard, groups.expert_replicate
        )
        forward = functools.reduce(Work.__add__, (u.forward for u in units))
        backward = functools.reduce(Work.__add__, (u.backward for u in units))
        weights = functools.reduce(Work.__add__, (u.backward_weight for u in units))
        parameters, experts = sum(u.parameters for u in units), sum(u.experts for u in units)
        return StageCost(
            forward=forward + Work(dp=data.exposed_forward(units)),
            backward=backward + Work(dp=data.exposed_backward(units)),
            parameters=parameters,
            saved=sum(u.saved for u in units),
            working=max(u.working for u in units),
            units=len(units),
            reduce=data.once_reduce_seconds(parameters, experts, len(units)),
            gather=data.once_gather_seconds(parameters, experts, len(units)),
            backward_weight=weights,
            deferred=sum(u.deferred for u in units),
            experts=experts,
            blocks=_runs(units),
        )

    def block(self, kind: BlockKind, causal: bool, window: int, groups: Groups) -> UnitCost:
        """The cost of one block."""
        key = (kind, causal, window, groups.tp, groups.cp, groups.ep)
        if key not in self._units:
            model = self.job.model
            kernels = block_kernels(model, kind, causal, self.cut, self.job.stack, window)
            held = kernels
            if kind in ("moe", "experts") and self.layout.ep > 1:
                fullest = dataclasses.replace(self.cut, expert_load=self.job.training.expert_load)
                held = block_kernels(model, kind, causal, fullest, self.job.stack, window)
            spread = kind in ("moe", "experts") and self.layout.ep > 1
            columns, rows = block_cuts(model, kind, spread)
            if self.job.stack.reduces_every_projection:
                columns = self._columns(kind)
            experts = model.expert_parameters() / (self.grid.ep * self.grid.tp) if spread else 0.0
            parameters = self._cut_parameters(kind, spread) + experts
            self._units[key] = self._unit(kernels, parameters, groups, (columns, rows), experts, held)
        return self._units[key]

    def _columns(self, kind: BlockKind) -> int:
        """Column-parallel layers of a block, each projection for itself: q, k, v; up, and gate where there is one."""
        return 3 * (2 if kind == "cross" else 1) + (2 if self.job.model.gated_mlp else 1)

    def _cut_parameters(self, kind: BlockKind, without_experts: bool) -> float:
        """Parameters of a block on one rank: norms and routers are replicated over tp, the rest is divided."""
        model = self.job.model
        whole = model.block_parameters(kind) - (model.expert_parameters() if without_experts else 0)
        norms = model.block_norms(kind) * model.norm_parameters()
        replicated = norms + (model.router_parameters() if kind in ("moe", "experts") else 0)
        if model.kv_lora_rank:
            # The down-projections of latent attention and their norms.
            ranks = model.q_lora_rank + model.kv_lora_rank
            replicated += model.hidden_size * (ranks + model.qk_rope_head_dim) + ranks
        return replicated + (whole - replicated) / self.layout.tp

    def embedding(self, groups: Groups) -> UnitCost:
        """The cost of the embedding in front of the first block."""
        key = ("embedding", groups.tp, groups.cp)
        if key not in self._units:
            self._units[key] = self._embedding(groups)
        return self._units[key]

    def _embedding(self, groups: Groups) -> UnitCost:
        kernels = embedding_kernels(self.job.model, self.cut, self.job.stack)
        model = self.job.model
        # The vocabulary is cut over tp; positions, segments and norms are not.
        tokens = model.vocab_size * model.hidden_size
        parameters = tokens / self.layout.tp + model.embedding_parameters() - tokens
        unit = self._unit(kernels, parameters, groups, embedding_cuts(model))
        # Its gradient is as large as its weights, whichever tokens there are.
        growing = unit.growing + parameters * self.recipe.compute
        return dataclasses.replace(unit, growing=growing, stays_gathered=True)

    def head(self, groups: Groups) -> UnitCost:
        """The cost of the head behind the last block."""
        key = ("head", groups.tp, groups.cp)
        if key not in self._units:
            self._units[key] = self._head(groups)
        return self._units[key]

    def _head(self, groups: Groups) -> UnitCost:
        model = self.job.model
        # A tied projection on another stage than the embedding is a second copy.
        copy = model.vocab_size * model.hidden_size if model.tie_word_embeddings and self.layout.stages > 1 else 0
        parameters = (model.head_parameters() + copy) / self.layout.tp
        unit = self._unit(head_kernels(model, self.cut, self.job.stack), parameters, groups, HEAD_CUTS)
        logits = self.cut.tokens * model.vocab_size / (1 if self.job.stack.gathers_logits else self.layout.tp)
        kept = kept_logits(self.job.stack, self.job.training.precision, self.layout.tp > 1) * logits
        if self.job.stack.loss_makes_gradients:
            kept += parameters * self.recipe.compute
        loss = tensor_seconds(self.job, groups.tp, loss_transfers(self.layout, self.cut.tokens))
        return dataclasses.replace(
            unit,
            forward=unit.forward + Work(tp=loss),
            saved=unit.saved + kept,
            kinds=(*unit.kinds, ("logits and loss", kept)),
            deferred=unit.deferred - (kept if self.job.stack.frees_after_input_gradient else 0.0),
            stays_gathered=True,
        )

    def _unit(
        self,
        kernels: list[Kernel],
        parameters: float,
        groups: Groups,
        cuts: tuple[int, int],
        experts: float = 0.0,
        held: list[Kernel] | None = None,
    ) -> UnitCost:
        """Cost of kernels with `cuts` column-parallel inputs and row-parallel outputs; `experts` of the parameters are
        routed experts' that other ranks send tokens to. `held` are the kernels of the rank that gets most tokens, whose
        bytes count, where they are others."""
        job, precision = self.job, self.job.training.precision
        held = held or kernels
        times = kernel_time(kernels, job.cluster.gpu, job.stack, precision, self.layout.tp)
        frozen = job.training.peft != "none"
        saved = saved_bytes(held, job.stack, precision, frozen)
        size = self.cut.tokens * job.model.hidden_size * self.recipe.compute
        tp_forward, tp_backward = (
            tensor_seconds(job, groups.tp, transfers) for transfers in tensor_transfers(self.layout, size, *cuts)
        )
        if job.training.peft != "none":
            times = times.without_weights()
        device_backward = times.backward + self._accumulation_seconds(parameters, experts)
        ep_forward = ep_backward = 0.0
        if experts:
            # What kernels hide of tensor parallelism they cannot hide of experts too.
            ep_forward, ep_backward = self._expert_seconds(
                groups,
                times.forward - hidden_seconds(job, tp_forward, times.forward),
                device_backward - hidden_seconds(job, tp_backward, times.backward),
            )
        cp_forward, cp_backward = self._context_seconds(kernels, groups)
        beside_forward = Work(tp=exposed_seconds(job, tp_forward, times.forward), cp=cp_forward, ep=ep_forward)
        beside_backward = Work(tp=exposed_seconds(job, tp_backward, times.backward), cp=cp_backward, ep=ep_backward)
        forward = self._work(times.forward, times.host_forward, beside_forward)
        backward = self._work(device_backward, times.host_backward, beside_backward)
        # The host's launches that the device does not hide are spread over the backward.
        late = times.host_weights / times.host_backward if times.host_backward else 0.0
        weights = Work(compute=times.weights + device_backward - times.backward, host=backward.host * late)
        # The embedding has no column-parallel input, the head no row-parallel output.
        is_block = (cuts[0] > 0) == (cuts[1] > 0)
        recompute = self.layout.recompute if is_block else "none"
        tp_again = tensor_seconds(job, groups.tp, repeated_transfers(job, self.layout, size, *cuts))
        boundary = self.cut.norm_tokens * job.model.hidden_size * self.recipe.compute
        # What a backward computes again before it begins.
        again = 0.0
        working, growing = (
            working_bytes(held, job.stack, precision, boundary, grows, self.layout.cp) for grows in (False, True)
        )
        kinds = kept_kinds(held, job.stack, precision, frozen, recompute == "selective")
        if recompute == "full":
            repeated = beside_forward.tp * tp_again / tp_forward if tp_forward else 0.0
            backward += self._again(kernels, times, dataclasses.replace(beside_forward, tp=repeated))
            saved, again, kinds = boundary, saved, (("inputs of blocks", boundary),)
        elif recompute == "selective" and job.stack.selective_keeps_outputs:
            backward += self._selected(kernels, cp_forward)[0] + Work(tp=tp_again, ep=ep_forward)
            # Behind tensor parallelism's row-parallel outputs stand their reductions, which are kept too.
            ends = boundary * (1 + (cuts[1] if self.layout.tp > 1 else 0))
            outputs = kept_outputs(held, job.stack, precision)
            saved, again = ends + outputs, max(0.0, saved - ends - outputs)
            kinds = (("inputs of blocks", ends), ("outputs of kernels", outputs))
        elif recompute == "selective":
            work, dropped = self._selected(kernels, cp_forward)
            if held is not kernels:
                dropped = self._selected(held, cp_forward)[1]
            backward += work
            saved, again = saved - dropped, dropped
        deferred = deferred_bytes(held, job.stack, precision)
        if job.stack.frees_after_input_gradient:
            deferred += min(0.0, weight_input_bytes(held, job.stack, precision) - saved)
        return UnitCost(
            forward,
            backward,
            parameters,
            saved,
            working + again,
            growing + again,
            backward_weight=weights,
            deferred=deferred,
            experts=experts,
            norm_working=norm_working(held, job.stack, precision),
            kinds=kinds,
        )

    def _again(self, kernels: list[Kernel], forward: KernelTime, beside: Work) -> Work:
        """The forward, run again. Where it stops early, its last matmul and the reduction behind that are left out;
        what comes back from experts is weighted, and the backward of that needs it."""
        job = self.job
        if not job.stack.recompute_stops_early:
            return self._work(forward.forward, forward.host_forward, beside, recompute=True)
        last = max((i for i, kernel in enumerate(kernels) if isinstance(kernel, Matmul)), default=len(kernels))
        times = kernel_time(kernels[:last], job.cluster.gpu, job.stack, job.training.precision, self.layout.tp)
        return self._work(times.forward, times.host_forward, beside, recompute=True)

    def _selected(self, kernels: list[Kernel], context: float) -> tuple[Work, float]:
        """What selective recomputation adds to a backward, and the bytes that it does not keep; `context` is the
        forward's seconds of context parallelism, which an attention core needs again.

        An attention core keeps Q, K, V and its output, and drops its scores (arXiv 2205.05198); other kernels drop
        what they had saved.
        """
        job, precision = self.job, self.job.training.precision
        device, host, dropped = 0.0, 0.0, 0.0
        for kernel in kernels:
            share = recomputed_share(kernel, job.stack)
            if not share:
                continue
            again = kernel_time([kernel], job.cluster.gpu, job.stack, precision, self.layout.tp)
            device, host = device + share * again.forward, host + share * again.host_forward
            if isinstance(kernel, Attention):
                dropped += share * score_bytes(kernel, job.stack, precision)
            else:
                dropped += share * saved_bytes([kernel], job.stack, precision)
        beside = Work(cp=context * job.stack.selective_recompute.get("attention", 0.0))
        return self._work(device, host, beside, recompute=True), dropped

    def _accumulation_seconds(self, parameters: float, experts: float) -> float:
        """Adding up gradients over microbatches, spread over all of them; sharded gradients are added as shards."""
        count = self.layout.microbatches(self.job.training.global_batch_size)
        if count == 1 or self.job.stack.fused_accumulation or self.job.training.peft != "none":
            return 0.0
        share = parameters
        if self.layout.shards_gradients:
            share = per_shard(self.layout, self.job.stack, parameters, experts)
        return accumulation_seconds(self.job.cluster.gpu, share) * (count - 1) / count

    def _context_seconds(self, kernels: list[Kernel], groups: Groups) -> tuple[float, float]:
        """Exposed seconds of the attention cores' context-parallel communication, forward and backward."""
        job, forward, backward = self.job, 0.0, 0.0
        if self.layout.cp > 1:
            for core in (k for k in kernels if isinstance(k, Attention)):
                time = kernel_time([core], job.cluster.gpu, job.stack, job.training.precision, self.layout.tp)
                one = context_seconds(job, core, groups.cp, time.forward, time.backward)
                forward, backward = forward + one[0], backward + one[1]
        return forward, backward

    def _expert_seconds(self, groups: Groups, forward: float, backward: float) -> tuple[float, float]:
        """Exposed seconds of dispatch and combine; a stack may run them beside another microbatch's kernels."""
        there, back = expert_seconds(self.job, self.cut, groups.ep, groups.tp)
        gpu, share = self.job.cluster.gpu, self.overlapped
        exposed = gpu.exposed(there, forward), gpu.exposed(back, backward)
        return (1 - share) * there + share * exposed[0], (1 - share) * back + share * exposed[1]

    def _work(self, device: float, host: float, communication: Work | None = None, recompute: bool = False) -> Work:
        """Host and device side by side on a GPU (the slower one counts), one after the other on a CPU. The host runs
        ahead while the device waits for communication."""
        waiting = communication or Work()
        exposed = host if self.job.cluster.gpu.kind == "cpu" else max(0.0, host - device - waiting.total)
        if recompute:
            return Work(recompute=device, host=exposed) + waiting
        return Work(compute=device, host=exposed) + waiting
