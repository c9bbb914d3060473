"""Token streams: bytes of text files, and how a batch is cut among replicas.

A token is a byte, so no tokenizer is needed and any model with a vocabulary of 256 or more can learn them.
Only `load_batch` needs torch: the launcher looks at the data before it starts a process.
"""

from __future__ import annotations

import os
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from simulator.errors import UserError
from simulator.job import Job
from simulator.layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VOCABULARY = 256
MOST_BYTES = 64 * 2**20
# Not somebody's text: installed packages below the standard library, caches, version control.
_SKIPPED = ("site-packages", "dist-packages", "__pycache__")


class Batch(NamedTuple):
    """What a rank trains on in one step: samples are the first dim of every tensor.

    inputs are what the first stage takes: token ids (samples, T). targets are int64 of shape (samples, T).
    """

    inputs: tuple[Tensor, ...]
    targets: Tensor

    def split(self, size: int) -> Iterator[Batch]:
        """Microbatches of `size` samples, in order."""
        parts = zip(*(tensor.split(size) for tensor in (*self.inputs, self.targets)), strict=True)
        return (Batch(tuple(inputs), targets) for *inputs, targets in parts)

    def cut(self, seq_len: int, ranks: int, place: int) -> Batch:
        """The part of every sequence that a rank of the context axis works on."""
        if ranks == 1:
            return self
        from runtime.context import own_positions

        own = own_positions(seq_len, ranks, place).to(self.targets.device)
        return Batch(tuple(tensor.index_select(1, own) for tensor in self.inputs), self.targets.index_select(1, own))


class Batches:
    """The batches of one rank: `load(step)` is its share of the global batch of a step, a function of (seed, step)
    alone, so that every layout sees the same samples, and a run can be continued at any step."""

    def __init__(self, job: Job, layout: Layout, rank: int, device: torch.device) -> None:
        self.training, self.device = job.training, device
        self.tokens = read_tokens(job.training.data)
        self.share = share_of(layout, rank, job.training.global_batch_size)
        self.context = layout.cp, layout.coordinates(rank)["cp"]

    def load(self, step: int) -> Batch:
        training = self.training
        offsets = sample_offsets(len(self.tokens), training.seed, step, training.global_batch_size, training.seq_len)
        inputs, targets = load_batch(self.tokens, offsets[self.share], training.seq_len, self.device)
        return Batch((inputs,), targets).cut(training.seq_len, *self.context)


def read_tokens(folder: str, most: int = MOST_BYTES) -> np.ndarray:
    """The text files below a folder, in sorted order, as one array of bytes, cut off after `most` of them.

    A file is text if its first 8 KiB hold no zero byte (git's rule). "" means the Python standard library's source.

    Raises:
        UserError: there is no such folder, or no text in it.
    """
    root = Path(folder or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise UserError(f"training.data = '{folder}' is not a folder; name a folder with text files")
    # Mapped from a file without a name, so that a rank holds only the pages that it samples from.
    with tempfile.TemporaryFile() as file:
        left = most
        for path in _files(root):
            if left <= 0:
                break
            if folder or path.suffix == ".py":
                left -= file.write(_read_text(path, left))
        if left == most:
            raise UserError(f"training.data = '{folder}' holds no text file")
        file.flush()
        return np.memmap(file, dtype=np.uint8, mode="r")


def _files(root: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in _SKIPPED and not f.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _read_text(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(most)
    except OSError as error:
        raise UserError(f"training.data: '{path}' cannot be read: {error.strerror}") from None
    return b"" if b"\0" in data[:8192] else data


def check_data(job: Job) -> None:
    """Raises UserError if there is too little text for one sample, or the model cannot read bytes. Reads no more of
    the text than that takes."""
    if job.model.vocab_size < VOCABULARY:
        raise UserError(f"vocab_size = {job.model.vocab_size} is too small for bytes; it must be at least {VOCABULARY}")
    seq_len, folder = job.training.seq_len, job.training.data
    found = len(read_tokens(folder, most=seq_len + 1))
    if found <= seq_len:
        raise UserError(
            f"training.data = '{folder}' holds {found} bytes of text, but one sample of seq_len = {seq_len} "
            f"needs {seq_len + 1}"
        )


def sample_offsets(length: int, seed: int, step: int, global_batch_size: int, seq_len: int) -> np.ndarray:
    """Where the samples of one global batch begin in a stream of `length` tokens: a function of (seed, step) alone,
    so that every layout sees the same samples, and a run can be continued at any step."""
    return np.random.default_rng([seed % 2**64, step]).integers(0, length - seq_len, size=global_batch_size)


def share_of(layout: Layout, rank: int, global_batch_size: int) -> slice:
    """The samples of the global batch that a rank works on: data-parallel ranks take contiguous equal parts."""
    place = layout.coordinates(rank)
    share = global_batch_size // layout.dp
    start = (place["dp_replicate"] * layout.dp_shard + place["dp_shard"]) * share
    return slice(start, start + share)


def load_batch(tokens: np.ndarray, offsets: np.ndarray, seq_len: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 of shape (len(offsets), seq_len); a target is the token after its input."""
    import torch

    windows = torch.from_numpy(tokens[offsets[:, None] + np.arange(seq_len + 1)].astype(np.int64))
    windows = windows.to(device)
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
