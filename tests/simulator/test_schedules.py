"""Orders equal torch's own, forwards come before backwards, and what is alive matches the closed forms."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from simulator.schedules import Op, compute_order, peak_in_flight

torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")

SHAPES = [(pp, m) for pp in range(2, 9) for m in (pp, pp + 1, 2 * pp, 3 * pp + 1, 4 * pp)]


def torch_order(name: str, pp: int, chunks: int, microbatches: int) -> dict[int, list[str]]:
    """The order that torch's schedule class generates, without the communication it adds."""
    if name == "Interleaved1F1B":
        schedule = object.__new__(torch_schedules.ScheduleInterleaved1F1B)
        schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = pp, chunks, microbatches
        schedule.number_of_rounds = max(1, microbatches // pp)
        schedule.microbatches_per_round = microbatches // schedule.number_of_rounds
        orders = {r: schedule._calculate_single_rank_operations(r) for r in range(pp)}
    else:
        kind = {"GPipe": torch_schedules.ScheduleGPipe, "1F1B": torch_schedules.Schedule1F1B}[name]
        fake = SimpleNamespace(_num_stages=pp, _n_microbatches=microbatches)
        orders = kind._get_pipeline_order(fake)
    return {r: [str(a) for a in actions if a is not None and "REDUCE" not in str(a)] for r, actions in orders.items()}


def ours(name: str, rank: int, pp: int, chunks: int, microbatches: int) -> list[str]:
    return [str(op) for op in compute_order(name, rank, pp, chunks, microbatches)]


@pytest.mark.parametrize(("pp", "m"), SHAPES)
def test_gpipe_is_torchs(pp: int, m: int) -> None:
    expected = torch_order("GPipe", pp, 1, m)
    assert {r: ours("GPipe", r, pp, 1, m) for r in range(pp)} == expected


@pytest.mark.parametrize(("pp", "m"), SHAPES)
def test_1f1b_is_torchs(pp: int, m: int) -> None:
    expected = torch_order("1F1B", pp, 1, m)
    for rank in range(pp - 1):
        assert ours("1F1B", rank, pp, 1, m) == expected[rank]
    # For the last rank torch's printed order counts forwards from 1 (its counter starts one late); what it runs is
    # F0 B0 F1 B1: compare the kinds, and the microbatches of the backwards.
    last, printed = ours("1F1B", pp - 1, pp, 1, m), expected[pp - 1]
    assert [op.strip("0123456789") for op in last] == [op.strip("0123456789") for op in printed]
    assert [op for op in last if "B" in op] == [op for op in printed if "B" in op]


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize(("pp", "m"), [(pp, m) for pp in range(2, 9) for m in (pp, 2 * pp, 3 * pp, 4 * pp, pp - 1)])
def test_interleaved_is_torchs(pp: int, m: int, chunks: int) -> None:
    expected = torch_order("Interleaved1F1B", pp, chunks, m)
    assert {r: ours("Interleaved1F1B", r, pp, chunks, m) for r in range(pp)} == expected


@pytest.mark.parametrize("name", ["GPipe", "1F1B", "Interleaved1F1B"])
def test_every_microbatch_goes_forward_then_backward_once(name: str) -> None:
    chunks = 2 if name == "Interleaved1F1B" else 1
    for rank in range(4):
        seen: dict[Any, int] = {}
        for place, op in enumerate(compute_order(name, rank, 4, chunks, 8)):
            assert op not in seen
            seen[op] = place
        for op, place in seen.items():
            if op.kind == "B":
                assert seen[Op("F", op.stage, op.microbatch)] < place
        assert len(seen) == 2 * 8 * chunks


@pytest.mark.parametrize("m", [8, 16, 32])
@pytest.mark.parametrize("pp", [4, 8])
def test_microbatches_alive_match_the_closed_forms(pp: int, m: int) -> None:
    """GPipe m; 1F1B min(m, P - r); interleaved [(v-1)P + 2(P-1-r) + 1] / v rank-microbatches, at most m
    (arXiv 2104.04473, 2205.05198)."""
    for rank in range(pp):
        assert peak_in_flight("GPipe", rank, pp, 1, m) == ((rank, m),)
        assert sum(n for _, n in peak_in_flight("1F1B", rank, pp, 1, m)) == min(m, pp - rank)
        for chunks in (2, 4):
            alive = sum(n for _, n in peak_in_flight("Interleaved1F1B", rank, pp, chunks, m))
            assert alive == min((chunks - 1) * pp + 2 * (pp - 1 - rank) + 1, chunks * m)
