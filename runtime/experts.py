"""Mixture of experts: a router sends every token to its top experts, which are multiplied in one grouped matmul.

    router   softmax over the logits of the chosen experts (Mixtral, arXiv 2401.04088)
    experts  tokens in the order of their experts; no capacity, so no token is dropped
    shared   a feed-forward that every token passes, where the model has one (DeepSeekMoE, arXiv 2401.06066)

There is no auxiliary loss: its value depends on which tokens a rank has together, and so on the layout.

Under expert parallelism a rank holds num_experts / ep experts and works on the tokens of all ranks of its ep group that
chose them: one all-to-all with uneven splits there, one back. Shapes: N tokens of this rank, h hidden_size, E experts,
k experts of a token, f moe_intermediate_size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from runtime.shards import local_tensor
from simulator.model import ModelSpec

Activation = Callable[[Tensor], Tensor]


def local_part_of(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, for work on a share of the tokens or of the width: what a rank finds as the
    gradient of something replicated is a share of it."""
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to_local(grad_placements=[Partial() if p.is_replicate() else p for p in tensor.placements])


def count_tokens(chosen: Tensor, experts: int) -> Tensor:
    """How many tokens chose each expert, (E,)."""
    return torch.bincount(chosen.flatten(), minlength=experts)


def message_sizes(by_rank: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """Rows that go to each rank and come from it, of `rows` in all, from the counts (2, ranks, experts of a rank)."""
    there, here = by_rank.sum(-1).tolist()
    return there, here


def even_counts(chosen: Tensor, experts: int) -> Tensor:
    """count_tokens where tensors are fake: nobody looks at the numbers."""
    return torch.empty(experts, dtype=torch.int64, device=chosen.device)


def even_sizes(by_rank: Tensor, rows: int) -> tuple[list[int], list[int]]:
    """message_sizes of a router in balance, where tensors are fake and no token chooses."""
    ranks = by_rank.shape[1]
    sizes = [rows // ranks + (rank < rows % ranks) for rank in range(ranks)]
    return sizes, sizes


class Router(nn.Module):
    """Chooses the experts of each token, and how much each of them counts."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.top = spec.num_experts_per_tok
        self.gate = nn.Linear(spec.hidden_size, spec.num_experts, bias=spec.router_bias)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and experts of tokens (N, h), both (N, k); the weights of a token sum to 1."""
        bias = None if self.gate.bias is None else local_part_of(self.gate.bias)
        logits = F.linear(tokens, local_part_of(self.gate.weight), bias)
        best, chosen = logits.float().topk(self.top, dim=-1)
        return best.softmax(dim=-1).to(tokens.dtype), chosen


class Experts(nn.Module):
    """The routed experts of a block, w2(act(w1 x) · w3 x) if gated, each weight one tensor with the experts first.

    `group` are the ranks that experts are spread over, `split` the ranks that each of them is cut over by its width.
    """

    def __init__(self, spec: ModelSpec, activation: Activation) -> None:
        super().__init__()
        experts, h, f = spec.num_experts, spec.hidden_size, spec.moe_intermediate_size
        self.activation = activation
        self.num_experts = experts
        self.group: dist.ProcessGroup | None = None
        self.split = 1
        self.w1 = nn.Parameter(torch.empty(experts, f, h))
        self.w2 = nn.Parameter(torch.empty(experts, h, f))
        self.w3 = nn.Parameter(torch.empty(experts, f, h)) if spec.gated_mlp else None
        biased = spec.mlp_bias
        self.w1_bias = nn.Parameter(torch.empty(experts, f)) if biased else None
        self.w2_bias = nn.Parameter(torch.empty(experts, h)) if biased else None
        self.w3_bias = nn.Parameter(torch.empty(experts, f)) if biased and spec.gated_mlp else None

    def forward(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """Results (M, h) for tokens (M, h) in the order of their experts, `counts` (E,) of them for each. Where experts
        are cut by width, the results are summands of it."""
        if self.group is None:
            return self._compute(tokens, counts)
        received = torch.empty_like(counts)
        dist.all_to_all_single(received, counts, group=self.group)
        # What each rank sends and gets is needed on the host: the sizes of the messages.
        by_rank = torch.stack((counts, received)).view(2, self.group.size(), -1)
        there, here = message_sizes(by_rank, tokens.shape[0])
        tokens = _exchange(tokens, here, there, self.group)
        # Sorted by sender, then by expert; experts want all senders together.
        of_expert = torch.arange(by_rank.shape[-1], device=tokens.device).repeat(self.group.size())
        order = of_expert.repeat_interleave(received, output_size=sum(here)).argsort(stable=True)
        results = self._compute(tokens.index_select(0, order), by_rank[1].sum(0))
        return _exchange(results.index_select(0, order.argsort()), there, here, self.group)

    def _compute(self, tokens: Tensor, counts: Tensor) -> Tensor:
        count = tokens.shape[0]
        if count == 0:
            # The grouped matmul refuses to have nothing to do: one token of zeros for the last expert, taken off below.
            tokens, counts = F.pad(tokens, (0, 0, 0, 1)), F.pad(counts[:-1], (0, 1), value=1)
        inner = self.activation(self._multiply(tokens, self.w1, self.w1_bias, counts))
        if self.w3 is not None:
            inner = inner * self._multiply(tokens, self.w3, self.w3_bias, counts)
        # A bias that all summands have in common is shared among them.
        return self._multiply(inner, self.w2, self.w2_bias, counts, 1 / self.split)[:count]

    def _multiply(self, x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor, share: float = 1.0) -> Tensor:
        ends = counts.cumsum(0).to(torch.int32)
        result = F.grouped_mm(x, local_part_of(weight).transpose(-2, -1), offs=ends)
        if bias is None:
            return result
        per_token = local_part_of(bias).repeat_interleave(counts, dim=0, output_size=x.shape[0])
        return result + per_token * share


def _exchange(rows: Tensor, received: list[int], sent: list[int], group: dist.ProcessGroup) -> Tensor:
    """All-to-all of rows, as many to and from each rank as the lists say; its backward is the way back."""
    result: Tensor = collectives.all_to_all_single_autograd(rows.contiguous(), received, sent, group)
    return collectives.wait_tensor(result) if isinstance(result, collectives.AsyncCollectiveTensor) else result


class MixtureOfExperts(nn.Module):
    """What stands in a block's place of the feed-forward. `shared` is the feed-forward of its shared experts."""

    def __init__(self, spec: ModelSpec, activation: Activation, shared: nn.Module | None) -> None:
        super().__init__()
        self.router = Router(spec)
        self.experts = Experts(spec, activation)
        self.shared_experts = shared

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, h). Where experts are cut by width over ranks, the result is this rank's summand."""
        local = local_part_of(x)
        routed = self._route(local.flatten(0, 1)).view_as(local)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

    def _route(self, tokens: Tensor) -> Tensor:
        weights, chosen = self.router(tokens)
        order = chosen.flatten().argsort(stable=True)
        counts = count_tokens(chosen, self.experts.num_experts)
        results = self.experts(tokens.index_select(0, order // self.router.top), counts)
        results = results.index_select(0, order.argsort()).unflatten(0, chosen.shape)
        return (results * weights.unsqueeze(-1)).sum(1)


def spread_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Give each rank of the ep axis its experts, whole."""
    experts.group = mesh.get_group()
    _distribute(experts, mesh, dict.fromkeys(_names(experts), Shard(0)))


def split_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Give each rank of the tensor axis its part of every expert's width (Megatron-LM, arXiv 1909.08053)."""
    experts.split = mesh.size()
    dims: dict[str, Shard | Replicate] = {"w2": Shard(2), "w2_bias": Replicate()}
    _distribute(experts, mesh, {name: dims.get(name, Shard(1)) for name in _names(experts)})


def replicate_weights(module: nn.Module, mesh: DeviceMesh) -> None:
    """Let every rank of the tensor axis keep all of a module's weights, whose gradients are then added up over it."""
    for part in module.modules():
        _distribute(part, mesh, dict.fromkeys(_names(part), Replicate()))


def _names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters(recurse=False)]


def _distribute(module: nn.Module, mesh: DeviceMesh, placements: dict[str, Shard | Replicate]) -> None:
    for name, placement in placements.items():
        weight = distribute_tensor(module.get_parameter(name), mesh, [placement])
        module.register_parameter(name, nn.Parameter(weight))


def scale_expert_gradients(stages: Iterable[nn.Module], tp: int, ep: int) -> None:
    """Turn FSDP's mean of routed experts' gradients into what the loss means.

    A rank's gradient is a sum over the tokens of its ep group, and FSDP takes the mean over the dp · cp · tp / ep ranks
    with the same experts. The loss is a mean over dp · cp ranks, and tp ranks with a share of the sequence each add up.
    """
    if tp == ep:
        return
    modules = (module for stage in stages for module in stage.modules() if isinstance(module, Experts))
    grads = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    # A pipeline rank may have dense blocks alone.
    if grads:
        torch._foreach_mul_([local_tensor(g) for g in grads], tp / ep)
