"""Expert parallelism: which ranks hold which routed experts, and bytes and seconds of sending tokens to them and back.

Experts regroup the ranks of a pipeline stage: `tp` neighbours split one expert, `ep` groups of them hold different
experts, and the rest hold the same ones and reduce their gradients among themselves (expert data parallelism).

    8 ranks, tp = 1, ep = 4      rank     0 1 2 3 4 5 6 7
                                 experts  a b c d a b c d
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.cluster import GroupShape
from simulator.collectives import Transfer, transfer_seconds
from simulator.kernels import Cut
from simulator.model import ModelSpec

if TYPE_CHECKING:
    from simulator.job import Job
    from simulator.layout import Layout
    from simulator.stack import Stack

Transfers = tuple[Transfer, ...]


@dataclass(frozen=True)
class ExpertGrid:
    """The ranks of a pipeline stage as routed experts see them; the product is all of them.

    shards are the ranks that share the state of the same experts, replicas the copies of such a group.
    """

    tp: int
    ep: int
    shards: int
    replicas: int


def expert_tp(layout: Layout, stack: Stack) -> int:
    """Ranks that split one routed expert. Without expert parallelism tp splits experts like all matrices; with it
    most stacks keep experts whole and let every tensor-parallel rank work on its part of the tokens."""
    return layout.tp if layout.ep == 1 or stack.expert_tensor_parallel else 1


def expert_grid(layout: Layout, stack: Stack) -> ExpertGrid:
    """How a legal layout spreads routed experts (NVIDIA/Megatron-LM@d98e8a64, parallel_state.py: the expert ranks are
    tp, ep, dp from the inside out; torchtitan shards experts over dp_shard · cp · tp / ep ranks)."""
    tp = expert_tp(layout, stack)
    sharding = layout.dp_shard * layout.cp * layout.tp if layout.zero_stage else tp * layout.ep
    shards = sharding // (tp * layout.ep)
    ranks = layout.dp * layout.cp * layout.tp
    return ExpertGrid(tp, layout.ep, shards, ranks // (tp * layout.ep * shards))


def expert_groups(layout: Layout, grid: ExpertGrid, pp_rank: int) -> tuple[tuple[int, ...], ...]:
    """Ranks of the first ep group of a pipeline stage, of its first shard group, and of its first replicas."""
    ranks = layout.group("tp", "cp", "dp_shard", *layout.reducing_replicas, pp_rank=pp_rank)
    whole = grid.tp * grid.ep
    return ranks[: whole : grid.tp], ranks[: whole * grid.shards : whole], ranks[:: whole * grid.shards]


def per_shard(layout: Layout, stack: Stack, parameters: float, experts: float) -> float:
    """Parameters that one rank keeps of what zero_stage shards; `experts` of them are routed experts'."""
    return (parameters - experts) / layout.shards + experts / expert_grid(layout, stack).shards


def copies_per_token(model: ModelSpec, parts: int) -> float:
    """In how many of n parts (ranks, nodes) of the experts the chosen experts of a token lie, all choices being equally
    likely.

    Rule: n · (1 - C(E - E/n, k) / C(E, k)) for k of E experts. Where the router first chooses t of its G groups and
    then k experts in those, the same over the E·t/G that are left, of which a part has as many as it shares with the
    chosen groups: a part inside of a group all of its own with probability t/G, of m whole groups those of j with
    probability C(m, j) · C(G - m, t - j) / C(G, t).
    Reference: arXiv 2412.19437, section 2.1.2 (DeepSeek-V3: 8 groups, 4 of them, so at most 4 nodes).
    Ignored: that groups are chosen by their scores, which the experts then have in common.
    """
    return _copies(model.num_experts, model.num_experts_per_tok, model.n_group, model.topk_group, parts)


@functools.lru_cache(maxsize=1024)
def _copies(experts: int, chosen: int, groups: int, left: int, parts: int) -> float:
    """Experts of a part and of a group are counted in 1 / (groups · parts) of all, so that they are whole numbers."""
    found = 0.0
    for part in range(parts):
        shared = [
            min(groups * (part + 1), parts * (group + 1)) - max(groups * part, parts * group) for group in range(groups)
        ]
        common = [share for share in shared if share > 0]
        for (taken, among), ways in _ways(common).items():
            chance = ways * math.comb(groups - len(common), left - taken) if taken <= left else 0
            found += chance * (1 - _missed(experts * left / groups, experts * among / (groups * parts), chosen))
    return found / math.comb(groups, left)


