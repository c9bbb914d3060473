"""The candidate layouts of a job: every combination of axis sizes whose product is the number of ranks.

Nothing is judged here but arithmetic: `Layout.problems` says which candidates are legal.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from simulator.axes import RANK_ORDER
from simulator.columns import DEFAULTS, NAMED, Column, Columns
from simulator.compute import UNFUSED
from simulator.errors import UserError
from simulator.job import Job
from simulator.layout import Layout
from simulator.program import MOST_UNSHARDED
from simulator.schedules import MULTI_STAGE, SPLIT_BACKWARD, V_PLACEMENT
from simulator.stage_split import with_balanced_splits

# Fields that belong to some ways to keep replicas together only: they are no condition for the others.
SYNC_FIELDS = ("servers", "staleness", "sync_interval", "outer_optimizer")
LARGEST_MICRO_BATCH = 16
LARGEST_VIRTUAL_STAGES = 8
# The shortest part of a sequence that a context-parallel rank gets, and the most parts of one that is not long, unless
# [search] names cp.
SHORTEST_PART, LONG_PART = 1024, 8192
MOST_PARTS = 8
# Above it a search would take minutes and gigabytes; the spaces of large jobs have less than a million.
MOST_LAYOUTS = 4_000_000
# Pipeline ranks far apart, or data-parallel ranks: the two orders that Megatron-LM has switches for.
RANK_ORDERS = (RANK_ORDER, "tp-cp-ep-pp-dp")

Search = Mapping[str, list[Any]]


def candidates(job: Job) -> Iterator[Layout]:
    """Every layout of the space, each once."""
    columns = space(job)
    return (columns.layout(row) for row in range(len(columns)))


def space(job: Job, search: Search | None = None) -> Columns:
    """Every layout worth asking about, each once. A field that `search` (the job's own if there is none) names has one
    of its values in all of them.

    Tensor parallelism stays inside a scale-up domain unless `search` names larger sizes; sequences are cut into up to
    MOST_PARTS parts, long ones until a part has LONG_PART tokens; ep is tried for models with experts. A pipeline is
    cut as evenly as its blocks allow and, where that is something else, such that the slowest rank has least to do
    beside embedding and head. Fields that change nothing for a layout (sequence_parallel without tp, virtual stages
    without pp) are not varied. The optimizer stays on the device unless `search` names offload.

    Raises:
        UserError: `search` names too many values to look at all their combinations.
    """
    return _Space(job, job.search if search is None else search).columns()


class _Space:
    def __init__(self, job: Job, search: Search) -> None:
        self.job, self.search, self.stack = job, search, job.stack
        self.names = {name: list(values) for name, values in NAMED.items()}
        for name in search:
            if name in self.names:
                known = self.names[name]
                known += [value for value in self.values(name, []) if value not in known]
        for name in ("sync", *SYNC_FIELDS):
            self.names[name] = list(dict.fromkeys([DEFAULTS[name], *self.values(name, []), job.nodes]))
        self.names["rank_order"] += [order for order in RANK_ORDERS if order not in self.names["rank_order"]]
        self.recipes: dict[tuple[Any, ...], Column] = {}

    def values(self, name: str, default: list[Any]) -> list[Any]:
        found = self.search.get(name, default)
        return list(dict.fromkeys(tuple(v) if isinstance(v, list) else v for v in found))

    def codes(self, name: str, default: list[Any]) -> list[int]:
        """The places of the values of a field that is no number."""
        return [self.names[name].index(value) for value in self.values(name, default)]

    def columns(self) -> Columns:
        grid = ("tp", "pp", "cp", "ep", "dp_replicate", "dp_shard", "zero_stage")
        recipe = (
            "micro_batch_size", "recompute", "sequence_parallel", "stage_layers", "rank_order", "offload", "schedule",
            "virtual_stages",
        )  # fmt: skip
        blocks = list(self.blocks())
        table = np.concatenate(blocks, axis=1) if blocks else np.zeros((len(grid) + len(recipe), 0), dtype=np.int64)
        numbers = dict(zip((*grid, *recipe), table, strict=True))
        columns = self.with_syncs(Columns(numbers, self.names))
        columns = columns.take(self.kept(columns))
        # The split that balances is computed from what blocks cost, so it comes last.
        return columns if "stage_layers" in self.search else with_balanced_splits(self.job, columns)

    def blocks(self) -> Iterator[Column]:
        """The layouts of one grid after the other: fields x layouts."""
        count = 0
        for world in self.world_sizes():
            sizes = {
                "tp": self.values("tp", self.tensor_sizes(world)),
                "pp": self.values("pp", [d for d in _divisors(world) if d <= self.job.model.num_hidden_layers]),
                "cp": self.values("cp", self.context_sizes()),
                "ep": self.values("ep", self.expert_sizes(world)),
            }
            for tp, pp, cp in itertools.product(sizes["tp"], sizes["pp"], sizes["cp"]):
                if min(tp, pp, cp) < 1 or world % (tp * pp * cp):
                    continue
                ranks = world // (tp * pp * cp)
                recipes = self.recipe_rows(tp > 1, pp, ranks)
                data = np.array(list(self.data_parallel(ranks, cp)), dtype=np.int64).reshape(-1, 3).T
                grid = np.array([(tp, pp, cp, ep) for ep in sizes["ep"]], dtype=np.int64).reshape(-1, 4).T
                count += grid.shape[1] * data.shape[1] * recipes.shape[1] * len(list(self.syncs()))
                self.check(count)
                yield _product(grid, data, recipes)

    @staticmethod
    def check(count: int) -> None:
        if count > MOST_LAYOUTS:
            raise UserError(f"[search] names more than {MOST_LAYOUTS:,} layouts; name fewer values")

    def with_syncs(self, columns: Columns) -> Columns:
        """Every row with every way to keep replicas together: an all-reduce, or what [search] names, because most
        others change what is trained. Servers are tried one on every node."""
        ways = list(self.syncs())
        names = ("sync", *SYNC_FIELDS)
        table = np.array(
            [[self.names[n].index(way.get(n, DEFAULTS[n])) for n in names] for way in ways], dtype=np.int64
        )
        rows = columns.take(np.repeat(np.arange(len(columns)), len(ways))) if len(ways) > 1 else columns
        tiled = {name: np.tile(table[:, i], len(columns)) for i, name in enumerate(names)}
        found = rows.replace(**tiled)
        kept = (found["dp_replicate"] > 1) | found.is_named("sync", "all_reduce")
        return found if kept.all() else found.take(kept)

    def syncs(self) -> Iterator[dict[str, Any]]:
        for sync in self.values("sync", ["all_reduce"]):
            fields: dict[str, list[Any]] = {}
            if sync == "parameter_server":
                fields = {
                    "servers": self.values("servers", [self.job.nodes]),
                    "staleness": self.values("staleness", [0]),
                }
            elif sync == "local_sgd":
                fields = {
                    "sync_interval": self.values("sync_interval", [1]),
                    "outer_optimizer": self.values("outer_optimizer", ["none"]),
                }
            for values in itertools.product(*fields.values()):
                yield {"sync": sync} | dict(zip(fields, values, strict=True))

    def kept(self, columns: Columns) -> Any:
        """The rows that have values that `search` names, and no twin."""
        found = np.ones(len(columns), dtype=bool)
        for name in (name for name in self.search if name not in SYNC_FIELDS):
            found &= np.isin(columns[name], self.codes(name, []) if name in self.names else self.values(name, []))
        # A backward that is split cannot recompute; that is so for every job.
        found &= ~(columns.is_named("schedule", *SPLIT_BACKWARD) & ~columns.is_named("recompute", "none"))
        if "rank_order" not in self.search and not self.job.cluster.nodes_per_leaf:
            # Where tensor and context ranks fill a domain, pipeline and data-parallel ranks are a domain apart in both
            # orders, and a flat network knows no other distance.
            fills = columns["tp"] * columns["cp"] % self.job.cluster.domain == 0
            found &= ~fills | (columns["rank_order"] == 0)
        if "zero_stage" not in self.search and self.stack.replicates_by_fsdp and 2 in self.stack.pipeline_zero_stages:
            # zero_stage 1 is as good as 2 there: under a pipeline FSDP2 reduces gradients once in both, and gathers
            # once as long as no stage has to make room for another. The gathers stand at other places of the program,
            # so that their steps may differ by less than a percent.
            twin = (columns["pp"] > 1) & (columns["zero_stage"] == 1)
            found &= ~(twin & (columns["virtual_stages"] <= MOST_UNSHARDED))
        return found

    def world_sizes(self) -> list[int]:
        """All devices; a machine that may be oversubscribed also takes fewer or more ranks."""
        spec, world = self.job.cluster, self.job.world_size
        if spec.oversubscribe <= 1:
            return [world]
        most = int(world * spec.oversubscribe)
        return [size for size in (2**i for i in range(most.bit_length())) if size <= most]

    def tensor_sizes(self, world: int) -> list[int]:
        spec = self.job.cluster
        widest = max(spec.domain, int(spec.gpus_per_node * spec.oversubscribe))
        return [d for d in _divisors(world) if d <= min(widest, self.job.model.num_attention_heads)]

    def context_sizes(self) -> list[int]:
        if not self.stack.context_parallel:
            return [1]
        length = self.job.training.seq_len
        most = max(1, length // LONG_PART, min(MOST_PARTS, length // SHORTEST_PART))
        return [2**i for i in range(most.bit_length())]

    def expert_sizes(self, world: int) -> list[int]:
        """Numbers of ranks that the experts can be spread over; most stacks spread them inside a pipeline stage."""
        if not self.stack.expert_dispatch or not self.job.model.num_experts:
            return [1]
        return [d for d in _divisors(self.job.model.num_experts) if world % d == 0]

    def data_parallel(self, ranks: int, cp: int) -> Iterator[tuple[int, int, int]]:
        """Ways to replicate and shard over this many data-parallel ranks; cp ranks shard with dp_shard."""
        stages = sorted({0, *self.stack.zero_stages})
        for zero in self.values("zero_stage", stages):
            for shard in self.values("dp_shard", _divisors(ranks) if zero else [1]):
                shards = shard * cp > 1 if zero else shard > 1
                if shard >= 1 and ranks % shard == 0 and shards == (zero > 0):
                    yield ranks // shard, shard, zero

    def recipe_rows(self, tensor: bool, pp: int, dp: int) -> Column:
        """What varies inside a grid: micro-batch, schedule and chunks, recompute, sequence parallelism."""
        share = self.job.training.global_batch_size // dp
        key = (tensor, pp, share, dp > 1)
        if key not in self.recipes:
            micro = [b for b in _divisors(share) if b <= LARGEST_MICRO_BATCH] if share else []
            sequence = {"": [False], "always": [True], "optional": [True, False]}[self.stack.sequence_parallel]
            orders = [RANK_ORDER] if self.stack.fixed_rank_order or pp == 1 or dp == 1 else list(RANK_ORDERS)
            fields = (
                self.values("micro_batch_size", micro),
                self.codes("recompute", self.recomputes()),
                self.codes("sequence_parallel", sequence) if tensor else [0],
                self.codes("stage_layers", [None]),
                self.codes("rank_order", orders),
                self.codes("offload", ["none"]),
                list(self.schedules(pp)),
            )
            self.check(math.prod(len(values) for values in fields))
            rows = [(*some, *schedule) for *some, schedule in itertools.product(*fields)]
            self.recipes[key] = np.array(rows, dtype=np.int64).reshape(-1, 8).T
        return self.recipes[key]

    def recomputes(self) -> list[str]:
        """Selective recompute of attention alone drops the scores of an unfused core; a fused one has none to drop."""
        stack = self.stack
        useful = stack.attention[0] in UNFUSED or set(stack.selective_recompute) != {"attention"}
        return [kind for kind in stack.recompute if kind != "selective" or useful]

    def schedules(self, pp: int) -> Iterator[tuple[int, int]]:
        place = self.names["schedule"].index
        if pp == 1:
            # Without a pipeline every schedule is the same loop over microbatches.
            yield place("1F1B"), 1
            return
        layers = self.job.model.num_hidden_layers
        several = [v for v in range(2, LARGEST_VIRTUAL_STAGES + 1) if pp * v <= layers]
        for name in self.values("schedule", list(self.stack.schedules)):
            stages = [2] if name in V_PLACEMENT else several if name in MULTI_STAGE else [1]
            for count in self.values("virtual_stages", stages):
                yield place(name), count


def _divisors(number: int) -> list[int]:
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def _product(*tables: Column) -> Column:
    """Every combination of a column of each of these tables of fields x choices, one below the other."""
    sizes = [table.shape[1] for table in tables]
    places = np.indices(sizes).reshape(len(sizes), -1)
    return np.concatenate([table[:, place] for table, place in zip(tables, places, strict=True)])


def without_model_parallelism(job: Job) -> Search:
    """A search limited to plain data parallelism, for the baseline."""
    kept = {k: v for k, v in job.search.items() if k in ("micro_batch_size", "recompute")}
    return kept | {"tp": [1], "pp": [1], "cp": [1], "ep": [1]}
