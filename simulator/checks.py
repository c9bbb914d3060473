"""What a well-formed file must be besides: sizes above zero, rates that a division can take, parts that go together.

pydantic has checked keys and types (files.py); here a value that no machine and no model has becomes a sentence.
Every function raises UserError for the first thing that is wrong, and returns nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, get_args

from simulator.cluster import ClusterSpec, Gpu
from simulator.collectives import Collective
from simulator.errors import UserError, nearest
from simulator.model import ModelSpec
from simulator.objective import Objective

if TYPE_CHECKING:
    from simulator.job import Job

# The cluster is a graph with a vertex per device; no public run has used more.
MOST_DEVICES = 2**17
MOST_GPUS_PER_NODE = 1024
MOST_LAYERS = 10_000
MOST_SAMPLES = 2**20
# Ten thousand times what any model was trained on: more is a slip of the pen.
MOST_TOKENS = 1e18


def check_model(model: ModelSpec, where: str) -> None:
    """Sizes of at least one, heads that divide."""
    sizes = (
        "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "vocab_size", "max_position_embeddings",
    )  # fmt: skip
    for name in sizes:
        if getattr(model, name) < 1:
            raise UserError(f"{where}: {name} = {getattr(model, name)} must be at least 1")
    if model.num_hidden_layers > MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers = {model.num_hidden_layers} must be at most {MOST_LAYERS}")
    heads, groups = model.num_attention_heads, model.num_key_value_heads
    if heads % groups:
        raise UserError(f"{where}: num_key_value_heads = {groups} must divide num_attention_heads = {heads}")
    if model.num_experts % model.n_group or not 1 <= model.topk_group <= model.n_group:
        raise UserError(
            f"{where}: n_group = {model.n_group} must divide num_experts = {model.num_experts}, and topk_group = "
            f"{model.topk_group} be 1 to {model.n_group}"
        )
    if model.num_experts_per_tok > model.num_experts:
        raise UserError(
            f"{where}: num_experts_per_tok = {model.num_experts_per_tok} is more than num_experts = {model.num_experts}"
        )
    left = model.num_experts * model.topk_group // model.n_group
    if model.num_experts_per_tok > left:
        raise UserError(
            f"{where}: num_experts_per_tok = {model.num_experts_per_tok} is more than the {left} of num_experts = "
            f"{model.num_experts} that are in topk_group = {model.topk_group} of n_group = {model.n_group} groups"
        )


# A modem, and a hundred times what any device has: beyond them nothing is a link, and times have no digits left.
LEAST_BANDWIDTH, MOST_BANDWIDTH = 1e3, 1e14


def check_cluster(spec: ClusterSpec) -> None:
    """A node with devices, and links that reach the others."""
    where = f"cluster '{spec.name}'"
    check_gpu(spec.gpu, where)
    _at_least(where, "gpus_per_node", spec.gpus_per_node, 1)
    if max(spec.gpus_per_node, spec.nics_per_node) > MOST_GPUS_PER_NODE:
        raise UserError(f"{where}: gpus_per_node and nics_per_node must be at most {MOST_GPUS_PER_NODE}")
    _at_least(where, "scale_up_domain", spec.scale_up_domain, 0)
    if spec.domain % spec.gpus_per_node:
        raise UserError(
            f"{where}: scale_up_domain = {spec.domain} must be a multiple of gpus_per_node = {spec.gpus_per_node}"
        )
    if spec.scale_out is not None and spec.nics_per_node < 1:
        raise UserError(f"{where}: nics_per_node = {spec.nics_per_node} must be at least 1 to reach scale_out")
    _at_least(where, "nodes_per_leaf", spec.nodes_per_leaf, 0)
    _at_least(where, "spine_oversubscription", spec.spine_oversubscription, 1)
    if spec.nodes_per_leaf * spec.gpus_per_node % spec.domain:
        raise UserError(
            f"{where}: nodes_per_leaf = {spec.nodes_per_leaf} of {spec.gpus_per_node} GPUs must be a multiple of "
            f"the {spec.domain} GPUs of a scale-up domain"
        )
    if spec.spine_oversubscription > 1 and not spec.nodes_per_leaf:
        raise UserError(f"{where}: spine_oversubscription needs nodes_per_leaf: how many nodes share the uplinks")
    if not 1 <= spec.oversubscribe <= 64:
        raise UserError(f"{where}: oversubscribe = {spec.oversubscribe} must be from 1 to 64")
    for name, speeds in (("concurrency", spec.concurrency), ("streaming", spec.streaming)):
        if any(not 0 < speed <= 1 for speed in speeds):
            raise UserError(f"{where}: {name} = {list(speeds)} must hold speeds above 0 and up to 1")
    if len(spec.streaming) > len(spec.concurrency):
        raise UserError(
            f"{where}: streaming has {len(spec.streaming)} speeds of ranks at once, concurrency {len(spec.concurrency)}"
        )
    if spec.price_per_gpu_hour is not None:
        _above_zero(where, "price_per_gpu_hour", [spec.price_per_gpu_hour])
    _check_links(spec, where)


def _check_links(spec: ClusterSpec, where: str) -> None:
    # A single GPU has nobody to talk to.
    alone = spec.gpus_per_node == 1 and spec.scale_out is None
    for tier, link in (("scale_up", spec.scale_up), ("scale_out", spec.scale_out)):
        if link is None:
            continue
        _above_zero(where, f"{tier}.bandwidth", [link.bandwidth])
        _check_bandwidth(where, f"{tier}.bandwidth", link.bandwidth)
        _at_least(where, f"{tier}.devices_per_root", link.devices_per_root, 0)
        if link.devices_per_root:
            _above_zero(where, f"{tier}.root_bandwidth (which devices_per_root needs)", [link.root_bandwidth])
            _check_bandwidth(where, f"{tier}.root_bandwidth", link.root_bandwidth)
        times = (link.latency, link.latency_per_doubling, *link.ring_hops)
        _at_least(where, f"{tier}'s latencies", min(times), 0)
        for collective in get_args(Collective):
            fits = link.collectives.get(collective, ())
            # An all-to-all without a fit goes by the all-gather's, what NCCL chooses for by its own model.
            modelled = bool(spec.nccl) and collective in ("all_reduce", "all_gather", "reduce_scatter")
            if not fits and not alone and collective != "all_to_all" and not modelled:
                raise UserError(f"{where}: {tier}.collectives has no '{collective}'; it needs at least one entry")
            if any(fit.efficiency <= 0 or fit.latency < 0 or fit.ramp < 0 or fit.ranks < 1 for fit in fits):
                raise UserError(
                    f"{where}: {tier}.collectives.{collective} needs ranks, efficiency above zero, no negative time"
                )
            for fit in fits:
                _at_least(where, f"{tier}.collectives.{collective}: active", fit.active, 0)
                if fit.active and not spec.concurrency:
                    raise UserError(
                        f"{where}: {tier}.collectives.{collective}: active = {fit.active} counts ranks that share "
                        "processors, but concurrency is empty: every rank has a device"
                    )


def _check_bandwidth(where: str, name: str, value: float) -> None:
    _at_least(where, f"{name} in bytes per second", value, LEAST_BANDWIDTH)
    if value > MOST_BANDWIDTH:
        raise UserError(f"{where}: {name} = {value:g} bytes per second must be at most {MOST_BANDWIDTH:g}")


def check_gpu(gpu: Gpu, where: str) -> None:
    """Rates above zero, times of at least zero, a peak for every matmul."""
    where = f"{where}: gpu '{gpu.name}'"
    for name in (
        "memory",
        "memory_bandwidth",
        "memory_efficiency",
        "reduction_efficiency",
        "multiprocessors",
        "sustained",
    ):
        _above_zero(where, name, [getattr(gpu, name)])
    for name in (
        "memory_overhead",
        "context_memory",
        "communicator_memory",
        "fragmentation",
        "overlap_slowdown",
        "timing_spread",
        "optimizer_efficiency",
    ):
        _at_least(where, name, getattr(gpu, name), 0)
    if not gpu.matmul:
        raise UserError(f"{where}: matmul is empty; it needs the rate of at least one precision")
    for precision, fit in gpu.matmul.items():
        if precision not in gpu.peak:
            raise UserError(f"{where}: peak has no '{precision}', but matmul has")
        _above_zero(where, f"matmul.{precision}.rate and peak.{precision}", [fit.rate, gpu.peak[precision]])
        _at_least(where, f"matmul.{precision}", min(fit.k0, fit.m0, fit.n0, fit.overhead), 0)
    _above_zero(where, "tiles", [size for tile in gpu.tiles for size in tile])
    for name, kernels in gpu.attention.items():
        if not kernels:
            raise UserError(f"{where}: attention.{name} is empty; it needs at least one head_dim")
        fits = [fit for kernel in kernels for fit in (kernel.forward, kernel.backward)]
        _above_zero(where, f"attention.{name}", [rate for fit in fits for rate in (fit.rate, fit.causal_rate)])
        _at_least(where, f"attention.{name}", min(min(f.half_length, f.causal_half_length) for f in fits), 0)
    if gpu.host is not None:
        _at_least(where, "host", min(gpu.host.forward, gpu.host.backward, gpu.host.dtensor), 0)


def check_job(job: Job, where: str) -> None:
    """A batch, a sequence the model can take, a precision that device and stack have, a cluster that hangs together."""
    training = job.training
    check_model(job.model, where)
    check_cluster(job.cluster)
    _at_least(where, "nodes", job.nodes, 1)
    if job.world_size > MOST_DEVICES:
        raise UserError(
            f"{where}: nodes = {job.nodes} are {job.world_size} devices, but at most {MOST_DEVICES} are simulated"
        )
    if job.nodes > 1 and job.cluster.scale_out is None:
        raise UserError(f"{where}: nodes = {job.nodes}, but cluster '{job.cluster.name}' has no scale_out network")
    for key in ("global_batch_size", "seq_len"):
        _at_least(where, f"training.{key}", getattr(training, key), 1)
    batch = training.global_batch_size
    if batch > MOST_SAMPLES:
        raise UserError(f"{where}: training.global_batch_size = {batch} must be at most {MOST_SAMPLES} sequences")
    _above_zero(where, "training.learning_rate", [training.learning_rate])
    _above_zero(where, "training.max_grad_norm", [training.max_grad_norm])
    if not 1 <= training.expert_load < math.inf:
        raise UserError(f"{where}: training.expert_load = {training.expert_load:g} must be at least 1, the mean")
    longest = job.model.max_position_embeddings
    if job.model.position == "learned" and training.seq_len > longest:
        raise UserError(
            f"{where}: training.seq_len = {training.seq_len} is more than the {longest} positions "
            f"that {job.model.name} has"
        )
    _check_precision(job, where)
    check_objective(job.objective, where)
    job.stragglers.check(int(job.world_size * job.cluster.oversubscribe), where)


def check_objective(objective: Objective, where: str) -> None:
    """A goal that has what it needs, and nothing that says nothing with it."""
    for key in ("tokens", "deadline"):
        value = getattr(objective, key)
        if value is not None:
            _above_zero(where, f"objective.{key}", [value])
            if key == "tokens" and not 1 <= value <= MOST_TOKENS:
                raise UserError(f"{where}: objective.tokens = {value:g} must be from 1 to {MOST_TOKENS:g}")
        elif objective.goal == "deadline":
            example = 'tokens = "1T"' if key == "tokens" else 'deadline = "30 days"'
            raise UserError(f"{where}: objective.goal = 'deadline' needs objective.{key}, like {example}")
    if objective.deadline is not None and objective.goal != "deadline":
        raise UserError(
            f"{where}: objective.deadline says nothing with objective.goal = '{objective.goal}'; did you mean "
            "'deadline'?"
        )
    if objective.goodput is not None and not 0 < objective.goodput <= 1:
        raise UserError(
            f"{where}: objective.goodput = {objective.goodput:g} must be above 0 and at most 1: the share of the time "
            "in which steps are made that count"
        )
    for count in objective.nodes:
        if count < 1:
            raise UserError(f"{where}: objective.nodes = {list(objective.nodes)} must hold numbers of at least 1")


def _check_precision(job: Job, where: str) -> None:
    precision = job.training.precision
    if precision not in job.stack.recipes:
        raise UserError(
            f"{where}: training.precision = '{precision}' is nothing that stack {job.stack.name} has"
            f"{nearest(precision, job.stack.recipes)}"
        )
    if job.cluster.gpu.arithmetic(precision) not in job.cluster.gpu.matmul:
        raise UserError(
            f"{where}: training.precision = '{precision}' has no matmul rate on {job.cluster.gpu.name}"
            f"{nearest(precision, job.cluster.gpu.matmul)}"
        )


def _above_zero(where: str, name: str, values: Iterable[float]) -> None:
    for value in values:
        if value <= 0:
            raise UserError(f"{where}: {name} = {value:g} must be above zero")


def _at_least(where: str, name: str, value: float, least: float) -> None:
    if value < least:
        raise UserError(f"{where}: {name} = {value:g} must be at least {least}")
