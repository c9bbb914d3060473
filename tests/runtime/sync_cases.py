"""Layouts that synchronise in different ways, and what their losses must be those of. All of a list take as many
processes or fewer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from simulator.layout import Layout

SGD = {"optimizer": "sgd", "learning_rate": 0.5, "max_grad_norm": 100.0}


@dataclass(frozen=True)
class SyncCase:
    """A run, and `like`, the name of the one whose losses it must have; "" where it need not equal any.

    saved: the run is made in two parts, the first of which leaves a checkpoint after so many steps.
    """

    name: str
    layout: Layout
    like: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    model: str = "tiny-llama"
    steps: int = 6
    saved: int = 0
    saved_as: Layout | None = None
    slow_rank: str | None = None


_TWO: dict[str, Any] = {"dp_replicate": 2, "micro_batch_size": 2}
_SERVER: dict[str, Any] = {"sync": "parameter_server", "servers": 1}
_LOCAL: dict[str, Any] = {"sync": "local_sgd", "sync_interval": 2}
_DILOCO: dict[str, Any] = {**_LOCAL, "outer_optimizer": "nesterov"}
_FOUR: dict[str, Any] = {"dp_replicate": 2, "micro_batch_size": 2}

# On three processes. One worker with a server is sequential training, by another way.
FAST = [
    SyncCase("one", Layout(micro_batch_size=2)),
    SyncCase("centre", Layout(**_TWO, sync="reduce_broadcast"), like="one"),
    SyncCase("server", Layout(**_TWO, **_SERVER), like="one"),
    SyncCase("server again", Layout(**_TWO, **_SERVER), like="one", saved=3),
    SyncCase("alone", Layout(micro_batch_size=2, **_SERVER, staleness=None), like="one"),
    SyncCase("one sgd", Layout(micro_batch_size=2), training=SGD),
    SyncCase("local 1", Layout(**_TWO, sync="local_sgd", sync_interval=1), like="one sgd", training=SGD),
    SyncCase("alone sgd", Layout(micro_batch_size=2, **_SERVER, staleness=None), like="one sgd", training=SGD),
    SyncCase("asynchronous", Layout(**_TWO, **_SERVER, staleness=None), steps=12, slow_rank="1:3.0"),
    SyncCase("bounded", Layout(**_TWO, **_SERVER, staleness=1), steps=12, slow_rank="1:3.0"),
    SyncCase("local 2", Layout(**_TWO, **_LOCAL)),
    SyncCase("diloco", Layout(**_TWO, **_DILOCO)),
    SyncCase("diloco again", Layout(**_TWO, **_DILOCO), like="diloco", saved=3),
]
MORE = [
    SyncCase("one", Layout(micro_batch_size=2)),
    SyncCase("one sgd", Layout(micro_batch_size=2), training=SGD),
    SyncCase("all", Layout(**_TWO), like="one"),
    SyncCase("server, random", Layout(**_TWO, **_SERVER), training={"sharding": "random"}),
    SyncCase("all, random", Layout(**_TWO), like="server, random", training={"sharding": "random"}),
    SyncCase("local 2", Layout(**_TWO, **_LOCAL)),
    SyncCase("local 2 again", Layout(**_TWO, **_LOCAL), like="local 2", saved=3),
    SyncCase("local 1 again", Layout(**_TWO, sync="local_sgd"), like="one sgd", training=SGD, saved=4),
    SyncCase("server after all", Layout(**_TWO, **_SERVER), like="one", saved=3, saved_as=Layout(**_TWO)),
    SyncCase("all after server", Layout(**_TWO), like="one", saved=3, saved_as=Layout(**_TWO, **_SERVER)),
    SyncCase("two servers", Layout(micro_batch_size=2, **{**_SERVER, "servers": 2}, staleness=None), like="one"),
    SyncCase("server, sgd", Layout(**_TWO, **_SERVER), like="one sgd", training=SGD, saved=2),
]
# On six: two replicas of two ranks, and two servers.
_SIX_SERVERS: dict[str, Any] = {**_SERVER, "servers": 2}
_SHARD: dict[str, Any] = {"dp_shard": 2, "zero_stage": 3}
_TENSOR: dict[str, Any] = {"tp": 2, "sequence_parallel": True}
_INSIDE: dict[str, dict[str, Any]] = {
    "tp": _TENSOR,
    "tp without sp": {"tp": 2},
    "pp": {"pp": 2},
    "fsdp": _SHARD,
    "zero 1": {"dp_shard": 2, "zero_stage": 1},
    "cp": {"cp": 2},
}
SIX = [
    SyncCase("one", Layout(micro_batch_size=2)),
    SyncCase("one sgd", Layout(micro_batch_size=2), training=SGD),
    SyncCase("one moe", Layout(micro_batch_size=2), training=SGD, model="tiny-moe"),
    SyncCase("centre, ep", Layout(dp_replicate=2, **_SHARD, ep=2, sync="reduce_broadcast"), "one moe", SGD, "tiny-moe"),
    SyncCase("server, ep", Layout(dp_replicate=2, **_SHARD, ep=2, **_SIX_SERVERS), "one moe", SGD, "tiny-moe"),
    *(
        SyncCase(f"{sync}, {name}", Layout(**_FOUR | {"micro_batch_size": 1}, **inside, **how), like="one")
        for name, inside in _INSIDE.items()
        for sync, how in (("centre", {"sync": "reduce_broadcast"}), ("server", _SIX_SERVERS))
    ),
    *(
        SyncCase(
            f"local, {name}", Layout(**_FOUR | {"micro_batch_size": 1}, **inside, sync="local_sgd"), "one sgd", SGD
        )
        for name, inside in _INSIDE.items()
    ),
    SyncCase("server, bf16", Layout(dp_replicate=4, **_SIX_SERVERS), training={"precision": "bf16"}),
    SyncCase("four workers", Layout(dp_replicate=4, **_SIX_SERVERS), like="one"),
    SyncCase("asynchronous, fsdp", Layout(dp_replicate=2, **_SHARD, **_SIX_SERVERS, staleness=None)),
    SyncCase("bounded, pp", Layout(dp_replicate=2, pp=2, **_SIX_SERVERS, staleness=2)),
    SyncCase("diloco, tp", Layout(dp_replicate=2, **_TENSOR, **_DILOCO)),
    SyncCase("diloco again, tp", Layout(dp_replicate=2, **_TENSOR, **_DILOCO), like="diloco, tp", saved=3),
    SyncCase("server again, fsdp", Layout(dp_replicate=2, **_SHARD, **_SIX_SERVERS), like="one", saved=3),
]
