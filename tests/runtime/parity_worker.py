"""Train some cases of one world size, one after the other, and write losses and gradient norms as JSON.

Run by `parity_table.run_cases`: `torchrun --nproc-per-node N parity_worker.py DATA NAMES OUTPUT`, NAMES a JSON list of
cases; one process needs no torchrun.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path

from parity_cases import CASES, LONG_CASES, STEPS, with_references
from tiny_jobs import MODELS, tiny_plan


def main() -> None:
    data, todo, output = sys.argv[1:]
    import torch
    import torch.distributed as dist

    from runtime.machine import leave
    from runtime.settings import Settings
    from runtime.trainer import train

    torch.set_num_threads(1)
    alone = {} if "WORLD_SIZE" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group("gloo", **alone)
    results = {}
    names = set(json.loads(Path(todo).read_text()))
    for case in with_references(CASES + LONG_CASES):
        if case.name in names:
            begin = time.perf_counter()
            plan = tiny_plan(case.layout, MODELS[case.model], data=data, **case.training)
            try:
                measured = train(plan, Settings(STEPS, 2))
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
