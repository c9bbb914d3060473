"""The engine against closed forms: bubbles, exposed communication, shared processors."""

from __future__ import annotations

import dataclasses
import inspect
import re
import time
from collections.abc import Iterable

import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import schedules
from simulator.cluster import ClusterSpec, CollectiveFit, Gpu, Link, MatmulFit
from simulator.engine import run_program
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.processors import Processors
from simulator.program import Program, with_communication
from simulator.schedules import SCHEDULES, Op, compute_order
from simulator.simulate import simulate
from simulator.stage import StageCost
from simulator.work import Work

FREE = {
    kind: (CollectiveFit(ranks=2, latency=0.0, efficiency=1e30),)
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
}


def ideal_job(pp: int, microbatches: int, message_bandwidth: float = 1e30) -> Job:
    """A job on `pp` devices whose network and optimizer cost nothing, unless messages are given a bandwidth."""
    gpu = Gpu("ideal", "gpu", 1e12, 1e30, {"bf16": 1e15}, {"bf16": MatmulFit(1e15)}, source="made up")
    fits = FREE | {"send_recv": (CollectiveFit(ranks=2, latency=0.0, efficiency=1.0),)}
    cluster = ClusterSpec("ideal", gpu, pp, Link("ideal", message_bandwidth, 0.0, fits), source="made up")
    job = build_job(
        {"model": "gpt2", "cluster": "dgx-a100", "nodes": 1, "training": {"global_batch_size": microbatches}}, "test"
    )
    return dataclasses.replace(job, cluster=cluster)


def program(layout: Layout, microbatches: int, forward: float, backward: float, **cost: float) -> Program:
    """Every rank holds the same work: a forward of its layers takes `forward` over all its chunks."""
    chunks = layout.virtual_stages
    stage = StageCost(
        forward=Work(compute=forward / chunks), backward=Work(compute=backward / chunks), parameters=0.0, saved=0.0,
        working=0.0, units=4, reduce=cost.get("reduce", 0.0), gather=0.0,
        backward_weight=Work(compute=cost.get("weight", 0.0) / chunks), reductions=((0.25, 0.25),) * 4,
    )  # fmt: skip
    stages = (stage,) * layout.stages
    orders = (compute_order(layout.schedule, r, layout.pp, chunks, microbatches) for r in range(layout.pp))
    return Program(tuple(tuple(with_communication(order, layout, stages)) for order in orders), stages)


@pytest.mark.parametrize("times", [(1.0, 2.0), (1.0, 1.6), (2.0, 1.0)])
@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("name", ["GPipe", "1F1B", "Interleaved1F1B"])
def test_bubble_is_the_closed_form(name: str, pp: int, times: tuple[float, float]) -> None:
    """(P-1)(F+B)/v beyond the ideal m(F+B): arXiv 2104.04473, section 2.2."""
    forward, backward = times
    chunks, m = (2 if name == "Interleaved1F1B" else 1), 4 * pp
    layout = Layout(pp=pp, schedule=name, virtual_stages=chunks)  # type: ignore[arg-type]
    run = run_program(ideal_job(pp, m), layout, program(layout, m, forward, backward))
    assert run.step_seconds == pytest.approx((m + (pp - 1) / chunks) * (forward + backward))
    assert run.breakdown.bubble == pytest.approx((pp - 1) / chunks * (forward + backward))


CASES = [(pp, m) for pp in (4, 8) for m in (8, 16, 32, 64)]
TIMES = [(1.0, 1.0, 1.0), (1.0, 1.2, 0.8), (1.0, 1.4, 0.6)]


def bubble(name: str, chunks: int, pp: int, m: int, times: tuple[float, float, float]) -> float:
    """Seconds beyond m(F + I + W) with free messages."""
    forward, gradient, weight = times
    layout = Layout(pp=pp, schedule=name, virtual_stages=chunks)  # type: ignore[arg-type]
    work = program(layout, m, forward, gradient + weight, weight=weight)
    run = run_program(ideal_job(pp, m), layout, work)
    assert run.breakdown.bubble == pytest.approx(run.step_seconds - m * sum(times))
    return run.step_seconds - m * sum(times)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize(("pp", "m"), CASES)
