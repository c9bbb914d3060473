"""Ways to synchronise, executed: those that promise the mathematics of an all-reduce keep it, the others their
bounds."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import sync_cases
import torch
from hypothesis import given
from hypothesis import strategies as st
from sync_cases import SyncCase
from tiny_jobs import tiny_plan
from workers import start_worker

from planner.plan import write_plan
from runtime import here
from runtime.here import check_layout, run_here
from runtime.link import find_seat, share_bounds
from runtime.parameter_server import Ledger
from runtime.replicas import cut_pieces, place_of, ranks_of_replicas
from runtime.settings import Settings
from simulator.errors import UserError
from simulator.layout import Layout

Runs = dict[str, dict[str, Any]]
SERVER: dict[str, Any] = {"sync": "parameter_server", "servers": 1}


def run_list(name: str, processes: int, text: Path, folder: Path) -> Runs:
    output = folder / f"{name}.json"
    start_worker("sync_worker.py", processes, name, str(text), str(folder), str(output))
    return json.loads(output.read_text())


@pytest.fixture(scope="session")
def fast(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run_list("FAST", 3, text_folder, tmp_path_factory.mktemp("sync"))


def check_like(case: SyncCase, runs: Runs) -> None:
    """Losses as the other run's. Norms too, but for local SGD, whose replicas each have one of their own."""
    ours, theirs = runs[case.name], runs[case.like]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    if "local_sgd" not in (case.layout.sync, theirs["layout"]["sync"]) or case.layout.sync == theirs["layout"]["sync"]:
        assert ours["grad_norms"] == pytest.approx(theirs["grad_norms"], rel=1e-5)


@pytest.mark.parametrize("case", [c for c in sync_cases.FAST if c.like], ids=lambda case: case.name)
def test_losses_are_those_of_the_reference(case: SyncCase, fast: Runs) -> None:
    check_like(case, fast)


@pytest.mark.parametrize("name", ["alone", "alone sgd"])
def test_one_asynchronous_worker_is_sequential_training(name: str, fast: Runs) -> None:
    """To the last bit: gradients travel, and the server's optimizer is the same."""
    (case,) = [case for case in sync_cases.FAST if case.name == name]
    assert fast[name]["losses"] == fast[case.like]["losses"]
    assert fast[name]["updates"] == {"staleness": [6], "lead": [6], "by_replica": [6]}


def test_nobody_is_further_ahead_than_the_bound(fast: Runs) -> None:
    """12 steps of two replicas, one of them three times as slow. Bounded by 1: leads are 0 and 1. Between its pull and
    its push a replica sees at most 3 updates of the other: from 1 behind it to 2 ahead."""
    bounded, free = fast["bounded"]["updates"], fast["asynchronous"]["updates"]
    for found in (bounded, free):
        assert sum(found["staleness"]) == sum(found["lead"]) == sum(found["by_replica"]) == 24
    assert len(bounded["lead"]) <= 2
    assert len(bounded["staleness"]) - 1 <= 2 * 1 + 1
    first, second = bounded["by_replica"]
    assert abs(first - second) <= 2
    assert fast["server"]["updates"] == {"staleness": [12], "lead": [12], "by_replica": [6, 6]}


@pytest.mark.parametrize("name", ["asynchronous", "bounded", "diloco", "local 2"])
def test_what_is_not_synchronous_learns_too(name: str, fast: Runs) -> None:
    losses = fast[name]["losses"]
    assert losses[-1] < losses[0] - 1.5


@pytest.mark.slow
def test_every_axis_inside_of_replicas(text_folder: Path, tmp_path: Path) -> None:
    runs = run_list("SIX", 6, text_folder, tmp_path)
    for case in sync_cases.SIX:
        if case.like:
            check_like(case, runs)
    assert len(runs["bounded, pp"]["updates"]["lead"]) <= 3
    more = run_list("MORE", 3, text_folder, tmp_path)
    for case in sync_cases.MORE:
        if case.like:
            check_like(case, more)


def test_launched_with_servers_end_to_end(text_folder: Path, tmp_path: Path) -> None:
    """Two workers and a server beside them; every step has a line, with how stale its updates were."""
    layout = Layout(dp_replicate=2, micro_batch_size=4, **SERVER, staleness=None)
    plan = write_plan(tiny_plan(layout, data=str(text_folder), sharding="hash"), tmp_path / "plan.json")
    seen: list[int] = []
    measured = run_here(
        plan,
        tmp_path / "m.json",
        Settings(4, 1, slow_rank="1:2.0"),
        progress=lambda step, _: seen.append(step),
        timeout=120,
    )
    assert (measured.world_size, measured.steps, len(measured.losses)) == (2, 4, 4)
    assert seen == [1, 2, 3, 4]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    stale = [n for line in lines for n in line["staleness"]]
    assert measured.updates is not None and measured.sharding is not None
    assert [stale.count(n) for n in range(len(measured.updates.staleness))] == list(measured.updates.staleness)
    assert [line["loss_metrics/global_avg_loss"] for line in lines] == pytest.approx(measured.losses)
    assert sum(measured.sharding.sizes) == (len(b"".join(p.read_bytes() for p in text_folder.iterdir())) - 1) // 32


