"""Pipeline schedules: the order of forwards and backwards on each pipeline rank, in PyTorch's own notation.

An op prints as torch writes it: `2F0` is stage 2, forward, microbatch 0; `2B0` its full backward, which some schedules
split into `2I0`, the gradient of the stage's input, and `2W0`, the gradients of its weights. `(0F4;3B1)OVERLAP_F_B` is
a forward and a backward that hide each other's communication. Each order equals the one that
torch.distributed.pipelining generates (tests/simulator/test_schedules.py compares them).

P ranks, r the rank, v chunks on each, m microbatches. F, I, W are the seconds of one microbatch's forward, input
gradient and weight gradient over all chunks of a rank, B = I + W. Bubbles are seconds that a rank idles in a step of
equal ranks and free messages. A chunk is a stage: in the loop placement chunk c of rank r is stage r + c·P; in the V
placement chunk 0 is stage r and chunk 1 is stage 2P - 1 - r.

In the drawings time runs to the right, a row is a rank, and F, I, W of a chunk take one slot each, B two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

Schedule = Literal[
    "GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV"
]
SCHEDULES: tuple[str, ...] = get_args(Schedule)
MULTI_STAGE = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
V_PLACEMENT = ("ZBVZeroBubble", "DualPipeV")
SPLIT_BACKWARD = ("InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")


class Op(NamedTuple):
    """One action of one pipeline rank. `stage` and `microbatch` are None where the action has none; `parts` are the
    forward and the backward of an overlapped pair."""

    kind: str
    stage: int | None = None
    microbatch: int | None = None
    parts: tuple[Op, ...] = ()

    def __str__(self) -> str:
        if self.parts:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        stage = "" if self.stage is None else self.stage
        return f"{stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"

    @property
    def leaves(self) -> tuple[Op, ...]:
        """The actions that it is made of: its parts, or itself."""
        return self.parts or (self,)


def gpipe(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """All forwards, then all backwards (GPipe, arXiv 1811.06965). Bubble (P-1)(F+B); m microbatches alive.

    rank 0  0F0 0F1 0F2 0F3 .   .   .   0B0---- 0B1---- 0B2---- 0B3----
    rank 1  .   1F0 1F1 1F2 1F3 1B0---- 1B1---- 1B2---- 1B3---- .   .
    (P = 2, v = 1, m = 4)
    """
    return [Op("F", rank, i) for i in range(microbatches)] + [Op("B", rank, i) for i in range(microbatches)]


def one_forward_one_backward(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """1F1B (PipeDream-flush, arXiv 2104.04473): the bubble of GPipe, but at most P - r microbatches alive.

    rank 0  0F0 0F1 .   .   0B0---- 0F2 0B1---- 0F3 0B2---- .   0B3----
    rank 1  .   1F0 1B0---- 1F1 1B1---- 1F2 1B2---- 1F3 1B3---- .   .
    (P = 2, v = 1, m = 4)
    """
    warmup = min(ranks - 1 - rank, microbatches)
    order = [Op("F", rank, i) for i in range(warmup)]
    for i in range(microbatches - warmup):
        order += [Op("F", rank, warmup + i), Op("B", rank, i)]
    return order + [Op("B", rank, i) for i in range(microbatches - warmup, microbatches)]


def looped_bfs(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """Breadth-first (arXiv 2211.05953): GPipe chunk by chunk, backwards in reverse. Bubble (P-1)(F+B)/v; all v·m
    passes alive, but parameters of one chunk at a time in use.

    rank 0  0F0 0F1 0F2 2F0 2F1 2F2 .   .   .   2B2---- 2B1---- 2B0---- 0B2---- 0B1---- 0B0----
    rank 1  .   1F0 1F1 1F2 3F0 3F1 3F2 3B2---- 3B1---- 3B0---- 1B2---- 1B1---- 1B0---- .   .
    (P = 2, v = 2, m = 3)
    """
    stages = range(rank, ranks * chunks, ranks)
    forwards = [Op("F", stage, i) for stage in stages for i in range(microbatches)]
    return forwards + [Op("B", stage, i) for stage in reversed(stages) for i in reversed(range(microbatches))]


def interleaved_1f1b(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """Interleaved 1F1B (arXiv 2104.04473, section 2.2) as torch runs it, depth first over the chunks of a rank.

    Bubble (P-1)(F+B)/v, for v times the messages of 1F1B. Rounds of R = m / max(1, m // P) microbatches go through a
    chunk before the next one's turn.

    rank 0  0F0 0F1 2F0 2F1 0F2 .   2B0---- 0F3 2B1---- 2F2 0B0---- 2F3 0B1---- .   2B2---- .   2B3---- 0B2---- 0B3----
    rank 1  .   1F0 1F1 3F0 3B0---- 3F1 3B1---- 1F2 1B0---- 1F3 1B1---- 3F2 3B2---- 3F3 3B3---- 1B2---- 1B3---- .   .
    (P = 2, v = 2, m = 4)
    """
    forwards = _depth_first("F", rank, ranks, chunks, microbatches)
    backwards = _depth_first("B", rank, ranks, chunks, microbatches)
    warmup = _warmup(rank, ranks, chunks, microbatches, per_hop=2)
    order = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        order += [forward, backward]
    return order + backwards[len(backwards) - warmup :]


def interleaved_zero_bubble(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """ZB1P, also ZB-H1 (arXiv 2401.10241, section 2.3), on v >= 1 chunks: interleaved 1F1B whose weight gradients
    lag r input gradients behind and fill the bubble at the end. Bubble (P-1)(F+I-W)/v; with v = 1 at most P alive.

    rank 0  0F0 0F1 0F2 .   .   0I0 0W0 0F3 0I1 0W1 0I2 0W2 0I3 0W3
    rank 1  .   1F0 1F1 .   1I0 1F2 1I1 1W0 1F3 1I2 1W1 1I3 1W2 1W3
    rank 2  .   .   2F0 2I0 2F1 2I1 2F2 2I2 2W0 2F3 2I3 2W1 2W2 2W3
    (P = 3, v = 1, m = 4)
    """
    forwards = _depth_first("F", rank, ranks, chunks, microbatches)
    inputs = _depth_first("I", rank, ranks, chunks, microbatches)
    weights = [op._replace(kind="W") for op in inputs]
    warmup = _warmup(rank, ranks, chunks, microbatches, per_hop=1)
    order = forwards[:warmup]
    for step, gradient in enumerate(inputs):
        order += [*forwards[warmup + step : warmup + step + 1], gradient]
        if step >= rank:
            order.append(weights[step - rank])
    return order + weights[max(0, len(weights) - rank) :]


def zbv_zero_bubble(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """ZB-V (arXiv 2401.10241, section 6): two chunks in V placement, so that the last rank turns round at once.

    Bubble (P-1)·F/2 where F = I = W, all of it from waiting for the gradient norm: without that wait steps follow each
    other without a bubble. The order is fixed and loses where the three differ. At most 2P passes of a chunk alive.

    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 3I1 3W1 0I0 0W0 3F2 3I2 3W2 0I1 0W1 0I2 0W2 .
    rank 1  .   1F0 2F0 1F1 2F1 2I0 2W0 1F2 1I0 1W0 2F2 2I1 2W1 1I1 2I2 1I2 1W1 2W2 1W2
    (P = 2, v = 2, m = 3)
    """
    first, second = rank, 2 * ranks - 1 - rank
    forward_0, input_0, weight_0 = (Op(kind, first) for kind in "FIW")
    forward_1, input_1, weight_1 = (Op(kind, second) for kind in "FIW")
    # The order is that of at least 2P - 1 microbatches, with those left out that there are not.
    count = max(microbatches, 2 * ranks - 1)
    fed = count - (2 * ranks - 1 - rank)
    shape = [
        *[forward_0] * (2 * (ranks - rank) - 1),
        *[forward_1, forward_0] * rank,
        *[forward_1, input_1, weight_1] * (ranks - rank),
        *[forward_0, input_0, weight_0, forward_1, input_1, weight_1] * fed,
        *[input_0, weight_0, forward_1, input_1, weight_1] * (count - ranks - fed),
        *[input_0, input_1] * rank,
        *[input_0, weight_0] * (ranks - rank),
        *[weight_1] * rank,
        *[weight_0] * rank,
    ]
    return [op for op in _numbered(shape) if op.microbatch is not None and op.microbatch < microbatches]


def dual_pipe_v(rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """DualPipeV (deepseek-ai/DualPipe; DualPipe is arXiv 2412.19437, section 3.2): two chunks in V placement; the main
    part is pairs of a forward of one chunk and a backward of the other. Needs m >= 2P.

    Bubble (P-1)(F&B + B - 3W)/2, with F&B the seconds of a pair, where F = I = W (deepseek-ai/DualPipe, its PP is 2P).
    Drawn with & between the two of a pair.

    rank 0  0F0 0F1 0F2 3F0 3I0 3W0 3F1 0F3&3B1---- .   3F2&0B0---- 3B2---- .   3F3&0B1---- 3B3---- 0I2 0W2 0I3 0W3
    rank 1  .   1F0 2F0 1F1 2F1 1F2 2B0---- 2F2&1B0---- 1F3&2B1---- 2F3&1B1---- 2B2---- 1B2---- .   2I3 1I3 2W3 1W3
    (P = 2, v = 2, m = 4)
    """
    first, second = rank, 2 * ranks - 1 - rank
    forward_0, backward_0, input_0 = (Op(kind, first) for kind in "FBI")
    forward_1, backward_1, input_1 = (Op(kind, second) for kind in "FBI")
    weight, after = Op("W"), ranks - 1 - rank
    down = Op("OVERLAP_F_B", parts=(forward_0, backward_1))
    up = Op("OVERLAP_F_B", parts=(forward_1, backward_0))
    main = [down, up] * (microbatches - 2 * ranks + rank + 1)
    if rank == ranks - 1:
        main[:1] = [forward_0, backward_1]
    shape = [
        *[forward_0] * (2 * after),
        *[forward_0, forward_1] * (rank + 1),
        *[input_1, weight, forward_1] * after,
        *main,
        *[backward_1, up] * after,
        *([backward_1, backward_0] * (rank + 1))[: rank + 1],
        *([input_1, input_0] * (rank + 1))[rank + 1 :],
        *[weight, input_0] * after,
        *[weight] * (rank + 1),
    ]
    return _numbered(shape)


def _warmup(rank: int, ranks: int, chunks: int, microbatches: int, per_hop: int) -> int:
    """Forwards of a depth-first schedule before its first backward."""
    per_round = microbatches // max(1, microbatches // ranks)
    return min((chunks - 1) * per_round + per_hop * (ranks - 1 - rank), chunks * microbatches)


def _depth_first(kind: str, rank: int, ranks: int, chunks: int, microbatches: int) -> list[Op]:
    """All ops of a kind on a rank: a round of microbatches through each chunk in turn, backwards from the last."""
    per_round = microbatches // max(1, microbatches // ranks)
    stages = range(rank, ranks * chunks, ranks)
    return [
        Op(kind, stage, microbatch)
        for first in range(0, microbatches, per_round)
        for stage in (stages if kind == "F" else reversed(stages))
        for microbatch in range(first, first + per_round)
    ]


def _numbered(shape: Sequence[Op]) -> list[Op]:
    """Give the ops of a rank their microbatches: each stage takes them in order, forwards and backwards apart. A W
    without a stage is that of the oldest input gradient whose weights are pending."""
    counts: dict[tuple[bool, int], int] = {}
    pending: list[Op] = []

    def number(op: Op) -> Op:
        if op.kind == "W":
            oldest = next(i for i, gradient in enumerate(pending) if op.stage in (None, gradient.stage))
            return pending.pop(oldest)._replace(kind="W")
        assert op.stage is not None
        key = (op.kind == "F", op.stage)
        numbered = op._replace(microbatch=counts.get(key, 0))
        counts[key] = counts.get(key, 0) + 1
        if op.kind == "I":
            pending.append(numbered)
        return numbered

    return [op._replace(parts=tuple(map(number, op.parts))) if op.parts else number(op) for op in shape]


_ORDERS: dict[str, Callable[[int, int, int, int], list[Op]]] = {
    "GPipe": gpipe,
    "1F1B": one_forward_one_backward,
    "Interleaved1F1B": interleaved_1f1b,
    "LoopedBFS": looped_bfs,
    "InterleavedZeroBubble": interleaved_zero_bubble,
    "ZBVZeroBubble": zbv_zero_bubble,
    "DualPipeV": dual_pipe_v,
}


@functools.lru_cache(maxsize=4096)
def compute_order(schedule: str, rank: int, ranks: int, chunks: int, microbatches: int) -> tuple[Op, ...]:
    """The forwards and backwards of one pipeline rank in the order in which it runs them."""
    return tuple(_ORDERS[schedule](rank, ranks, chunks, microbatches))