def test_bubbles_hold_for_unequal_times(pp: int, m: int, times: tuple[float, float, float]) -> None:
    """(P-1)(F+I+W) for GPipe and 1F1B, 1/v of it for the interleaved ones (arXiv 2104.04473, 2211.05953); ZB1P
    (P-1)(F+I-W), 1/v of it on v chunks (arXiv 2401.10241)."""
    forward, gradient, weight = times
    whole, zero = (pp - 1) * sum(times), (pp - 1) * (forward + gradient - weight)
    assert bubble("GPipe", 1, pp, m, times) == pytest.approx(whole)
    assert bubble("1F1B", 1, pp, m, times) == pytest.approx(whole)
    assert bubble("InterleavedZeroBubble", 1, pp, m, times) == pytest.approx(zero)
    for chunks in (2, 4):
        assert bubble("LoopedBFS", chunks, pp, m, times) == pytest.approx(whole / chunks)
        assert bubble("Interleaved1F1B", chunks, pp, m, times) == pytest.approx(whole / chunks)
    assert bubble("InterleavedZeroBubble", 2, pp, m, times) == pytest.approx(zero / 2)


@pytest.mark.parametrize(("pp", "m"), [(pp, m) for pp, m in CASES if m >= 2 * pp])
def test_bubbles_of_the_v_schedules(pp: int, m: int) -> None:
    """Where F = I = W = 1: ZBV (P-1)F/2, waiting for the gradient norm (arXiv 2401.10241, section 6); DualPipeV
    (P-1)(F&B + B - 3W)/2 = (P-1)(3 + 2 - 3)/2 (deepseek-ai/DualPipe)."""
    assert bubble("ZBVZeroBubble", 2, pp, m, TIMES[0]) == pytest.approx((pp - 1) / 2)
    assert bubble("DualPipeV", 2, pp, m, TIMES[0]) == pytest.approx(pp - 1)


@pytest.mark.parametrize(
    ("name", "chunks", "seconds"),
    [
        ("1F1B", 1, (21.0, 21.0, 21.0)),
        ("Interleaved1F1B", 2, (10.5, 10.5, 10.5)),
        ("Interleaved1F1B", 4, (5.25, 5.25, 5.25)),
        ("InterleavedZeroBubble", 1, (7.0, 9.8, 12.6)),
        ("InterleavedZeroBubble", 2, (3.5, 4.9, 6.3)),
        ("ZBVZeroBubble", 2, (3.5, 4.2, 5.6)),
        ("DualPipeV", 2, (7.0, 8.6, 10.7)),
    ],
)
def test_bubbles_of_eight_ranks_and_32_microbatches(name: str, chunks: int, seconds: tuple[float, ...]) -> None:
    """Seconds for (F, I, W) = (1, 1, 1), (1, 1.2, 0.8), (1, 1.4, 0.6): from another simulation of the same orders
    where no closed form is known, that is for the V schedules with unequal times."""
    assert [bubble(name, chunks, 8, 32, times) for times in TIMES] == pytest.approx(seconds)


@pytest.mark.parametrize("name", SCHEDULES)
def test_drawings_show_when_ops_run(name: str) -> None:
    """Every schedule is drawn in its docstring; F, I and W of a chunk take one slot of four characters, B two."""
    lines = (inspect.getdoc(schedules._ORDERS[name]) or "").splitlines()
    shape = dict(part.split(" = ") for part in lines[-1].strip("()").split(", "))
    pp, chunks, m = (int(shape[key]) for key in "Pvm")
    layout = Layout(pp=pp, schedule=name, virtual_stages=chunks)  # type: ignore[arg-type]
    work = program(layout, m, chunks, 2.0 * chunks, weight=chunks)
    spans = run_program(ideal_job(pp, m), layout, work, trace=True).timeline.spans
    for rank in range(pp):
        row = next(line.removeprefix(f"rank {rank}  ") for line in lines if line.startswith(f"rank {rank} "))
        cells = [(cell.start() / 4, cell.group().rstrip("-")) for cell in re.finditer(r"[^ .]+", row)]
        drawn = [(at, f"PP:({op.replace('&', ';')})OVERLAP_F_B" if "&" in op else f"PP:{op}") for at, op in cells]
        run = [span for span in spans if (span.rank, span.stream) == (rank, "compute") and span.name != "OPTIMIZER"]
        assert drawn == [(span.start, span.name) for span in run]