def test_a_ledger_by_hand() -> None:
    """Two replicas, bound 1, five updates. Replica 0 begins, ends and begins again (1 ahead), ends: now it is 2 ahead
    and must wait; replica 1, which began with nothing applied, ends and meets 2 updates of the other."""
    ledger = Ledger(2, bound=1, total=5)
    assert ledger.next(0) and ledger.next(1)
    ledger.add(0, 1.0, 1.0)
    assert ledger.next(0)
    ledger.add(0, 1.0, 1.0)
    waiting = threading.Thread(target=ledger.next, args=(0,), daemon=True)
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()
    ledger.add(1, 1.0, 1.0)
    waiting.join(5)
    assert not waiting.is_alive()
    # The fifth is replica 1's; nobody gets a sixth.
    assert ledger.next(1) and not ledger.next(1)
    ledger.add(0, 1.0, 1.0)
    assert [(u.replica, u.lead, u.staleness) for u in ledger.log] == [(0, 0, 0), (0, 1, 0), (1, 0, 2), (0, 1, 0)]


def test_a_ledger_ends_with_a_loss_that_is_no_number() -> None:
    ledger = Ledger(1, None, 5)
    assert ledger.next(0)
    ledger.add(0, float("nan"), 1.0)
    assert not ledger.next(0)


@given(st.integers(0, 200), st.integers(1, 9))
def test_servers_share_a_vector_without_gaps(length: int, servers: int) -> None:
    bounds = share_bounds(length, servers)
    assert [n for first, last in bounds for n in range(first, last)] == list(range(length))
    sizes = [last - first for first, last in bounds]
    assert max(sizes) - min(sizes) <= 1
    pieces = [(length // 3, 1), (length - length // 3, 2)]
    cut = [cut_pieces(pieces, first, last) for first, last in bounds]
    assert [sum(size for size, _ in part) for part in cut] == sizes
    assert sum(size / copies for part in cut for size, copies in part) == pytest.approx(
        sum(size / copies for size, copies in pieces)
    )


@pytest.mark.parametrize(
    "layout", [Layout(dp_replicate=3, tp=2, pp=2), Layout(dp_replicate=2, dp_shard=3, zero_stage=1)]
)
def test_replicas_partition_the_ranks(layout: Layout) -> None:
    replicas = ranks_of_replicas(layout)
    assert sorted(rank for ranks in replicas for rank in ranks) == list(range(layout.world_size))
    for number, ranks in enumerate(replicas):
        for rank in ranks:
            place = place_of(layout, rank)
            assert (place.replica, ranks[place.rank]) == (number, rank)
            # Peers differ in dp_replicate alone.
            assert layout.coordinates(rank) | {"dp_replicate": 0} == layout.coordinates(replicas[0][place.rank])


def test_seats_over_two_nodes() -> None:
    """4 workers and 2 servers on 2 nodes: processes 0, 1 and 3, 4 work, 2 and 5 serve."""
    layout = Layout(dp_replicate=4, sync="parameter_server", servers=2)
    seats = [
        find_seat(layout, {"RANK": str(r), "LOCAL_RANK": str(r % 3), "LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "6"})
        for r in range(6)
    ]
    assert [(seat.serves, seat.number) for seat in seats] == [
        (False, 0), (False, 1), (True, 0), (False, 2), (False, 3), (True, 1),
    ]  # fmt: skip
    with pytest.raises(UserError, match="4 workers and 1 servers do not spread evenly over 5 nodes"):
        find_seat(Layout(dp_replicate=4, sync="parameter_server", servers=1), {"LOCAL_WORLD_SIZE": "1"})


@pytest.mark.parametrize(
    ("layout", "settings", "words"),
    [
        (
            Layout(dp_replicate=2, **SERVER),
            {"slow_rank": "2:1.5"},
            "slow-rank 2 must be one of the layout's ranks, 0 to 1",
        ),
        (Layout(dp_replicate=2, **SERVER), {"slow_rank": "1:0.5"}, "with a factor of at least 1, like 1:2.0"),
        (Layout(dp_replicate=2, **SERVER), {"slow_rank": "1=2"}, "must name ranks once each"),
        (
            Layout(dp_replicate=2, **SERVER, staleness=None),
            {"checkpoint": Path("saved")},
            "--checkpoint needs a step that ends on all replicas at once, but with staleness = none",
        ),
        (Layout(dp_replicate=2, **SERVER, staleness=3), {"profile": Path("p")}, "--profile needs a step"),
    ],
)
def test_settings_that_do_not_go_together_are_one_sentence(
    layout: Layout, settings: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(here, "_run", lambda *_: pytest.fail("started processes"))
    plan = write_plan(tiny_plan(layout), tmp_path / "plan.json")
    with pytest.raises(UserError, match=words):
        run_here(plan, tmp_path / "m.json", Settings(**settings))


def test_what_a_replica_cannot_hold_is_refused() -> None:
    layout = Layout(dp_replicate=2, dp_shard=2, cp=2, zero_stage=3, sync="local_sgd")
    with pytest.raises(UserError, match="runs with cp = 2 or dp_shard = 2 in a replica, not both"):
        check_layout(tiny_plan(layout))


def test_the_outer_step_is_nesterov_on_the_mean_change() -> None:
    """arXiv 2311.08105, algorithm 1, by hand with lr 0.7 and momentum 0.9: parameters 1.0, replicas come to 0.4 and
    0.8.

    Outer gradient 1.0 - 0.6 = 0.4; momentum 0.4; Nesterov step 0.7 (0.4 + 0.9 · 0.4) = 0.532; then 0.468. A second
    meeting without change, gradient 0: momentum 0.36, step 0.7 · 0.9 · 0.36 = 0.2268.
    """
    from runtime.local_sgd import OUTER_LEARNING_RATE, OUTER_MOMENTUM

    outer = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([outer], lr=OUTER_LEARNING_RATE, momentum=OUTER_MOMENTUM, nesterov=True)
    for gradient, expected in ((0.4, 0.468), (0.0, 0.468 - 0.2268)):
        outer.grad = torch.tensor([gradient])
        optimizer.step()
        assert outer.item() == pytest.approx(expected)
