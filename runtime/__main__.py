"""`torchrun --nproc-per-node N -m runtime plan.json`: train a plan's model with exactly its layout."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from planner.plan import Plan, read_plan
from runtime.environment import slurm_ranks, world_size
from runtime.here import ERROR_PREFIX, NOTE_PREFIX, check_alone, check_plan
from runtime.machine import keep_awake, leave, take_processors
from runtime.settings import Settings, add_arguments, settings_of
from simulator.errors import UserError
from simulator.files import plain, write_json

if TYPE_CHECKING:
    from runtime.link import Link, Seat

# A rank that waits longer than this for another has lost it.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=10)


def main(arguments: list[str] | None = None) -> int:
    """Run one rank. Returns the exit code: 0 done, 2 the user's error; anything else leaves a traceback."""
    options = _parse(arguments)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _end_with_parent()
    try:
        if options.alone is not None:
            _run_alone(options)
            return 0
        os.environ |= slurm_ranks(os.environ)
        _run(read_plan(options.plan), settings_of(options))
    except UserError as error:
        # In one write, so that the sentences of two ranks do not run into each other.
        sys.stderr.write(f"{ERROR_PREFIX}{error}\n")
        sys.stderr.flush()
        return error.exit_code
    return 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torchrun -m runtime", description=__doc__)
    parser.add_argument("plan", type=Path, help="plan.json, written by `layoutwise plan`")
    add_arguments(parser)
    parser.add_argument("--alone", type=int, metavar="RANK", help="run this rank by itself, without the others")
    parser.add_argument("--fake", action="store_true", help="with --alone: count, compute nothing")
    return parser.parse_args(arguments)


def _run(plan: Plan, settings: Settings) -> None:
    check_plan(plan, world_size(os.environ))
    settings.check()
    # torch's notices about its own internals are nothing that a user could act on.
    warnings.filterwarnings("ignore", module="torch")
    from runtime.link import find_seat
    from runtime.trainer import train

    seat = find_seat(plan.layout, os.environ)
    with _process_group(seat) as link:
        if seat.serves:
            assert link is not None
            _serve(plan, settings, link)
            return
        first = seat.number == 0
        measurement = train(plan, settings, _show_step if first else None, _note if first else None, link)
        if not first:
            return
        if settings.output is None:
            print(json.dumps(plain(measurement), indent=2))
        else:
            write_json(settings.output, measurement)


def _serve(plan: Plan, settings: Settings, link: Link) -> None:
    """Be a parameter server until the workers are done. The first one shows steps where replicas have none in
    common."""
    from runtime.asynchronous import UpdateNotes
    from runtime.parameter_server import Server

    notes = None
    if link.seat.number == 0 and plan.layout.staleness != 0:
        notes = UpdateNotes(plan, settings.metrics, settings.steps, _show_step)
    # Whoever ends the job signals every process: the workers save, and for that they need their servers.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Server(plan.layout, plan.job.training, link, settings.steps, notes).serve()


def _note(sentence: str) -> None:
    print(f"{NOTE_PREFIX}{sentence}", file=sys.stderr, flush=True)


def _run_alone(options: argparse.Namespace) -> None:
    plan = read_plan(options.plan)
    check_alone(plan, options.alone)
    settings_of(options).check()
    warnings.filterwarnings("ignore", module="torch")
    import torch

    from runtime.alone import needs_fake, run_alone
    from runtime.trainer import find_device

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    fake = options.fake or needs_fake(plan, options.alone, find_device())
    found = run_alone(plan, options.alone, options.steps, options.warmup, fake)
    if options.output is None:
        print(json.dumps(plain(found), indent=2))
    else:
        write_json(options.output, found)


def _show_step(step: int, steps: int, loss: float, grad_norm: float, seconds: float) -> None:
    print(
        f"step {step}/{steps}  loss {loss:.4f}  grad norm {grad_norm:.4f}  {seconds:.4f} s", file=sys.stderr, flush=True
    )


@contextlib.contextmanager
def _process_group(seat: Seat) -> Iterator[Link | None]:
    """The default process group of this process, which is that of its kind: NCCL on GPUs, gloo on processors and for
    parameter servers. Yields the link between workers and servers, where there are some."""
    import torch
    import torch.distributed as dist

    from runtime.checkpoint import SAVE_TIMEOUT
    from runtime.link import Link
    from runtime.trainer import find_device

    device = torch.device("cpu") if seat.serves else find_device()
    if device.type == "cuda":
        if (count := torch.cuda.device_count()) < seat.local_workers:
            raise UserError(f"this machine has {count} GPUs, but {seat.local_workers} ranks are to run on it")
        torch.cuda.set_device(device)
        dist_options = {"backend": "nccl", "device_id": device}
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        if "TORCHELASTIC_RUN_ID" in os.environ and not seat.servers:
            local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
            take_processors(int(os.environ["LOCAL_RANK"]), local_ranks)
            keep_awake(local_ranks)
        dist_options = {"backend": "gloo"}
    if "WORLD_SIZE" not in os.environ:
        # Started without torchrun, as a single process.
        dist_options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    link = None
    if seat.servers:
        store, _, _ = next(dist.rendezvous("env://", timeout=COLLECTIVE_TIMEOUT))
        store.set_timeout(COLLECTIVE_TIMEOUT)
        kind = dist.PrefixStore("servers" if seat.serves else "workers", store)
        dist_options |= {"store": kind, "rank": seat.number, "world_size": seat.peers}
        # A server hears nothing of a worker that saves.
        link = Link(store, seat, SAVE_TIMEOUT)
    dist.init_process_group(timeout=COLLECTIVE_TIMEOUT, **dist_options)
    yield link
    # Not after an error: it waits for ranks that may be gone, while torchrun waits for this one to end.
    if device.type == "cuda":
        dist.destroy_process_group()
    else:
        dist.barrier()


def _end_with_parent() -> None:
    """Die when torchrun dies. Ranks have sessions of their own, so that no signal to torchrun's group reaches them."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_rank() -> NoReturn:
    """Leave however it ends: after a crash too, the ordinary way out would wait for a thread that writes a checkpoint
    with ranks that are gone."""
    try:
        code = main()
    except SystemExit:
        raise
    except BaseException:
        traceback.print_exc()
        code = 1
    leave(code)


if __name__ == "__main__":
    run_rank()
