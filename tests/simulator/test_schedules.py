"""Orders and lowered programs equal torch's own, never deadlock, and hold what the closed forms say."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from in_flight import peak_in_flight

from simulator.layout import Layout
from simulator.program import sharded_order, with_communication
from simulator.schedules import MULTI_STAGE, SCHEDULES, SPLIT_BACKWARD, V_PLACEMENT, Op, compute_order
from simulator.stage import StageCost
from simulator.work import Work

torch_schedules = pytest.importorskip("torch.distributed.pipelining.schedules")
torch_placement = pytest.importorskip("torch.distributed.pipelining._utils").generate_stage_to_rank_mapping

SHAPES = [(pp, m) for pp in range(2, 9) for m in (pp, pp + 1, 2 * pp, 3 * pp + 1, 4 * pp)]


def torch_actions(name: str, pp: int, chunks: int, microbatches: int) -> dict[int, list[Any]]:
    """The order that torch's schedule class generates, without the communication it adds."""
    kind = torch_schedules.get_schedule_class(name)
    if name not in MULTI_STAGE:
        orders = kind._get_pipeline_order(SimpleNamespace(_num_stages=pp, _n_microbatches=microbatches))
        return {r: [a for a in actions if a and "REDUCE" not in str(a)] for r, actions in orders.items()}
    schedule = object.__new__(kind)
    schedule.pp_group_size, schedule.n_local_stages, schedule._n_microbatches = pp, chunks, microbatches
    schedule.num_stages, schedule._stages = pp * chunks, [None] * chunks
    schedule.number_of_rounds = max(1, microbatches // pp)
    schedule.microbatches_per_round = microbatches // schedule.number_of_rounds
    return {r: [a for a in schedule._calculate_single_rank_operations(r) if a] for r in range(pp)}


def torch_order(name: str, pp: int, chunks: int, microbatches: int) -> dict[int, list[str]]:
    return {r: list(map(str, actions)) for r, actions in torch_actions(name, pp, chunks, microbatches).items()}


def ours(name: str, rank: int, pp: int, chunks: int, microbatches: int) -> list[str]:
    return [str(op) for op in compute_order(name, rank, pp, chunks, microbatches)]


def microbatch_counts(name: str, pp: int) -> list[int]:
    """The counts up to four rounds that torch accepts."""
    if name == "DualPipeV":
        return list(range(2 * pp, 4 * pp + 2))
    counts = range(1, 4 * pp + 2)
    return [m for m in counts if name not in ("Interleaved1F1B", "InterleavedZeroBubble") or m % max(1, m // pp) == 0]


def chunk_counts(name: str) -> tuple[int, ...]:
    if name in V_PLACEMENT:
        return (2,)
    return (1, 2, 3, 4, 5) if name in MULTI_STAGE else (1,)


@pytest.mark.parametrize("pp", range(2, 9))
@pytest.mark.parametrize("name", ["GPipe", *MULTI_STAGE])
def test_order_is_torchs(name: str, pp: int) -> None:
    for chunks in chunk_counts(name):
        for m in microbatch_counts(name, pp):
            assert {r: ours(name, r, pp, chunks, m) for r in range(pp)} == torch_order(name, pp, chunks, m)


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


@pytest.mark.parametrize("pp", range(2, 9))
@pytest.mark.parametrize("name", MULTI_STAGE)
def test_placement_is_torchs(name: str, pp: int) -> None:
    chunks = 2 if name in V_PLACEMENT else 3
    layout = Layout(pp=pp, virtual_stages=chunks, schedule=name)  # type: ignore[arg-type]
    expected = torch_placement(pp, pp * chunks, style="v" if name in V_PLACEMENT else "loop")
    assert {stage: layout.rank_of_stage(stage) for stage in range(layout.stages)} == expected
    for rank in range(pp):
        assert layout.stages_of(rank) == tuple(stage for stage, owner in expected.items() if owner == rank)


def lowered_ops(name: str, pp: int, chunks: int, microbatches: int, zero_stage: int = 3) -> dict[int, list[Op]]:
    """Our program with communication, every stage having something to gather and to reduce."""
    layout = Layout(pp=pp, virtual_stages=chunks, schedule=name, zero_stage=zero_stage)  # type: ignore[arg-type]
    stage = StageCost(Work(), Work(), 0.0, 0.0, 0.0, units=1, reduce=1.0, gather=1.0)
    stages = (stage,) * layout.stages
    orders = (compute_order(name, rank, pp, chunks, microbatches) for rank in range(pp))
    return {rank: with_communication(order, layout, stages) for rank, order in enumerate(orders)}


def lowered(name: str, pp: int, chunks: int, microbatches: int, zero_stage: int = 3) -> dict[int, list[str]]:
    programs = lowered_ops(name, pp, chunks, microbatches, zero_stage)
    return {rank: list(map(str, ops)) for rank, ops in programs.items()}


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
@pytest.mark.parametrize("name", MULTI_STAGE)
def test_program_is_what_torch_lowers(name: str, pp: int) -> None:
    """The same ops around the same messages. Torch puts a receive where its sender is done, we where it is waited for;
    it drops stages in the order of a set."""
    for chunks in chunk_counts(name):
        for m in microbatch_counts(name, pp)[:: max(1, pp)]:
            placement = torch_placement(pp, pp * chunks, style="v" if name in V_PLACEMENT else "loop")
            actions = torch_actions(name, pp, chunks, m)
            for rank in range(pp):
                unsharded = torch_schedules._add_unshard_reshard(actions[rank])
                actions[rank] = torch_schedules._add_reduce_grad(unsharded, m)
            expected = torch_schedules._add_send_recv(actions, placement.__getitem__, pp * chunks)
            mine = lowered(name, pp, chunks, m)
            for rank in range(pp):
                theirs, own = list(map(str, expected[rank])), mine[rank]
                assert own.pop() == "OPTIMIZER"
                assert Counter(own) == Counter(theirs)
                assert sorted_reshards(own) == sorted_reshards(theirs)


def sorted_reshards(ops: list[str]) -> list[str]:
    """Ops without receives, neighbouring RESHARDs in order."""
    kept = [op for op in ops if "RECV" not in op]
    for i in range(len(kept)):
        while i and "RESHARD" in kept[i - 1] and "RESHARD" in kept[i] and kept[i] < kept[i - 1]:
            kept[i - 1], kept[i] = kept[i], kept[i - 1]
            i -= 1
    return kept


def test_more_than_three_stages_are_gathered_again() -> None:
    """Two ranks, four chunks: the three next stages are held. Chunk 3 of rank 0 (stage 6) takes the place of stage 0,
    which comes back when stage 6's turn is over."""
    moves = [op for op in lowered("LoopedBFS", 2, 4, 2)[0] if "SHARD" in op]
    assert moves[:5] == ["0UNSHARD", "2UNSHARD", "4UNSHARD", "0RESHARD", "6UNSHARD"]
    assert moves.count("0UNSHARD") == 2
    once = [op for op in lowered("LoopedBFS", 2, 4, 2, zero_stage=1)[0] if "SHARD" in op]
    assert once == ["0UNSHARD", "2UNSHARD", "4UNSHARD", "6UNSHARD"]


def test_neighbouring_stages_of_a_rank_send_nothing() -> None:
    """The turn of the V: stages 1 and 2 on rank 1 of two."""
    last = lowered("ZBVZeroBubble", 2, 2, 4)[1]
    assert not [op for op in last if "1SEND_F" in op or "2RECV_F" in op or "2SEND_B" in op or "1RECV_B" in op]
    assert last.index("1F0") < last.index("2F0") < last.index("2I0") < last.index("1I0")


@st.composite
def shapes(draw: st.DrawFn) -> tuple[str, int, int, int]:
    """A schedule, ranks, chunks and microbatches that it can run."""
    name, pp = draw(st.sampled_from(SCHEDULES)), draw(st.integers(2, 10))
    counts = [m for m in microbatch_counts(name, pp) if name != "1F1B" or m >= pp]
    return name, pp, draw(st.sampled_from(chunk_counts(name))), draw(st.sampled_from(counts))


@given(shapes())
@settings(deadline=None, max_examples=150)
def test_no_order_deadlocks(shape: tuple[str, int, int, int]) -> None:
    """Every rank gets to the end when a receive waits for its send, and a pass for those that feed it."""
    orders, done = lowered_ops(*shape), set[Op]()
    places = dict.fromkeys(orders, 0)
    while any(places[rank] < len(orders[rank]) for rank in orders):
        before = dict(places)
        for rank, order in orders.items():
            while places[rank] < len(order):
                leaves = order[places[rank]].leaves
                if not all(is_fed(leaf, done, last=shape[1] * shape[2] - 1) for leaf in leaves):
                    break
                done.update(leaves)
                places[rank] += 1
        assert places != before, {rank: orders[rank][place : place + 1] for rank, place in places.items()}


def is_fed(op: Op, done: set[Op], last: int) -> bool:
    """Whether what an op needs was done, on its own rank or by a neighbour."""
    stage, microbatch = op.stage, op.microbatch
    if op.kind == "F":
        return stage == 0 or Op("F", (stage or 0) - 1, microbatch) in done
    if op.kind == "W":
        return Op("I", stage, microbatch) in done
    if op.kind in ("B", "I"):
        above = {Op(kind, (stage or 0) + 1, microbatch) for kind in "BI"}
        return Op("F", stage, microbatch) in done and (stage == last or bool(above & done))
    if op.kind in ("RECV_F", "RECV_B"):
        sender = (stage or 0) + (-1 if op.kind == "RECV_F" else 1)
        return Op(op.kind.replace("RECV", "SEND"), sender, microbatch) in done
    return True


@given(shapes())
@settings(deadline=None, max_examples=100)
def test_every_microbatch_goes_once_through_every_stage(shape: tuple[str, int, int, int]) -> None:
    name, pp, chunks, m = shape
    layout = Layout(pp=pp, virtual_stages=chunks, schedule=name)  # type: ignore[arg-type]
    for rank in range(pp):
        leaves = [leaf for op in compute_order(name, rank, pp, chunks, m) for leaf in op.leaves]
        place = {leaf: i for i, leaf in enumerate(leaves)}
        assert len(place) == len(leaves)
        passes = {(leaf.stage, leaf.microbatch) for leaf in leaves}
        assert passes == {(stage, i) for stage in layout.stages_of(rank) for i in range(m)}
        for stage, i in passes:
            forward, whole, half, rest = (place.get(Op(kind, stage, i)) for kind in "FBIW")
            assert forward is not None
            if whole is not None:
                assert forward < whole and half is None and rest is None
            else:
                assert name in SPLIT_BACKWARD and half is not None and rest is not None and forward < half < rest


def passes_alive(name: str, rank: int, pp: int, chunks: int, m: int) -> int:
    """The most passes of a stage alive at once on a rank."""
    return max(sum(held.alive for held in moment) for moment in peak_in_flight(name, rank, pp, chunks, m))


@pytest.mark.parametrize("m", [8, 16, 32, 64])
@pytest.mark.parametrize("pp", [4, 8])
def test_microbatches_alive_match_the_closed_forms(pp: int, m: int) -> None:
    """GPipe m; 1F1B min(m, P - r); interleaved [(v-1)P + 2(P-1-r) + 1] / v rank-microbatches, at most m
    (arXiv 2104.04473, 2205.05198); ZB1P and ZBV P (arXiv 2401.10241); DualPipeV P + 1/2 (deepseek-ai/DualPipe)."""
    for rank in range(pp):
        assert peak_in_flight("GPipe", rank, pp, 1, m) == (((rank, m, 0),),)
        assert passes_alive("1F1B", rank, pp, 1, m) == min(m, pp - rank)
        if m >= 2 * pp:
            assert passes_alive("ZBVZeroBubble", rank, pp, 2, m) == 2 * pp
            assert passes_alive("DualPipeV", rank, pp, 2, m) == 2 * pp + 1
        for chunks in (2, 4):
            alive = passes_alive("Interleaved1F1B", rank, pp, chunks, m)
            assert alive == min((chunks - 1) * pp + 2 * (pp - 1 - rank) + 1, chunks * m)
            assert passes_alive("LoopedBFS", rank, pp, chunks, m) == chunks * m
        for chunks in (1, 2, 4):
            assert passes_alive("InterleavedZeroBubble", rank, pp, chunks, m) == chunks * pp
            moments = peak_in_flight("InterleavedZeroBubble", rank, pp, chunks, m)
            assert max(sum(held.deferred for held in moment) for moment in moments) == rank + 1


@given(shapes())
@settings(deadline=None, max_examples=50)
def test_fullest_moments_cover_every_moment(shape: tuple[str, int, int, int]) -> None:
    """For any bytes per stage, and 3 more from I to W, the largest of the moments is the largest sum that a walk
    through the order meets."""
    name, pp, chunks, m = shape
    for rank in range(pp):
        size = {stage: 1 + (7 * stage) % 5 for stage in range(pp * chunks)}
        held = most = 0
        for leaf in (leaf for op in compute_order(name, rank, pp, chunks, m) for leaf in op.leaves):
            assert leaf.stage is not None
            held += {"F": size[leaf.stage], "I": 3, "W": -size[leaf.stage] - 3}.get(leaf.kind, -size[leaf.stage])
            most = max(most, held)
        moments = peak_in_flight(name, rank, pp, chunks, m)
        assert held == 0
        assert max(sum(size[s] * alive + 3 * deferred for s, alive, deferred in moment) for moment in moments) == most


def test_a_pair_prints_as_torch_prints_it() -> None:
    pair = Op("OVERLAP_F_B", parts=(Op("F", 0, 4), Op("B", 3, 1)))
    assert str(pair) == "(0F4;3B1)OVERLAP_F_B" == str(torch_schedules._Action.from_str(str(pair)))


@pytest.mark.parametrize("name", MULTI_STAGE)
@pytest.mark.parametrize("chunks", [2, 4])
def test_gathers_and_reductions_that_the_runtime_runs_are_torchs(name: str, chunks: int) -> None:
    """zero_stage 2 and 3: gathered ahead, at most three stages at once; reduced behind the last gradient."""
    if name in V_PLACEMENT and chunks != 2:
        return
    layout = Layout(pp=2, virtual_stages=chunks, schedule=name, dp_shard=2, zero_stage=2)
    for rank, actions in torch_actions(name, 2, chunks, 8).items():
        lowered = torch_schedules._add_reduce_grad(torch_schedules._add_unshard_reshard(actions), 8)
        order = compute_order(name, rank, 2, chunks, 8)
        assert list(map(str, sharded_order(order, layout))) == list(map(str, lowered))


def test_zero_stage_1_gathers_once_and_drops_at_the_end() -> None:
    layout = Layout(pp=2, virtual_stages=4, schedule="Interleaved1F1B", dp_shard=2, zero_stage=1)
    ops = [str(op) for op in sharded_order(compute_order("Interleaved1F1B", 0, 2, 4, 8), layout)]
    for kind in ("UNSHARD", "REDUCE_GRAD", "RESHARD"):
        assert sorted(op for op in ops if op.endswith(kind)) == [f"{stage}{kind}" for stage in (0, 2, 4, 6)]
    assert all(op.endswith("RESHARD") for op in ops[-4:])
    assert all(ops.index(f"{stage}UNSHARD") + 1 == ops.index(f"{stage}F0") for stage in (0, 2, 4, 6))
