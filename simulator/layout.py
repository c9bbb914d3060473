"""Layout: how one job is cut over the ranks.

The world is a grid. With the rank order `tp-cp-ep-dp-pp` the tensor axis is innermost, so its ranks are neighbours
(one NVLink domain); pipeline stages are farthest apart, because they speak least. Other orders put other axes there.
ep is no axis of its own: it regroups the ranks of dp_shard, cp and tp.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from simulator.axes import RANK_ORDER, axes_in
from simulator.files import STRICT
from simulator.layout_rules import layout_problems
from simulator.offload import Offload
from simulator.schedules import V_PLACEMENT, Schedule
from simulator.sync_rules import OuterOptimizer, Sync

if TYPE_CHECKING:
    from simulator.job import Job


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
        return axes_in(self.rank_order)

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
        return layout_problems(self, job)

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
