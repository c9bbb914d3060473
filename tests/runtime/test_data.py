"""Which samples a rank sees: a function of seed and step alone, cut among replicas without gaps."""

from __future__ import annotations

import copy
import dataclasses
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_jobs import BERT, LLAMA, MODELS, T5, tiny_plan

from runtime.data import NO_TARGET, Batch, Batches, check_data, read_windows, sample_offsets, share_of
from runtime.tokens import open_stream, read_tokens
from simulator.errors import UserError
from simulator.job import Training, build_job
from simulator.layout import Layout
from simulator.model import ModelSpec

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


def test_windows_hold_a_sample_and_the_token_behind_it() -> None:
    windows = read_windows(np.arange(100, dtype=np.uint8), np.array([0, 60]), 32)
    assert windows.shape == (2, 33) and windows.dtype == np.int64
    assert (windows[1, 0], windows[1, -1]) == (60, 92)


def batches(layout: Layout, model: ModelSpec, folder: Path, rank: int = 0, **training: Any) -> Batches:
    return Batches(tiny_plan(layout, model, data=str(folder), **training).job, layout, rank, CPU)


def test_targets_follow_inputs(text_folder: Path) -> None:
    (inputs,), targets = batches(Layout(), LLAMA, text_folder).load(0)
    assert inputs.shape == targets.shape == (8, 32)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_an_encoder_finds_what_is_hidden(text_folder: Path) -> None:
    """seq_len 32: round(4.8) = 5 targets in each sample. Of 8,000 hidden tokens 80 % show the mask, the last of 256
    ids; of the others half stay (and one in 256 of those that show any token)."""
    found = batches(Layout(), BERT, text_folder)
    hidden, masked, kept = 0, 0, 0
    for step in range(200):
        (inputs,), targets = found.load(step)
        (plain,), _ = batches_plain(found, step)
        places = targets != NO_TARGET
        assert (places.sum(dim=1) == 5).all()
        assert torch.equal(targets[places], plain[places])
        assert torch.equal(inputs[~places], plain[~places])
        hidden += int(places.sum())
        masked += int((inputs[places] == 255).sum())
        kept += int((inputs[places] == plain[places]).sum())
    assert hidden == 8000
    assert masked / hidden == pytest.approx(0.8, abs=0.02)
    assert kept / hidden == pytest.approx(0.1, abs=0.015)


def batches_plain(found: Batches, step: int) -> Batch:
    """The same samples with nothing hidden."""
    plain = copy.copy(found)
    plain.model = LLAMA
    return plain.load(step)


def test_a_decoder_gives_back_what_its_encoder_must_not_see(text_folder: Path) -> None:
    found = batches(Layout(), T5, text_folder)
    (source, before), targets = found.load(3)
    assert torch.equal(before[:, 1:], targets[:, :-1])
    assert ((source == 255).sum(dim=1) == 5).all()
    assert torch.equal(source[source != 255], targets[source != 255])


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-bert", "tiny-t5"])
def test_every_layout_sees_the_same_batch(model: str, text_folder: Path) -> None:
    whole = batches(Layout(), MODELS[model], text_folder).load(7)
    layout = Layout(dp_replicate=2, tp=2)
    parts = [batches(layout, MODELS[model], text_folder, layout.rank(dp_replicate=r)).load(7) for r in range(2)]
    for one, *two in zip((*whole.inputs, whole.targets), *((*p.inputs, p.targets) for p in parts), strict=True):
        assert torch.equal(one, torch.cat(two))


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


def stream(data: Path, vocab_size: int = 1000, **training: Any) -> np.ndarray:
    return open_stream(Training(8, 32, "fp32", data=str(data), **training), vocab_size).ids


@pytest.mark.parametrize(("vocab_size", "dtype"), [(50257, np.uint16), (128256, np.uint32)])
def test_raw_ids_are_as_wide_as_the_vocabulary_needs(vocab_size: int, dtype: Any, tmp_path: Path) -> None:
    """As nanoGPT's prepare.py writes them: `arr.tofile("train.bin")`."""
    ids = np.arange(1, 500, dtype=dtype)
    ids.tofile(tmp_path / "train.bin")
    assert np.array_equal(stream(tmp_path / "train.bin", vocab_size), ids)


def write_indexed(stem: Path, documents: list[list[int]], code: int = 4, dtype: Any = np.int32) -> None:
    """As megatron/core/datasets/indexed_dataset.py writes a data set of one sequence per document."""
    np.concatenate([np.asarray(d, dtype) for d in documents]).tofile(stem.with_suffix(".bin"))
    lengths = np.array([len(d) for d in documents], np.int32)
    pointers = np.concatenate(([0], np.cumsum(lengths[:-1], dtype=np.int64) * np.dtype(dtype).itemsize)).astype(
        np.int64
    )
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(documents), len(documents) + 1)
    ends = np.arange(len(documents) + 1, dtype=np.int64)
    stem.with_suffix(".idx").write_bytes(header + lengths.tobytes() + pointers.tobytes() + ends.tobytes())


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
@pytest.mark.parametrize(("code", "dtype"), [(4, np.int32), (8, np.uint16)])
def test_indexed_documents_follow_each_other(suffix: str, code: int, dtype: Any, tmp_path: Path) -> None:
    write_indexed(tmp_path / "web_text", [[5, 6, 7], [8], [9, 10]], code, dtype)
    found = stream(tmp_path / f"web_text{suffix}")
    assert found.tolist() == [5, 6, 7, 8, 9, 10] and found.dtype == dtype


