"""`make examples`: plan every job in examples/ and write its index, examples/README.md, with questions and answers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from planner.other_nodes import node_counts, over_nodes
from planner.plan import Plan
from planner.search import plan
from simulator.files import write_text
from simulator.job import read_job
from simulator.layout import Layout
from simulator.units import show_seconds

EXAMPLES = Path(__file__).parents[2] / "examples"
INDEX = EXAMPLES / "README.md"
# Its cluster is a profile of the machine in front of you.
UNKNOWN = "this-machine"
# Planned in more than about three seconds each, by the slow tests.
LARGE = (
    "deepseek-v3-2048-h800",
    "gpt-1t-3072-a100",
    "gpt-530b-2240-a100",
    "gpt-oss-120b-64-b200",
    "gpt3-175b-1024-a100",
    "kimi-k2-1024-h200",
    "llama-405b-16384-h100",
    "llama-405b-nvfp4-512-gb300",
    "llama-405b-pinned-1024-h200",
    "llama-70b-aws-p4d-128",
    "llama-8b-ethernet-32-a100",
    "qwen3-235b-a22b-256-h100",
    "qwen3-30b-a3b-16-h100",
)
_HEAD = """# Examples

Each file is a job, and its first lines are the question. `layoutwise plan examples/NAME.toml` answers it; the answers
below are predictions of this version, written by `make examples`. MFU is of the data sheet's peak for the job's
precision; GiB are those of the fullest GPU, with the probability that the run needs more than there is.

| job | GPUs | question | recommended layout | step | tokens/s/GPU | MFU | GiB (risk) |
|---|--:|---|---|--:|--:|--:|--:|
"""


def names() -> list[str]:
    """All examples, small ones first."""
    files = sorted(path.stem for path in EXAMPLES.glob("*.toml"))
    return sorted(files, key=lambda name: (name == UNKNOWN, _ranks(name), name))


def _ranks(name: str) -> int:
    return 0 if name == UNKNOWN else read_job(EXAMPLES / f"{name}.toml").world_size


def question(name: str) -> str:
    """The comment at the top of an example."""
    lines = (EXAMPLES / f"{name}.toml").read_text(encoding="utf-8").splitlines()
    top = lines[: next(place for place, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(line.lstrip("# ") for line in top)


def answer(name: str) -> Plan:
    """What `layoutwise plan` recommends: on the nodes of the file, or on those that its objective chooses."""
    job = read_job(EXAMPLES / f"{name}.toml")
    if not job.objective.nodes and job.objective.goal == "fastest":
        return plan(job)
    scaling, plans = over_nodes(job, node_counts(job), top=1)
    return next(one for one in plans if one.job.nodes == scaling.chosen)


def row(name: str, found: Plan | None) -> str:
    """One line of the index."""
    link = f"[{name}]({name}.toml)"
    if found is None:
        return f"| {link} | | {question(name)} | | | | | |"
    best = found.best
    cells = (
        link, f"{found.job.world_size:,}", question(name), f"`{_shown(best.layout)}`", show_seconds(best.step_seconds),
        f"{best.tokens_per_second_per_gpu:,.0f}", f"{best.mfu:.1%}",
        f"{best.memory.peak / 2**30:.1f} ({best.out_of_memory_probability:.0%})",
    )  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _shown(layout: Layout) -> str:
    """Without the list of layers: how many the stages have is enough to read."""
    text = dataclasses.replace(layout, stage_layers=None).short()
    layers = layout.stage_layers
    return text if layers is None else f"{text}, stages of {min(layers)} to {max(layers)} layers"


def index(plans: dict[str, Plan | None]) -> str:
    return _HEAD + "".join(f"{row(name, plans[name])}\n" for name in names())


def main() -> None:
    plans: dict[str, Plan | None] = {}
    for name in names():
        print(name, file=sys.stderr, flush=True)
        plans[name] = None if name == UNKNOWN else answer(name)
    print(f"written to {write_text(INDEX, index(plans))}")


if __name__ == "__main__":
    main()
