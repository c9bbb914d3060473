"""How the samples of an epoch are cut among replicas. Nothing here imports torch.

    sampled      no epochs: every step draws its global batch from anywhere in the stream
    block        replica r has the r-th part of the stream, in order
    sequential   the samples go round: replica r has every R-th one, beginning with the r-th
    random       as sequential, in an order that is drawn anew for every epoch
    hash         a sample belongs to the replica that its tokens say, wherever it stands in the stream

A sample of the last four is a window of seq_len tokens, one behind the other. Sequential and random cut a global batch
that does not depend on the number of replicas; block and hash own samples, so that another number of replicas is
another order. What a change of that number in the middle of an epoch has left over is cut anew, so that no sample is
lost or seen twice there either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from simulator.errors import UserError
from simulator.files import STRICT
from simulator.job import Training

# Odd multipliers from the golden ratio, and the finalizer of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).
_GOLDEN = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
_ROWS = 2**15


@dataclass(frozen=True)
class Cut:
    """From `step` on samples are cut among `replicas`."""

    step: int
    replicas: int

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Shares:
    """What the replicas have of an epoch: samples each owns, and how many of all are left out or seen twice."""

    sizes: tuple[int, ...]
    dropped: int
    repeated: int

    @property
    def imbalance(self) -> float:
        """The largest share over the mean one, less 1."""
        return max(self.sizes) * len(self.sizes) / sum(self.sizes) - 1


def samples_of(length: int, seq_len: int) -> int:
    """Samples in a stream of so many tokens: the token behind the last one is a target too."""
    return max(0, (length - 1) // seq_len)


def content_hash(windows: np.ndarray) -> np.ndarray:
    """A number for each row of token ids, uint64 of shape (rows,): the same for the same ids on every machine."""
    width = windows.shape[1]
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(width, _GOLDEN, np.uint64), dtype=np.uint64)
        found = ((windows.astype(np.uint64) + np.uint64(1)) * powers).sum(axis=1, dtype=np.uint64)
        for shift, factor in _MIX:
            found = (found ^ (found >> np.uint64(shift))) * np.uint64(factor)
    return found


def owners(ids: np.ndarray, seq_len: int, samples: int) -> np.ndarray:
    """The content hash of every sample of a stream; it reads all of it, a piece at a time."""
    parts = []
    for first in range(0, samples, _ROWS):
        last = min(first + _ROWS, samples)
        parts.append(content_hash(ids[first * seq_len : last * seq_len].reshape(-1, seq_len)))
    return np.concatenate(parts) if parts else np.empty(0, np.uint64)


class Epochs:
    """Which samples each replica sees in a step: a function of seed, step and cuts.

    Args:
        samples: in an epoch.
        cuts: how many replicas there were from which step on, the first from step 0.
        hashes: gives the content hash of every sample, for "hash" alone.

    Raises:
        UserError: there is not one global batch in an epoch.
    """

    def __init__(
        self, samples: int, training: Training, cuts: tuple[Cut, ...], hashes: Callable[[], np.ndarray] | None = None
    ) -> None:
        assert cuts and cuts[0].step == 0
        self.samples, self.cuts = samples, cuts
        self.kind, self.pads = training.sharding, training.remainder == "pad"
        self.batch_size, self.seed = training.global_batch_size, training.seed % 2**64
        self.hashes = hashes() if hashes is not None and self.kind == "hash" else None
        self._span: _Span | None = None
        self._steps: dict[int, int] = {}
        for cut in cuts:
            self._check(cut.replicas)

    def batch(self, step: int) -> np.ndarray:
        """Sample numbers of one step, of shape (replicas, global_batch_size / replicas)."""
        span = self._span
        if span is None or step < span.begin:
            span = self._first(0, 0, None)
        while step >= span.end:
            span = self._next(span, step)
        self._span = span
        share = self.batch_size // len(span.queues)
        first = (step - span.begin) * share
        return span.queues[:, first : first + share]

    def shares(self, epoch: int = 0) -> Shares:
        """Of a whole epoch, as it is cut last."""
        order, replicas = self._order(epoch), self.cuts[-1].replicas
        queues = self._queues(order, replicas)
        seen = np.bincount(queues.ravel(), minlength=self.samples)
        sizes = (
            np.bincount(self._owner(order, replicas), minlength=replicas)
            if self.kind == "hash"
            else np.full(replicas, self.samples / replicas)
        )
        return Shares(tuple(sizes.tolist()), int((seen == 0).sum()), int(np.maximum(seen - 1, 0).sum()))

    def _check(self, replicas: int) -> None:
        if self._steps_of_epoch(replicas):
            return
        if self.kind == "hash" and self.samples >= self.batch_size:
            raise UserError(
                f"data.sharding = 'hash' leaves a replica fewer than {self.batch_size // replicas} of {self.samples} "
                "samples; take data.remainder = 'pad', or another sharding"
            )
        raise UserError(
            f"data.sharding = '{self.kind}' finds {self.samples} samples, not one global_batch_size = "
            f"{self.batch_size}; take data.remainder = 'pad', more data or a smaller batch"
        )

    def _order(self, epoch: int) -> np.ndarray:
        if self.kind == "random":
            return np.random.default_rng([self.seed, epoch, 2**32]).permutation(self.samples)
        return np.arange(self.samples)

    def _owner(self, order: np.ndarray, replicas: int) -> np.ndarray:
        assert self.hashes is not None
        return (self.hashes[order] % np.uint64(replicas)).astype(np.int64)

    def _queues(self, order: np.ndarray, replicas: int) -> np.ndarray:
        """What each replica sees of these samples, in order: whole steps, of shape (replicas, samples of each)."""
        share = self.batch_size // replicas
        if self.kind == "hash":
            owner = self._owner(order, replicas)
            own = [order[owner == replica] for replica in range(replicas)]
            sizes = [len(part) for part in own]
            length = -(-max(sizes) // share) * share if self.pads else min(sizes) // share * share
            # A replica without any sample of its own pads with those of all.
            return np.stack([np.resize(part if len(part) else order, length) for part in own])
        count = len(order)
        whole = -(-count // self.batch_size) if self.pads else count // self.batch_size
        order = np.resize(order, whole * self.batch_size)
        return order.reshape(replicas, -1) if self.kind == "block" else order.reshape(-1, replicas).T

    def _steps_of_epoch(self, replicas: int) -> int:
        if replicas not in self._steps:
            self._steps[replicas] = self._length(np.arange(self.samples), replicas)
        return self._steps[replicas]

    def _length(self, order: np.ndarray, replicas: int) -> int:
        """Steps that these samples make."""
        if not len(order):
            return 0
        if self.kind == "hash":
            return self._queues(order, replicas).shape[1] * replicas // self.batch_size
        return -(-len(order) // self.batch_size) if self.pads else len(order) // self.batch_size

    def _next(self, span: _Span, step: int) -> _Span:
        """The span behind this one; whole epochs before `step` with no cut in them are skipped."""
        if span.left is not None:
            return self._first(span.end, span.epoch, span.left)
        begin, length = span.end, self._steps_of_epoch(self._replicas(span.end))
        until = min([step, *(cut.step for cut in self.cuts if cut.step > begin)])
        skipped = max(0, until - begin) // length
        return self._first(begin + skipped * length, span.epoch + 1 + skipped, None)

    def _first(self, begin: int, epoch: int, order: np.ndarray | None) -> _Span:
        """The span that begins at a step: an epoch, or with `order` what a cut has left of one."""
        replicas = self._replicas(begin)
        if order is not None and not self._length(order, replicas):
            order, epoch = None, epoch + 1
        order = self._order(epoch) if order is None else order
        queues = self._queues(order, replicas)
        end = begin + queues.size // self.batch_size
        ends = [cut.step for cut in self.cuts if begin < cut.step < end]
        if not ends:
            return _Span(begin, end, epoch, queues, None)
        seen = queues[:, : (ends[0] - begin) * (self.batch_size // replicas)]
        return _Span(begin, ends[0], epoch, queues, order[~np.isin(order, seen)])

    def _replicas(self, step: int) -> int:
        return [cut.replicas for cut in self.cuts if cut.step <= step][-1]


@dataclass(frozen=True)
class _Span:
    """Steps from `begin` to before `end`, in which replica r works through queues[r]. `left` are the samples that a cut
    at the end leaves for the same epoch, None where the epoch ends."""

    begin: int
    end: int
    epoch: int
    queues: np.ndarray
    left: np.ndarray | None
