"""What one unit costs one rank: a block, the embedding or the head. Seconds of its forward and backward by kind, and
bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
from simulator.axes import RANK_ORDER
from simulator.compute import KernelTime, accumulation_seconds, kernel_time
from simulator.context_parallel import context_seconds, context_transfers, moved_seconds
from simulator.expert_parallel import expert_grid, expert_seconds, overlapped_share, per_shard
from simulator.kernels import (
    Attention,
    Kernel,
    Matmul,
    block_kernels,
    embedding_kernels,
    head_kernels,
)
from simulator.layout import Layout
from simulator.model import BlockKind
from simulator.placement import Groups, known_to
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
from simulator.unit_transfers import cut_of
from simulator.work import NOTHING, Work

if TYPE_CHECKING:
    from simulator.job import Job


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
    backward_weight: Work = NOTHING
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


def _unit_key(job: Job, layout: Layout) -> tuple[object, ...]:
    """What the cost of a unit depends on besides its groups."""
    plain = dataclasses.replace(
        layout, dp_replicate=1, dp_shard=1, zero_stage=0, pp=min(layout.pp, 2), schedule="1F1B", virtual_stages=1,
        stage_layers=None, rank_order=RANK_ORDER,
    )  # fmt: skip
    if job.stack.fused_accumulation:
        return (plain,)
    sharded = (layout.dp_replicate, layout.dp_shard, layout.zero_stage) if layout.shards_gradients else ()
    streaming = job.cluster.streaming_cost(layout.world_size)
    return plain, layout.microbatches(job.training.global_batch_size), sharded, streaming


@dataclass(frozen=True)
class _UnitKernels:
    """The kernels of a unit and what follows from them alone, whatever is recomputed and wherever its groups lie.
    `held` are those of the rank that gets most tokens, whose bytes count; the rest are seconds, and bytes as in
    UnitCost."""

    kernels: list[Kernel]
    held: list[Kernel]
    times: KernelTime
    saved: float
    working: float
    growing: float
    deferred: float
    norm_working: float


class UnitCosts:
    """Costs of the units of one layout, each found once: most layouts of a job differ in what does not change them.
    `overlapped` is the share of passes that hide their exchanges of tokens, if it is not the layout's own. `key` is
    what the cost of a block with experts depends on besides its groups. Other units do not depend on how experts are
    spread, and embedding and head are not run again."""

    def __init__(self, job: Job, layout: Layout, overlapped: float | None = None) -> None:
        self.job, self.layout = job, layout
        self.overlapped = overlapped_share(job, layout) if overlapped is None else overlapped
        self.recipe = job.stack.recipes[job.training.precision]
        self.grid = expert_grid(layout, job.stack)
        self.cut = cut_of(job, layout)
        self.key = _unit_key(job, layout), self.overlapped
        dense = layout if layout.ep == 1 else dataclasses.replace(layout, ep=1)
        ends = dense if layout.recompute == "none" else dataclasses.replace(dense, recompute="none")
        known: dict[object, dict[object, UnitCost]] = known_to(job, "units")
        self._units = known.setdefault(self.key, {})
        self._dense = known.setdefault(_unit_key(job, dense), {})
        self._ends = self._dense if ends is dense else known.setdefault(_unit_key(job, ends), {})

    def block(self, kind: BlockKind, causal: bool, window: int, groups: Groups) -> UnitCost:
        """The cost of one block."""
        spread = kind in ("moe", "experts") and self.layout.ep > 1
        units = self._units if spread else self._dense
        key = (kind, causal, window, groups.tp, groups.cp, groups.ep if spread else None)
        if key not in units:
            model = self.job.model
            cuts = block_cuts(model, kind, spread, self.job.stack.reduces_every_projection)
            experts = model.expert_parameters() / (self.grid.ep * self.grid.tp) if spread else 0.0
            parameters = self._cut_parameters(kind, spread) + experts
            of = self._block_kernels(kind, causal, window, spread)
            units[key] = self._unit(of, parameters, groups, cuts, experts)
        return units[key]

    def _block_kernels(self, kind: BlockKind, causal: bool, window: int, spread: bool) -> _UnitKernels:
        known: dict[object, _UnitKernels] = known_to(self.job, "kernels")
        key = (kind, causal, window, self.cut)
        if key not in known:
            model, stack = self.job.model, self.job.stack
            kernels = held = block_kernels(model, kind, causal, self.cut, stack, window)
            if spread:
                fullest = dataclasses.replace(self.cut, expert_load=self.job.training.expert_load)
                held = block_kernels(model, kind, causal, fullest, stack, window)
            known[key] = self._measured(kernels, held)
        return known[key]

    def _measured(self, kernels: list[Kernel], held: list[Kernel]) -> _UnitKernels:
        job, precision = self.job, self.job.training.precision
        frozen = job.training.peft != "none"
        times = kernel_time(kernels, job.cluster.gpu, job.stack, precision, self.layout.tp)
        boundary = self._boundary()
        working, growing = (
            working_bytes(held, job.stack, precision, boundary, grows, self.layout.cp) for grows in (False, True)
        )
        return _UnitKernels(
            kernels,
            held,
            times.without_weights() if frozen else times,
            saved_bytes(held, job.stack, precision, frozen),
            working,
            growing,
            deferred_bytes(held, job.stack, precision),
            norm_working(held, job.stack, precision),
        )

    def _boundary(self) -> float:
        """Bytes of the input of a block."""
        return self.cut.norm_tokens * self.job.model.hidden_size * self.recipe.compute

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
        return self._end("embedding", groups, self._embedding)

    def head(self, groups: Groups) -> UnitCost:
        """The cost of the head behind the last block."""
        return self._end("head", groups, self._head)

    def _end(self, name: str, groups: Groups, make: Callable[[Groups], UnitCost]) -> UnitCost:
        key = (name, groups.tp, groups.cp)
        if key not in self._ends:
            self._ends[key] = make(groups)
        return self._ends[key]

    def _embedding(self, groups: Groups) -> UnitCost:
        kernels = embedding_kernels(self.job.model, self.cut, self.job.stack)
        model = self.job.model
        # The vocabulary is cut over tp; positions, segments and norms are not.
        tokens = model.vocab_size * model.hidden_size
        parameters = tokens / self.layout.tp + model.embedding_parameters() - tokens
        unit = self._unit(self._measured(kernels, kernels), parameters, groups, embedding_cuts(model))
        # Its gradient is as large as its weights, whichever tokens there are.
        growing = unit.growing + parameters * self.recipe.compute
        return dataclasses.replace(unit, growing=growing, stays_gathered=True)

    def _head(self, groups: Groups) -> UnitCost:
        model = self.job.model
        # A tied projection on another stage than the embedding is a second copy.
        copy = model.vocab_size * model.hidden_size if model.tie_word_embeddings and self.layout.stages > 1 else 0
        parameters = (model.head_parameters() + copy) / self.layout.tp
        kernels = head_kernels(model, self.cut, self.job.stack)
        unit = self._unit(self._measured(kernels, kernels), parameters, groups, HEAD_CUTS)
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
        self, of: _UnitKernels, parameters: float, groups: Groups, cuts: tuple[int, int], experts: float = 0.0
    ) -> UnitCost:
        """Cost of kernels with `cuts` column-parallel inputs and row-parallel outputs; `experts` of the parameters are
        routed experts' that other ranks send tokens to."""
        job, precision = self.job, self.job.training.precision
        kernels, held, times, saved = of.kernels, of.held, of.times, of.saved
        size = self.cut.tokens * job.model.hidden_size * self.recipe.compute
        tp_forward, tp_backward = (
            tensor_seconds(job, groups.tp, transfers) for transfers in tensor_transfers(self.layout, size, *cuts)
        )
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
        boundary = self._boundary()
        # What a backward computes again before it begins.
        again = 0.0
        kinds = kept_kinds(held, job.stack, precision, job.training.peft != "none", recompute == "selective")
        if recompute == "full":
            repeated = beside_forward.tp * tp_again / tp_forward if tp_forward else 0.0
            backward += self._again(kernels, times, dataclasses.replace(beside_forward, tp=repeated))
            saved, again, kinds = boundary, saved, (("inputs of blocks", boundary),)
        elif recompute == "selective" and job.stack.selective_keeps_outputs:
            cp_again = self._repeated_ring(kernels, groups)
            backward += self._selected(kernels, cp_forward)[0] + Work(tp=tp_again, cp=cp_again, ep=ep_forward)
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
        deferred = of.deferred
        if job.stack.frees_after_input_gradient:
            deferred += min(0.0, weight_input_bytes(held, job.stack, precision) - saved)
        return UnitCost(
            forward,
            backward,
            parameters,
            saved,
            of.working + again,
            of.growing + again,
            backward_weight=weights,
            deferred=deferred,
            experts=experts,
            norm_working=of.norm_working,
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
        spec = self.job.cluster
        return accumulation_seconds(spec.gpu, share) * spec.streaming_cost(self.layout.world_size) * (count - 1) / count

    def _context_seconds(self, kernels: list[Kernel], groups: Groups) -> tuple[float, float]:
        """Exposed seconds of the attention cores' context-parallel communication, forward and backward."""
        job, forward, backward = self.job, 0.0, 0.0
        if self.layout.cp > 1:
            for core in (k for k in kernels if isinstance(k, Attention)):
                time = kernel_time([core], job.cluster.gpu, job.stack, job.training.precision, self.layout.tp)
                one = context_seconds(job, core, groups.cp, time.forward, time.backward)
                forward, backward = forward + one[0], backward + one[1]
        return forward, backward

    def _repeated_ring(self, kernels: list[Kernel], groups: Groups) -> float:
        """Seconds of what attention cores exchange over cp again where their outputs are kept: messages are no kernel's
        output, and no core runs that would hide them. Cores that run again bring their own (_selected)."""
        if self.job.stack.selective_recompute.get("attention", 0.0):
            return 0.0
        cores = (kernel for kernel in kernels if isinstance(kernel, Attention))
        cp = groups.cp
        return sum(moved_seconds(self.job, context_transfers(self.job, core, cp.ranks)[0], cp) for core in cores)

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
