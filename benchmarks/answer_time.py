"""How long the tool takes to answer, as a user waits for it: whole processes, medians of several runs.

python benchmarks/answer_time.py [runs]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOB = """
model = "{model}"
cluster = "{cluster}"
nodes = {nodes}
[training]
global_batch_size = {batch}
seq_len = {seq_len}
"""

# name: model, cluster, nodes, global batch, sequence
JOBS = {
    "llama-3.1-8b, 8 H100": ("llama-3.1-8b", "dgx-h100", 1, 128, 8192),
    "llama-3.1-70b, 256 H100": ("llama-3.1-70b", "dgx-h100", 32, 512, 8192),
    "gpt3-175b, 1024 A100": ("gpt3-175b", "dgx-a100", 128, 1536, 2048),
}
# The scaling curve of the second of them.
COUNTS = "4,8,16,32,64"


def seconds(command: list[str]) -> float:
    """Wall seconds of one run of a command."""
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    layoutwise = [sys.executable, "-m", "planner.cli"]
    commands = {"layoutwise --help": [*layoutwise, "--help"]}
    with tempfile.TemporaryDirectory() as folder:
        for name, job in JOBS.items():
            path = Path(folder) / f"{name.replace(' ', '-')}.toml"
            model, cluster, nodes, batch, seq_len = job
            text = JOB.format(model=model, cluster=cluster, nodes=nodes, batch=batch, seq_len=seq_len)
            path.write_text(text, encoding="utf-8")
            commands[f"layoutwise plan: {name}"] = [*layoutwise, "plan", str(path), "-o", folder]
        curve = Path(folder) / "llama-3.1-70b,-256-H100.toml"
        commands[f"layoutwise plan --nodes {COUNTS}: 70B"] = [
            *layoutwise, "plan", str(curve), "--nodes", COUNTS, "-o", folder,
        ]  # fmt: skip
        for name, command in commands.items():
            taken = [seconds(command) for _ in range(runs)]
            print(f"{name:45} median {statistics.median(taken):6.2f} s  (min {min(taken):.2f}, max {max(taken):.2f})")


if __name__ == "__main__":
    main()
