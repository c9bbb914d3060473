"""Measuring this machine: a short run gives a whole profile, and what goes wrong is said in a sentence."""

from __future__ import annotations

import dataclasses
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from runtime import measure as module
from runtime.machine import processors
from runtime.measure import busy_seconds, disturbances, measure, noise, profile_of, world_sizes
from simulator.errors import UserError
from simulator.profile import Profile, Sample, cluster_of, read_profile

MACHINE = {
    "name": "test", "kind": "gpu", "devices": 1, "memory": 8e10, "process_memory": 5e8, "versions": {"torch": "2.13.0"},
}  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Profile, Path, list[tuple[str, float]]]:
    """The profile of a quick run, its file, and the progress that was told."""
    path = tmp_path_factory.mktemp("measure") / "profile.json"
    told: list[tuple[str, float]] = []
    profile = measure(path, lambda name, fraction: told.append((name, fraction)), "quick")
    return profile, path, told


class TestQuickRun:
    def test_the_file_holds_the_profile(self, measured: tuple[Profile, Path, list[tuple[str, float]]]) -> None:
        profile, path, _ = measured
        assert read_profile(path) == profile

    def test_constants_are_positive_and_plausible(
        self, measured: tuple[Profile, Path, list[tuple[str, float]]]
    ) -> None:
        profile = measured[0]
        assert profile.devices == processors() or profile.kind == "gpu"
        assert 1e9 < profile.matmul["fp32"].rate < 1e15
        assert profile.matmul["bf16"].rate > 0
        assert 1e8 < profile.memory_bandwidth < 1e14
        assert 1e-7 < profile.host.forward < 1e-2
        assert 0 < profile.host.backward < 1e-2
        assert profile.host.dtensor > profile.host.forward
        assert 5e7 < profile.process_memory < profile.memory
        assert [kernel.head_dim for kernel in profile.attention] == [32]

    def test_ranks_share_the_processors(self, measured: tuple[Profile, Path, list[tuple[str, float]]]) -> None:
        concurrency = measured[0].concurrency
        if measured[0].kind == "cpu":
            assert concurrency[0] == 1.0
            assert len(concurrency) == 2
            assert 0.1 < concurrency[1] <= 1.0

    def test_every_collective_has_constants(self, measured: tuple[Profile, Path, list[tuple[str, float]]]) -> None:
        profile = measured[0]
        if profile.kind == "cpu" or profile.devices > 1:
            assert profile.collectives.keys() == {
                "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"
            }  # fmt: skip
            fits = [fit for fits in profile.collectives.values() for fit in fits]
            assert all(fit.ranks == 2 and fit.efficiency > 0 and fit.latency >= 0 for fit in fits)

    def test_samples_keep_their_spread(self, measured: tuple[Profile, Path, list[tuple[str, float]]]) -> None:
        samples = measured[0].samples
        assert all(0 < s.p10 <= s.seconds <= s.p90 for s in samples if s.kind != "dtensor")
        assert {s.sizes for s in samples if s.kind == "matmul"} >= {(64, 128, 128), (256, 256, 128), (256, 128, 256)}

    def test_the_profile_is_a_cluster(self, measured: tuple[Profile, Path, list[tuple[str, float]]]) -> None:
        profile = measured[0]
        spec = cluster_of(profile)
        assert spec.gpus_per_node == profile.devices
        assert spec.gpu.matmul == profile.matmul

    def test_progress_rises_to_one(self, measured: tuple[Profile, Path, list[tuple[str, float]]]) -> None:
        fractions = [fraction for _, fraction in measured[2]]
        assert all(a <= b for a, b in pairwise(fractions))
        assert fractions[-1] == 1.0
        assert "matmul fp32" in [name for name, _ in measured[2]]


@pytest.mark.parametrize(
    ("kind", "devices", "expected"),
    [("cpu", 1, [2]), ("cpu", 2, [2, 4]), ("cpu", 6, [2, 4, 6, 8, 12]), ("gpu", 8, [2, 4, 8]), ("gpu", 1, [])],
)
def test_world_sizes(kind: str, devices: int, expected: list[int]) -> None:
    assert world_sizes(kind, devices) == expected
    assert world_sizes(kind, devices, "quick") == expected[:1]


def test_noise_is_the_usual_spread_of_products() -> None:
    spreads = [Sample("matmul", (1, 1, 1), 2.0, 2.0 - s, 2.0 + s, "fp32") for s in (0.1, 0.2, 1.9)]
    assert noise([*spreads, Sample("memory", (1,), 1.0, 0.0, 9.0)]) == pytest.approx(0.2)


def test_disturbances_are_told_above_their_limits() -> None:
    assert disturbances(0.3, 0.2, 2) == []
    assert disturbances(0.31, 0.9, 2) == [
        "repeated matrix products lie 31% apart (more than 30%)", "other work used 0.9 of the 2 processors"
    ]  # fmt: skip


def test_own_work_is_not_the_work_of_others() -> None:
    (busy, own), until = busy_seconds(), time.process_time() + 0.3
    while time.process_time() < until:
        pass
    busy_after, own_after = busy_seconds()
    assert own_after - own == pytest.approx(0.3, abs=0.1)
    assert busy_after >= busy


def test_a_machine_with_one_gpu_has_no_link() -> None:
    def sample(kind: str, sizes: tuple[float, ...], seconds: float) -> Sample:
        return Sample(kind, sizes, seconds, seconds, seconds, "bf16")

    samples = [sample(kind, (), 1e-5) for kind in ("host_forward", "host_backward", "dtensor")]
    samples += [sample("matmul", (n, n, n), 2e-6 + 2 * n**3 / 5e14) for n in (256, 1024, 4096)]
    samples += [sample("memory", (size,), size / 2e12) for size in (1e6, 1e9)]
    for kind, factor in (("attention_forward", 4), ("attention_backward", 10)):
        samples += [sample(kind, (1, 8, s, 64, c), factor * 8 * s**2 * 64 / 3e14) for s in (512, 4096) for c in (0, 1)]
    profile = profile_of(MACHINE, samples)
    # The host works beside a GPU: nothing is taken off its kernels.
    assert profile.matmul["bf16"].overhead == pytest.approx(2e-6)
    assert profile.memory_bandwidth == pytest.approx(2e12)
    assert profile.collectives == {}
    assert profile.concurrency == ()
    assert cluster_of(profile).scale_up.bandwidth == profile.memory_bandwidth
    assert dataclasses.asdict(profile)["versions"].keys() == {"python", "torch"}


def test_a_failure_of_the_microbenchmarks_is_told_in_a_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "raise RuntimeError('no such device')"]
    with pytest.raises(UserError, match=r"failed \(exit code 1\): RuntimeError: no such device"):
        module._run(command, tmp_path / "errors.txt", lambda name, fraction: None)


def test_microbenchmarks_that_do_not_end_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIME_LIMIT", 0.2)
    with pytest.raises(UserError, match="did not finish within"):
        module._run([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "errors.txt", lambda *_: None)


def test_the_host_is_counted_by_the_kernels_that_the_simulator_counts() -> None:
    import torch

    from runtime.host_overhead import kernel_counts

    forward, backward = kernel_counts(torch.device("cpu"))
    # Seven products, one attention and the pointwise kernels of a Llama block; products have two kernels backward.
    assert forward >= 7 + 1 + 2 + 2
    assert backward >= 14 + 1 + 2 + 2
