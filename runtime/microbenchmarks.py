"""Microbenchmarks that ranks run on their devices: kernels, the host's work per kernel, shared processors, collectives.

Started by `runtime.measure` under torchrun, once for every number of ranks; rank 0 writes the samples to a file.
All cases of a kind are timed in turn, round after round, so that a disturbance meets many cases once and not one
case always.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.host_overhead import host_seconds, now, train_once
from runtime.machine import leave, memory_bytes, processor_name, processors, resident_bytes
from runtime.measure import PROGRESS
from simulator.files import write_json
from simulator.profile import Sample

KIB, MIB = 2**10, 2**20


@dataclass(frozen=True)
class Grid:
    """The sizes that are measured, and how often.

    matmul: (m, n, k) of forward products; each is measured in the two forms of its backward too.
    memory, collective: bytes. attention: sequence lengths at `tokens` tokens and `width` = heads · head_dim.
    seconds: the least length of one timing. pool: elements that operands are cut from, larger than the caches.
    between: seconds that a rank computes before each collective where it shares processors with what moves the bytes;
    0 calls collectives one behind the other.
    """

    matmul: tuple[tuple[int, int, int], ...]
    memory: tuple[int, ...]
    attention: tuple[int, ...]
    head_dims: tuple[int, ...]
    tokens: int
    width: int
    collective: tuple[int, ...]
    concurrency_tokens: int
    repeats: int
    seconds: float
    pool: int = 16 * MIB
    between: float = 0.0


_WEIGHTS = ((128, 128), (384, 128), (256, 256), (1024, 256), (256, 1024), (512, 512), (2048, 512), (512, 2048))
_LARGE = ((64, 2048, 2048), (512, 4096, 512), (2048, 1024, 1024))
_GPU_WEIGHTS = ((1024, 1024), (2048, 2048), (8192, 2048), (2048, 8192), (4096, 4096))
GRIDS = {
    "gpu": Grid(
        matmul=(*((m, n, k) for m in (512, 2048, 8192) for n, k in _GPU_WEIGHTS), (8192, 8192, 8192)),
        memory=tuple(MIB * 2**i for i in range(9)),
        attention=(512, 1024, 2048, 4096, 8192),
        head_dims=(64, 128),
        tokens=8192,
        width=2048,
        collective=tuple(4 * KIB * 4**i for i in range(9)),
        concurrency_tokens=0,
        repeats=10,
        seconds=3e-3,
        pool=256 * MIB,
    ),
    "full": Grid(
        matmul=tuple((m, n, k) for m in (64, 256, 1024) for n, k in _WEIGHTS) + _LARGE,
        memory=tuple(64 * KIB * 2**i for i in range(10)),
        attention=(64, 128, 256, 512, 1024),
        head_dims=(32, 64, 128),
        tokens=1024,
        width=256,
        collective=(*(4 * KIB * 4**i for i in range(7)), 32 * MIB),
        concurrency_tokens=1024,
        repeats=5,
        seconds=3e-3,
        between=8e-3,
    ),
    "quick": Grid(
        matmul=((64, 128, 128), (256, 256, 128), (256, 512, 256)),
        memory=(64 * KIB, MIB, 4 * MIB),
        attention=(64, 256),
        head_dims=(32,),
        tokens=256,
        width=256,
        collective=(4 * KIB, 256 * KIB, MIB),
        concurrency_tokens=128,
        repeats=3,
        seconds=1e-3,
        between=2e-3,
    ),
}


@dataclass(frozen=True)
class Case:
    """Something to time: call(i) runs it once on operands number i."""

    kind: str
    sizes: tuple[float, ...]
    call: Callable[[int], object]
    precision: str = ""


class Operands:
    """Tensors cut from one pool that is larger than the caches of a processor, one behind the other.

    A training step comes back to a tensor after it has touched many others; operands that lie in the cache from the
    last repetition would be too fast.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, elements: int) -> None:
        self.pool = torch.randn(elements, device=device).to(dtype)
        self.position = 0

    def take(self, *shape: int) -> Tensor:
        """The next tensor of this shape, a leaf that needs a gradient."""
        count = math.prod(shape)
        if self.position + count > self.pool.numel():
            self.position = 0
        part = self.pool[self.position : self.position + count]
        self.position += count
        return part.view(shape).requires_grad_()

    def sets(self, *shapes: tuple[int, ...]) -> list[list[Tensor]]:
        """As many sets of tensors as the pool holds, between 2 and 64."""
        count = self.pool.numel() // sum(math.prod(shape) for shape in shapes)
        return [[self.take(*shape) for shape in shapes] for _ in range(max(2, min(64, count)))]


