"""Clusters from the matrix that `nvidia-smi topo -m` prints: real ones, and what is cut off or wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from command_line import call
from hypothesis import given
from hypothesis import strategies as st

from simulator.cluster import ClusterSpec, CollectiveSample, build_cluster, group_shape
from simulator.cluster_file import cluster_toml
from simulator.errors import UserError
from simulator.fabric_fit import predicted_seconds
from simulator.job import build_job
from simulator.presets import cluster_from_table, find_cluster
from simulator.topo_cluster import DescribedCluster, cluster_from_topo
from simulator.topo_matrix import parse_topo

TOPO = Path(__file__).parents[1] / "golden" / "topo"
# file: GPU, network, (GB/s of a GPU's links, GPUs, of them behind one root, cards)
CASES: dict[str, tuple[str, str, tuple[float, int, int, int]]] = {
    # 18 links of 25 GB/s, 12 of 25, 6 of 25; H800's are cut to 8.
    "h100-nvswitch": ("h100", "400 Gb/s", (450, 8, 0, 8)),
    "dgx-a100": ("a100", "8 x 200 Gb/s", (300, 8, 0, 8)),
    "dgx-2-v100": ("v100", "100 Gb/s", (150, 16, 0, 8)),
    "h800-nvswitch": ("NVIDIA H800", "400 Gb/s", (200, 8, 0, 8)),
    # 1 + 1 + 2 + 2 links of each GPU, 25 GB/s each.
    "dgx-1-v100": ("v100", "100 Gb/s InfiniBand", (150, 8, 0, 4)),
    "a100-pcie-pairs": ("a100-pcie", "", (300, 4, 2, 0)),
    "h100-pcie-scattered-pairs": ("h100", "", (300, 8, 2, 0)),
    "workstation-uneven": ("rtx 4090", "1 x 10 Gb/s", (31.5, 5, 0, 1)),
}


def described(case: str) -> DescribedCluster:
    gpu, network, _ = CASES[case]
    return cluster_from_topo(parse_topo((TOPO / f"{case}.txt").read_text()), gpu, network, case)


def written(case: str, folder: Path) -> ClusterSpec:
    """The cluster as it is read back from its file."""
    path = folder / f"{case}.toml"
    path.write_text(cluster_toml(described(case).table, "A comment."))
    return find_cluster(str(path))


@pytest.mark.parametrize("case", CASES)
def test_real_matrices_become_clusters_that_can_be_planned_on(case: str, tmp_path: Path) -> None:
    spec = written(case, tmp_path)
    bandwidth, gpus, root, cards = CASES[case][2]
    assert (spec.scale_up.bandwidth, spec.gpus_per_node) == (bandwidth * 1e9, gpus)
    assert (spec.scale_up.devices_per_root, spec.nics_per_node) == (root, cards)
    assert (spec.scale_out is not None) == bool(cards)
    told = cluster_from_table(described(case).table, "test")
    assert dataclasses.replace(spec, source="") == dataclasses.replace(told, source="")
    job = build_job({"model": "gpt2", "cluster": str(tmp_path / f"{case}.toml"), "nodes": 1}, "test")
    assert job.world_size == gpus


@pytest.mark.parametrize(("case", "preset"), [("h100-nvswitch", "dgx-h100"), ("dgx-1-v100", "dgx-1-v100")])
def test_a_known_machine_is_the_preset(case: str, preset: str, tmp_path: Path) -> None:
    """Links inside of a node are those of the preset that was written by hand."""
    ours, theirs = written(case, tmp_path), find_cluster(preset)
    assert ours.gpu == theirs.gpu and ours.nccl == theirs.nccl
    for collective, fits in theirs.scale_up.collectives.items():
        assert ours.scale_up.collectives[collective] == fits
    assert (ours.scale_up.bandwidth, ours.scale_up.topology) == (theirs.scale_up.bandwidth, theirs.scale_up.topology)


def test_bridged_pairs_gather_over_pcie_as_measured(tmp_path: Path) -> None:
    """all_gather_perf of 32 MiB on these four A100 took 973.2 us (25.86 GB/s on the bus); a pair of them alone has 300
    GB/s, the others are reached over PCIe 4.0 x16. Predicted from the matrix and data sheets alone, within 15 %."""
    spec = written("a100-pcie-pairs", tmp_path)
    graph = build_cluster(spec, 1)
    assert group_shape(graph, (0, 1)).slowest == 300e9
    assert group_shape(graph, (0, 1, 2, 3)).slowest == 31.5e9
    seconds = predicted_seconds(spec, CollectiveSample("all_gather", 4, 1, 33554432, 0.0))
    assert seconds == pytest.approx(973.2e-6, rel=0.15)


def test_what_was_assumed_is_said() -> None:
    assert "CUDA_VISIBLE_DEVICES=0,5,1,2,3,4,6,7" in " ".join(described("h100-pcie-scattered-pairs").notes)
    assert "sockets of 1, 4 GPUs" in " ".join(described("workstation-uneven").notes)
    assert "NV8 of the 18 NVLinks" in " ".join(described("h800-nvswitch").notes)


def test_links_of_pairs_are_a_mesh_where_a_gpu_has_enough_of_them() -> None:
    """Four A100 with NV4 to each other: 12 links of 25 GB/s, of which two GPUs use a third and three use two."""
    rows = [["X" if a == b else "NV4" for b in range(4)] for a in range(4)]
    text = "GPU0 GPU1 GPU2 GPU3\n" + "\n".join(f"GPU{a} {' '.join(row)}" for a, row in enumerate(rows))
    spec = cluster_from_table(cluster_from_topo(parse_topo(text), "a100", "", "mesh").table, "test")
    assert spec.scale_up.bandwidth == 300e9
    two, three, four = (fit.efficiency for fit in spec.scale_up.collectives["all_reduce"])
    assert (two, three) == pytest.approx((four / 3, four * 2 / 3), rel=1e-3)


H100 = (TOPO / "h100-nvswitch.txt").read_text()
BAD = {
    "no matrix": ("nothing here", "no topology matrix"),
    "cut rows": ("\n".join(H100.splitlines()[:5]), "no row of it: was it cut off?"),
    "cut line": (H100[: H100.index("GPU7\tNV18") + 20], "was it cut off or wrapped?"),
    "asymmetric": (H100.replace("GPU0\t X \tNV18", "GPU0\t X \tSYS", 1), "must be symmetric"),
    "unknown cell": (H100.replace("GPU0\t X \tNV18", "GPU0\t X \tERR", 1), "'ERR' in it"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_paste_that_is_not_whole_is_one_sentence(case: str) -> None:
    text, words = BAD[case]
    with pytest.raises(UserError, match=r"^[^\n]*$") as caught:
        parse_topo(text)
    assert words in str(caught.value)


def test_noise_around_the_matrix_is_passed_over() -> None:
    """A prompt, colours, the legend, and the lines that MIG or a driver print before."""
    noisy = "Warning: MIG mode is on\n\x1b[4m" + H100.replace("\n", "\r\n")
    assert parse_topo(noisy) == parse_topo(H100)
    assert parse_topo(H100).models["NIC1"] == "mlx5_1"


@given(st.text(max_size=200))
def test_any_text_is_a_matrix_or_one_sentence(text: str) -> None:
    try:
        assert parse_topo(text).gpus
    except UserError as error:
        assert str(error)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--gpu h100"),
        (("--gpu", "h1000"), "did you mean 'h100'?"),
        (("--gpu", "a100"), "NV18, but A100-SXM4-80G has 12"),
        (("--gpu", "h100", "--network", "fast"), '"8 x 400 Gb/s"'),
        (("--gpu", "h100", "--network", "8 x 1000000 Tb/s"), "a card of 1.25e+17 bytes per second must have from 1000"),
        (("--gpu", "h100", "--network", "9999 x 400 Gb/s"), "9999 cards must be from 1 to 1024"),
    ],
)
def test_command_refuses_in_one_sentence(
    arguments: tuple[str, ...],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "cluster", TOPO / "h100-nvswitch.txt", *arguments) == 2
    shown = capsys.readouterr().err
    assert words in shown and shown.count("\n") == 1 and not list(tmp_path.glob("*.toml"))


def test_command_writes_a_cluster_that_a_job_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    topo = TOPO / "h800-nvswitch.txt"
    assert call(monkeypatch, "cluster", topo, "--gpu", "h800", "--network", "8 x 400 Gb/s", "-o", "mine.toml") == 0
    assert 'cluster = "mine.toml"' in capsys.readouterr().out
    Path("job.toml").write_text('model = "gpt2"\ncluster = "mine.toml"\nnodes = 2\n')
    assert call(monkeypatch, "simulate", "job.toml", "--layout", "") == 0
    assert call(monkeypatch, "plan", "job.toml", "--set", "cluster=topo.txt") == 2
    assert "layoutwise cluster topo.txt" in capsys.readouterr().err
