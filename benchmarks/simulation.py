"""How fast the simulator simulates, on one core: four sizes, and how the cost grows.

python benchmarks/simulation.py [runs]

`first` is simulate() on a job that nobody asked anything yet, so that it builds the cluster's graph too; `again` is the
median of further calls, as a search makes them. Events are those of the engine's queue.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from simulator.engine import run_program
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.program import build_program
from simulator.simulate import simulate

# model, nodes of 8 H100, global batch, layout; sequences of 8,192 tokens
SIZES = [
    ("llama-3.1-8b", 1, 128, "tp=2 pp=4"),
    ("llama-3.1-70b", 32, 512, "tp=8 pp=4 virtual_stages=5"),
    ("llama-3.1-405b", 512, 2048, "tp=8 pp=16 virtual_stages=7"),
    ("llama-3.1-405b", 2048, 2048, "tp=8 pp=16 virtual_stages=7"),
]
GROWTH = {
    "GPUs (tp=8 pp=16 virtual_stages=7, 16 microbatches)": [
        ("llama-3.1-405b", nodes, nodes, "tp=8 pp=16 virtual_stages=7") for nodes in (16, 64, 256, 1024, 2048, 8192)
    ],
    "stages (1,024 GPUs, tp=8, 32 microbatches)": [
        ("llama-3.1-405b", 128, 32 * 128 // pp, f"tp=8 pp={pp}" + (f" virtual_stages={v}" if v > 1 else ""))
        for pp, v in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (16, 7))
    ],
    "microbatches (8 GPUs, pp=8)": [("llama-3.1-8b", 1, m, "pp=8") for m in (8, 32, 128, 512, 2048, 8192)],
    "microbatches (8 GPUs, tp=8 pp=1)": [("llama-3.1-8b", 1, m, "tp=8") for m in (8, 128, 2048, 8192)],
}
HEADER = f"{'GPUs':>6} {'layout':32} {'m':>5} {'first':>9} {'again':>9} {'events':>8} {'events/s':>9}"


def case(model: str, nodes: int, batch: int, layout: str) -> tuple[Job, Layout]:
    """A job and a layout of it that is legal."""
    training = {"global_batch_size": batch, "seq_len": 8192}
    job = build_job({"model": model, "cluster": "dgx-h100", "nodes": nodes, "training": training}, "benchmark")
    chosen = parse_layout(layout, job)
    assert not chosen.problems(job), chosen.problems(job)
    return job, chosen


def seconds(call: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def row(model: str, nodes: int, batch: int, text: str, runs: int) -> str:
    """One line of a table: seconds of simulate(), events and events per second of the engine alone."""
    job, layout = case(model, nodes, batch, text)
    first = seconds(lambda: simulate(job, layout))
    again = statistics.median(seconds(lambda: simulate(job, layout)) for _ in range(runs))
    program = build_program(job, layout)
    events = run_program(job, layout, program).events
    engine = statistics.median(seconds(lambda: run_program(job, layout, program)) for _ in range(runs))
    m = layout.microbatches(batch)
    return (
        f"{layout.world_size:6} {text:32} {m:5} {first * 1e3:6.1f} ms {again * 1e3:6.1f} ms {events:8} "
        f"{events / engine:9,.0f}"
    )


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    simulate(*case("llama-3.1-8b", 1, 8, "tp=8"))  # imports what is imported late
    print(f"four sizes, llama 3.1 8B, 70B, 405B\n{HEADER}")
    for size in SIZES:
        print(row(*size, runs))
    for what, cases in GROWTH.items():
        print(f"\ngrowth with {what}\n{HEADER}")
        for one in cases:
            print(row(*one, runs))


if __name__ == "__main__":
    main()
