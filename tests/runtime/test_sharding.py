"""Samples of an epoch, cut among replicas: none lost, none seen twice, also where a run is continued by more or
fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_jobs import LLAMA, tiny_plan

from runtime.data import Batches
from runtime.sharding import Cut, Epochs, content_hash, owners, samples_of
from simulator.errors import UserError
from simulator.job import Training, build_job
from simulator.layout import Layout

KINDS = ("block", "sequential", "random", "hash")


def epochs(
    kind: Any, samples: int, batch: int, *cuts: tuple[int, int], remainder: Any = "drop", seed: int = 0
) -> Epochs:
    training = Training(batch, 8, "fp32", seed=seed, sharding=kind, remainder=remainder)
    numbers = content_hash(np.arange(samples)[:, None])
    return Epochs(samples, training, tuple(Cut(*cut) for cut in cuts), lambda: numbers)


def seen(found: Epochs, first: int, last: int) -> list[int]:
    return [int(n) for step in range(first, last) for n in found.batch(step).ravel()]


def test_four_ways_by_hand() -> None:
    """12 samples, 2 replicas, batches of 4: three steps of two samples each."""
    assert [epochs("block", 12, 4, (0, 2)).batch(s).tolist() for s in range(3)] == [
        [[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5], [10, 11]],
    ]  # fmt: skip
    assert [epochs("sequential", 12, 4, (0, 2)).batch(s).tolist() for s in range(3)] == [
        [[0, 2], [1, 3]], [[4, 6], [5, 7]], [[8, 10], [9, 11]],
    ]  # fmt: skip
    order = np.random.default_rng([0, 1, 2**32]).permutation(12)
    # The second epoch begins with step 3.
    assert epochs("random", 12, 4, (0, 2)).batch(3).tolist() == [[order[0], order[2]], [order[1], order[3]]]
    owner = content_hash(np.arange(12)[:, None]) % 2
    own = [np.flatnonzero(owner == replica) for replica in (0, 1)]
    assert epochs("hash", 12, 4, (0, 2), remainder="pad").batch(0).tolist() == [part[:2].tolist() for part in own]


@given(
    kind=st.sampled_from(KINDS),
    samples=st.integers(1, 90),
    replicas=st.integers(1, 5),
    share=st.integers(1, 4),
    remainder=st.sampled_from(("drop", "pad")),
    seed=st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_an_epoch_has_every_sample_once(
    kind: str, samples: int, replicas: int, share: int, remainder: str, seed: int
) -> None:
    """Drop: none twice, and what is lost is less than a batch (of shares that hash leaves uneven: what the longer
    ones have more). Pad: none lost, and what comes twice is as little."""
    batch = replicas * share
    try:
        found = epochs(kind, samples, batch, (0, replicas), remainder=remainder, seed=seed)
    except UserError:
        assert remainder == "drop" and (samples < batch or kind == "hash")
        return
    shares, length = found.shares(), found._steps_of_epoch(replicas)
    for epoch in range(2):
        counts = np.bincount(seen(found, epoch * length, (epoch + 1) * length), minlength=samples)
        assert (counts <= 1).all() if remainder == "drop" else (counts >= 1).all()
        assert (counts == 0).sum() == shares.dropped
        assert (counts - 1).clip(0).sum() == shares.repeated
        if kind != "hash":
            assert shares.dropped + shares.repeated < batch
            assert abs(shares.imbalance) < 1e-9
    assert sum(shares.sizes) == pytest.approx(samples)


CHANGES = st.lists(st.tuples(st.integers(1, 7), st.sampled_from((1, 2, 3, 4, 6))), max_size=3)


def with_changes(first: int, changes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Cuts from (steps since the last cut, replicas)."""
    places = np.cumsum([steps for steps, _ in changes], dtype=int)
    return [(0, first), *((int(place), r) for place, (_, r) in zip(places, changes, strict=True))]


