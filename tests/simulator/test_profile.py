"""Profiles: a fit gives back the constants that its samples were made from."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.cluster import HostFit, build_cluster, group_shape
from simulator.collectives import bus_bytes
from simulator.compute import optimizer_seconds
from simulator.errors import UserError
from simulator.files import write_json
from simulator.presets import find_cluster, find_stack
from simulator.profile import Profile, Sample, calibrate, cluster_of, non_negative_fit, read_profile

HOST = {"host_forward": 5e-6, "host_backward": 11e-6, "dtensor": 40e-6}
RATE, K0, OVERHEAD = 2e11, 24.0, 3e-6
MEMORY = 2e10
ATTENTION = {"attention_forward": (1.5e11, 200.0, 1.2e11, 500.0), "attention_backward": (1e11, 300.0, 8e10, 800.0)}
LINK, LINK_LATENCY = 4e9, 60e-6
ALL_REDUCE = {2: (80e-6, 0.5, 2e-9), 4: (150e-6, 0.3, 0.0)}


def sample(kind: str, sizes: tuple[float, ...], seconds: float, precision: str = "") -> Sample:
    return Sample(kind, sizes, seconds, seconds, seconds, precision)


def synthetic(kind: str = "cpu") -> list[Sample]:
    """Samples of a device with the constants above, without noise. A GPU works beside its host, a CPU is the host."""
    host, host_backward = (HOST["host_forward"], HOST["host_backward"]) if kind == "cpu" else (0.0, 0.0)
    samples = [sample(work, (), seconds) for work, seconds in HOST.items()]
    for m, n, k in itertools.product((256, 1024), (512, 2048), (256, 4096)):
        seconds = host + OVERHEAD + 2 * m * n * (k + K0) / RATE
        samples.append(sample("matmul", (m, n, k), seconds, "fp32"))
    samples += [sample("memory", (float(size),), host + size / MEMORY) for size in (2**20, 2**24, 2**26)]
    for (attention, fit), seq, causal in itertools.product(ATTENTION.items(), (128, 512, 2048), (0, 1)):
        rate, half = fit[2 * causal : 2 * causal + 2]
        factor, launch = (4, host) if attention == "attention_forward" else (10, host_backward)
        flops = factor * 2 * 8 * seq**2 * 64 / (1 + causal)
        samples.append(sample(attention, (2, 8, seq, 64, causal), launch + flops / rate * (1 + half / seq)))
    for size in (1e3, 1e5, 1e7):
        samples.append(sample("send_recv", (2, size), LINK_LATENCY + size / LINK))
    for collective, (ranks, fit), size in itertools.product(
        ("all_reduce", "all_gather", "reduce_scatter"), ALL_REDUCE.items(), (1e3, 1e4, 1e5, 1e6, 1e7)
    ):
        latency, efficiency, ramp = fit if kind == "gpu" else (*fit[:2], 0.0)
        x = bus_bytes(collective, ranks, size)
        samples.append(sample(collective, (ranks, size), latency + x / (efficiency * LINK) + ramp * x**0.5))
    samples += [sample("concurrency", (ranks,), 1e-3 * slowdown) for ranks, slowdown in ((1, 1.0), (2, 1.25), (4, 4.0))]
    return samples


@pytest.fixture
def profile() -> Profile:
    samples = synthetic()
    return Profile(
        name="test-cpu", created="2026-01-31", versions={"torch": "2.13.0"}, kind="cpu", devices=4, memory=16e9,
        process_memory=2e8, samples=tuple(samples), **calibrate(samples),
    )  # fmt: skip


def test_matmul_constants_are_recovered(profile: Profile) -> None:
    fit = profile.matmul["fp32"]
    assert (fit.rate, fit.k0, fit.overhead) == pytest.approx((RATE, K0, OVERHEAD), rel=1e-4)


def test_host_and_memory_constants_are_recovered(profile: Profile) -> None:
    assert dataclasses.astuple(profile.host) == tuple(HOST.values())
    assert profile.memory_bandwidth == pytest.approx(MEMORY, rel=1e-6)


def test_attention_constants_are_recovered_with_and_without_mask(profile: Profile) -> None:
    (kernel,) = profile.attention
    assert kernel.head_dim == 64
    assert dataclasses.astuple(kernel.forward) == pytest.approx(ATTENTION["attention_forward"], rel=1e-4)
    assert dataclasses.astuple(kernel.backward) == pytest.approx(ATTENTION["attention_backward"], rel=1e-4)


def test_link_and_collective_constants_are_recovered(profile: Profile) -> None:
    assert (profile.link_latency, profile.link_bandwidth) == pytest.approx((LINK_LATENCY, LINK), rel=1e-6)
    gpu = calibrate(synthetic("gpu"), "gpu")["collectives"]
    for kind in ("all_reduce", "all_gather", "reduce_scatter"):
        found = {fit.ranks: (fit.latency, fit.efficiency, fit.ramp) for fit in gpu[kind]}  # type: ignore[index]
        near = {fit.ranks: (fit.latency, fit.efficiency, fit.ramp) for fit in profile.collectives[kind]}
        assert found.keys() == near.keys() == ALL_REDUCE.keys()
        for ranks, known in ALL_REDUCE.items():
            assert found[ranks] == pytest.approx(known, rel=1e-4, abs=1e-13)
            assert near[ranks] == pytest.approx((*known[:2], 0.0), rel=1e-4)


def test_scattered_timings_neither_lengthen_nor_shorten_a_collective() -> None:
    """Half of the timings are 60 % too long, half 60 % too short: in the mean they are right. Relative to themselves
    the short ones would count sixteen times as much as the long ones, and all would come out at
    (1/0.4 + 1/1.6) / (1/0.4² + 1/1.6²) = 0.47 of what it is."""
    sizes = (1e3, 1e4, 1e5, 1e6, 1e7, 1e8)
    scattered = [
        sample("all_reduce", (2, size), factor * (1e-3 + size / LINK)) for size in sizes for factor in (0.4, 1.6)
    ]
    others = [s for s in synthetic() if s.kind != "all_reduce"]
    (fit,) = calibrate([*others, *scattered])["collectives"]["all_reduce"]  # type: ignore[index]
    assert (fit.latency, fit.efficiency) == pytest.approx((1e-3, 1.0), rel=1e-3)


def test_sides_of_a_product_cost_by_their_size() -> None:
    """2 (m n k + 13 m n + 9 n k + 17 m k) / rate."""
    samples = [s for s in synthetic() if s.kind != "matmul"]
    for m, n, k in itertools.product((64, 1024), (128, 512, 2048), (128, 4096)):
        flops = 2 * (m * n * k + 13 * m * n + 9 * n * k + 17 * m * k)
        samples.append(sample("matmul", (m, n, k), HOST["host_forward"] + OVERHEAD + flops / RATE, "fp32"))
    fit = calibrate(samples)["matmul"]["fp32"]  # type: ignore[index]
    assert (fit.rate, fit.k0, fit.m0, fit.n0, fit.overhead) == pytest.approx((RATE, 13, 9, 17, OVERHEAD), rel=1e-4)


def test_pairs_among_others_have_constants_of_their_own() -> None:
    """Two of four ranks reduce while the two others do: 0.4 ms, and x / (0.2 · 4 GB/s) where a pair alone has 0.5."""
    among = [sample("all_reduce", (2, size, 4), 4e-4 + size / (0.2 * LINK)) for size in (1e3, 1e5, 1e7)]
    cpu, gpu = (calibrate([*synthetic(kind), *among], kind)["collectives"]["all_reduce"] for kind in ("cpu", "gpu"))  # type: ignore[index, arg-type]
    assert [(fit.ranks, fit.active) for fit in cpu] == [(2, 2), (2, 4), (4, 4)]
    assert (cpu[1].latency, cpu[1].efficiency) == pytest.approx((4e-4, 0.2), rel=1e-4)
    assert (cpu[0].latency, cpu[0].efficiency) == pytest.approx(ALL_REDUCE[2][:2], rel=1e-4)
    # Messages of pairs among others are no measure of the link.
    busy = [sample("send_recv", (2, size, 4), 1e-2 + size / 1e8) for size in (1e3, 1e5, 1e7)]
    assert calibrate([*synthetic(), *busy])["link_bandwidth"] == pytest.approx(LINK, rel=1e-6)
    # A GPU is nobody else's.
    assert {fit.active for fit in gpu} == {0}


def test_concurrency_is_the_speed_of_each_rank_and_fills_the_gaps(profile: Profile) -> None:
    assert profile.concurrency == pytest.approx((1.0, 0.8, 0.525, 0.25))


def test_ranks_that_stream_share_the_memory() -> None:
    """Updates of four ranks at once take 6 times as long as one: each goes at 1/6, where computing goes at 1/4. An
    update among four is then 1.5 times as long as what sharing the processors makes of it, among two 1.28 times, and
    alone, or on a machine whose profile is older, as long as it was."""
    slow = [sample("streaming", (ranks,), 1e-3 * slowdown) for ranks, slowdown in ((1, 1.0), (2, 1.6), (4, 6.0))]
    constants = calibrate([*synthetic(), *slow])
    assert constants["streaming"] == pytest.approx((1.0, 1 / 1.6, (1 / 1.6 + 1 / 6) / 2, 1 / 6))
    machine = Profile(
        name="test", created="2026-01-31", versions={}, kind="cpu", devices=4, memory=16e9, process_memory=2e8,
        samples=(), **constants,
    )  # fmt: skip
    spec, old = cluster_of(machine), cluster_of(dataclasses.replace(machine, streaming=()))
    assert [spec.streaming_cost(ranks) for ranks in (1, 2, 4)] == pytest.approx([1.0, 1.6 / 1.25, 1.5])
    # Among more than were measured the memory is shared like the processors are.
    assert spec.streaming_cost(8) == pytest.approx(1.5)
    assert [old.streaming_cost(ranks) for ranks in (1, 4)] == [1.0, 1.0]


def test_a_gpus_samples_are_free_of_the_host() -> None:
    fits = calibrate(synthetic("gpu"), "gpu")
    fit = fits["matmul"]["fp32"]
    assert (fit.rate, fit.k0, fit.overhead) == pytest.approx((RATE, K0, OVERHEAD), rel=1e-4)
    assert fits["memory_bandwidth"] == pytest.approx(MEMORY, rel=1e-6)
    assert fits["host"] == HostFit(*HOST.values())
    assert fits["concurrency"] == ()


def test_a_single_gpu_has_no_collectives() -> None:
    links = ("send_recv", "all_reduce", "all_gather", "reduce_scatter")
    assert calibrate([s for s in synthetic("gpu") if s.kind not in links], "gpu")["collectives"] == {}


def test_an_optimizer_step_has_a_bandwidth_of_its_own() -> None:
    """40 bytes a parameter at 1.5e10 bytes a second, where elementwise kernels reach 2e10: three quarters. 12 million
    parameters are then 12e6 · 40 / 1.5e10 = 32 ms; without such samples 24 ms."""
    found = []
    for more in ([], [sample("optimizer", (40.0 * n,), 1e-5 + 40 * n / 1.5e10) for n in (2**20, 2**22, 2**24)]):
        constants = calibrate([*synthetic(), *more])
        profile = Profile(
            name="test", created="2026-01-31", versions={}, kind="cpu", devices=4, memory=16e9, process_memory=2e8,
            samples=(), **constants,
        )  # fmt: skip
        gpu = cluster_of(profile).gpu
        found.append(optimizer_seconds(gpu, find_stack("layoutwise-cpu"), "adamw", 12e6))
    assert found == pytest.approx([0.024, 0.032], rel=1e-3)


def test_compute_beside_communication_takes_longer() -> None:
    """A product of 2 ms that takes 2.5 ms beside an all-reduce: a quarter more."""
    pair = [sample("compute_alone", (2,), 2e-3), sample("compute_overlapped", (2,), 2.5e-3)]
    assert calibrate([*synthetic(), *pair])["overlap_slowdown"] == pytest.approx(0.25)
    assert calibrate([*synthetic(), *pair[:1]])["overlap_slowdown"] == 0.0


def test_ranks_never_share_more_than_the_processors() -> None:
    assert calibrate(synthetic(), devices=1)["concurrency"] == pytest.approx((1.0, 1 / 2, 1 / 3, 0.25))


def test_five_percent_of_noise_costs_no_more_than_ten_percent_of_the_rate() -> None:
    noise = np.random.default_rng(0)
    noisy = [dataclasses.replace(s, seconds=s.seconds * noise.uniform(0.95, 1.05)) for s in synthetic()]
    fits = calibrate(
        [s for s in noisy if s.kind != "concurrency"] + [s for s in synthetic() if s.kind == "concurrency"]
    )
    assert fits["matmul"]["fp32"].rate == pytest.approx(RATE, rel=0.1)
    assert fits["memory_bandwidth"] == pytest.approx(MEMORY, rel=0.1)


@given(st.lists(st.floats(0, 1e3), min_size=3, max_size=3), st.integers(0, 2**32 - 1))
def test_a_fit_without_noise_is_exact_and_never_negative(known: list[float], seed: int) -> None:
    features = np.random.default_rng(seed).uniform(0.1, 10, (12, 3))
    seconds = features @ np.array(known) + 1e-12
    found = non_negative_fit(features, seconds)
    assert (found >= 0).all()
    assert features @ found == pytest.approx(seconds, rel=1e-6, abs=1e-11)


@given(st.integers(0, 2**32 - 1))
def test_a_fit_is_never_negative_whatever_the_samples(seed: int) -> None:
    draw = np.random.default_rng(seed)
    features, seconds = draw.uniform(0.1, 10, (6, 3)), draw.uniform(0.1, 10, 6)
    found = non_negative_fit(features, seconds)
    assert (found >= 0).all()
    assert found.sum() > 0


@given(times=st.lists(st.floats(1e-5, 1e-1), min_size=4, max_size=4))
def test_noise_never_leaves_a_link_without_a_rate(times: list[float]) -> None:
    """Messages that took any time at all, larger ones less than smaller ones too, still give a bandwidth."""
    others = [s for s in synthetic() if s.kind != "send_recv"]
    messages = [sample("send_recv", (2, 4096.0 * 16**i), seconds) for i, seconds in enumerate(times)]
    assert 0 < calibrate([*others, *messages])["link_bandwidth"] < float("inf")  # type: ignore[operator]


def test_a_missing_kind_of_sample_is_named() -> None:
    with pytest.raises(UserError, match="no samples of kind 'matmul'; measure again"):
        calibrate([s for s in synthetic() if s.kind != "matmul"])


def test_a_profile_survives_its_file(profile: Profile, tmp_path: Path) -> None:
    assert read_profile(write_json(tmp_path / "profile.json", profile)) == profile


def test_a_profile_of_another_version_is_refused(profile: Profile, tmp_path: Path) -> None:
    path = write_json(tmp_path / "profile.json", dataclasses.replace(profile, version=99))
    with pytest.raises(UserError, match="version = 99 is not 1; measure again"):
        read_profile(path)


def test_a_profile_is_a_cluster(profile: Profile, tmp_path: Path) -> None:
    path = write_json(tmp_path / "profile.json", profile)
    spec = find_cluster("this-machine", profile=str(path))
    assert spec == cluster_of(profile)
    assert (spec.name, spec.gpus_per_node, spec.oversubscribe, spec.gpu.kind) == ("this-machine", 4, 2.0, "cpu")
    assert spec.gpu.memory == pytest.approx(16e9 / 4)
    assert spec.gpu.matmul == profile.matmul
    assert group_shape(build_cluster(spec, 1), (0, 1)).bandwidth == profile.link_bandwidth


def test_a_profile_has_a_name_where_profiles_are_kept(
    profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_json(tmp_path / "layoutwise" / "office.json", profile)
    assert find_cluster("this-machine", profile="office") == cluster_of(profile)
    with pytest.raises(UserError, match=r"profile 'ofice' is not known in .*; did you mean 'office'"):
        find_cluster("this-machine", profile="ofice")


def test_a_gpu_has_its_memory_to_itself(profile: Profile) -> None:
    spec = cluster_of(dataclasses.replace(profile, kind="gpu"))
    assert (spec.gpu.memory, spec.oversubscribe) == (16e9, 1.0)
