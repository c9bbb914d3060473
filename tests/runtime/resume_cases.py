"""Pairs of layouts: a run saved with the first and continued with the second is the run that was never stopped."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from parity_cases import _INTERLEAVED, _REPLICATE, _SGD, _SHARD, _TENSOR, _ZBV, Case

from simulator.layout import Layout

SAVED, STEPS = 3, 8


@dataclass(frozen=True)
class Pair:
    """`saved` trains SAVED steps, then the same model and recipe goes on in the layout `then`."""

    saved: Case
    then: Layout

    @property
    def resumed(self) -> Case:
        return dataclasses.replace(self.saved, layout=self.then)

    @property
    def name(self) -> str:
        return f"{self.saved.name} -> {self.then.short()}"

    @property
    def folder(self) -> str:
        return "".join(c if c.isalnum() else "_" for c in self.name)


# All on four ranks: one start.
FAST = [
    Pair(Case(Layout(dp_replicate=4, micro_batch_size=2)), Layout(tp=2, pp=2, micro_batch_size=4)),
    Pair(
        Case(Layout(**_REPLICATE, dp_shard=2, zero_stage=3, micro_batch_size=1), "tiny-gpt"),
        Layout(**_TENSOR, **_REPLICATE, micro_batch_size=4, recompute="full"),
    ),
    Pair(
        Case(Layout(**_INTERLEAVED, **_SHARD, micro_batch_size=2)),
        Layout(pp=2, **_REPLICATE, micro_batch_size=1, stage_layers=(3, 1)),
    ),
    # Experts lie on a mesh of their own.
    Pair(
        Case(Layout(**_SHARD, **_TENSOR, ep=2, micro_batch_size=2), "tiny-shared-moe"),
        Layout(**_REPLICATE, cp=2, micro_batch_size=2),
    ),
]
# The second layout has at most as many ranks as the first: one start for each world size, the largest first.
SHRINKING = [
    Pair(
        Case(Layout(**_REPLICATE, dp_shard=2, zero_stage=3, micro_batch_size=1)),
        Layout(pp=2, **_REPLICATE, micro_batch_size=2, recompute="full"),
    ),
    Pair(Case(Layout(**_SHARD, micro_batch_size=4), "tiny-gpt"), Layout(micro_batch_size=8)),
    Pair(Case(Layout(**_REPLICATE, micro_batch_size=4)), Layout(**_SHARD, micro_batch_size=4)),
    Pair(Case(Layout(**_INTERLEAVED, micro_batch_size=2)), Layout(**_TENSOR, micro_batch_size=4)),
    Pair(Case(Layout(**_REPLICATE, micro_batch_size=4), training=_SGD), Layout(pp=2, micro_batch_size=2)),
    Pair(Case(Layout(tp=2, pp=2, micro_batch_size=4)), Layout(dp_replicate=4, micro_batch_size=2)),
    Pair(Case(Layout(**_TENSOR, **_SHARD, micro_batch_size=2)), Layout(**_INTERLEAVED, **_SHARD, micro_batch_size=2)),
    Pair(Case(Layout(**_TENSOR, **_SHARD, micro_batch_size=2), "tiny-gpt"), Layout(**_REPLICATE, micro_batch_size=4)),
    Pair(Case(Layout(**_INTERLEAVED, **_SHARD, micro_batch_size=2)), Layout(micro_batch_size=2, recompute="full")),
    Pair(Case(Layout(tp=4, sequence_parallel=True, micro_batch_size=8), "tiny-gpt"), Layout(micro_batch_size=8)),
    Pair(
        Case(Layout(pp=2, micro_batch_size=1, stage_layers=(3, 1)), "tiny-gpt-untied"),
        Layout(**_TENSOR, micro_batch_size=8, recompute="full"),
    ),
    Pair(Case(Layout(**_SHARD, micro_batch_size=4, recompute="full"), "tiny-qwen"), Layout(tp=2, micro_batch_size=8)),
    Pair(Case(Layout(dp_shard=4, zero_stage=3, ep=4, micro_batch_size=2), "tiny-moe"), Layout(micro_batch_size=2)),
    Pair(Case(Layout(**_ZBV, dp_shard=2, zero_stage=2, micro_batch_size=1)), Layout(cp=2, micro_batch_size=4)),
    Pair(Case(Layout(**_SHARD, micro_batch_size=2), "tiny-t5"), Layout(**_TENSOR, micro_batch_size=8)),
    # Samples of an epoch, whose global batches do not depend on who shares them.
    Pair(Case(Layout(dp_replicate=4, micro_batch_size=2), training={"sharding": "random"}), Layout(**_SHARD)),
]
# The second layout has more ranks: the smallest first.
GROWING = [
    Pair(Case(Layout(tp=2, micro_batch_size=8)), Layout(dp_shard=4, zero_stage=2, micro_batch_size=2)),
    Pair(Case(Layout(micro_batch_size=8)), Layout(pp=2, micro_batch_size=1, stage_layers=(3, 1))),
    Pair(Case(Layout(micro_batch_size=8), "tiny-gpt"), Layout(**_TENSOR, **_SHARD, micro_batch_size=4)),
    Pair(Case(Layout(**_SHARD, micro_batch_size=4), training=_SGD), Layout(tp=2, pp=2, micro_batch_size=4)),
    Pair(Case(Layout(micro_batch_size=8), "tiny-moe"), Layout(pp=2, **_SHARD, ep=2, micro_batch_size=2)),
]