@pytest.mark.parametrize(("times", "seconds"), list(zip(TIMES, (0.0, 2.8, 5.6), strict=True)))
def test_zbv_steps_follow_each_other_without_a_bubble(times: tuple[float, float, float], seconds: float) -> None:
    """Where no step waits for a gradient norm, a second one of 32 microbatches on eight ranks adds its own work alone
    if F = I = W (arXiv 2401.10241, section 6), and a bubble that the fixed order cannot avoid if not."""
    forward, gradient, weight = times
    layout = Layout(pp=8, schedule="ZBVZeroBubble", virtual_stages=2)
    stages = program(layout, 32, forward, gradient + weight, weight=weight).stages
    once = [compute_order("ZBVZeroBubble", rank, 8, 2, 32) for rank in range(8)]
    twice = [(*order, *(op._replace(microbatch=32 + (op.microbatch or 0)) for op in order)) for order in once]

    def step_seconds(orders: Iterable[tuple[Op, ...]]) -> float:
        lowered = tuple(tuple(with_communication(order, layout, stages)) for order in orders)
        return run_program(ideal_job(8, 32), layout, Program(lowered, stages)).step_seconds

    assert step_seconds(twice) - step_seconds(once) - 32 * sum(times) == pytest.approx(seconds, abs=1e-9)


def test_a_pair_hides_communication_behind_the_others_computation() -> None:
    """Forward 1 s + 0.5 s of collectives, backward 2 s + 1.5 s: 5 s if the stack hides none. Else the backward covers
    the 0.5 s, the forward 1 s of the 1.5 s: 1 + 2 + 0.5 s. Where sharing slows computation by 25 %, 1.5 s hidden cost
    1.5 · 0.25 / 1.25 = 0.3 s."""
    stage = StageCost(
        forward=Work(compute=1.0, tp=0.5), backward=Work(compute=2.0, tp=1.5), parameters=0.0, saved=0.0, working=0.0,
        units=1, reduce=0.0, gather=0.0,
    )  # fmt: skip
    pair = Op("OVERLAP_F_B", parts=(Op("F", 0, 1), Op("B", 1, 0)))
    job, layout = ideal_job(1, 1), Layout()
    assert run_program(job, layout, Program(((pair,),), (stage, stage))).step_seconds == pytest.approx(5.0)
    job = dataclasses.replace(job, stack=dataclasses.replace(job.stack, overlaps_in_pair=("tp",)))
    run = run_program(job, layout, Program(((pair,),), (stage, stage)), trace=True)
    assert run.step_seconds == pytest.approx(3.5)
    assert run.breakdown.tp == pytest.approx(0.5)
    assert [span.name for span in run.timeline.spans] == ["PP:(0F1;1B0)OVERLAP_F_B"]
    gpu = dataclasses.replace(job.cluster.gpu, overlap_slowdown=0.25)
    job = dataclasses.replace(job, cluster=dataclasses.replace(job.cluster, gpu=gpu))
    assert run_program(job, layout, Program(((pair,),), (stage, stage))).step_seconds == pytest.approx(3.8)


def test_the_last_weight_gradient_carries_the_reduction() -> None:
    """ZB1P on two ranks, two microbatches, F = I = W = 1. Rank 1 computes F0 I0 F1 I1 W0 W1 from 1 s to 7 s; its
    reduction of 0.4 s runs in four buckets beside W1 and is over 0.1 s after it."""
    layout = Layout(pp=2, schedule="InterleavedZeroBubble")
    job = ideal_job(2, 2)
    job = dataclasses.replace(job, stack=dataclasses.replace(job.stack, overlap_grad_reduce=True))
    work = program(layout, 2, 1.0, 2.0, weight=1.0, reduce=0.4)
    run = run_program(job, layout, work, trace=True)
    names = [span.name for span in run.timeline.spans if span.rank == 1 and span.stream == "compute"]
    assert names == ["PP:1F0", "PP:1I0", "PP:1F1", "PP:1I1", "PP:1W0", "PP:1W1", "OPTIMIZER"]
    assert {span.name for span in run.timeline.spans if span.stream == "dp"} == {"PP:0W1", "PP:1W1"}
    assert run.step_seconds == pytest.approx(7.1)


