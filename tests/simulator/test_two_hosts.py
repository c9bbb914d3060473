"""Two hosts made of one machine: how a link is written, what the cluster costs, and what the link decides."""

from __future__ import annotations

import dataclasses
import math

import pytest

from planner.rivals import planned, rivals_of_hosts
from simulator import presets
from simulator.cluster import AttentionFit, AttentionKernel, ClusterSpec, CollectiveFit, Gpu, HostFit, Link, MatmulFit
from simulator.collectives import collective_seconds, message_seconds
from simulator.errors import UserError
from simulator.hosts import PAYLOAD, Wire, parse_wire, ranks_per_host, two_hosts
from simulator.job import Job, Training
from simulator.layout import Layout
from simulator.placement import layout_groups
from simulator.simulate import simulate
from simulator.stage import StageCosts

FITS = {
    name: (CollectiveFit(2, 1e-4, efficiency), CollectiveFit(4, 1e-3, efficiency / 2))
    for name, efficiency in (("all_reduce", 0.5), ("all_gather", 0.5), ("reduce_scatter", 0.25), ("all_to_all", 0.5))
}
LOOPBACK = Link("loopback", 4e9, 1e-4, FITS | {"send_recv": (CollectiveFit(2, 1e-4, 1.0),)})
RATE = AttentionFit(4e10, 0.0, 4e10, 0.0)
PROCESSOR = Gpu(
    "cpu", "cpu", 12e9, 3e10, {"fp32": 8e10}, {"fp32": MatmulFit(8e10)}, source="test",
    attention={"sdpa": (AttentionKernel(64, RATE, RATE),)}, host=HostFit(1e-5, 1e-5, 1e-4),
)  # fmt: skip
MACHINE = ClusterSpec(
    "this-machine", PROCESSOR, 2, LOOPBACK, source="test", oversubscribe=2.0, concurrency=(1.0, 0.9, 0.6, 0.45)
)


def job_on(spec: ClusterSpec, nodes: int, batch: int = 32) -> Job:
    training = Training(global_batch_size=batch, seq_len=128, precision="fp32")
    return Job(presets.find_model("llama-bytes-12m"), spec, nodes, training, presets.find_stack("layoutwise-cpu"))