def _ways(shares: Sequence[int]) -> Counter[tuple[int, int]]:
    """How many choices of these groups have so many of them and so much of the part between them."""
    ways = Counter({(0, 0): 1})
    for share in shares:
        for (taken, among), count in list(ways.items()):
            ways[taken + 1, among + share] += count
    return ways


def _missed(experts: float, size: float, chosen: int) -> float:
    """The chance that none of the chosen experts is among `size` of them."""
    missed = 1.0
    for one in range(chosen):
        missed *= max(0.0, experts - size - one) / (experts - one)
    return missed


def dispatch_bytes(job: Job, cut: Cut, shape: GroupShape, width: float) -> float:
    """Bytes of a rank's tokens on their way to the experts, in elements of this width: topk copies of each, or fewer
    where the stack sends no token twice over the same links: "deduplicated" one for each rank with a chosen expert,
    between domains one for each domain; "forwarded" that between domains alone.

    Ignored: the copies that a domain makes of what it got, over links that are faster by more than they are more: 8 for
    3.6 between nodes take 58 % of the time on NVLink at 200 GB/s.
    """
    model, dispatch = job.model, job.stack.expert_dispatch
    copies = float(model.num_experts_per_tok)
    if shape.domains > 1 and dispatch != "all_to_all":
        copies = copies_per_token(model, shape.domains)
    elif dispatch == "deduplicated":
        copies = copies_per_token(model, shape.ranks)
    return width * cut.tokens / cut.tp * copies * model.hidden_size


def expert_transfers(job: Job, cut: Cut, ep: GroupShape) -> tuple[Transfers, Transfers]:
    """A mixture's communication, forward and backward: how many tokens come is exchanged first (an int64 for every
    expert), then dispatch and combine are an all-to-all each.

    Where tp splits the experts, what arrived is gathered over tp before them and scattered behind. In the backward
    the gradients go the same ways in the width of activations.
    Reference: NVIDIA/Megatron-LM@d98e8a64, token dispatchers; volumes e·topk·T·h per all-to-all.
    Ignored: imbalance, the fast path inside a node of hierarchical kernels.
    """
    if cut.ep == 1:
        return (), ()
    recipe = job.stack.recipes[job.training.precision]
    sent = recipe.compute if recipe.dispatch is None else recipe.dispatch
    out, back = (Transfer("all_to_all", "ep", dispatch_bytes(job, cut, ep, width)) for width in (sent, recipe.compute))
    split: Transfers = ()
    if cut.expert_tp > 1:
        size = recipe.compute * cut.tokens * job.model.num_experts_per_tok * job.model.hidden_size
        split = (Transfer("all_gather", "tp", size), Transfer("reduce_scatter", "tp", size))
    counts = Transfer("all_to_all", "ep", 8.0 * job.model.num_experts)
    return (counts, out, *split, back), (back, *split, back)


def overlapped_share(job: Job, layout: Layout) -> float:
    """The share of a rank's passes whose exchanges of tokens run beside kernels of another microbatch.

    Rule: 1F1B pairs the forward of a microbatch with the backward of one before it, but for the forwards that come
    ahead of the first backward and as many backwards behind the last forward: of m·v passes each way, for m
    microbatches and v stages on each of p ranks, the last rank begins with (v - 1)·p + 1, a rank without a pipeline
    with one. What is recomputed in full has no partner, and under a pipeline only the interleaved schedule pairs.
    Reference: NVIDIA-NeMo/Megatron-Bridge@319a6eb1, docs/training/communication-overlap.md (asserts where a pipeline
    has no virtual stages, or recomputation is full); megatron-core, get_pp_rank_microbatches (one forward more).
    Ignored: ranks before the last begin with more forwards, while later ranks have nothing to do yet; that the forward
    more keeps one stage's activations more.
    """
    if not job.stack.overlap_ep or layout.ep == 1 or layout.recompute == "full":
        return 0.0
    if layout.pp > 1 and layout.schedule != "Interleaved1F1B":
        return 0.0
    passes = layout.microbatches(job.training.global_batch_size) * layout.virtual_stages
    alone = (layout.virtual_stages - 1) * layout.pp + 1
    return max(0, passes - alone) / passes if passes else 0.0


def expert_seconds(job: Job, cut: Cut, ep: GroupShape, tp: GroupShape) -> tuple[float, float]:
    """Seconds of a mixture's communication, forward and backward."""
    shapes = {"ep": ep, "tp": tp}
    forward, backward = (transfer_seconds(one, shapes, job.cluster) for one in expert_transfers(job, cut, ep))
    return forward, backward
