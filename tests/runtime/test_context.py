"""Which positions a rank of the context axis holds, and that the batch is cut to them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_jobs import tiny_plan

from runtime.context import own_positions
from runtime.data import Batches
from simulator.layout import Layout

CPU = torch.device("cpu")


def test_a_rank_holds_a_chunk_from_each_end() -> None:
    assert own_positions(12, 3, 0).tolist() == [0, 1, 10, 11]
    assert own_positions(12, 3, 2).tolist() == [4, 5, 6, 7]
    assert own_positions(5, 1, 0).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_has_as_many_scores_to_compute(ranks: int) -> None:
    """A query at position p sees p + 1 keys; the sum over its positions is the same for all ranks."""
    parts = [own_positions(64, ranks, place) for place in range(ranks)]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(64))
    assert len({int((part + 1).sum()) for part in parts}) == 1


def test_batches_are_cut_along_the_sequence(text_folder: Path) -> None:
    layout = Layout(cp=2, tp=2, dp_replicate=2)
    job = tiny_plan(layout, data=str(text_folder)).job
    whole = Batches(job, Layout(dp_replicate=2), 1, CPU).load(3)
    for rank in (4, 5, 6, 7):
        own = own_positions(32, 2, (rank - 4) // 2)
        batch = Batches(job, layout, rank, CPU).load(3)
        assert torch.equal(batch.inputs[0], whole.inputs[0][:, own])
        assert torch.equal(batch.targets, whole.targets[:, own])