@pytest.mark.parametrize(
    ("text", "wire"),
    [
        ("100 MB/s", Wire(1e8)),
        ("100MB/s", Wire(1e8)),
        ("1 Gb/s", Wire(1.25e8)),
        ("100 MB/s 1ms", Wire(1e8, 1e-3)),
        ("1 GB/s 0.5 ms", Wire(1e9, 5e-4)),
        (" none ", Wire(math.inf)),
    ],
)
def test_a_link_is_a_rate_and_a_delay(text: str, wire: Wire) -> None:
    found = parse_wire(text)
    assert (found.bandwidth, found.delay) == pytest.approx((wire.bandwidth, wire.delay))
    assert str(parse_wire(str(found))) == str(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must be a rate, or a rate and a delay, like"),
        ("fast", "must be a rate"),
        ("100", "must be a rate"),
        ("100 MB", "must be a rate"),
        ("100 m/s", "'100 m/s' is not a bandwidth; write it like"),
        ("100 MB/s soon", "'soon' is not a time; write it like"),
        ("100 MB/s 1", "'1' is not a time"),
        ("1 kB/s", "the rate must be from 1 MB/s to 100 GB/s"),
        ("100 MB/s 2 s", "the delay must be from 0 to 1 s"),
        ("100 MB/s -1 ms", "the delay must be from 0 to 1 s"),
    ],
)
def test_what_is_no_link_is_said(text: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^--link '{text}'.*{words}"):
        parse_wire(text)


def test_a_host_is_half_of_the_machine() -> None:
    """Two processors: a host has one, and two ranks on it. Four at once on the machine have 0.45 of their speed, so
    that two on each host have too; one on each has what two have, 0.9. Memory: 24 GB over four ranks."""
    spec = two_hosts(MACHINE, Wire(1e8))
    assert (spec.gpus_per_node, spec.oversubscribe, spec.concurrency) == (2, 1.0, (0.9, 0.45))
    assert spec.gpu.memory == 6e9
    assert [ranks_per_host(n) for n in (2, 3, 4, 8)] == [2, 2, 2, 4]


def test_speeds_that_were_not_measured_keep_the_whole() -> None:
    """Measured up to two at once, 2 · 0.9 in all: four have that together, 0.45 each."""
    spec = two_hosts(dataclasses.replace(MACHINE, concurrency=(1.0, 0.9)), Wire(1e8))
    assert spec.concurrency == pytest.approx((0.9, 0.45))


def test_collectives_cross_the_wire_as_a_ring_does() -> None:
    """An all-reduce of 40 MB over four ranks on two hosts: 2 · 3/4 · 40 MB = 60 MB over 100 MB/s, of which 1448 of
    1514 bytes are payload, and 0.1 ms: 0.6274 s. gloo's reduce-scatter moves as much as its all-reduce does."""
    spec = two_hosts(MACHINE, Wire(1e8))
    layout = Layout(dp_replicate=4)
    shape = layout_groups(job_on(spec, 2), layout)[0].replicate
    assert (shape.ranks, shape.domains) == (4, 2)
    expected = 6e7 / (1e8 * 1448 / 1514) + 1e-4
    assert collective_seconds("all_reduce", 4e7, shape, spec) == pytest.approx(expected, rel=1e-9)
    assert collective_seconds("reduce_scatter", 4e7, shape, spec) == pytest.approx(expected, rel=1e-9)
    assert collective_seconds("all_gather", 4e7, shape, spec) == pytest.approx(expected / 2, rel=1e-3)


def test_a_delay_is_crossed_four_times_by_an_all_reduce() -> None:
    spec, slow = (two_hosts(MACHINE, Wire(1e8, delay)) for delay in (0.0, 1e-3))
    shape = layout_groups(job_on(spec, 2), Layout(dp_replicate=4))[0].replicate
    seconds = [collective_seconds("all_reduce", 1e6, shape, one) for one in (spec, slow)]
    assert seconds[1] - seconds[0] == pytest.approx(4e-3)


def test_a_wire_is_never_faster_than_the_loopback() -> None:
    """60 MB of four ranks at 4 GB/s · 0.25 and 1 ms: 61 ms, whatever the wire could do. A pair that exchanges 4 MB
    moves half of it at 4 GB/s · 0.25 in 2 ms and 0.1 ms, as inside of a host; a message of 4 MB where messages reach a
    quarter takes 4 ms. (With half of the wire each of the two pairs would need 1 and 2 ms for them.)"""
    quarter = (CollectiveFit(2, 1e-4, 0.25),)
    slow = LOOPBACK.collectives | {"send_recv": quarter, "all_to_all": quarter}
    spec = two_hosts(dataclasses.replace(MACHINE, scale_up=dataclasses.replace(LOOPBACK, collectives=slow)), Wire())
    shape = layout_groups(job_on(spec, 2), Layout(dp_replicate=4))[0].replicate
    assert collective_seconds("all_reduce", 4e7, shape, spec) == pytest.approx(0.061)
    groups = layout_groups(job_on(spec, 2), Layout(tp=2, dp_replicate=2))[0]
    assert (groups.tp.domains, groups.replicate.domains) == (1, 2)
    for pair in (groups.tp, groups.replicate):
        assert collective_seconds("all_to_all", 4e6, pair, spec) == pytest.approx(1e-4 + 2e-3)
        assert message_seconds(4e6, pair, spec) == pytest.approx((1e-4, 4e-3))


def test_a_host_has_half_of_the_ranks_that_shared_the_machine() -> None:
    """Of four ranks that shared it two are on each host. A pair inside of one took 3 ms among four, and a pair across
    the wire waits as long: its processors are as busy. 1 MB at 0.5 and 0.25 of 4 GB/s is then 0.5 and 1 ms more."""
    fits = (CollectiveFit(2, 1e-3, 0.5, active=2), CollectiveFit(2, 3e-3, 0.25, active=4))
    shared = LOOPBACK.collectives | {"all_reduce": (*fits, CollectiveFit(4, 5e-3, 0.25, active=4))}
    machine = dataclasses.replace(MACHINE, scale_up=dataclasses.replace(LOOPBACK, collectives=shared))
    spec = two_hosts(machine, Wire())
    groups = layout_groups(job_on(spec, 2), Layout(tp=2, dp_replicate=2))[0]
    assert (groups.tp.domains, groups.replicate.domains, groups.tp.sharing) == (1, 2, 2)
    for shape in (groups.tp, groups.replicate):
        assert collective_seconds("all_reduce", 1e6, shape, spec) == pytest.approx(3e-3 + 1e-3)
    # One machine of two processors takes four ranks, and the pairs of two hybrids then share it.
    hybrid = layout_groups(job_on(machine, 1), Layout(tp=2, dp_replicate=2))[0].tp
    alone = layout_groups(job_on(machine, 1), Layout(tp=2))[0].tp
    assert collective_seconds("all_reduce", 1e6, hybrid, machine) == pytest.approx(3e-3 + 1e-3)
    assert collective_seconds("all_reduce", 1e6, alone, machine) == pytest.approx(1e-3 + 0.5e-3)


def test_the_choice_changes_with_the_link() -> None:
    """Data parallelism across a fast link, a pipeline across slow ones; tensor parallelism across those loses most."""
    chosen = {}
    for rate in (1e10, 1e8, 2e7):
        job = job_on(two_hosts(MACHINE, Wire(rate)), 2)
        plans, _ = planned(job, rivals_of_hosts(2))
        seconds = {name: one.best.step_seconds for name, one in plans.items()}
        chosen[rate] = min(seconds, key=lambda name: seconds[name]), seconds
    assert chosen[1e10][0].endswith("data across") or chosen[1e10][0] == "data across and inside"
    for rate in (1e8, 2e7):
        name, slow = chosen[rate]
        assert name.endswith("pipeline across") or name == "pipeline across and inside"
        assert slow["tensor across and inside"] > 1.5 * slow["tensor inside, pipeline across"]
        assert slow["tensor across and inside"] > slow["tensor inside, data across"]


def test_ddp_hides_what_a_wire_carries_behind_the_backward() -> None:
    """Two replicas, one on each host: what a ring of two sends of the gradients, all of them once, takes 0.5 s at
    100 MB/s, and the backward of 16 samples 1.4 s. Of 48 MB DDP's first two buckets are there before the backward is
    done; the third has what is left. FSDP waits for each of its reductions, which gloo makes of twice the
    bytes, and for its gather."""
    job = job_on(dataclasses.replace(two_hosts(MACHINE, Wire(1e8)), gpus_per_node=1), 2)
    wire = 4 * job.model.parameters() / (1e8 * PAYLOAD)
    hidden = simulate(job, Layout(dp_replicate=2, micro_batch_size=16)).breakdown.dp
    waiting = simulate(job, Layout(dp_shard=2, zero_stage=2, micro_batch_size=16)).breakdown.dp
    assert hidden == pytest.approx(wire * BUCKETS[-1] / sum(BUCKETS), rel=0.02)
    assert waiting == pytest.approx(1.5 * wire, rel=0.01)


# Bytes of DDP's buckets of llama-bytes-12m, from its head on. The head's 256 x 512, its norm and a matrix of 1408 x 512
# fill the first, of 1 MiB; 25 MiB are full behind the 25 weights before it; the rest, of 48,252,928 bytes, is the last.
BUCKETS = (4 * (256 * 512 + 512 + 1408 * 512), 26_484_736, 18_358_272)


def test_what_ddp_hides_waits_for_the_wire_and_then_for_a_processor() -> None:
    """One rank on each host, and a backward of 4 samples, 0.36 s, which is over before the second bucket is reduced:
    at 50 MB/s it takes 0.57 s. 14 ms of them, its bytes at half of 4 GB/s, it needs a processor that computes too: each
    has half of it. The third bucket has its ranks to itself."""
    job = job_on(dataclasses.replace(two_hosts(MACHINE, Wire(5e7)), gpus_per_node=1), 2, batch=8)
    layout = Layout(dp_replicate=2, micro_batch_size=4)
    (cost,) = StageCosts(job, layout).stages()
    assert [reduced for _, reduced in cost.reductions] == pytest.approx([size / sum(BUCKETS) for size in BUCKETS])
    assert sum(share for share, _ in cost.reductions) == pytest.approx(1.0)
    left = cost.reductions[2][0] * cost.backward.total / 0.9
    copied, wire = BUCKETS[1] / 2e9, (BUCKETS[1] + BUCKETS[2]) / (5e7 * PAYLOAD)
    # Copying takes twice as long, and the backward loses what that takes more.
    assert simulate(job, layout).breakdown.dp == pytest.approx(wire + copied - (left + copied), rel=0.005)


def test_a_slower_link_never_makes_a_step_shorter() -> None:
    layouts = [Layout(dp_replicate=4), Layout(tp=4), Layout(pp=4), Layout(dp_replicate=2, pp=2), Layout(tp=2, pp=2)]
    for layout in layouts:
        steps = [
            simulate(job_on(two_hosts(MACHINE, Wire(rate)), 2), layout).step_seconds for rate in (1e10, 1e9, 1e8, 1e7)
        ]
        assert steps == sorted(steps)


def test_machines_that_cannot_be_two_hosts_are_refused() -> None:
    with pytest.raises(UserError, match="this one has GPUs"):
        two_hosts(presets.find_cluster("dgx-h100"), Wire(1e8))
    alone = dataclasses.replace(MACHINE, gpus_per_node=1)
    with pytest.raises(UserError, match="may use one processor"):
        two_hosts(alone, Wire(1e8))


def test_a_collective_alone_takes_what_was_measured() -> None:
    """Four ranks on two processors: the all-reduce of their gradients was measured with all four, so that sharing is
    in its seconds already. With 0.45 of the speed it would last 2.2 times as long."""
    job = job_on(MACHINE, 1)
    found = simulate(job, Layout(dp_replicate=4))
    shape = layout_groups(job, Layout(dp_replicate=4))[0].replicate
    gradients = 4.0 * job.model.parameters()
    assert found.breakdown.dp == pytest.approx(collective_seconds("all_reduce", gradients, shape, MACHINE), rel=0.02)


def test_messages_over_a_wire_that_nothing_limits_need_processors_as_inside() -> None:
    """A link that is none is the loopback: what passes it costs processors what a message inside of a host costs, and
    on hosts as fast as the machine the step is the same."""
    spec = two_hosts(MACHINE, Wire())
    together = dataclasses.replace(MACHINE, concurrency=(1.0, 1.0, 1.0, 1.0), gpus_per_node=4, oversubscribe=1.0)
    # Messages on their way count as ranks at work.
    hosts = dataclasses.replace(spec, concurrency=(1.0, 1.0, 1.0, 1.0))
    layout = Layout(pp=4)
    steps = [simulate(job_on(one, nodes), layout).step_seconds for one, nodes in ((hosts, 2), (together, 1))]
    # The norm's all-reduce crosses the wire as one of two hosts.
    assert steps[0] == pytest.approx(steps[1], rel=1e-3)
    slow = dataclasses.replace(spec, concurrency=(1.0, 0.25))
    assert simulate(job_on(slow, 2), layout).step_seconds > steps[0]
