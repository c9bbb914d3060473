"""The loss against torch's own, and what it holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from runtime import loss as loss_module
from runtime.data import NO_TARGET
from runtime.loss import mean_cross_entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 1000, 2**24])
def test_equals_torchs_cross_entropy(dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece or row by row, with tokens that have no target."""
    monkeypatch.setattr(loss_module, "PIECE", piece)
    torch.manual_seed(1)
    scores, targets = torch.randn(3, 20, 97).to(dtype), torch.randint(0, 97, (3, 20))
    targets[0, :7] = NO_TARGET
    theirs, ours = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    expected = F.cross_entropy(theirs.flatten(0, 1).float(), targets.flatten()) / 3
    # The gradient takes the place of the logits, which may not be a leaf then.
    found = mean_cross_entropy(ours * 1, targets) / 3
    expected.backward()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    assert theirs.grad is not None and ours.grad is not None
    rounding = 1e-7 if dtype == torch.float32 else 2e-5
    assert torch.allclose(theirs.grad, ours.grad, atol=rounding)


def test_keeps_the_logits_alone() -> None:
    """Of 4,096 logits in bf16 8 KiB, and a few numbers for each of 4 tokens; the gradient lies where they lay."""
    logits = (torch.randn(4, 1024, requires_grad=True) * 1).to(torch.bfloat16)
    kept: list[int] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.nbytes) or tensor, lambda tensor: tensor):
        loss = mean_cross_entropy(logits, torch.tensor([1, 2, 3, NO_TARGET]))
    assert 2 * 4096 <= sum(kept) <= 2 * 4096 + 4 * 24
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr()
