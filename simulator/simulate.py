"""simulate(job, layout) -> Prediction: the front door of the simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulator.engine import run_program
from simulator.error_bars import step_interval
from simulator.layout import Layout
from simulator.memory import capacity, fullest, memory_per_rank, memory_timeline
from simulator.memory_curve import memory_curve
from simulator.program import build_program
from simulator.results import Prediction
from simulator.risk import needed, out_of_memory_probability, shortfall
from simulator.sync_cost import is_simulated, synchronise

if TYPE_CHECKING:
    from simulator.job import Job


def simulate(job: Job, layout: Layout, trace: bool = False) -> Prediction:
    """Predict one step of one layout: seconds, where they go, and bytes per rank.

    Where replicas keep together in another way than by an all-reduce, or ranks and steps differ, many steps of all
    replicas are simulated after one of one replica, and the mean is predicted; the timeline is the one step.

    A layout that does not fit is predicted all the same, with `fits` false and the reason in `problems`.

    Args:
        layout: a legal one: `layout.problems(job)` is empty.
        trace: keep every span, and the memory over time, in `timeline`.
    """
    program = build_program(job, layout)
    ranks = memory_per_rank(job, layout, program.stages)
    run = run_program(job, layout, program, trace)
    memory, timeline = fullest(ranks), run.timeline
    if trace:
        timeline = timeline._replace(memory=memory_curve(memory_timeline(job, layout, program.stages), timeline.spans))
    step_seconds, breakdown, synchronisation = run.step_seconds, run.breakdown, None
    if is_simulated(job, layout):
        synchronisation, breakdown = synchronise(job, layout, run)
        step_seconds = synchronisation.mean
    reason = shortfall(job, layout, ranks)
    risk = out_of_memory_probability(needed(job, layout, ranks), capacity(job, layout), job.stack.name)
    tokens = job.tokens_per_step / step_seconds
    # Ranks that share processors are no more devices than there are.
    per_gpu = tokens / min(layout.world_size, job.world_size)
    gpu, seq_len = job.cluster.gpu, job.training.seq_len
    peak = gpu.peak[gpu.arithmetic(job.training.precision)]
    flops = job.model.flops_per_token(seq_len)
    if job.training.peft != "none":
        flops -= job.model.frozen_flops_per_token()
    recomputed = job.model.recomputed_flops_per_token(seq_len, layout.recompute)
    if layout.recompute == "selective":
        recomputed *= job.stack.selective_recompute.get("attention", 0.0)
    return Prediction(
        layout=layout,
        fits=not reason,
        problems=(reason,) if reason else (),
        step_seconds=step_seconds,
        tokens_per_second=tokens,
        tokens_per_second_per_gpu=per_gpu,
        mfu=per_gpu * flops / peak,
        hfu=per_gpu * (flops + recomputed) / peak,
        breakdown=breakdown,
        memory=memory,
        memory_per_stage=ranks,
        out_of_memory_probability=risk,
        timeline=timeline,
        synchronisation=synchronisation,
        interval=step_interval(job, step_seconds),
    )
