"""Every level of the search's bounds is below the next one, and columns say what Layout says."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from in_flight import peak_in_flight
from layout_columns import columns_of

from planner.search import lower_bound
from planner.space import space
from simulator.columns import Columns, distinct, legal
from simulator.critical_path import critical_path, pipeline_times, step_at_least
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.lifetimes import as_good_as
from simulator.memory import fullest, memory_per_rank
from simulator.program import build_program, stage_costs
from simulator.screen import before_backward, screen
from simulator.simulate import simulate
from simulator.stage_split import balanced_layers

HAIR = 1 + 1e-9


def job(model: str, cluster: str = "dgx-h100", nodes: int = 1, search: Any = None, **training: Any) -> Job:
    data = {"model": model, "cluster": cluster, "nodes": nodes, "training": training, "search": search or {}}
    return build_job(data, "test")


# Dense and mixed blocks, tied heads, devices with and without an odd number of ranks per domain, every stack.
JOBS: dict[str, dict[str, Any]] = {
    "gpt2": {"cluster": "dgx-a100", "global_batch_size": 24, "seq_len": 1024, "stack": "megatron-2021"},
    "llama-3.1-8b": {"nodes": 2, "global_batch_size": 64, "seq_len": 4096, "stack": "torchtitan"},
    "mixtral-8x7b": {"nodes": 2, "global_batch_size": 64, "seq_len": 2048, "stack": "megatron-core"},
    "gpt-oss-120b": {"nodes": 2, "global_batch_size": 32, "seq_len": 2048, "stack": "megatron-bridge"},
    "llama-3.1-70b": {"nodes": 4, "global_batch_size": 96, "seq_len": 8192, "stack": "layoutwise-cuda"},
    "bert-large": {"cluster": "workstation-4x4090", "global_batch_size": 32, "seq_len": 512, "stack": "torchtitan"},
    "gpt3-175b": {"cluster": "dgx-a100", "nodes": 12, "global_batch_size": 96, "seq_len": 2048},
}


def sample(task: Job, count: int, seed: int = 0) -> Columns:
    """Some legal layouts of a job's space."""
    columns = space(task)
    rows = np.flatnonzero(legal(task, columns)).tolist()
    return columns.take(np.array(random.Random(seed).sample(rows, min(count, len(rows)))))


@pytest.mark.parametrize("name", JOBS)
def test_legal_is_what_layouts_say(name: str) -> None:
    """On a sample of the whole space, illegal layouts included."""
    task = job(name, **JOBS[name])
    columns = space(task)
    found = legal(task, columns)
    for row in random.Random(1).sample(range(len(columns)), min(len(columns), 1000)):
        layout = columns.layout(row)
        assert found[row] == (not layout.problems(task)), layout.short()


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_legal_is_what_layouts_say_over_the_whole_space(name: str) -> None:
    """pytest -m slow tests/simulator/test_screen.py, in about three minutes."""
    task = job(name, **JOBS[name])
    columns = space(task)
    expected = [not columns.layout(row).problems(task) for row in range(len(columns))]
    assert legal(task, columns).tolist() == expected


def hold_the_levels(task: Job, columns: Columns) -> None:
    """No bound is above what the simulator says: of seconds on any level, of bytes."""
    screened = screen(task, columns)
    for row in range(len(columns)):
        layout = columns.layout(row)
        stages = stage_costs(task, layout)
        shared = step_at_least(task, layout, stages, pipeline_times(task, layout, stages))
        whole, step = critical_path(task, layout, stages), simulate(task, layout)
        assert lower_bound(task, layout, stages) <= shared * HAIR, layout.short()
        for bound in (screened.seconds[row], shared, whole):
            assert bound <= step.step_seconds * HAIR, layout.short()
        assert screened.memory[row] <= step.memory.peak * HAIR, layout.short()


@pytest.mark.parametrize("name", JOBS)
def test_every_level_is_below_the_next(name: str) -> None:
    task = job(name, **JOBS[name])
    hold_the_levels(task, sample(task, 20))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_every_level_is_below_the_next_on_many_layouts(name: str) -> None:
    """2,000 layouts in all: pytest -m slow tests/simulator/test_screen.py."""
    task = job(name, **JOBS[name])
    hold_the_levels(task, sample(task, 290, seed=7))


def test_screen_alone_on_links_is_tight() -> None:
    """One microbatch after another on one rank: the bound is the step, but for the reduction of its gradients."""
    task = job("llama-3.1-8b", nodes=1, global_batch_size=8, seq_len=4096)
    layout = Layout(tp=8, sequence_parallel=True)
    assert not layout.problems(task)
    bound = screen(task, columns_of([layout])).seconds[0]
    assert bound == pytest.approx(simulate(task, layout).step_seconds, rel=1e-9)


