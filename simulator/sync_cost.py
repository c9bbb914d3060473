"""What sync.py simulates for a job and a layout: bytes, links and seconds of its replicas; and the Prediction of it.

A replica's step comes from the engine, where replicas with another sync than an all-reduce do not meet. Pushes and
pulls cross the cards of the nodes with servers; a replica of several ranks has the cards of all of them.

    all_reduce        seconds of the engine's step with the reduction, less those without: what nothing hides
    reduce_broadcast  a reduction of the gradients to the first replica and a broadcast of their sum
    parameter_server  gradients to every server its share, parameters back; the servers update
    local_sgd         an all-reduce of the parameters, every sync_interval steps
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.cluster import GroupShape, Link, gpu_of, group_shape
from simulator.collectives import Collective, collective_seconds, fit_of, message_seconds
from simulator.compute import accumulation_seconds, host_optimizer_seconds, optimizer_seconds
from simulator.engine import Run, run_program
from simulator.incast import Kind
from simulator.layout import Layout
from simulator.program import build_program
from simulator.results import Breakdown, Synchronisation
from simulator.sync import Replica, Servers, in_rounds, with_servers
from simulator.sync_bounds import hosted_seconds, ring_seconds
from simulator.sync_rules import changes_mathematics, server_nodes

if TYPE_CHECKING:
    from simulator.job import Job

# Pieces of a push that are simulated one by one, at most. The way back of the last is what nothing hides.
MOST_PIECES = 16
# Bytes per parameter that DiLoCo's outer step moves: average and anchor read, momentum read and written, both
# written back, all in fp32 (arXiv 2311.08105, algorithm 1).
OUTER_TRAFFIC = 24.0


def is_simulated(job: Job, layout: Layout) -> bool:
    """Whether one step of one replica does not say it all."""
    return layout.sync != "all_reduce" or not job.stragglers.none


def synchronise(job: Job, layout: Layout, run: Run) -> tuple[Synchronisation, Breakdown]:
    """Simulate the steps of all replicas, and say where a mean step goes; `run` is one step of one of them."""
    steps, replica = job.stragglers.steps, run
    if layout.sync == "all_reduce":
        alone = dataclasses.replace(layout, sync="local_sgd")
        replica = run_program(job, alone, build_program(job, alone))
        # What nothing hides where all are alike.
        exposed = max(0.0, run.step_seconds - replica.step_seconds)
        found = in_rounds(_replicas(job, layout, replica.breakdown), exposed, 1, steps)
    elif layout.sync == "local_sgd":
        replicas = _replicas(job, layout, run.breakdown)
        found = in_rounds(replicas, averaging_seconds(job, layout), layout.sync_interval, steps)
    elif layout.sync == "reduce_broadcast":
        found = in_rounds(_replicas(job, layout, run.breakdown), centre_seconds(job, layout), 1, steps)
    else:
        hosts = _servers(job, layout)
        replicas = _replicas(job, layout, run.breakdown, hosts)
        found = with_servers(replicas, hosts.servers, layout.staleness, steps)
    found = dataclasses.replace(found, changes_mathematics=changes_mathematics(layout))
    return found, _spread_over(replica.breakdown, found)


def _spread_over(replica: Breakdown, found: Synchronisation) -> Breakdown:
    """Where a mean step goes: what a replica computes, its transfers (dp), and its waiting for others (bubble)."""
    scale = found.mean / (found.computing + found.communicating + found.waiting)
    own = replica.total()
    items = {name: value / own * found.computing * scale for name, value in vars(replica).items()}
    items["dp"] += found.communicating * scale
    items["bubble"] += found.waiting * scale
    return Breakdown(**items)


def averaging_seconds(job: Job, layout: Layout) -> float:
    """An all-reduce of a replica's parameters with the other replicas, and the outer step if there is one.

    Rule: the all-reduce of collectives.py in the stack's buckets, of parameters in the width in which they are kept;
    nothing hides it. The outer step moves OUTER_TRAFFIC bytes per parameter.
    """
    own = job.model.parameters() / pushing_ranks(layout)
    size = own * job.stack.recipes[job.training.precision].parameters
    pieces = max(1, round(size / job.stack.bucket_bytes))
    seconds = pieces * collective_seconds("all_reduce", size / pieces, _peers(job, layout), job.cluster)
    if layout.outer_optimizer == "nesterov":
        gpu = job.cluster.gpu
        seconds += own * OUTER_TRAFFIC / (gpu.memory_bandwidth * gpu.memory_efficiency)
    return seconds


def centre_seconds(job: Job, layout: Layout) -> float:
    """A reduction of a replica's gradients to the first replica, then a broadcast of the sum.

    Rule: under NCCL both are chains in pieces, in which every link carries the buffer once; they have the constants of
    a reduce-scatter and an all-gather with as much on the bus (nccl-tests, doc/PERFORMANCE.md: factor 1). Under gloo
    the reduction is a ring's reduce-scatter whose parts then go to the centre, the broadcast a binomial tree of whole
    messages (gloo/reduce.cc, gloo/broadcast.cc).
    Ignored: that the two might overlap; no table of either was fitted.
    """
    n = layout.dp_replicate
    size = job.model.parameters() * job.stack.recipes[job.training.precision].gradient_reduce / pushing_ranks(layout)
    peers = _peers(job, layout)
    if job.cluster.nccl:
        bus = size * n / (n - 1)
        kinds: tuple[Collective, ...] = ("reduce_scatter", "all_gather")
        return sum(collective_seconds(kind, bus, peers, job.cluster) for kind in kinds)
    reduced = collective_seconds("reduce_scatter", size, peers, job.cluster)
    reduced += sum(message_seconds(size * (n - 1) / n, peers, job.cluster))
    return reduced + math.ceil(math.log2(n)) * sum(message_seconds(size, peers, job.cluster))


def _peers(job: Job, layout: Layout) -> GroupShape:
    """How the ranks of the replicas that hold the same lie on the cluster, where they lie worst."""
    starts = {start for tier in job.cluster.tiers for start in layout.sibling_starts("dp_replicate", tier)} or {0}
    sharing = job.cluster.sharing(layout.world_size)
    shapes = (group_shape(job.graph, layout.group("dp_replicate"), start, sharing) for start in sorted(starts))
    return max(shapes, key=lambda shape: (shape.domains, -shape.slowest))


def pushing_ranks(layout: Layout) -> int:
    """Ranks of a replica that hold different parameters or gradients: what is sharded, each its shard; of copies one
    is sent."""
    return layout.tp * layout.pp * layout.shards


def link_rates(job: Job, size: float = math.inf, sharing: int = 0) -> tuple[float, float]:
    """Bytes per second that messages of `size` bytes reach on a device's scale-up link, and on all network cards of a
    node, among `sharing` ranks that share its processors (ClusterSpec.sharing)."""
    spec = job.cluster
    out = spec.scale_out
    return _rate(spec.scale_up, size, sharing), _rate(out, size, sharing) * spec.nics_per_node if out else 0.0


def exchange(job: Job, layout: Layout) -> tuple[float, float, float]:
    """(bytes of a replica's gradients, bytes per second of all links between its nodes and others, those of its ranks).

    A ring or a tree that goes from node to node has all cards of a node for what replicas on that node have in common.
    """
    ranks = layout.world_size / layout.dp_replicate
    size = job.model.parameters() * job.stack.recipes[job.training.precision].gradient_reduce
    inside, cards = link_rates(job, size / pushing_ranks(layout), job.cluster.sharing(layout.world_size))
    if job.nodes == 1 or not cards:
        return size, inside * pushing_ranks(layout), inside * pushing_ranks(layout)
    own = cards / job.cluster.gpus_per_node * pushing_ranks(layout)
    return size, max(own, cards * max(1.0, ranks / job.cluster.gpus_per_node)), own


def exchange_bound(job: Job, layout: Layout) -> float:
    """The least seconds of a step's exchange between the replicas, in the textbook (sync_bounds.py)."""
    size, cards, own = exchange(job, layout)
    replicas, recipe = layout.dp_replicate, job.stack.recipes[job.training.precision]
    if layout.sync == "parameter_server":
        pull = job.model.parameters() * recipe.parameters
        return hosted_seconds(replicas, layout.servers, job.nodes, size, pull, own)
    if layout.sync == "reduce_broadcast":
        # The centre takes and sends at least one whole buffer.
        return 2 * size / cards
    if layout.sync == "local_sgd":
        size = job.model.parameters() * recipe.parameters
    return ring_seconds(replicas, size, cards) / layout.sync_interval


def _pieces(job: Job, size: float) -> int:
    """Pieces in which a server's share travels: whole, or as the stack cuts it."""
    piece = job.stack.server_piece_bytes
    return max(1, min(MOST_PIECES, round(size / piece))) if piece else 1


def _rate(link: Link, size: float, sharing: int) -> float:
    fits = link.collectives.get("send_recv")
    if not fits:
        return link.bandwidth
    fit = fit_of(fits, 2, sharing)
    return 1 / (1 / (fit.efficiency * link.bandwidth) + fit.ramp / math.sqrt(size))


def _latency(link: Link, sharing: int) -> float:
    fits = link.collectives.get("send_recv")
    return fit_of(fits, 2, sharing).latency if fits else link.latency


@dataclass(frozen=True)
class _Hosts:
    """What replicas push to, and the kinds of transfer of each of them."""

    servers: Servers
    push: tuple[int | None, ...]
    pull: tuple[int | None, ...]


def _replicas(job: Job, layout: Layout, alone: Breakdown, hosts: _Hosts | None = None) -> list[Replica]:
    """The replicas with their own speeds. A factor lengthens what a device does, not what links do."""
    device = alone.compute + alone.recompute + alone.host + alone.optimizer
    total, ranks = alone.total(), layout.world_size // layout.dp_replicate
    found = []
    for number, factor in enumerate(job.stragglers.replica_factors(layout)):
        seconds = total + device * (factor - 1)
        share = device * factor / seconds
        jitters = (1 + share * (jitter - 1) for jitter in job.stragglers.jitters(number, ranks))
        kinds = (hosts.push[number], hosts.pull[number]) if hosts else (None, None)
        found.append(Replica(seconds, jitters, *kinds))
    return found


def _nodes_of(job: Job, layout: Layout) -> list[list[int]]:
    """The nodes of every replica, once for each of its ranks."""
    found: list[list[int]] = [[] for _ in range(layout.dp_replicate)]
    for rank in range(layout.world_size):
        found[layout.coordinates(rank)["dp_replicate"]].append(gpu_of(job.graph, rank)[1])
    return found


def _servers(job: Job, layout: Layout) -> _Hosts:
    """Parameter servers on their nodes.

    Rule: the nodes of the servers count as one, whose cards are as fast as those of all together, or as the nodes with
    most servers allow; all servers do the same, so that one's links are as busy as the others'. A rank has its share
    of its node's cards. A replica on a node with servers keeps the share of its own node's servers off the network; its
    pushes leave over cards that also carry the servers' answers.
    Exact where replicas on nodes with servers are alike or there is one such node.
    Ignored: the host's PCIe and memory, replicas that straddle leaf switches in unequal parts.
    """
    spec, servers = job.cluster, layout.servers
    places = server_nodes(servers, job.nodes)
    largest = max(places.count(node) for node in places) / servers
    recipe, parameters = job.stack.recipes[job.training.precision], job.model.parameters()
    push = parameters * recipe.gradient_reduce
    pieces, sharing = _pieces(job, push / servers), job.cluster.sharing(layout.world_size)
    inside, cards = link_rates(job, push / servers / pieces, sharing)
    receive, finish = _server_work(job, layout, parameters * largest)
    bare = Servers(
        {},
        [],
        push,
        parameters * recipe.parameters,
        pieces,
        _latency(spec.scale_out if job.nodes > 1 and spec.scale_out else spec.scale_up, sharing),
        receive,
        finish,
    )
    if job.nodes == 1 or not cards:
        return _one_kind(layout, bare, inside * servers, inside * pushing_ranks(layout))
    hosting = set(places)
    capacity = min(cards / largest, _uplinks(job, hosting))
    limit = cards / spec.gpus_per_node * pushing_ranks(layout)
    return _kinds(bare, _nodes_of(job, layout), hosting, capacity, limit, inside * pushing_ranks(layout))


def _one_kind(layout: Layout, bare: Servers, capacity: float, limit: float) -> _Hosts:
    kinds = [Kind((("in", 1.0),), limit), Kind((("out", 1.0),), limit)]
    servers = dataclasses.replace(bare, capacities={"in": capacity, "out": capacity}, kinds=kinds)
    return _Hosts(servers, (0,) * layout.dp_replicate, (1,) * layout.dp_replicate)


def _kinds(
    bare: Servers, nodes: list[list[int]], hosting: set[int], capacity: float, limit: float, inside: float
) -> _Hosts:
    """A kind of push and one of pull for every part of a replica that can lie on nodes with servers."""
    parts = [sum(node in hosting for node in own) / len(own) for own in nodes]
    kinds: list[Kind] = []
    for part in sorted(set(parts)):
        local = part / len(hosting)
        alone = min(limit / (1 - local) if local < 1 else float("inf"), inside / local if local else float("inf"))
        to, back = (1 - local), part - local
        kinds += [Kind((("in", to), ("out", back)), alone), Kind((("out", to), ("in", back)), alone)]
    order = sorted(set(parts))
    push = tuple(2 * order.index(part) for part in parts)
    servers = dataclasses.replace(bare, capacities={"in": capacity, "out": capacity}, kinds=kinds)
    return _Hosts(servers, push, tuple(kind + 1 for kind in push))


def _uplinks(job: Job, hosting: set[int]) -> float:
    """Bytes per second into all leaves with servers over their uplinks, as the leaf with most of them allows."""
    spec = job.cluster
    if not spec.nodes_per_leaf or job.nodes <= spec.nodes_per_leaf:
        return float("inf")
    leaves = [node // spec.nodes_per_leaf for node in hosting]
    most = max(leaves.count(leaf) for leaf in leaves)
    uplink: float = job.graph.edges["fabric", ("leaf", leaves[0])]["bandwidth"]
    return uplink * len(hosting) / most


def _server_work(job: Job, layout: Layout, parameters: float) -> tuple[float, float]:
    """Seconds of the servers of a node for what one replica pushes, and for what follows when all have pushed.

    Rule: synchronous servers add every push to a sum (12 bytes per parameter) and update once; others update with every
    push. At the memory bandwidth of the host where that is known: on machines without GPUs, and where the stack names
    what its optimizer reaches on the host. Elsewhere 0: a summation in the host keeps up with its network cards
    (BytePS, OSDI'20, section 4.1).
    """
    if job.cluster.gpu.kind == "cpu":
        update = optimizer_seconds(job.cluster.gpu, job.stack, job.training.optimizer, parameters)
        added = accumulation_seconds(job.cluster.gpu, parameters)
    elif job.stack.host_optimizer_bandwidth:
        update = host_optimizer_seconds(job.stack.host_optimizer_bandwidth, parameters)
        added = update * 12 / 28
    else:
        return 0.0, 0.0
    return (added, update) if layout.staleness == 0 else (update, 0.0)
