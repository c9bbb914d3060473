"""How fast are replicas over parameter servers simulated? Every replica is a process; transfers share links by kind.

    python benchmarks/synchronisation.py [UPDATES]

512 workers on 64 nodes push to and pull from 16 servers, asynchronously, UPDATES (1,000) times each, with jitter, on
one processor. The 8,192 flows of every moment are few kinds: workers beside a server and workers elsewhere, out
and back.
"""

from __future__ import annotations

import dataclasses
import sys
import time

from simulator.job import build_job
from simulator.layout_text import parse_layout
from simulator.simulate import simulate
from simulator.stragglers import Stragglers

JOB = {
    "model": "gpt2",
    "cluster": "dgx-h100",
    "nodes": 64,
    "training": {"stack": "layoutwise-cuda", "global_batch_size": 4096, "seq_len": 1024},
}
CASES = (
    ("asynchronous", "sync=parameter_server servers=16 staleness=none"),
    ("at most 4 steps apart", "sync=parameter_server servers=16 staleness=4"),
    ("synchronous", "sync=parameter_server servers=16"),
    ("local SGD, 50 steps", "sync=local_sgd sync_interval=50"),
)


def main() -> None:
    """Print a line for every way."""
    updates = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    job = dataclasses.replace(
        build_job(JOB, "job 'benchmark'"), stragglers=Stragglers(jitter="lognormal 5 %", steps=updates)
    )
    for name, text in CASES:
        start = time.process_time()
        found = simulate(job, parse_layout(text, job)).synchronisation
        seconds = time.process_time() - start
        assert found is not None
        print(
            f"{name:22} {512 * updates:,} updates, {found.events:,} events in {seconds:.1f} s of one processor: "
            f"{found.events / seconds:,.0f} events/s; a step takes {found.mean * 1e3:.1f} ms, "
            f"p95 {found.p95 * 1e3:.1f} ms"
        )


if __name__ == "__main__":
    main()
