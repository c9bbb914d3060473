"""Save, and go on in another layout: the part of some pairs that runs on one world size.

Run by test_checkpoint.py: `torchrun --nproc-per-node N resume_worker.py LIST DATA FOLDER OUTPUT`; one process needs no
torchrun. LIST is a list of pairs in resume_cases.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import resume_cases
from resume_cases import SAVED, STEPS, Pair
from tiny_jobs import MODELS, tiny_plan


def main() -> None:
    name, data, folder, output = sys.argv[1:]
    import torch
    import torch.distributed as dist

    from runtime.machine import leave

    torch.set_num_threads(1)
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    results: dict[str, Any] = {}
    for pair in getattr(resume_cases, name):
        try:
            results |= run(pair, data, Path(folder) / pair.folder, dist.get_world_size())
        except BaseException:
            print(pair.name, file=sys.stderr)
            traceback.print_exc()
            # The other ranks wait for this one, so there is nothing to go on with.
            sys.stderr.flush()
            os._exit(1)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    leave()


def run(pair: Pair, data: str, folder: Path, world_size: int) -> dict[str, Any]:
    """Losses and norms of what this world size has to run of a pair, in the order in which it has to."""
    from runtime.settings import Settings
    from runtime.trainer import train

    found = {}
    saved, resumed = (
        tiny_plan(case.layout, MODELS[case.model], data=data, **case.training) for case in (pair.saved, pair.resumed)
    )
    if saved.layout.world_size == world_size:
        found[f"{pair.name} undisturbed"] = train(saved, Settings(STEPS, 0))
        train(saved, Settings(SAVED, 0, checkpoint=folder, checkpoint_every=2))
    if resumed.layout.world_size == world_size:
        found[pair.name] = train(resumed, Settings(STEPS, 0, checkpoint=folder, checkpoint_every=STEPS))
    return {name: {"losses": m.losses, "grad_norms": m.grad_norms} for name, m in found.items()}


if __name__ == "__main__":
    main()