def matmul_cases(grid: Grid, device: torch.device, precision: str) -> list[Case]:
    """Forward products, and those of their backward: dX = dY W and dW = dYᵀ X."""
    operands = Operands(device, torch.bfloat16 if precision == "bf16" else torch.float32, grid.pool)
    cases = []
    for m, n, k in grid.matmul:
        sets = operands.sets((m, k), (n, k), (m, n))
        forms: tuple[tuple[tuple[int, int, int], Callable[..., Tensor]], ...] = (
            ((m, n, k), lambda x, w, g: F.linear(x, w)),
            ((m, k, n), lambda x, w, g: g @ w),
            ((n, k, m), lambda x, w, g: g.t() @ x),
        )
        cases += [Case("matmul", sizes, _on(form, sets), precision) for sizes, form in forms]
    return cases


def memory_cases(grid: Grid, device: torch.device) -> list[Case]:
    """The residual addition: two tensors read, one written."""
    operands = Operands(device, torch.float32, grid.pool)
    return [
        Case("memory", (3.0 * size,), _on(torch.add, operands.sets((size // 4,), (size // 4,)))) for size in grid.memory
    ]


def attention_cases(grid: Grid, device: torch.device) -> list[Case]:
    """Scaled dot product attention on heads that lie as the projections leave them: (batch, seq, heads, head_dim)."""
    # CUDA has fused kernels for 16 bits only.
    operands = Operands(device, torch.bfloat16 if device.type == "cuda" else torch.float32, grid.pool)
    cases = []
    for head_dim, seq, causal in itertools.product(grid.head_dims, grid.attention, (False, True)):
        batch, heads = max(1, grid.tokens // seq), max(1, grid.width // head_dim)
        shape = (batch, seq, heads, head_dim)
        sets = [[t.transpose(1, 2) for t in tensors] for tensors in operands.sets(shape, shape, shape, shape)[:8]]

        def forward(q: Tensor, k: Tensor, v: Tensor, g: Tensor, causal: bool = causal) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

        graphs = [[forward(*tensors), *tensors] for tensors in sets]

        def backward(out: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> object:
            return torch.autograd.grad(out, (q, k, v), g, retain_graph=True)

        sizes = (batch, heads, seq, head_dim, float(causal))
        cases.append(Case("attention_forward", sizes, _on(forward, sets)))
        cases.append(Case("attention_backward", sizes, _on(backward, graphs)))
    return cases


def _on(function: Callable[..., object], sets: Sequence[Sequence[Tensor]]) -> Callable[[int], object]:
    return lambda i: function(*sets[i % len(sets)])


def time_cases(cases: Sequence[Case], grid: Grid, device: torch.device) -> list[Sample]:
    """Median seconds of each case, in rounds over all cases."""
    counts = []
    for case in cases:
        first, second = _time(case, 1, device), _time(case, 1, device)
        counts.append(max(1, min(200, int(grid.seconds / min(first, second)))))
    rounds = [
        [_time(case, count, device) for case, count in zip(cases, counts, strict=True)] for _ in range(1 + grid.repeats)
    ]
    # The first round takes its results' memory from the system, the others from what it gave back.
    return [
        sample(case.kind, case.sizes, times, case.precision)
        for case, times in zip(cases, zip(*rounds[1:], strict=True), strict=True)
    ]


def _time(case: Case, count: int, device: torch.device) -> float:
    """Seconds of one call, averaged over `count` calls. The results live until the end, as activations do."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        # The device waits until the host has queued the calls: their launches do not count.
        torch.cuda._sleep(int(2e5 * count))
        start.record()
        results = [case.call(i) for i in range(count)]
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / count
    begin = time.perf_counter()
    results = [case.call(i) for i in range(count)]  # noqa: F841
    return (time.perf_counter() - begin) / count


def sample(kind: str, sizes: Sequence[float], seconds: Sequence[float], precision: str = "") -> Sample:
    """The median and the spread of repeated timings."""
    p10, median, p90 = (float(v) for v in np.percentile(seconds, (10, 50, 90)))
    return Sample(kind, tuple(float(s) for s in sizes), median, p10, p90, precision)


def host_samples(grid: Grid, device: torch.device) -> list[Sample]:
    """The host's work per kernel, without sizes."""
    return [sample(kind, (), seconds) for kind, seconds in host_seconds(device, 10 * grid.repeats).items()]


def concurrency_seconds(grid: Grid, device: torch.device) -> list[float]:
    """Seconds of a small training step on every rank at once, repeated: 1 / the mean of the ranks' rates."""
    layer = nn.Sequential(nn.Linear(512, 2048), nn.GELU(), nn.Linear(2048, 512), nn.LayerNorm(512)).to(device)
    x = torch.randn(grid.concurrency_tokens, 512, device=device, requires_grad=True)
    times = []
    for _ in range(1 + grid.repeats):
        dist.barrier()
        start = now(device)
        layer(x).sum().backward()
        times.append(now(device) - start)
    rates = 1 / torch.tensor(times[1:], dtype=torch.float64)
    dist.all_reduce(rates)
    seconds: list[float] = (dist.get_world_size() / rates).tolist()
    return seconds


def overlap_samples(grid: Grid, device: torch.device) -> list[Sample]:
    """A matrix product alone, and while an all-reduce of the largest size goes on beside it: "compute_alone" and
    "compute_overlapped", on the slowest rank. The all-reduces outlast the products."""
    size, buffer = 1024 if device.type == "cpu" else 8192, torch.zeros(grid.collective[-1] // 4, device=device)
    x = torch.randn(size, size, device=device, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    product = Case("compute_alone", (), lambda i: x @ x)
    alone, reduction = ([_time_together(case, 2, device) for _ in range(3)] for case in (
        product, Case("all_reduce", (), _on(dist.all_reduce, [[buffer]])),
    ))  # fmt: skip
    # All ranks must make the same number of calls.
    lengths = torch.tensor([min(alone), min(reduction)], dtype=torch.float64, device=device)
    dist.all_reduce(lengths, dist.ReduceOp.MAX)
    one, other = lengths.tolist()
    products = max(2, min(50, int(4 * grid.seconds / one)))
    # Shared, either takes up to twice as long.
    reductions = max(1, min(50, math.ceil(2.5 * products * one / other)))
    times: dict[str, list[float]] = {"compute_alone": [], "compute_overlapped": []}
    for _ in range(1 + grid.repeats):
        times["compute_alone"].append(_time(product, products, device))
        dist.barrier()
        works = [dist.all_reduce(buffer, async_op=True) for _ in range(reductions)]
        times["compute_overlapped"].append(_time(product, products, device))
        for work in works:
            work.wait()
    found = []
    for kind, seconds in times.items():
        slowest = torch.tensor(seconds[1:], dtype=torch.float64, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        found.append(sample(kind, (dist.get_world_size(),), slowest.tolist()))
    return found


@dataclass(frozen=True)
class Group:
    """The ranks that a collective joins: of all, or of neighbours while their siblings do the same."""

    ranks: int
    process_group: dist.ProcessGroup | None = None


def groups() -> list[Group]:
    """All ranks, and pairs of neighbours among more than two that share processors."""
    world = dist.get_world_size()
    found = [Group(world)]
    if world > 2 and world % 2 == 0 and not torch.cuda.is_available():
        pairs, _ = dist.new_subgroups(2)
        found.append(Group(2, pairs))
    return found


def collective_cases(grid: Grid, device: torch.device, group: Group) -> list[Case]:
    """Collectives of a group, by the bytes of the whole buffer; messages between ranks 0 and 1."""
    # torch 2.13 renames the two; older releases have only the long names.
    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    ranks, among = group.ranks, group.process_group
    shared = () if ranks == dist.get_world_size() else (dist.get_world_size(),)
    cases = []
    for size in grid.collective:
        elements = size // 4 // ranks * ranks
        # Zeros, so that summing them again and again stays finite.
        whole, part = torch.zeros(elements, device=device), torch.zeros(elements // ranks, device=device)
        other = torch.zeros_like(whole)
        calls: dict[str, Callable[[int], object]] = {
            "all_reduce": _among(among, dist.all_reduce, whole),
            "all_gather": _among(among, all_gather, whole, part),
            "reduce_scatter": _among(among, reduce_scatter, part, whole),
            "all_to_all": _among(among, dist.all_to_all_single, other, whole),
        }
        if dist.get_world_size() == 2:
            calls["send_recv"] = functools.partial(_message, whole)
        cases += [Case(kind, (ranks, 4.0 * elements, *shared), call) for kind, call in calls.items()]
    return cases


def _among(
    group: dist.ProcessGroup | None, function: Callable[..., object], *tensors: Tensor
) -> Callable[[int], object]:
    return lambda i: function(*tensors, group=group)


def _message(tensor: Tensor, i: int) -> None:
    """A message from rank 0 to rank 1, and back the next time: the receiver of one is the sender of the next."""
    operation = dist.isend if _sends(i) else dist.irecv
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, 1 - dist.get_rank())]):
        work.wait()


def _sends(i: int) -> bool:
    return dist.get_rank() == i % 2


class Between:
    """What a rank computes before each collective, as it does in a step: products of about `seconds`, on operands that
    are new to the caches. A collective then begins where the ranks are not quite together, its threads have slept, and
    the processors are at work for others.

    Args:
        seconds: of one rank alone; with 0 nothing is computed.
    """

    def __init__(self, seconds: float, grid: Grid, device: torch.device) -> None:
        operands = Operands(device, torch.float32, grid.pool)
        self.sets = operands.sets((256, 512), (512, 512))
        product = Case("", (), _on(functools.partial(F.linear), self.sets))
        alone = min(_time(product, 20, device) for _ in range(5)) if seconds else 1.0
        count = torch.tensor(seconds / alone)
        dist.all_reduce(count, dist.ReduceOp.MAX)
        self.count, self.next = round(count.item()), 0

    def __call__(self) -> None:
        for _ in range(self.count):
            self.next += 1
            F.linear(*self.sets[self.next % len(self.sets)])

    def before(self, case: Case) -> Case:
        """The case with the computing before it. Of the two ranks of a message the one that sends computes: the other
        waits for it."""
        message = case.kind == "send_recv"

        def call(i: int) -> object:
            if not message or _sends(i):
                self()
            return case.call(i)

        return Case(case.kind, case.sizes, call)

    def seconds(self, device: torch.device) -> tuple[float, float]:
        """Seconds of the computing without a collective: of all ranks at once, by the mean of their rates as the
        speed of ranks that share processors is (concurrency_seconds), and of one while the others wait."""
        if not self.count:
            return 0.0, 0.0
        together = _time_together(Case("", (), lambda i: self()), 8, device)
        first = _time_together(Case("", (), lambda i: self() if dist.get_rank() == 0 else None), 8, device)
        rate, longest = torch.tensor(1 / together), torch.tensor(first)
        dist.all_reduce(rate)
        dist.all_reduce(longest, dist.ReduceOp.MAX)
        return dist.get_world_size() / rate.item(), longest.item()


def collective_samples(grid: Grid, device: torch.device, group: Group) -> list[Sample]:
    """Median seconds of each case on the slowest rank: what it adds to computing, waiting for the others included.

    Never less than a quarter of what it takes when nothing else is done: computing is taken off, and where a
    collective is short next to it the rest is noise.
    """
    cases = collective_cases(grid, device, group)
    least = torch.tensor([[_time_together(case, 2, device) for _ in range(3)] for case in cases]).amin(1)
    # All ranks must make the same number of calls; an even one, so that messages go there and back.
    dist.all_reduce(least, dist.ReduceOp.MAX)
    between = Between(grid.between if device.type == "cpu" else 0.0, grid, device)
    longest = 25 if not between.count else 4
    counts = [2 * max(1, min(longest, int(2 * grid.seconds / seconds))) for seconds in least.tolist()]
    rounds, computing = [], []
    for _ in range(grid.repeats):
        rounds.append([_time_together(between.before(c), n, device) for c, n in zip(cases, counts, strict=True)])
        computing += [between.seconds(device) for _ in range(3)]
    slowest = torch.tensor(rounds)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    # Computing hardly changes from round to round: its median leaves less noise than each round's own.
    together, sending = np.median(computing, axis=0)
    found = []
    for case, times, seconds in zip(cases, slowest.T.tolist(), least.tolist(), strict=True):
        off = sending if case.kind == "send_recv" else together
        found.append(sample(case.kind, case.sizes, [max(time - off, 0.25 * seconds) for time in times]))
    return found


def _time_together(case: Case, count: int, device: torch.device) -> float:
    """Seconds of one call on this rank, after all ranks have met."""
    dist.barrier()
    start = now(device)
    for i in range(count):
        case.call(i)
    return (now(device) - start) / count


def describe(device: torch.device) -> dict[str, object]:
    """What a Profile says of the machine. Call it before anything large is allocated: the process's memory is what a
    training rank holds without its model."""
    train_once(device)
    versions = {"torch": torch.__version__, "backend": dist.get_backend()}
    if device.type == "cuda":
        torch.zeros(1, device=device)
        free, total = torch.cuda.mem_get_info()
        return {
            "name": torch.cuda.get_device_name(),
            "kind": "gpu",
            "devices": torch.cuda.device_count(),
            "memory": float(total),
            "process_memory": float(total - free - torch.cuda.memory_reserved()),
            "versions": versions | {"cuda": str(torch.version.cuda)},
        }
    return {
        "name": processor_name(),
        "kind": "cpu",
        "devices": processors(),
        "memory": float(memory_bytes()),
        "process_memory": float(resident_bytes()),
        "versions": versions,
    }


def list_steps(grid: Grid, device: torch.device, at_once: list[float]) -> list[tuple[str, Callable[[], list[Sample]]]]:
    """What this number of ranks measures, with names for the progress.

    Args:
        at_once: takes the timings of ranks that share processors, which are made before and after all others, since
            a disturbance of some seconds would change each of them alike.
    """

    def kernels(make: Callable[..., list[Case]], *arguments: str) -> Callable[[], list[Sample]]:
        return lambda: time_cases(make(grid, device, *arguments), grid, device)

    def concurrency() -> list[Sample]:
        at_once.extend(concurrency_seconds(grid, device))
        return []

    ranks = dist.get_world_size()
    steps: list[tuple[str, Callable[[], list[Sample]]]]
    if ranks == 1:
        steps = [
            ("host", lambda: host_samples(grid, device)),
            ("matmul fp32", kernels(matmul_cases, "fp32")),
            ("matmul bf16", kernels(matmul_cases, "bf16")),
            ("memory", kernels(memory_cases)),
            ("attention", kernels(attention_cases)),
        ]
    else:
        steps = [
            (f"collectives of {group.ranks}", functools.partial(collective_samples, grid, device, group))
            for group in groups()
        ]
        if ranks == 2:
            steps.append(("compute beside communication", lambda: overlap_samples(grid, device)))
    if device.type == "cpu":
        shared = (f"{ranks} at once", concurrency)
        steps = [shared, *steps, shared]
    return steps


def run(grid_name: str, output: Path) -> None:
    """Everything that this number of ranks is there for; rank 0 writes {"machine", "samples"}."""
    cuda = torch.cuda.is_available()
    # A GPU is not busy with what fills a processor.
    grid = GRIDS["gpu" if cuda and grid_name == "full" else grid_name]
    device = torch.device("cuda", dist.get_node_local_rank(0)) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=60))
    ranks, samples = dist.get_world_size(), list[Sample]()
    # The machine is described once, by the world of one rank.
    machine = describe(device) if ranks == 1 else None
    at_once: list[float] = []
    for index, (name, step) in enumerate(steps := list_steps(grid, device, at_once)):
        if dist.get_rank() == 0:
            print(PROGRESS, index / len(steps), name, flush=True)
        samples += step()
    if at_once:
        samples.append(sample("concurrency", (ranks,), at_once))
    if dist.get_rank() == 0:
        write_json(output, {"machine": machine, "samples": [asdict(s) for s in samples]})
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", choices=("full", "quick"), default="full")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    run(arguments.grid, arguments.output)
    leave()


if __name__ == "__main__":
    main()
