"""Samples of a token stream: which ones a step sees, what is hidden in them, and how they are cut among replicas.

    decoder                 inputs the sample, targets the token behind each
    encoder (BERT)          inputs the sample with hidden tokens, targets what was hidden
    encoder and decoder     the encoder's inputs the sample with hidden tokens; the decoder gives back the whole

Only `Batches.load` needs torch: the launcher looks at the data before it starts a process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runtime.sharding import Cut, Epochs, Shares, owners, samples_of
from runtime.tokens import VOCABULARY, open_stream
from simulator.errors import UserError
from simulator.job import Job
from simulator.layout import Layout

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# BERT (arXiv 1810.04805, section 3.1): 15 % of the tokens are to be found; of them 80 % show the mask, 10 % any token.
MASKED, SHOWN_AS_MASK, SHOWN_AS_ANY = 0.15, 0.8, 0.1
# What torch's cross entropy leaves out.
NO_TARGET = -100


class Batch(NamedTuple):
    """What a rank trains on in one step: samples are the first dim of every tensor.

    inputs are what the first stage takes: token ids (samples, T), of the encoder and the decoder where there are both.
    targets are int64 of shape (samples, T), -100 where nothing is predicted; each sample predicts as many.
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
    """The batches of one rank: `load(step)` is its share of the global batch of a step. By default that is a function
    of (seed, step) alone, so that every layout sees the same samples, and a run can be continued at any step.

    Args:
        cuts: among how many replicas samples were cut from which step on; None for the layout's, from the first step.
    """

    def __init__(
        self, job: Job, layout: Layout, rank: int, device: torch.device, cuts: tuple[Cut, ...] | None = None
    ) -> None:
        self.training, self.model, self.device = job.training, job.model, device
        self.stream = open_stream(job.training, job.model.vocab_size)
        self.share = share_of(layout, rank, job.training.global_batch_size)
        self.context = layout.cp, layout.coordinates(rank)["cp"]
        # The last id of a vocabulary stands in: no byte of UTF-8 text is 255, and it is rare in any other.
        self.mask_token = self.stream.mask_token if self.stream.mask_token >= 0 else job.model.vocab_size - 1
        self.epochs: Epochs | None = None
        if job.training.sharding != "sampled":
            self.cut_anew(cuts or (Cut(0, layout.dp),))

    def cut_anew(self, cuts: tuple[Cut, ...]) -> None:
        """Cut samples as a run did that is continued. Raises UserError where an epoch has not one global batch."""
        if self.training.sharding == "sampled":
            return
        ids, seq_len = self.stream.ids, self.training.seq_len
        samples = samples_of(len(ids), seq_len)
        self.epochs = Epochs(samples, self.training, cuts, lambda: owners(ids, seq_len, samples))

    def shares(self) -> Shares | None:
        """What the replicas have of an epoch; None where there are no epochs."""
        return None if self.epochs is None else self.epochs.shares()

    def load(self, step: int) -> Batch:
        import torch

        training, ids = self.training, self.stream.ids
        windows = read_windows(ids, self._offsets(step), training.seq_len)
        _check_ids(windows, self.model.vocab_size, training.data)
        arrays = self._shown(windows, step)
        *inputs, targets = (torch.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays)
        return Batch(tuple(inputs), targets).cut(training.seq_len, *self.context)

    def _offsets(self, step: int) -> np.ndarray:
        """Where this rank's samples of a step begin in the stream."""
        training = self.training
        if self.epochs is not None:
            share = self.share.stop - self.share.start
            return self.epochs.batch(step)[self.share.start // share] * training.seq_len
        offsets = sample_offsets(
            len(self.stream.ids), training.seed, step, training.global_batch_size, training.seq_len
        )
        return offsets[self.share]

    def _shown(self, windows: np.ndarray, step: int) -> tuple[np.ndarray, ...]:
        """Inputs and, last, targets of windows (samples, T + 1)."""
        if self.model.causal:
            return windows[:, :-1], windows[:, 1:]
        samples = windows[:, 1:] if self.model.encoder_decoder else windows[:, :-1]
        hidden = [self._hide(sample, step, number) for number, sample in enumerate(samples, start=self.share.start)]
        shown, targets = (np.stack(arrays) for arrays in zip(*hidden, strict=True))
        return (shown, windows[:, :-1], samples) if self.model.encoder_decoder else (shown, targets)

    def _hide(self, sample: np.ndarray, step: int, number: int) -> tuple[np.ndarray, np.ndarray]:
        """A sample with hidden tokens, and targets: what was hidden, NO_TARGET elsewhere. The number of a sample in the
        global batch decides, so that layouts hide the same; as many are hidden in each, so that means of microbatches
        add up. An encoder in front of a decoder always sees the mask, as BART's token masking has it."""
        # From 1: with a zero behind them seed and step alone would be the same stream, which places the samples.
        random = np.random.default_rng([self.training.seed % 2**64, step, 1 + number])
        count = max(1, round(MASKED * len(sample)))
        places, chance = random.choice(len(sample), count, replace=False), random.random(count)
        anything = random.integers(0, self.stream.vocabulary or self.model.vocab_size, count)
        shown, targets = sample.copy(), np.full_like(sample, NO_TARGET)
        targets[places] = sample[places]
        kept = np.where(chance < SHOWN_AS_MASK + SHOWN_AS_ANY, anything, sample[places])
        always = self.model.encoder_decoder
        shown[places] = np.where(always | (chance < SHOWN_AS_MASK), self.mask_token, kept)
        return shown, targets


def check_data(job: Job) -> None:
    """Raises UserError if there is too little data for one sample, or the model does not have its tokens. Reads no more
    text than that takes; text for a tokenizer is tokenised here, before the first process starts."""
    training, vocab_size = job.training, job.model.vocab_size
    seq_len, name = training.seq_len, training.data
    stream = open_stream(training, vocab_size, most=seq_len + 1)
    found, raw = len(stream.ids), stream.vocabulary == VOCABULARY and not training.tokenizer
    if vocab_size < stream.vocabulary:
        of = "bytes" if raw else f"training.tokenizer = '{training.tokenizer}'"
        raise UserError(f"vocab_size = {vocab_size} is too small for {of}; it must be at least {stream.vocabulary}")
    if found <= seq_len:
        unit = "bytes of text" if raw else "tokens"
        raise UserError(
            f"training.data = '{name}' holds {found} {unit}, but one sample of seq_len = {seq_len} needs {seq_len + 1}"
        )
    _check_ids(stream.ids[: 2**20], vocab_size, name)


def _check_ids(ids: np.ndarray, vocab_size: int, name: str) -> None:
    least, largest = int(ids.min()), int(ids.max())
    if least < 0 or largest >= vocab_size:
        wrong = least if least < 0 else largest
        raise UserError(f"training.data = '{name}' holds the token id {wrong}, but vocab_size = {vocab_size}")


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


def read_windows(tokens: np.ndarray, offsets: np.ndarray, seq_len: int) -> np.ndarray:
    """The samples at these offsets with the token behind each: int64 of shape (len(offsets), seq_len + 1)."""
    return tokens[offsets[:, None] + np.arange(seq_len + 1)].astype(np.int64)
