"""Plans and what lies beside them, for the tests of the page."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from planner.other_nodes import scaling_of
from planner.plan import Plan, write_plan
from planner.scaling import Scaling
from planner.search import plan
from simulator.files import write_json
from simulator.job import build_job
from simulator.results import MeasuredTimeline, Measurement, Quantiles
from simulator.simulate import simulate

JOB: dict[str, Any] = {
    "model": "llama-3.1-8b",
    "cluster": "dgx-h100",
    "nodes": 2,
    "training": {"global_batch_size": 64, "seq_len": 4096, "stack": "megatron-core"},
    "search": {"pp": [1, 2, 4], "tp": [1, 2, 8], "recompute": ["none", "full"]},
}
# Of `validate published --json`: predicted / measured - 1 is 0, +25 % and -20 %, and a row that is not compared.
EXAM_ROWS = [
    ("a", 1000.0, 1000.0, "megatron-core", "high"),
    ("b", 400.0, 500.0, "megatron-core", "medium"),
    ("c", 500.0, 400.0, "torchtitan", "high"),
    ("d", 500.0, 400.0, "torchtitan", "low"),
]


def make_plan(**job: Any) -> Plan:
    """A plan with runners-up and a baseline; words change keys of the job."""
    return plan(build_job(JOB | job, "test"), top=4)


def scaling_beside(found: Plan) -> Scaling:
    """The plan's job on its nodes and on twice as many, where a step takes as long."""
    job = dataclasses.replace(found.job, nodes=2 * found.job.nodes)
    best = dataclasses.replace(found.best, tokens_per_second_per_gpu=found.best.tokens_per_second_per_gpu / 2)
    return scaling_of(found.job, [found, dataclasses.replace(found, job=job, best=best)], (), False)


def exam_document() -> dict[str, Any]:
    rows = [
        {
            "id": name, "job": "", "confidence": confidence, "gpu": "H100", "arch": "llama", "framework": "x",
            "measured": {"tokens_per_second_per_gpu": measured, "peak_memory_gib": None},
            "predicted": {"tokens_per_second_per_gpu": predicted, "peak_memory_gib": 1.0},
            "error": predicted / measured - 1, "stack": stack,
        }
        for name, measured, predicted, stack, confidence in EXAM_ROWS
    ]  # fmt: skip
    skipped = rows[0] | {"id": "e", "error": None, "predicted": {"tokens_per_second_per_gpu": None}, "stack": None}
    return {"rows": [*rows, skipped], "summary": {"count": 4}}


def make_folder(folder: Path, found: Plan, measured: bool = True) -> Path:
    """A folder as `plan`, `run --profile` and `validate published --json` leave it. The measured step is the predicted
    one on every rank, twice as slow."""
    write_plan(found, folder / "plan.json")
    if not measured:
        return folder
    step, layout = 2 * found.best.step_seconds, found.layout
    measurement = Measurement(
        layout=layout, world_size=layout.world_size, steps=3, warmup=1,
        step_seconds=Quantiles(step, 0.9 * step, 1.2 * step), tokens_per_second=found.job.tokens_per_step / step,
        peak_memory=(found.best.memory.peak / 2, found.best.memory.peak / 4), losses=(3.0, 2.5, 2.0),
        grad_norms=(1.0, 1.0, 1.0), device="cpu", versions={},
    )  # fmt: skip
    write_json(folder / "measurement.json", measurement)
    spans = [
        dataclasses.replace(span, rank=rank, start=2 * span.start, seconds=2 * span.seconds)
        for rank in range(layout.world_size)
        for span in simulate(found.job, layout, trace=True).timeline.spans
        if span.rank == layout.coordinates(rank)["pp"]
    ]
    write_json(folder / "profile" / "timeline.json", MeasuredTimeline(layout, 3, step, "cpu", tuple(spans)))
    (folder / "validation.json").write_text(json.dumps(exam_document()))
    return folder
