"""Bytes on the wire: on links without latency or loss, seconds times bandwidth are the closed forms of the papers.

Full sizes are in bytes; a ring moves 2(n-1)/n of what it reduces, (n-1)/n of what it gathers or scatters.
"""

from __future__ import annotations

import dataclasses

import pytest

from simulator.cluster import ClusterSpec, CollectiveFit, Link, build_cluster, group_shape
from simulator.collectives import collective_seconds
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.presets import find_cluster
from simulator.simulate import simulate
from simulator.stage import StageCost, StageCosts

WIRE = 1e9
PERFECT = {
    kind: (CollectiveFit(ranks=2, latency=0.0, efficiency=1.0),)
    for kind in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv")
}
SEQUENCE, BATCH, WIDTH = 512, 2, 2.0


def wire(gpus_per_node: int = 8) -> ClusterSpec:
    """Every GPU with a card of its own, both of 1 GB/s and no latency."""
    up, out = (Link("a wire", WIRE, 0.0, PERFECT) for _ in range(2))
    spec = dataclasses.replace(find_cluster("dgx-a100"), gpus_per_node=gpus_per_node, nics_per_node=gpus_per_node)
    return dataclasses.replace(spec, scale_up=up, scale_out=out, nccl="")


def job(stack: str = "megatron-core", nodes: int = 1, global_batch_size: int = 16) -> Job:
    training = {"global_batch_size": global_batch_size, "seq_len": SEQUENCE, "stack": stack}
    made = build_job({"model": "gpt2", "cluster": "dgx-a100", "nodes": nodes, "training": training}, "test")
    return dataclasses.replace(made, cluster=wire())


def cost(layout: Layout, of: Job, index: int = 0) -> StageCost:
    return StageCosts(of, layout).stage(index)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallel_moves_what_megatron_says(tp: int, sequence_parallel: bool) -> None:
    """Per layer and pass two all-reduces of e·s·b·h (arXiv 1909.08053), or as many bytes in two gathers and two
    scatters (arXiv 2205.05198). A middle stage has layers alone."""
    layout = Layout(tp=tp, pp=4, dp_replicate=2, micro_batch_size=BATCH, sequence_parallel=sequence_parallel)
    found = cost(layout, job(nodes=tp), index=1)
    reduced = 2 * (tp - 1) / tp * WIDTH * SEQUENCE * BATCH * 768
    assert found.forward.tp * WIRE == pytest.approx(3 * 2 * reduced)
    assert found.backward.tp * WIRE == pytest.approx(3 * 2 * reduced)


def test_full_recompute_reduces_two_more() -> None:
    layout = Layout(tp=2, pp=4, micro_batch_size=BATCH, recompute="full", sequence_parallel=True)
    found = cost(layout, job(), index=1)
    assert found.backward.tp == pytest.approx(2 * found.forward.tp)


def test_pipeline_messages_carry_one_boundary() -> None:
    """e·s·b·h, a t-th of it where the boundary is cut over tp (arXiv 2205.05198)."""
    for tp, layout in ((1, Layout(pp=4, dp_replicate=2)), (2, Layout(pp=4, tp=2, sequence_parallel=True))):
        prediction = simulate(job(), layout, trace=True)
        sent = [span.seconds * WIRE for span in prediction.timeline.spans if span.stream == "send"]
        # Messages that meet others on their way take longer; the quickest met nobody.
        assert min(sent) == pytest.approx(WIDTH * SEQUENCE * 768 / tp)


def test_replicas_reduce_every_gradient_once_a_step() -> None:
    """2(n-1)/n · e'·Ψ over eight replicas, e' the four bytes of Megatron's gradients."""
    found = cost(Layout(dp_replicate=8), job())
    assert found.reduce * WIRE == pytest.approx(2 * 7 / 8 * 4 * found.parameters)
    assert found.gather == 0


def test_zero_1_scatters_gradients_and_gathers_parameters() -> None:
    """arXiv 1910.02054, section 7: as many bytes as an all-reduce where both are equally wide."""
    found = cost(Layout(dp_shard=8, zero_stage=1), job())
    assert found.reduce * WIRE == pytest.approx(7 / 8 * 4 * found.parameters)
    assert found.gather * WIRE == pytest.approx(7 / 8 * 2 * found.parameters)


def test_zero_3_gathers_twice_and_scatters_once_a_microbatch() -> None:
    """arXiv 1910.02054, section 7.3: 3(n-1)/n · Ψ, without overlap and with the root of embedding and head gathered
    once; torchtitan reduces in fp32 and gathers in bf16."""
    of = job("torchtitan")
    stack = dataclasses.replace(of.stack, overlap_param_gather=False, overlap_grad_reduce=False)
    of = dataclasses.replace(of, stack=stack)
    found = cost(Layout(dp_shard=8, zero_stage=3), of)
    model = of.model
    root = model.embedding_parameters() + model.head_parameters()
    width = of.stack.recipes["bf16"]
    gathered = 7 / 8 * width.compute * (found.parameters + (found.parameters - root))
    scattered = 7 / 8 * width.gradient_reduce * found.parameters
    assert (found.forward.dp + found.backward.dp) * WIRE == pytest.approx(gathered + scattered)


def test_hybrid_shards_are_reduced_over_their_replicas() -> None:
    """FSDP over d_i ranks, then an all-reduce of Ψ/d_i over d_o replicas, once a step."""
    of = job("torchtitan", nodes=2)
    found = cost(Layout(dp_shard=8, dp_replicate=2, zero_stage=3), of)
    width = of.stack.recipes["bf16"].gradient_reduce
    assert found.reduce * WIRE == pytest.approx(2 * 1 / 2 * width * found.parameters / 8)


def test_experts_exchange_their_tokens() -> None:
    """An all-to-all over EP ranks of one domain sends e·topk·T·h·(EP-1)/EP; over N domains of g ranks the cards carry
    (EP-g)/EP of the buffer."""
    buffer = WIDTH * 8 * 4096 * 7168  # 8 of the experts for 4,096 tokens of 7,168 elements
    spec = wire()
    inside = group_shape(build_cluster(spec, 1), tuple(range(8)))
    assert collective_seconds("all_to_all", buffer, inside, spec) * WIRE == pytest.approx(buffer * 7 / 8)
    across = group_shape(build_cluster(spec, 4), tuple(range(32)))
    assert collective_seconds("all_to_all", buffer, across, spec) * WIRE == pytest.approx(buffer * 24 / 32)


def test_context_parallel_rings_pass_keys_and_values() -> None:
    """A forward passes K and V to the next of c ranks c - 1 times (arXiv 2310.01889): as many bytes as one gather."""
    keys_and_values = 2 * WIDTH * 8192 * 1024
    spec, c = wire(), 4
    ring = group_shape(build_cluster(spec, 1), tuple(range(c)))
    hops = (c - 1) * collective_seconds("send_recv", keys_and_values / c, ring, spec)
    assert hops * WIRE == pytest.approx((c - 1) / c * keys_and_values)
    assert collective_seconds("all_gather", keys_and_values, ring, spec) == pytest.approx(hops)
