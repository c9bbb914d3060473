"""The candidate layouts of a job: every combination of axis sizes whose product is the number of ranks.

Nothing is judged here but arithmetic: `Layout.problems` says which candidates are legal.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from simulator.compute import UNFUSED
from simulator.job import Job
from simulator.layout import MULTI_STAGE, SPLIT_BACKWARD, V_PLACEMENT, Layout
from simulator.program import MOST_UNSHARDED

# Fields that belong to some ways to keep replicas together only: they are no condition for the others.
SYNC_FIELDS = ("servers", "staleness", "sync_interval", "outer_optimizer")
LARGEST_MICRO_BATCH = 16
LARGEST_VIRTUAL_STAGES = 8
# Sequences that are cut, and the shortest part of one that a rank gets, unless [search] names cp.
LONG_SEQUENCE = 32768
SHORTEST_PART = 8192


def candidates(job: Job) -> Iterator[Layout]:
    """Every layout worth asking about, each once. A field that `job.search` names has one of its values in all of them.

    Tensor parallelism stays inside a scale-up domain unless `search` names larger sizes; sequences are cut from
    LONG_SEQUENCE tokens on; ep is tried for models with experts. Fields that change nothing
    for a layout (sequence_parallel without tp, virtual stages without pp) are not varied.
    """
    for layout in _combinations(job):
        if all(getattr(layout, name) in _values(job, name, []) for name in job.search if name not in SYNC_FIELDS):
            yield layout


def _combinations(job: Job) -> Iterator[Layout]:
    for world in _world_sizes(job):
        sizes = {
            "tp": _values(job, "tp", _tensor_sizes(job, world)),
            "pp": _values(job, "pp", _divisors(world)),
            "cp": _values(job, "cp", _context_sizes(job)),
            "ep": _values(job, "ep", _expert_sizes(job, world)),
        }
        for tp, pp, cp, ep in itertools.product(*sizes.values()):
            if min(tp, pp, cp) < 1 or world % (tp * pp * cp):
                continue
            for data in _data_parallel(job, world // (tp * pp * cp), cp):
                recipes = _recipes(job, tp, pp, data["dp_replicate"] * data["dp_shard"])
                for rest, sync in itertools.product(recipes, _syncs(job, data["dp_replicate"])):
                    layout = Layout(tp=tp, pp=pp, cp=cp, ep=ep, **data, **rest, **sync)
                    if "zero_stage" in job.search or not _has_a_twin(job, layout):
                        yield layout


def _syncs(job: Job, replicas: int) -> list[dict[str, Any]]:
    """Ways to keep replicas together: an all-reduce, and what [search] names, because most others change what is
    trained. Servers are tried one on every node."""
    found: list[dict[str, Any]] = []
    for sync in _values(job, "sync", ["all_reduce"]):
        fields: dict[str, list[Any]] = {}
        if sync == "parameter_server":
            fields = {"servers": _values(job, "servers", [job.nodes]), "staleness": _values(job, "staleness", [0])}
        elif sync == "local_sgd":
            fields = {
                "sync_interval": _values(job, "sync_interval", [1]),
                "outer_optimizer": _values(job, "outer_optimizer", ["none"]),
            }
        if sync == "all_reduce" or replicas > 1:
            found += [
                {"sync": sync} | dict(zip(fields, values, strict=True))
                for values in itertools.product(*fields.values())
            ]
    return found


def _has_a_twin(job: Job, layout: Layout) -> bool:
    """Whether zero_stage 1 is as good as what 2 is, which is tried too: under a pipeline FSDP2 reduces gradients once
    in both, and gathers once as long as no stage has to make room for another. The gathers stand at other places of
    the program, so that their steps may differ by less than a percent."""
    stack = job.stack
    found = layout.pp > 1 and layout.zero_stage == 1 and stack.replicates_by_fsdp and 2 in stack.pipeline_zero_stages
    return found and layout.virtual_stages <= MOST_UNSHARDED


def _values(job: Job, name: str, default: list[Any]) -> list[Any]:
    found = job.search.get(name, default)
    return list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in found))


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _world_sizes(job: Job) -> list[int]:
    """All devices; a machine that may be oversubscribed also takes fewer or more ranks."""
    if job.cluster.oversubscribe <= 1:
        return [job.world_size]
    most = int(job.world_size * job.cluster.oversubscribe)
    return [size for size in (2**i for i in range(most.bit_length())) if size <= most]


def _tensor_sizes(job: Job, world: int) -> list[int]:
    widest = max(job.cluster.domain, int(job.cluster.gpus_per_node * job.cluster.oversubscribe))
    return [d for d in _divisors(world) if d <= min(widest, job.model.num_attention_heads)]


def _context_sizes(job: Job) -> list[int]:
    seq_len = job.training.seq_len
    if not job.stack.context_parallel or seq_len < LONG_SEQUENCE:
        return [1]
    return [2**i for i in range((seq_len // SHORTEST_PART).bit_length())]


def _expert_sizes(job: Job, world: int) -> list[int]:
    """Numbers of ranks that the experts can be spread over; most stacks spread them inside a pipeline stage."""
    if not job.stack.expert_dispatch or not job.model.num_experts:
        return [1]
    return [d for d in _divisors(job.model.num_experts) if world % d == 0]


def _data_parallel(job: Job, ranks: int, cp: int) -> Iterator[dict[str, Any]]:
    """Ways to replicate and shard over this many data-parallel ranks; cp ranks shard with dp_shard."""
    stages = sorted({0, *job.stack.zero_stages})
    for zero in _values(job, "zero_stage", stages):
        for shard in _values(job, "dp_shard", _divisors(ranks) if zero else [1]):
            shards = shard * cp > 1 if zero else shard > 1
            if shard >= 1 and ranks % shard == 0 and shards == (zero > 0):
                replicate = ranks // shard
                if replicate in _values(job, "dp_replicate", [replicate]):
                    yield {"dp_replicate": replicate, "dp_shard": shard, "zero_stage": zero}


def _recipes(job: Job, tp: int, pp: int, dp: int) -> Iterator[dict[str, Any]]:
    """What varies inside a grid: micro-batch, schedule and chunks, recompute, sequence parallelism."""
    share = job.training.global_batch_size // dp
    micro = [b for b in (2**i for i in range(LARGEST_MICRO_BATCH.bit_length())) if share and share % b == 0]
    sequence = [False]
    if tp > 1:
        sequence = {"": [False], "always": [True], "optional": [True, False]}[job.stack.sequence_parallel]
    fields = {
        "micro_batch_size": _values(job, "micro_batch_size", micro),
        "recompute": _values(job, "recompute", _recomputes(job)),
        "sequence_parallel": _values(job, "sequence_parallel", sequence) if tp > 1 else [False],
        "stage_layers": _values(job, "stage_layers", [None]),
        "rank_order": _values(job, "rank_order", [Layout.rank_order]),
        "schedule_and_chunks": list(_schedules(job, pp)),
    }
    for combination in itertools.product(*fields.values()):
        recipe = dict(zip(fields, combination, strict=True))
        schedule, chunks = recipe.pop("schedule_and_chunks")
        if schedule in SPLIT_BACKWARD and recipe["recompute"] != "none":
            continue
        yield recipe | {"schedule": schedule, "virtual_stages": chunks}


def _recomputes(job: Job) -> list[str]:
    """Selective recompute of attention alone drops the scores of an unfused core; a fused one has none to drop."""
    useful = job.stack.attention[0] in UNFUSED or set(job.stack.selective_recompute) != {"attention"}
    return [kind for kind in job.stack.recompute if kind != "selective" or useful]


def _schedules(job: Job, pp: int) -> Iterator[tuple[str, int]]:
    # LoopedBFS has the bubble of Interleaved1F1B and keeps all microbatches alive: tried where it is named.
    tried = [
        name for name in job.stack.schedules if name != "LoopedBFS" or "Interleaved1F1B" not in job.stack.schedules
    ]
    names = _values(job, "schedule", tried)
    if pp == 1:
        # Without a pipeline every schedule is the same loop over microbatches.
        yield "1F1B", 1
        return
    layers = job.model.num_hidden_layers
    even = [v for v in range(2, LARGEST_VIRTUAL_STAGES + 1) if layers % (pp * v) == 0]
    # Where no number of chunks divides the layers, two uneven ones are tried.
    chunks = even or [v for v in (2, 4) if pp * v <= layers]
    for name in names:
        stages = [2] if name in V_PLACEMENT else chunks if name in MULTI_STAGE else [1]
        for count in _values(job, "virtual_stages", stages):
            yield name, count


def without_model_parallelism(job: Job) -> Job:
    """The same job with its search limited to plain data parallelism, for the baseline."""
    kept = {k: v for k, v in job.search.items() if k in ("micro_batch_size", "recompute")}
    return dataclasses.replace(job, search=kept | {"tp": [1], "pp": [1], "cp": [1], "ep": [1]})
