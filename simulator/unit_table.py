"""What one block, the embedding and the head cost in many layouts: a few hundred combinations of tp, cp, ep,
micro-batch and recomputation, costed once by unit_cost.py and looked up by every layout.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from simulator.axes import AXES
from simulator.columns import NAMED, Columns, distinct
from simulator.layout import Layout
from simulator.placement import Groups, distinct_groups, known_to
from simulator.unit_cost import UnitCost, UnitCosts

if TYPE_CHECKING:
    from simulator.job import Job

Floats = npt.NDArray[np.float64]
# What is kept of a unit: seconds, then elements and bytes.
SECONDS = ("forward", "backward", "weights", "hidden", "host")
SIZES = ("parameters", "experts", "saved", "working", "deferred")


class UnitTable:
    """The units of a job's model: its kinds of blocks, then the embedding, then the head.

    `code` is the entry of every row; `seconds` and `sizes` of a field are arrays of entries x units. Where the groups
    of a layout's ranks lie in several ways, its seconds are the least.
    """

    def __init__(self, job: Job, columns: Columns) -> None:
        self.job, model = job, job.model
        # Adding up gradients depends on the number of microbatches: `accumulation` has it for each row.
        self.alone = _without_accumulation(job)
        self.overlaps = _overlaps_tokens(job, columns)
        blocks = [
            (model.block_kind(i), model.block_is_causal(i), model.block_window(i))
            for i in range(model.num_hidden_layers)
        ]
        self.kinds = list(dict.fromkeys(blocks))
        # The kind of each block of the model, as a place in `kinds`.
        self.block_kinds = tuple(self.kinds.index(block) for block in blocks)
        self.units = len(self.kinds) + 2
        firsts, self.code = self._entries(columns)
        overlaps = self.overlaps[firsts].tolist()
        costs = [self._costs(*entry) for entry in zip(columns.layouts(firsts), overlaps, strict=True)]
        fields = (*SECONDS, *SIZES)
        table = np.array(costs, dtype=np.float64).reshape(len(costs), self.units, len(fields))
        self.table = {name: np.ascontiguousarray(table[:, :, i]) for i, name in enumerate(fields)}

    def __getitem__(self, field: str) -> Floats:
        return self.table[field]

    def _entries(self, columns: Columns) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """A row of every entry, and the entry of every row."""
        sizes = [columns[name] for name in (*AXES, "ep")]
        grids, grid = distinct(columns["rank_order"], *sizes, columns["zero_stage"] > 0)
        shapes: dict[object, int] = {}
        lies = []
        for layout in columns.layouts(grids):
            groups = distinct_groups(self.job, layout)
            key = tuple(dict.fromkeys((g.tp, g.cp, g.ep) for g in groups))
            lies.append(shapes.setdefault(key, len(shapes)))
        fields = [columns[name] for name in ("tp", "cp", "ep", "micro_batch_size", "recompute", "sequence_parallel")]
        others = [columns[name] for name in columns.numbers if name not in _KNOWN]
        # A tied head is copied under a pipeline.
        return distinct(np.array(lies)[grid], *fields, columns["pp"] > 1, self.overlaps, *others)

    def _costs(self, layout: Layout, overlaps: bool) -> list[list[float]]:
        """The fields of each unit. A search makes several tables, of which most entries are the same."""
        # Where some passes hide their exchange of tokens all are taken to: which share does differs between layouts.
        costs, lies = UnitCosts(self.alone, layout, overlapped=float(overlaps)), distinct_groups(self.job, layout)
        known: dict[object, list[list[float]]] = known_to(self.alone, "table")
        key = (costs.key, *((groups.tp, groups.cp, groups.ep) for groups in lies))
        if key not in known:
            ways = [self._units(costs, groups) for groups in lies]
            known[key] = [[min(values) for values in zip(*units, strict=True)] for units in zip(*ways, strict=True)]
        return known[key]

    def _units(self, costs: UnitCosts, groups: Groups) -> list[list[float]]:
        units = [*(costs.block(*kind, groups) for kind in self.kinds), costs.embedding(groups), costs.head(groups)]
        return [self._fields(unit) for unit in units]

    def _fields(self, unit: UnitCost) -> list[float]:
        names = self.job.stack.overlaps_in_pair
        hidden = unit.forward.spent_on(names) + unit.backward.spent_on(names)
        seconds = (unit.forward.total, unit.backward.total, unit.backward_weight.total, hidden, unit.backward.host)
        return [*seconds, *(getattr(unit, name) for name in SIZES)]


def _overlaps_tokens(job: Job, columns: Columns) -> npt.NDArray[np.bool_]:
    """The rows in which exchanges of tokens run beside another microbatch (expert_parallel.overlapped_share)."""
    pairs = (columns["pp"] == 1) | columns.is_named("schedule", "Interleaved1F1B")
    several = columns.microbatches(job.training.global_batch_size) > 1
    found = pairs & several & (columns["ep"] > 1) & ~columns.is_named("recompute", "full")
    return np.asarray(found & job.stack.overlap_ep)


def _without_accumulation(job: Job) -> Job:
    """The same job where adding up gradients takes no time: one for all tables, because it keeps what units cost."""
    if job.stack.fused_accumulation:
        return job
    known = known_to(job, "without accumulation")
    if not known:
        known["job"] = dataclasses.replace(job, stack=dataclasses.replace(job.stack, fused_accumulation=True))
        known["job"].__dict__["graph"] = job.graph
    found: Job = known["job"]
    return found


_KNOWN = {*AXES, "ep", "zero_stage", "micro_batch_size", "virtual_stages", *NAMED}
