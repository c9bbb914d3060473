"""A mixture of experts computes what its definition says, token by token, and so does a rank without tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_jobs import MOE, SHARED_MOE
from torch import Tensor

from runtime.experts import MixtureOfExperts
from runtime.model import Block, FeedForward
from simulator.model import ModelSpec


def mixture_of(spec: ModelSpec) -> MixtureOfExperts:
    """The mixture of a block with random weights and biases, large enough that no two experts are alike."""
    torch.manual_seed(0)
    mixture = Block(spec, spec.num_hidden_layers - 1).moe
    assert mixture is not None
    for parameter in mixture.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return mixture


def token_by_token(mixture: MixtureOfExperts, x: Tensor) -> Tensor:
    """softmax over the top logits, times the chosen experts, plus the shared ones: as in the papers, one by one."""
    experts, rows = mixture.experts, []
    for token in x.flatten(0, 1):
        logits = mixture.router.gate(token)
        best = logits.argsort(descending=True)[: mixture.router.top]
        row = torch.zeros_like(token)
        for weight, e in zip(logits[best].softmax(0), best.tolist(), strict=True):
            bias1, bias2, bias3 = (
                0 if bias is None else bias[e] for bias in (experts.w1_bias, experts.w2_bias, experts.w3_bias)
            )
            assert experts.w3 is not None
            inner = F.silu(experts.w1[e] @ token + bias1) * (experts.w3[e] @ token + bias3)
            row = row + weight * (experts.w2[e] @ inner + bias2)
        rows.append(row if mixture.shared_experts is None else row + mixture.shared_experts(token))
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("spec", [MOE, SHARED_MOE], ids=lambda spec: spec.name)
def test_results_and_gradients_are_those_of_the_definition(spec: ModelSpec) -> None:
    mixture = mixture_of(spec)
    x, way = torch.randn(2, 8, spec.hidden_size, requires_grad=True), torch.randn(2, 8, spec.hidden_size)
    inputs = [x, *mixture.parameters()]
    ours, theirs = mixture(x), token_by_token(mixture, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, inputs, way), torch.autograd.grad(theirs, inputs, way), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", [MOE, SHARED_MOE], ids=lambda spec: spec.name)
def test_a_rank_without_tokens_has_gradients_of_zero(spec: ModelSpec) -> None:
    experts = mixture_of(spec).experts
    nothing = torch.zeros(0, spec.hidden_size, requires_grad=True)
    result = experts(nothing, torch.zeros(spec.num_experts, dtype=torch.int64))
    assert result.shape == (0, spec.hidden_size)
    result.sum().backward()
    assert nothing.grad is not None and nothing.grad.shape == nothing.shape
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


def test_blocks_without_experts_come_first() -> None:
    assert isinstance(Block(SHARED_MOE, 0).feed_forward, FeedForward)
    assert Block(SHARED_MOE, 0).moe is None
    assert Block(SHARED_MOE, 1).feed_forward is None
    assert isinstance(Block(dataclasses.replace(SHARED_MOE, first_k_dense_replace=0), 0).moe, MixtureOfExperts)
