"""Train every case of one world size, one after the other, and write losses and gradient norms as JSON.

Run by the fixture `parity_runs`: `torchrun --nproc-per-node N parity_worker.py DATA OUTPUT`; one
process needs no torchrun.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_jobs import MODELS, tiny_plan

from simulator.layout import Layout

STEPS = 10


@dataclass(frozen=True)
class Case:
    """One layout of one model; its losses must be those of the reference with the same model and training."""

    layout: Layout
    model: str = "tiny-llama"
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        changed = " ".join(f"{k}={v}" for k, v in self.training.items())
        return f"{self.model} {self.layout.short()} {changed}".strip()

    @property
    def reference(self) -> Case:
        return Case(Layout(micro_batch_size=8), self.model, self.training)


_REPLICATE = {"dp_replicate": 2}
_SHARD = {"dp_shard": 2, "zero_stage": 3}
_TENSOR = {"tp": 2, "sequence_parallel": True}
_INTERLEAVED = {"pp": 2, "schedule": "Interleaved1F1B", "virtual_stages": 2}
_SGD = {"optimizer": "sgd", "learning_rate": 0.5}

CASES = [
    # One process: gradient accumulation and recompute.
    Case(Layout(micro_batch_size=2)),
    Case(Layout(micro_batch_size=2, recompute="full")),
    # Each axis alone, on two.
    Case(Layout(**_REPLICATE, micro_batch_size=4)),
    Case(Layout(**_REPLICATE, micro_batch_size=2)),
    Case(Layout(**_REPLICATE, micro_batch_size=4, recompute="full"), "tiny-gpt"),
    Case(Layout(dp_shard=2, zero_stage=2, micro_batch_size=2)),
    Case(Layout(**_SHARD, micro_batch_size=4)),
    Case(Layout(**_SHARD, micro_batch_size=2, recompute="full"), "tiny-gpt"),
    Case(Layout(**_SHARD, micro_batch_size=2), training=_SGD),
    Case(Layout(tp=2, micro_batch_size=8)),
    Case(Layout(tp=2, micro_batch_size=4), "tiny-gpt"),
    Case(Layout(tp=2, micro_batch_size=4), "tiny-qwen"),
    Case(Layout(**_TENSOR, micro_batch_size=4)),
    Case(Layout(**_TENSOR, micro_batch_size=8, recompute="full")),
    Case(Layout(**_TENSOR, micro_batch_size=4), "tiny-gpt"),
    Case(Layout(**_TENSOR, micro_batch_size=8), "tiny-qwen"),
    Case(Layout(pp=2, schedule="GPipe", micro_batch_size=2)),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2, recompute="full"), "tiny-gpt-untied"),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=1, stage_layers=(3, 1))),
    Case(Layout(**_INTERLEAVED, micro_batch_size=2)),
    # Two axes, on four.
    Case(Layout(dp_replicate=2, dp_shard=2, zero_stage=3, micro_batch_size=1)),
    Case(Layout(dp_replicate=2, dp_shard=2, zero_stage=2, micro_batch_size=2), "tiny-gpt"),
    Case(Layout(tp=4, sequence_parallel=True, micro_batch_size=8), "tiny-gpt"),
    Case(Layout(tp=2, **_REPLICATE, micro_batch_size=2)),
    Case(Layout(tp=2, dp_shard=2, zero_stage=2, micro_batch_size=4, recompute="full"), "tiny-gpt"),
    Case(Layout(**_TENSOR, **_SHARD, micro_batch_size=2)),
    Case(Layout(pp=2, **_REPLICATE, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(**_INTERLEAVED, **_REPLICATE, micro_batch_size=2)),
    Case(Layout(pp=2, **_SHARD, schedule="1F1B", micro_batch_size=2)),
    Case(Layout(pp=2, **_SHARD, schedule="GPipe", micro_batch_size=1), "tiny-gpt-untied"),
    Case(Layout(pp=2, dp_shard=2, zero_stage=2, schedule="1F1B", micro_batch_size=1)),
    Case(Layout(**_INTERLEAVED, **_SHARD, micro_batch_size=2)),
    Case(Layout(pp=2, tp=2, schedule="1F1B", micro_batch_size=4)),
    Case(Layout(pp=2, **_TENSOR, schedule="1F1B", micro_batch_size=4, recompute="full"), "tiny-gpt-untied"),
    Case(Layout(**_INTERLEAVED, **_TENSOR, micro_batch_size=4)),
    # Half precision, where only the size of the difference is known.
    Case(Layout(**_SHARD, micro_batch_size=4), training={"precision": "bf16"}),
    Case(Layout(**_REPLICATE, micro_batch_size=4), training={"precision": "bf16"}),
    Case(Layout(**_TENSOR, micro_batch_size=8), training={"precision": "bf16"}),
    Case(Layout(pp=2, **_SHARD, micro_batch_size=2), training={"precision": "bf16"}),
    Case(Layout(pp=2, schedule="1F1B", micro_batch_size=2), training={"precision": "bf16"}),
]
REFERENCES = list({case.reference.name: case.reference for case in CASES}.values())


def main() -> None:
    data, output = sys.argv[1:]
    import torch
    import torch.distributed as dist

    from runtime.machine import leave
    from runtime.trainer import train

    torch.set_num_threads(1)
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    results = {}
    for case in CASES + REFERENCES:
        if case.layout.world_size == dist.get_world_size():
            begin = time.perf_counter()
            plan = tiny_plan(case.layout, MODELS[case.model], data=data, **case.training)
            try:
                measured = train(plan, STEPS, 2)
            except Exception:
                print(case.name, file=sys.stderr)
                traceback.print_exc()
                # The other ranks wait for this one, so there is nothing to go on with.
                sys.stderr.flush()
                os._exit(1)
            seconds = time.perf_counter() - begin
            results[case.name] = {"losses": measured.losses, "grad_norms": measured.grad_norms, "seconds": seconds}
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    leave()


if __name__ == "__main__":
    main()
