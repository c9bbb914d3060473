"""What the trainer adds to a step: its own against a loop written by hand for the same model and layout.

python benchmarks/step_overhead.py [rounds]

Both live in the same processes and take turns, step by step, each beginning every other round: what else the machine
does falls on both. Shown is the median over rounds of (trainer's step / hand-written step), with quartiles. Layouts:
DDP 2, FSDP2 2 and a 1F1B pipeline of 2, on processors with gloo.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

LAYOUTS = {
    "DDP 2": {"dp_replicate": 2, "micro_batch_size": 4},
    "FSDP2 2": {"dp_shard": 2, "zero_stage": 3, "micro_batch_size": 4},
    "pipeline 1F1B 2": {"pp": 2, "schedule": "1F1B", "micro_batch_size": 2},
}
MODEL, BATCH, SEQ_LEN = "llama-bytes-12m", 8, 128


def main() -> None:
    rounds = sys.argv[1] if len(sys.argv) > 1 else "40"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, __file__, rounds], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def on_rank(rounds: int) -> None:
    """Every layout, one after the other; rank 0 prints."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name, fields in LAYOUTS.items():
        ratios, ours, theirs = compare(fields, rounds)
        low, middle, high = statistics.quantiles(ratios, n=4)
        if dist.get_rank() == 0:
            print(
                f"{name:16} trainer / by hand: median {middle - 1:+.1%} (quartiles {low - 1:+.1%} to {high - 1:+.1%}); "
                f"steps of {statistics.median(ours) * 1e3:.0f} and {statistics.median(theirs) * 1e3:.0f} ms, "
                f"{rounds} rounds",
                flush=True,
            )
    dist.barrier()


def compare(fields: dict, rounds: int) -> tuple[list[float], list[float], list[float]]:
    """Ratios of steps that follow each other, and both kinds' seconds."""
    import torch
    import torch.distributed as dist

    from runtime.data import Batches
    from runtime.step import build_run
    from simulator.job import Job, Training
    from simulator.layout import Layout
    from simulator.presets import find_cluster, find_model, find_stack

    layout, device = Layout(**fields), torch.device("cpu")
    training = Training(BATCH, SEQ_LEN, "fp32", learning_rate=1e-3)
    # The cluster is not looked at: nothing is predicted.
    job = Job(find_model(MODEL), find_cluster("dgx-h100"), 1, training, find_stack("layoutwise-cpu"))
    run, batches = build_run(job, layout, device), Batches(job, layout, dist.get_rank(), device)
    by_hand = HAND_WRITTEN[next(iter(fields))](job, layout)
    ours, theirs = [], []

    def timed(call: Callable[[], object], into: list[float]) -> None:
        dist.barrier()
        begin = time.perf_counter()
        call()
        into.append(time.perf_counter() - begin)

    for number in range(-5, rounds):
        steps = [
            (lambda n=number: run.step(batches.load(n + 5)), ours),
            (lambda n=number: by_hand(batches.load(n + 5)), theirs),
        ]
        for call, into in steps if number % 2 else reversed(steps):
            timed(call, into)
    ours, theirs = ours[5:], theirs[5:]
    return [a / b for a, b in zip(ours, theirs, strict=True)], ours, theirs


def data_parallel(wrap: Callable) -> Callable:
    """A loop over the whole model, wrapped by DDP or FSDP2, as torch's tutorials write it."""

    def build(job: object, layout: object) -> Callable:
        import torch
        import torch.nn.functional as F

        model = wrap(whole_stage(job, layout, 0))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

        def step(batch: object) -> float:
            (tokens,), targets = batch
            loss = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            return loss.item()

        return step

    return build


def whole_stage(job: object, layout: object, number: int) -> object:
    import torch

    from runtime.model import init_weights
    from runtime.pipeline import build_stage

    stage = build_stage(job.model, layout, SEQ_LEN, number)
    init_weights(stage, 0, torch.device("cpu"))
    return stage


def ddp(model: object) -> object:
    from torch.nn.parallel import DistributedDataParallel

    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def fsdp(model: object) -> object:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def pipeline(job: object, layout: object) -> Callable:
    """torch's 1F1B over two stages; the norm for clipping is summed over both by hand."""
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank = dist.get_rank()
    model = whole_stage(job, layout, rank)
    stage = PipelineStage(model, rank, 2, torch.device("cpu"))
    count = layout.microbatches(BATCH)
    schedule = Schedule1F1B(stage, count, loss_fn=lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(batch: object) -> float:
        (tokens,), targets = batch
        losses: list = []
        if rank == 0:
            schedule.step(tokens)
        else:
            schedule.step(target=targets, losses=losses, return_outputs=False)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).square()
        dist.all_reduce(norm)
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), 1.0, norm.sqrt())
        optimizer.step()
        optimizer.zero_grad()
        return sum(loss.item() for loss in losses)

    return step


HAND_WRITTEN = {"dp_replicate": data_parallel(ddp), "dp_shard": data_parallel(fsdp), "pp": pipeline}


if __name__ == "__main__":
    if "RANK" in os.environ:
        on_rank(int(sys.argv[1]))
    else:
        main()
