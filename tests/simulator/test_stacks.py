"""What a stack's fields do to a stage: each against the arithmetic that its docstring states."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from simulator.compute import host_optimizer_seconds, kernel_time, matmul_seconds
from simulator.errors import UserError
from simulator.job import Job, build_job
from simulator.kernels import Cut, Matmul, block_kernels
from simulator.layout import Layout
from simulator.layout_text import parse_layout
from simulator.model import RopeScaling
from simulator.presets import find_stack, names
from simulator.program import stage_costs
from simulator.simulate import simulate
from simulator.stage import StageCost

TP2 = "tp=2 pp=4 dp_shard=1 dp_replicate=1"


def job(stack: str = "megatron-core", model: str = "llama-3.1-8b", nodes: int = 1, **training: Any) -> Job:
    recipe = {"global_batch_size": 8, "seq_len": 2048, "stack": stack} | training
    return build_job({"model": model, "cluster": "dgx-h100", "nodes": nodes, "training": recipe}, "job")


def changed(base: Job, **fields: Any) -> Job:
    return dataclasses.replace(base, stack=dataclasses.replace(base.stack, **fields))


def middle(base: Job, text: str = TP2) -> StageCost:
    """A stage of eight blocks without embedding or head."""
    return stage_costs(base, parse_layout(text, base))[1]


@pytest.mark.parametrize("name", names("stacks"))
def test_every_stack_is_complete(name: str) -> None:
    stack = find_stack(name)
    assert stack.source and stack.recipes and stack.elementwise


def test_a_stack_extends_another() -> None:
    """What it names replaces, tables are merged, the rest is the other's."""
    below, above = find_stack("megatron-core"), find_stack("megatron-bridge")
    assert (above.overlap_tp, below.overlap_tp) == (4, 0)
    assert above.elementwise == below.elementwise and above.recipes["fp32"] == below.recipes["fp32"]
    # A table's other keys stay.
    assert above.recipes["fp8"] == dataclasses.replace(
        below.recipes["fp8"], parameters=2.0, gradients=2.0, gradient_reduce=2.0
    )


def test_an_unknown_stack_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'megatron-core'"):
        find_stack("megatron-cor")


def test_a_slow_host_is_what_a_small_model_waits_for() -> None:
    """With launches of a millisecond nothing else counts: those of a block, times eight blocks."""
    base = changed(job(), host=dataclasses.replace(find_stack("megatron-core").host, forward=1e-3, backward=1e-3))
    cost = middle(base)
    kernels = block_kernels(base.model, "dense", True, Cut(1, 2048, 2, True), base.stack)
    launches = kernel_time(kernels, base.cluster.gpu, base.stack, "bf16", 2).host_forward
    assert cost.forward.total == pytest.approx(8 * launches)
    assert cost.forward.host == pytest.approx(8 * launches - cost.forward.compute - cost.forward.tp)


def test_a_fast_host_costs_nothing() -> None:
    base = changed(job(), host=dataclasses.replace(find_stack("megatron-core").host, forward=0.0, backward=0.0))
    assert middle(base).forward.host == middle(base).backward.host == 0


def test_tensor_parallel_overlap_leaves_one_piece_and_what_hiding_costs() -> None:
    """A quarter waits; three quarters run beside kernels, which go 1.189 times slower meanwhile."""
    alone, pieces = middle(job()).forward.tp, middle(changed(job(), overlap_tp=4)).forward.tp
    assert pieces == pytest.approx(alone / 4 + 0.75 * alone * 0.189 / 1.189)


def test_every_projection_for_itself_reduces_five_times_where_two_do() -> None:
    """Backward of a Llama block without sequence parallelism: q, k, v, gate, up instead of one each for attention
    and feed-forward; the forward has its two all-reduces either way."""
    text = TP2 + " sequence_parallel=false"
    base = changed(job(), sequence_parallel="optional")
    once, each = middle(base, text), middle(changed(base, reduces_every_projection=True), text)
    assert each.forward.tp == pytest.approx(once.forward.tp)
    assert each.backward.tp == pytest.approx(2.5 * once.backward.tp)


def test_recomputation_that_stops_early_saves_the_last_matmul() -> None:
    """The down projection and the residual behind it are not run again."""
    text = TP2 + " recompute=full"
    whole, early = (middle(changed(job(), recompute_stops_early=stops), text) for stops in (False, True))
    gpu = job().cluster.gpu
    down = matmul_seconds(gpu, "bf16", 2048, 4096, 14336 / 2) / gpu.clock("bf16")
    add = gpu.memory_overhead + 3 * 2 * 2048 / 2 * 4096 / (gpu.memory_bandwidth * gpu.memory_efficiency)
    assert whole.backward.recompute - early.backward.recompute == pytest.approx(8 * (down + add))


def test_selective_recomputation_runs_the_share_that_the_stack_names() -> None:
    """Half of all matmuls and nothing else: half of a forward's matmul seconds, and less is kept."""
    base = changed(job(), selective_recompute={"matmul": 0.5}, host=find_stack("megatron-bridge").host)
    again, kept = middle(base, TP2 + " recompute=selective"), middle(base)
    kernels = block_kernels(base.model, "dense", True, Cut(1, 2048, 2, True), base.stack)
    matmuls = [kernel for kernel in kernels if isinstance(kernel, Matmul)]
    forward = kernel_time(matmuls, base.cluster.gpu, base.stack, "bf16", 2).forward
    assert again.backward.recompute == pytest.approx(8 * forward / 2)
    assert again.saved < kept.saved


