"""Which samples a rank sees: a function of seed and step alone, cut among replicas without gaps."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_jobs import LLAMA, tiny_plan

from runtime.data import check_data, load_batch, read_tokens, sample_offsets, share_of
from simulator.errors import UserError
from simulator.layout import Layout

CPU = torch.device("cpu")


def test_order_depends_on_seed_and_step_alone() -> None:
    first = sample_offsets(10_000, seed=3, step=5, global_batch_size=8, seq_len=32)
    assert np.array_equal(first, sample_offsets(10_000, 3, 5, 8, 32))
    assert not np.array_equal(first, sample_offsets(10_000, 3, 6, 8, 32))
    assert not np.array_equal(first, sample_offsets(10_000, 4, 5, 8, 32))


@pytest.mark.parametrize(
    "layout", [Layout(dp_replicate=4), Layout(dp_replicate=2, dp_shard=2, zero_stage=3), Layout(dp_shard=2, tp=2, pp=2)]
)
def test_shares_partition_the_batch(layout: Layout) -> None:
    shares = [share_of(layout, rank, 8) for rank in range(layout.world_size)]
    distinct = sorted({(share.start, share.stop) for share in shares})
    assert len(distinct) == layout.dp
    assert [i for start, stop in distinct for i in range(start, stop)] == list(range(8))
    # Ranks that differ in tp or pp alone work on the same samples.
    for rank, share in enumerate(shares):
        place = layout.coordinates(rank) | {"tp": 0, "pp": 0}
        assert share == shares[layout.rank(**place)]


def test_targets_follow_inputs() -> None:
    tokens = np.arange(100, dtype=np.uint8)
    inputs, targets = load_batch(tokens, np.array([0, 60]), 32, CPU)
    assert inputs.shape == targets.shape == (2, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    assert inputs[1, 0] == 60 and targets[1, -1] == 92


def test_the_last_sample_ends_with_the_stream() -> None:
    assert set(sample_offsets(34, 0, 0, 100, 32)) == {0, 1}


def test_text_is_read_in_sorted_order_without_binaries(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "two.txt").write_text("two")
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "c.bin").write_bytes(b"\x00\x01")
    (tmp_path / ".hidden").write_text("no")
    assert read_tokens(str(tmp_path)).tobytes() == b"onetwo"
    assert read_tokens(str(tmp_path), most=4).tobytes() == b"onet"


def test_default_is_the_standard_library() -> None:
    assert len(read_tokens("", most=10_000)) == 10_000


@pytest.mark.parametrize(("folder", "words"), [("missing", "is not a folder"), ("", "holds no text file")])
def test_folders_without_text_are_refused(tmp_path: Path, folder: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_tokens(str(tmp_path / folder))


@pytest.mark.parametrize(
    ("vocab_size", "words"), [(100, "vocab_size = 100 is too small"), (256, "holds 20 bytes .* needs 33")]
)
def test_jobs_that_cannot_learn_the_text_are_refused(tmp_path: Path, vocab_size: int, words: str) -> None:
    (tmp_path / "short.txt").write_text("twenty bytes of text")
    model = dataclasses.replace(LLAMA, vocab_size=vocab_size)
    with pytest.raises(UserError, match=words):
        check_data(tiny_plan(Layout(), model, data=str(tmp_path)).job)