@given(pp=st.integers(1, 6), per_rank=st.integers(1, 4), forward=st.floats(0.1, 3), backward=st.floats(0.1, 6))
@settings(deadline=None, max_examples=40)
def test_breakdown_sums_to_the_step(pp: int, per_rank: int, forward: float, backward: float) -> None:
    m, layout = pp * per_rank, Layout(pp=pp)
    run = run_program(ideal_job(pp, m), layout, program(layout, m, forward, backward))
    assert run.breakdown.total() == pytest.approx(run.step_seconds)


def test_slow_messages_are_counted_as_pp() -> None:
    """Two ranks, one microbatch: F0, message, F1, B1, message, B0. A message of 1024·768 bf16 is 1.57e6 bytes."""
    layout, size = Layout(pp=2), 1024 * 768 * 2
    job = ideal_job(2, 1, message_bandwidth=size / 0.5)
    job = dataclasses.replace(job, training=dataclasses.replace(job.training, global_batch_size=1))
    run = run_program(job, layout, program(dataclasses.replace(layout, schedule="GPipe"), 1, 1.0, 2.0))
    assert run.step_seconds == pytest.approx(1 + 0.5 + 1 + 2 + 0.5 + 2)
    assert run.breakdown.pp == pytest.approx(0.5)


def test_reduction_hides_behind_the_last_backward() -> None:
    """Four buckets of 0.2 s behind a backward of 2 s: three hide, the last one follows. Without overlap all 0.8 s."""
    layout = Layout(dp_replicate=2)
    job = ideal_job(2, 2)
    stack = dataclasses.replace(job.stack, overlap_grad_reduce=True)
    run = run_program(dataclasses.replace(job, stack=stack), layout, program(layout, 1, 1.0, 2.0, reduce=0.8))
    assert run.step_seconds == pytest.approx(3.2)
    assert run.breakdown.dp == pytest.approx(0.2)
    stack = dataclasses.replace(job.stack, overlap_grad_reduce=False)
    run = run_program(dataclasses.replace(job, stack=stack), layout, program(layout, 1, 1.0, 2.0, reduce=0.8))
    assert run.step_seconds == pytest.approx(3.8)


def test_long_reduction_is_exposed() -> None:
    """Four buckets of 1 s ready at 0.5, 1, 1.5 and 2 s of the backward: the stream ends at 0.5 + 4 = 4.5 s."""
    layout, job = Layout(dp_replicate=2), ideal_job(2, 2)
    job = dataclasses.replace(job, stack=dataclasses.replace(job.stack, overlap_grad_reduce=True))
    run = run_program(job, layout, program(layout, 1, 1.0, 2.0, reduce=4.0))
    assert run.step_seconds == pytest.approx(1.0 + 4.5)


def test_processors_share_and_log() -> None:
    """Two processors: one job alone runs at full speed, two at 0.8 each, four at half of that."""
    env, log = simpy.Environment(), []
    pool = Processors(env, (1.0, 0.8))

    def worker(name: str, start: float, seconds: float, ranks: int) -> simpy.events.ProcessGenerator:
        yield env.timeout(start)
        yield pool.work(seconds, ranks)
        log.append((round(env.now, 9), name))

    env.process(worker("a", 0.0, 2.0, 1))  # 1 s alone, then 1 s of work at 0.8 beside b: done at 2.25
    env.process(worker("b", 1.0, 1.0, 1))  # 1 s of work at 0.8: done at 2.25 too
    env.process(worker("c", 3.0, 1.0, 4))  # four ranks on two processors: 0.8 · 2/4 = 0.4, done at 5.5
    env.run()
    assert log == [(2.25, "a"), (2.25, "b"), (5.5, "c")]


def test_processors_finish_late_in_a_long_step() -> None:
    """At 1e5 s the clock's own grain is 1.5e-11 s: a job is done when its turn is over, not when nothing is left."""
    env = simpy.Environment(initial_time=1e5)
    pool = Processors(env, (1.0, 0.7))

    def worker(seconds: float) -> simpy.events.ProcessGenerator:
        yield pool.work(seconds, 1)

    for seconds in (1 / 3, 1 / 7, 0.1):
        env.process(worker(seconds))
    env.run(until=1e5 + 10)
    assert not pool.jobs