def test_frozen_weights_have_no_gradient() -> None:
    """lora: no weight matmuls, no reduction, no optimizer; parameters in the kernels' two bytes alone."""
    full, lora = job(), job(peft="lora")
    layout = parse_layout("tp=1 pp=1 dp_shard=8 zero_stage=1", full)
    trained, frozen = stage_costs(full, layout)[0], stage_costs(lora, layout)[0]
    assert frozen.forward == trained.forward
    assert frozen.backward.compute < 0.75 * trained.backward.compute
    assert (frozen.reduce, frozen.gather) == (0, 0) and trained.reduce > 0
    prediction = simulate(lora, layout)
    assert prediction.breakdown.optimizer < 1e-3
    assert prediction.memory.gradients == prediction.memory.optimizer == 0
    assert prediction.memory.parameters == pytest.approx(2 * full.model.parameters())
    # 6 per weight and token become 4.
    flops = full.model.flops_per_token(2048)
    whole = simulate(full, layout)
    ratio = (prediction.mfu / prediction.tokens_per_second) / (whole.mfu / whole.tokens_per_second)
    assert ratio == pytest.approx(1 - 2 * full.model.active_matmul_parameters() / flops)


def test_an_optimizer_in_host_memory_takes_the_hosts_time() -> None:
    """28 bytes for each of the 8.03e9 parameters of a node at 115 GB/s: 1.96 s, beside the norm's all-reduce."""
    base = changed(job(), host_optimizer_bandwidth=115e9)
    prediction = simulate(base, parse_layout("tp=1 pp=1 dp_shard=8 zero_stage=1", base))
    assert host_optimizer_seconds(115e9, 8.03e9) == pytest.approx(1.955, abs=1e-3)
    assert prediction.breakdown.optimizer == pytest.approx(1.956, abs=2e-3)


def test_gathering_every_tensor_for_itself_costs_its_latency_each_time() -> None:
    base = job("torchtitan")
    layout = Layout(dp_shard=8, zero_stage=3)
    flat, tensors = (
        stage_costs(changed(base, gathers_per_unit=pieces, overlap_param_gather=False), layout)[0] for pieces in (1, 12)
    )
    assert tensors.forward.dp > flat.forward.dp


def test_what_a_recipe_keeps_wide_runs_in_16_bits() -> None:
    """85 % at the narrow rate, 15 % at the wide one."""
    base = build_job(
        {"model": "llama-3.1-8b", "cluster": "dgx-b200", "nodes": 1,
         "training": {"global_batch_size": 8, "seq_len": 2048, "precision": "nvfp4"}}, "job",
    )  # fmt: skip
    gpu, stack = base.cluster.gpu, base.stack
    kernel = Matmul("up", 8192, 14336, 4096, quantised=False)
    wide = dataclasses.replace(stack, recipes={"nvfp4": dataclasses.replace(stack.recipes["nvfp4"], kept_wide=0.15)})
    narrow = dataclasses.replace(stack, recipes={"nvfp4": dataclasses.replace(stack.recipes["nvfp4"], kept_wide=0.0)})
    quantised = kernel._replace(quantised=True)
    extra = [kernel_time([quantised], gpu, s, "nvfp4", 1).forward for s in (narrow, wide)]
    sixteen = matmul_seconds(gpu, "bf16", 8192, 14336, 4096) / gpu.clock("bf16")
    four = matmul_seconds(gpu, "nvfp4", 8192, 14336, 4096) / gpu.clock("nvfp4")
    assert extra[1] - extra[0] == pytest.approx(0.15 * (sixteen - four))


def test_the_clock_is_the_precisions_own_or_the_devices() -> None:
    gpu = job().cluster.gpu
    assert gpu.clock("fp32") == gpu.sustained
    assert gpu.clock("fp8") == gpu.matmul["fp8"].sustained != gpu.sustained
    assert gpu.clock("fp16") == gpu.clock("bf16")


def test_the_runtime_refuses_adapters() -> None:
    base = build_job(
        {"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 1,
         "training": {"global_batch_size": 8, "seq_len": 2048, "stack": "layoutwise-cuda", "peft": "lora"}}, "job",
    )  # fmt: skip
    assert "stack layoutwise-cuda cannot train with peft = 'lora' yet" in Layout(dp_replicate=8).problems(base)


def runtime_problems(model: str, layout: Layout, **changes: Any) -> list[str]:
    base = build_job(
        {"model": model, "cluster": "dgx-h100", "nodes": 1,
         "training": {"global_batch_size": 16, "seq_len": 512, "stack": "layoutwise-cuda"}}, "job",
    )  # fmt: skip
    return layout.problems(dataclasses.replace(base, model=dataclasses.replace(base.model, **changes)))


@pytest.mark.parametrize("model", ["gpt2", "llama-3.1-8b", "bert-large", "t5-large", "bart-large"])
def test_the_runtime_trains_this_family(model: str) -> None:
    assert runtime_problems(model, Layout(dp_shard=8, zero_stage=3)) == []


def test_the_runtime_says_what_it_does_not_do_with_a_model() -> None:
    pipeline = Layout(pp=2, dp_shard=4, zero_stage=3)
    assert "stack layoutwise-cuda does not cut the t5 family into stages: pp must be 1" in runtime_problems(
        "t5-large", pipeline
    )
    yarn = RopeScaling("yarn", 40.0)
    assert runtime_problems("llama-3.1-8b", Layout(dp_shard=8, zero_stage=3), rope_scaling=yarn) == [
        "stack layoutwise-cuda has no rope_scaling of rope_type 'yarn'; it has ['linear', 'llama3']"
    ]
    assert any(
        "carries no masks" in words for words in runtime_problems("gpt2", Layout(dp_shard=4, cp=2), sliding_window=9)
    )