def test_where_nothing_meets_the_critical_path_is_the_step() -> None:
    """Messages of two ranks inside a node, free of others."""
    task = job("llama-3.1-8b", nodes=1, global_batch_size=16, seq_len=4096)
    layout = Layout(tp=4, pp=2, sequence_parallel=True, schedule="Interleaved1F1B", virtual_stages=4)
    stages = build_program(task, layout).stages
    assert critical_path(task, layout, stages) == pytest.approx(simulate(task, layout).step_seconds, rel=1e-9)


def test_columns_are_the_layouts() -> None:
    layouts = [Layout(tp=2, pp=4, stage_layers=(1, 2, 3, 4)), Layout(rank_order="tp-cp-ep-pp-dp"), Layout()]
    columns = columns_of(layouts)
    assert [columns.layout(row) for row in range(len(columns))] == layouts


def test_distinct_finds_every_combination() -> None:
    draw = np.random.default_rng(0)
    columns = [draw.integers(0, top, 500) for top in (3, 10**6, 17)]
    firsts, codes = distinct(*columns)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(firsts) == len(set(rows))
    assert all(rows[firsts[code]] == row for code, row in zip(codes, rows, strict=True))


SHAPES = [
    ("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("Interleaved1F1B", 4), ("LoopedBFS", 2),
    ("InterleavedZeroBubble", 1), ("InterleavedZeroBubble", 2), ("ZBVZeroBubble", 2), ("DualPipeV", 2),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "chunks"), SHAPES)
def test_what_is_alive_before_the_first_backward(schedule: str, chunks: int) -> None:
    """Counted from the order of ops; and a few rounds of microbatches are as full as many."""
    for ranks in range(2, 6):
        for count in range(2 * ranks, 7 * ranks):
            if count % max(1, count // ranks):
                continue
            layout = Layout(pp=ranks, virtual_stages=chunks, schedule=schedule)  # type: ignore[arg-type]
            for rank in range(ranks):
                moments = peak_in_flight(schedule, rank, ranks, chunks, count)
                shape, few = (schedule, rank, ranks, chunks), as_good_as(schedule, ranks, count)
                assert set(peak_in_flight(*shape, few)) == set(moments)
                alive = before_backward(layout, rank, count)
                by_stage = dict(zip(layout.stages_of(rank), alive, strict=True))
                assert any(all(held.alive >= by_stage[held.stage] for held in moment) for moment in moments)


def test_balanced_stages() -> None:
    """14 blocks of 16, embedding and head of 8: 56 + 8 at the ends, 64 between, where an even cut has 72 (4 + 8)."""
    assert balanced_layers((16,) * 14, 8, 8, 4, 1, False) == (3, 4, 4, 3)
    # A head of two blocks: the last rank has two blocks less; the embedding is nothing.
    assert balanced_layers((16,) * 14, 0, 32, 4, 1, False) == (4, 4, 4, 2)
    # On a V the first rank holds both ends.
    assert balanced_layers((16,) * 14, 16, 16, 2, 2, True) == (3, 4, 4, 3)
    # Blocks of two kinds: 4 x 8 + 4 x 16 over two stages is 48 each.
    assert balanced_layers((8,) * 4 + (16,) * 4, 0, 0, 2, 1, False) == (5, 3)


def test_balanced_stages_name_all_blocks_and_leave_no_stage_empty() -> None:
    draw = random.Random(3)
    for _ in range(300):
        ranks, chunks = draw.randint(2, 8), draw.randint(1, 4)
        blocks = draw.randint(ranks * chunks, 80)
        works = tuple(draw.choice([(16,), (8, 16)][draw.randint(0, 1)]) for _ in range(blocks))
        found = balanced_layers(works, draw.randint(0, 20), draw.randint(0, 40), ranks, chunks, False)
        assert len(found) == ranks * chunks and sum(found) == blocks and min(found) >= 1


def test_memory_of_screen_is_most_of_it() -> None:
    """State and what is alive before the first backward; what a backward works on and gathers is left out."""
    task = job("llama-3.1-70b", nodes=4, global_batch_size=96, seq_len=8192)
    columns = sample(task, 21)
    screened, shares = screen(task, columns), []
    for row in range(len(columns)):
        layout = columns.layout(row)
        peak = fullest(memory_per_rank(task, layout, stage_costs(task, layout))).peak
        shares.append(screened.memory[row] / peak)
    assert 0.8 < sorted(shares)[10] <= max(shares) <= HAIR
