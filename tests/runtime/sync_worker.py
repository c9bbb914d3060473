"""Train some layouts that synchronise in different ways, one after the other, and write what was measured as JSON.

Run by test_sync.py: `torchrun --nproc-per-node N sync_worker.py LIST DATA FOLDER OUTPUT`, LIST one of sync_cases.
Processes that a case has no use for wait.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import sync_cases
from sync_cases import SyncCase
from tiny_jobs import MODELS, tiny_plan

TIMEOUT = datetime.timedelta(minutes=2)


def main() -> None:
    name, data, folder, output = sys.argv[1:]
    import torch
    import torch.distributed as dist

    import simulator.layout_rules
    from runtime.machine import leave
    from simulator.files import plain

    # One worker with servers is sequential training: no layout that makes sense, but one that says much.
    rules = simulator.layout_rules.sync_problems
    simulator.layout_rules.sync_problems = lambda layout, job: [] if layout.dp_replicate == 1 else rules(layout, job)
    torch.set_num_threads(1)
    store, rank, size = next(dist.rendezvous("env://"))
    results: dict[str, Any] = {}
    for case in getattr(sync_cases, name):
        try:
            parts = [(case.layout, case.steps)]
            if case.saved:
                parts.insert(0, (case.saved_as or case.layout, case.saved))
            for number, (layout, steps) in enumerate(parts):
                here = dist.PrefixStore(f"{case.name} {number}", store)
                measured = run(replace(case, layout=layout, steps=steps), here, rank, data, Path(folder))
        except BaseException:
            print(case.name, file=sys.stderr)
            traceback.print_exc()
            # The other ranks wait for this one, so there is nothing to go on with.
            sys.stderr.flush()
            os._exit(1)
        results[case.name] = plain(measured) if measured else None
    if rank == 0:
        Path(output).write_text(json.dumps(results))
    store.set(f"done {rank}", "")
    store.wait([f"done {other}" for other in range(size)])
    leave()


def run(case: SyncCase, store: Any, rank: int, data: str, folder: Path) -> Any:
    """The part of this process in a case; what was measured, of a worker."""
    import torch.distributed as dist

    from runtime.link import Link, find_seat
    from runtime.parameter_server import Server
    from runtime.settings import Settings
    from runtime.trainer import train

    layout = case.layout
    needed = layout.world_size + layout.servers
    plan = tiny_plan(layout, MODELS[case.model], data=data, **case.training)
    if rank >= needed:
        return None
    seat = find_seat(layout, {"RANK": str(rank), "LOCAL_RANK": str(rank)})
    link = Link(store, seat, TIMEOUT) if seat.servers else None
    kind = dist.PrefixStore("servers" if seat.serves else "workers", store)
    dist.init_process_group("gloo", store=kind, rank=seat.number, world_size=seat.peers, timeout=TIMEOUT)
    checkpoint = folder / "".join(c if c.isalnum() else "_" for c in case.name) if case.saved else None
    settings = Settings(case.steps, 0, checkpoint=checkpoint, slow_rank=case.slow_rank)
    measured = None
    if seat.serves:
        assert link is not None
        Server(layout, plan.job.training, link, case.steps).serve()
    else:
        measured = train(plan, settings, link=link)
    dist.barrier()
    dist.destroy_process_group()
    return measured


if __name__ == "__main__":
    main()
