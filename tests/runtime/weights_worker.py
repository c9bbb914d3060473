"""Read and write weights in every case of test_weights, with its layout: `torchrun ... weights_worker.py FOLDER`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from test_weights import CASES
from tiny_jobs import MODELS, tiny_plan

from runtime.machine import leave
from runtime.step import build_run
from runtime.weights import export_model, load_safetensors


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for number, (name, layout) in enumerate(CASES):
        try:
            run = build_run(tiny_plan(layout, MODELS[name]).job, layout, torch.device("cpu"))
            load_safetensors(run.stages, folder / name)
            export_model(run.stages, layout, folder / f"out-{number}")
        except Exception:
            print(name, layout.short(), file=sys.stderr)
            traceback.print_exc()
            # The other ranks wait for this one, so there is nothing to go on with.
            sys.stderr.flush()
            os._exit(1)
    leave()


if __name__ == "__main__":
    main()
