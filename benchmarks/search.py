"""How fast the planner searches, on one core: whole spaces to a zero gap, layouts screened per second, growth.

python benchmarks/search.py [quick]

`answer` is `layoutwise plan` as a whole process, imports included, in seconds of wall time and of processor time, with
the most memory that it held; `quick` leaves it out for all but the first job, and the largest clusters.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from planner.search import plan
from planner.space import space
from simulator.columns import legal
from simulator.job import Job, build_job
from simulator.screen import screen

# name: model, cluster, nodes, global batch, sequence
JOBS = {
    "gpt3-175b, 1,024 A100": ("gpt3-175b", "dgx-a100", 128, 1536, 2048),
    "gpt-1t, 3,072 A100": ("gpt-1t", "dgx-a100", 384, 3072, 2048),
    "llama-3.1-70b, 256 H100": ("llama-3.1-70b", "dgx-h100", 32, 512, 8192),
    "llama-3.1-405b, 16,384 H100": ("llama-3.1-405b", "dgx-h100", 2048, 2048, 8192),
}
# Nodes of eight GPUs.
GROWTH = (1, 4, 16, 64, 256, 1024, 2048)


def job(model: str, cluster: str, nodes: int, batch: int, seq_len: int) -> Job:
    training = {"global_batch_size": batch, "seq_len": seq_len}
    return build_job({"model": model, "cluster": cluster, "nodes": nodes, "training": training}, "benchmark")


def screening(task: Job) -> str:
    """The size of a space, and how fast its legal layouts are screened, tables of unit costs included and not."""
    task.graph  # noqa: B018 - built once for whatever follows
    start = time.process_time()
    columns = space(task)
    rows = np.flatnonzero(legal(task, columns))
    listed = time.process_time() - start
    found = columns.take(rows)
    rates = []
    for _ in range(2):
        start = time.process_time()
        screen(task, found)
        rates.append(len(rows) / (time.process_time() - start))
    return f"{len(columns):9,} {len(rows):9,} {listed:7.2f} s {rates[0]:11,.0f} {rates[1]:11,.0f}"


def answer(task: tuple[str, str, int, int, int]) -> tuple[float, float, float]:
    """Wall and processor seconds of `layoutwise plan` as a whole process, and GB that it held at most."""
    model, cluster, nodes, batch, seq_len = task
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.toml"
        text = f'model = "{model}"\ncluster = "{cluster}"\nnodes = {nodes}\n'
        path.write_text(f"{text}[training]\nglobal_batch_size = {batch}\nseq_len = {seq_len}\n", encoding="utf-8")
        command = [sys.executable, "-m", "planner.cli", "plan", str(path), "-o", folder]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024 / 1e9


def main() -> None:
    quick = "quick" in sys.argv
    # First, while this process is small: what it holds counts as held by those that it starts.
    answers = {name: answer(task) for name, task in list(JOBS.items())[: 1 if quick else None]}
    print(f"{'':30} {'space':>9} {'legal':>9} {'listed':>9} {'screened/s':>11} {'again/s':>11}")
    for name, task in JOBS.items():
        print(f"{name:30} {screening(job(*task))}")
    counted = f"{'illegal':>9} {'too big':>9} {'bounded':>9} {'simulated':>9} {'gap':>5}"
    print(f"\n{'':30} {'wall':>7} {'cpu':>7} {'memory':>7} {counted}")
    for name, (wall, cpu, held) in answers.items():
        c = plan(job(*JOBS[name])).certificate
        counts = f"{c.illegal:9,} {c.out_of_memory:9,} {c.bounded:9,} {c.simulated:9}"
        print(f"{name:30} {wall:5.2f} s {cpu:5.2f} s {held:4.2f} GB {counts} {c.lower_bound_gap:5.1%}")
    print(f"\ngrowth: llama-3.1-8b, H100, 2 sequences a GPU\n{'GPUs':>6} {'legal':>9} {'simulated':>9} {'cpu':>7}")
    for nodes in GROWTH[: 4 if quick else None]:
        task = job("llama-3.1-8b", "dgx-h100", nodes, 16 * nodes, 8192)
        start = time.process_time()
        c = plan(task).certificate
        seconds = time.process_time() - start
        print(f"{task.world_size:6} {c.space - c.illegal:9,} {c.simulated:9} {seconds:5.2f} s")


if __name__ == "__main__":
    main()