@given(
    kind=st.sampled_from(("block", "sequential", "random")),
    parts=st.integers(4, 12),
    changes=CHANGES,
    first=st.sampled_from((1, 2, 3, 4, 6)),
    seed=st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_a_change_of_replicas_in_an_epoch_loses_nothing(
    kind: str, parts: int, changes: list[tuple[int, int]], first: int, seed: int
) -> None:
    """Batches of 12 of 12 n samples: whoever goes on, an epoch has every sample once."""
    found = epochs(kind, 12 * parts, 12, *with_changes(first, changes), seed=seed)
    for epoch in range(3):
        assert sorted(seen(found, epoch * parts, (epoch + 1) * parts)) == list(range(12 * parts))


@given(
    parts=st.integers(4, 12),
    changes=CHANGES,
    first=st.sampled_from((1, 2, 3)),
    remainder=st.sampled_from(("drop", "pad")),
)
@settings(max_examples=200, deadline=None)
def test_uneven_shares_that_change_hands_lose_nothing(
    parts: int, changes: list[tuple[int, int]], first: int, remainder: str
) -> None:
    """Hash: before an epoch ends, no sample comes twice (drop), or each has come (pad)."""
    try:
        found = epochs("hash", 60 * parts, 12, *with_changes(first, changes), remainder=remainder)
    except UserError:
        return
    span = found._first(0, 0, None)
    while span.left is not None and (after := found._next(span, span.end)).epoch == 0:
        span = after
    counts = np.bincount(seen(found, 0, span.end), minlength=60 * parts)
    if remainder == "drop":
        assert counts.max() == 1
    elif span.left is None:
        assert counts.min() >= 1


@pytest.mark.parametrize("kind", KINDS)
def test_any_step_can_be_the_first(kind: str) -> None:
    """A continued run asks for a late step at once, and gets what the undisturbed one got."""
    cuts = ((0, 2), (5, 4), (23, 1))
    whole = epochs(kind, 100, 4, *cuts, remainder="pad")
    expected = [whole.batch(step).tolist() for step in range(160)]
    for step in (0, 4, 5, 6, 22, 23, 24, 26, 80, 159):
        assert epochs(kind, 100, 4, *cuts, remainder="pad").batch(step).tolist() == expected[step]


def test_hash_with_a_change_of_replicas_loses_nothing_when_padded() -> None:
    """60 samples, 3 steps of 2 replicas with 4 each, then 3 replicas: all 60 are seen before the epoch ends."""
    found = epochs("hash", 60, 12, (0, 2), (3, 3), remainder="pad")
    first = found._first(0, 0, None)
    assert first.end == 3 and first.left is not None
    rest = found._next(first, 3)
    assert rest.epoch == 0
    assert set(seen(found, 0, rest.end)) == set(range(60))
    before = seen(found, 0, 3)
    assert len(before) == len(set(before)) == 36
    assert not set(before) & set(seen(found, 3, rest.end))


@pytest.mark.parametrize("kind", ["sequential", "random"])
def test_global_batches_do_not_depend_on_the_replicas(kind: str) -> None:
    one, four = (epochs(kind, 40, 8, (0, replicas)) for replicas in (1, 4))
    for step in range(12):
        assert set(one.batch(step).ravel()) == set(four.batch(step).ravel())


def test_hash_follows_the_content_not_the_place() -> None:
    """The same window of tokens belongs to the same replica in any stream; over many, replicas have about as many.

    4 replicas, 4,000 windows: 1,000 each, standard deviation sqrt(4000 * 1/4 * 3/4) = 27; four of them are 110.
    """
    ids = np.random.default_rng(0).integers(0, 256, 8 * 4000 + 1)
    numbers = owners(ids, 8, samples_of(len(ids), 8))
    moved = owners(ids[8 * 7 :], 8, 4000 - 7)
    assert np.array_equal(numbers[7:], moved)
    assert np.array_equal(numbers, owners(ids.astype(np.uint8), 8, 4000))
    assert abs(np.bincount((numbers % np.uint64(4)).astype(int)) - 1000).max() < 110
    # A permutation of tokens is another sample.
    assert content_hash(np.array([[1, 2, 3]])) != content_hash(np.array([[2, 1, 3]]))


def test_hash_reports_its_imbalance() -> None:
    found = epochs("hash", 1000, 8, (0, 4))
    shares = found.shares()
    assert len(shares.sizes) == 4 and sum(shares.sizes) == 1000
    assert shares.imbalance == pytest.approx(max(shares.sizes) / 250 - 1)
    assert shares.dropped == 1000 - 4 * (min(shares.sizes) // 2 * 2)


@pytest.mark.parametrize(
    ("kind", "samples", "words"),
    [
        ("random", 3, "finds 3 samples, not one global_batch_size = 4"),
        ("hash", 6, "'hash' leaves a replica fewer than"),
    ],
)
def test_too_few_samples_are_refused(kind: str, samples: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        epochs(kind, samples, 4, (0, 4))


def test_a_rank_reads_its_windows(text_folder: Path) -> None:
    """Two replicas under tensor parallelism: each reads its samples of the round robin, its tp ranks the same ones."""
    plan = tiny_plan(
        Layout(dp_replicate=2, tp=2, micro_batch_size=4), LLAMA, data=str(text_folder), sharding="sequential"
    )
    ranks = [Batches(plan.job, plan.layout, rank, torch.device("cpu")) for rank in range(4)]
    loaded = [batches.load(1).inputs[0] for batches in ranks]
    ids = ranks[0].stream.ids
    for rank, inputs in enumerate(loaded):
        numbers = range(8 + rank // 2, 16, 2)
        assert inputs.tolist() == [ids[32 * n : 32 * n + 32].tolist() for n in numbers]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"data": {"shardin": "hash"}}, "unknown key 'data.shardin'"),
        ({"training": {"sharding": "hash"}}, "unknown key 'training.sharding'; it belongs into"),
        ({"data": {"sharding": "hashed"}}, "sharding"),
    ],
)
def test_a_wrong_table_is_one_sentence(table: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_job({"model": "gpt2", "cluster": "dgx-h100", "nodes": 1} | table, "test")


def test_a_job_says_how_its_samples_are_cut() -> None:
    data = {"model": "gpt2", "cluster": "dgx-h100", "nodes": 1, "data": {"sharding": "random", "remainder": "pad"}}
    training = build_job(data, "test").training
    assert (training.sharding, training.remainder) == ("random", "pad")
