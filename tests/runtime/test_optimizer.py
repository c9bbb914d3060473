"""Pieces of the step that need no second process: norm, clipping, step times."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from runtime.optimizer import clip_gradients, squared_norm
from runtime.record import quantiles


def parameters_with_gradients() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in ((8, 4), (4,), (3, 5)):
        parameter = nn.Parameter(torch.zeros(shape))
        parameter.grad = torch.randn(shape, generator=generator)
        found.append(parameter)
    return found


def test_clipping_is_torchs_on_one_process() -> None:
    ours, theirs = parameters_with_gradients(), parameters_with_gradients()
    norm = squared_norm(ours, ranks_per_stage=1).sqrt()
    clip_gradients(ours, norm)
    assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(theirs, 1.0).item(), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_small_gradients_are_left_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([0.3, 0.4])
    clip_gradients([parameter], torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(parameter.grad, torch.tensor([0.3, 0.4]))


def test_copies_are_counted_once() -> None:
    one = squared_norm(parameters_with_gradients(), ranks_per_stage=1)
    torch.testing.assert_close(squared_norm(parameters_with_gradients(), ranks_per_stage=4) * 4, one)


def test_quantiles() -> None:
    spread = quantiles([float(n) for n in range(11)])
    assert (spread.p10, spread.median, spread.p90) == (1.0, 5.0, 9.0)
    assert quantiles([2.0]).p90 == 2.0