def test_spans_carry_torchs_names() -> None:
    layout, job = Layout(pp=2), ideal_job(2, 2)
    run = run_program(job, layout, program(layout, 2, 1.0, 2.0), trace=True)
    compute = [s.name for s in run.timeline.spans if s.stream == "compute" and s.rank == 0]
    assert compute == ["PP:0F0", "PP:0F1", "PP:0B0", "PP:0B1", "OPTIMIZER"]
    assert not run_program(job, layout, program(layout, 2, 1.0, 2.0)).timeline.spans


@given(factor=st.floats(1.0, 8.0), tp=st.sampled_from([1, 2, 8]), pp=st.sampled_from([1, 2, 4]))
@settings(deadline=None, max_examples=20)
def test_more_bandwidth_never_slows_a_step(factor: float, tp: int, pp: int) -> None:
    job = build_job(
        {"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 4, "training": {"global_batch_size": 128}}, "test"
    )
    dp = 32 // (tp * pp)
    layout = Layout(dp_shard=dp, zero_stage=1, tp=tp, pp=pp, sequence_parallel=tp > 1)
    cluster, out = job.cluster, job.cluster.scale_out
    assert out is not None
    faster = dataclasses.replace(
        cluster,
        scale_up=dataclasses.replace(cluster.scale_up, bandwidth=cluster.scale_up.bandwidth * factor),
        scale_out=dataclasses.replace(out, bandwidth=out.bandwidth * factor),
    )
    before = simulate(job, layout).step_seconds
    assert simulate(dataclasses.replace(job, cluster=faster), layout).step_seconds <= before * (1 + 1e-9)


def test_sixteen_thousand_gpus_take_less_than_two_seconds() -> None:
    """A step of llama 3.1 405B on 16,384 GPUs, the cluster's graph included, in seconds of one processor."""
    data = {"model": "llama-3.1-405b", "cluster": "dgx-h100", "nodes": 2048}
    job = build_job(data | {"training": {"global_batch_size": 2048, "seq_len": 8192}}, "test")
    layout = parse_layout("tp=8 pp=16 virtual_stages=7", job)
    assert not layout.problems(job)
    start = time.process_time()
    simulate(job, layout)
    assert time.process_time() - start < 2.0


def test_ops_that_nothing_can_interleave_are_one_event() -> None:
    """Without a pipeline a step costs the same to simulate however many microbatches it has, and takes their sum."""
    job, layout = ideal_job(1, 1), Layout()
    few, many = (run_program(job, layout, program(layout, m, 1.0, 2.0)) for m in (2, 512))
    assert few.events == many.events < 10
    assert many.step_seconds == pytest.approx(512 * 3.0)


def test_a_rank_in_the_middle_shares_its_link_between_both_ways() -> None:
    """1F1B over three ranks, three microbatches, a message takes 4 s alone. What rank 1 sends:

    F0 from 6 s, F1 from 10 s on (behind F0): 4 s each. B0 from 19 s on, and F2 from 20 s on: they share the link, so
    that B0's last 3 s take 6, until 26 s. Then B1, which has waited behind it, shares it with the last second of F2
    until 28 s, and its last 3 s are alone, until 31 s. B2 is alone, from 37 s on: rank 0 is done 4 + 2 s later.
    """
    job, layout = ideal_job(3, 3, message_bandwidth=1024 * 768 * 2 / 4.0), Layout(pp=3)
    run = run_program(job, layout, program(layout, 3, 1.0, 2.0), trace=True)
    sent = {s.name: (s.start, s.start + s.seconds) for s in run.timeline.spans if s.rank == 1 and s.stream == "send"}
    assert sent == {
        "PP:1SEND_F0": (6.0, 10.0), "PP:1SEND_F1": (10.0, 14.0), "PP:1SEND_F2": (20.0, 28.0),
        "PP:1SEND_B0": (19.0, 26.0), "PP:1SEND_B1": (26.0, 31.0), "PP:1SEND_B2": (37.0, 41.0),
    }  # fmt: skip
    assert run.step_seconds == pytest.approx(43.0)