def damage(path: Path, change: str) -> None:
    content = path.read_bytes()
    path.write_bytes(
        {"magic": b"X" + content[1:], "dtype": content[:17] + b"\x06" + content[18:], "end": content[:40]}[change]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [("magic", "does not begin like an index"), ("dtype", "dtype code 6"), ("end", "is cut off: 3 sequences")],
)
def test_a_bad_index_is_named(change: str, words: str, tmp_path: Path) -> None:
    write_indexed(tmp_path / "set", [[5, 6, 7], [8], [9, 10]])
    damage(tmp_path / "set.idx", change)
    with pytest.raises(UserError, match=words):
        stream(tmp_path / "set.bin")


def test_an_index_must_count_its_tokens(tmp_path: Path) -> None:
    write_indexed(tmp_path / "set", [[5, 6, 7], [8]])
    np.arange(3, dtype=np.int32).tofile(tmp_path / "set.bin")
    with pytest.raises(UserError, match="holds 3 tokens, but its index counts 4"):
        stream(tmp_path / "set.bin")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.arange(200, dtype=np.uint32).tobytes(), "every other id is 0"),
        (b"\x01\x02\x03", "3 bytes are no whole number of uint16 ids"),
        (b"", "0 bytes are no whole number"),
        (np.full(100, 256, np.uint16).tobytes(), "holds the token id 256, but vocab_size = 256"),
        (np.full(20, 7, np.uint16).tobytes(), "holds 20 tokens, but one sample of seq_len = 32 needs 33"),
    ],
)
def test_raw_ids_that_cannot_be_meant_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(content)
    with pytest.raises(UserError, match=words):
        check_data(tiny_plan(Layout(), data=str(tmp_path / "train.bin")).job)


def test_an_id_beyond_the_vocabulary_is_found_where_it_is_sampled(tmp_path: Path) -> None:
    """The launcher looks at the beginning of the data alone."""
    np.full(34, 300, np.uint16).tofile(tmp_path / "train.bin")
    with pytest.raises(UserError, match="token id 300, but vocab_size = 256"):
        batches(Layout(), LLAMA, tmp_path / "train.bin").load(0)


@pytest.fixture
def tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Words by hand: every word is a token, and there are a mask and an end of text."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = {"<|endoftext|>": 0, "[UNK]": 1, "one": 2, "two": 3, "[MASK]": 4}
    path = tmp_path / "tokenizer.json"
    path.write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [],
                "normalizer": None,
                "pre_tokenizer": {"type": "Whitespace"},
                "post_processor": None,
                "decoder": None,
                "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
            }
        )
    )
    return path


def test_text_goes_through_a_tokenizer_once(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("one two\ntwo three")
    (folder / "b.txt").write_text("two")
    assert stream(folder, tokenizer=str(tokenizer)).tolist() == [2, 3, 3, 1, 0, 3, 0]
    (cached,) = (tmp_path / "cache" / "layoutwise" / "tokens").glob("*.bin")
    cached.write_bytes(np.array([7, 7], np.uint16).tobytes())
    assert stream(folder, tokenizer=str(tokenizer)).tolist() == [7, 7]
    cached.write_bytes(b"cut")
    assert stream(folder, tokenizer=str(tokenizer)).tolist() == [2, 3, 3, 1, 0, 3, 0]
    (folder / "b.txt").write_text("one")
    assert stream(folder, tokenizer=str(tokenizer)).tolist() == [2, 3, 3, 1, 0, 2, 0]


def test_the_tokenizers_mask_hides_tokens(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("one two " * 100)
    (source, _), _ = batches(Layout(), T5, folder, tokenizer=str(tokenizer)).load(0)
    assert ((source == 4).sum(dim=1) == 5).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer": "missing.json"}, "'missing.json' is not a file"),
        ({"data": "ids.bin"}, "training.tokenizer is for folders of text"),
        ({"vocab_size": 4}, "vocab_size = 4 is too small for training.tokenizer = .*; it must be at least 5"),
    ],
)
def test_a_tokenizer_that_does_not_fit_is_refused(
    change: dict[str, Any], words: str, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("one two " * 100)
    model = dataclasses.replace(LLAMA, vocab_size=change.get("vocab_size", 256))
    training = {"tokenizer": str(tokenizer), "data": str(tmp_path / "text")} | change
    training.pop("vocab_size", None)
    with pytest.raises(UserError, match=words):
        check_data(tiny_plan(Layout(), model, **training).job)


def test_paths_of_a_job_are_beside_its_file(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    job = {"model": "gpt2", "cluster": "dgx-h100", "nodes": 1, "training": {"data": "text", "tokenizer": "t.json"}}
    training = build_job(job, "test", tmp_path).training
    assert (training.data, training.tokenizer) == (str(tmp_path / "text"), str(tmp_path / "t.json"))
