"""The cluster is a graph; how a group of ranks lies on it decides what its collectives cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import networkx as nx
import pytest

from simulator.cluster import ClusterSpec, Gpu, bottleneck, build_cluster, group_shape, path
from simulator.errors import UserError
from simulator.files import to_dataclass
from simulator.presets import DATA, THIS_MACHINE, find_cluster, names

PRESETS = [name for name in names("clusters") if name != THIS_MACHINE]


def graph_of(name: str, nodes: int) -> nx.DiGraph:
    return build_cluster(find_cluster(name), nodes)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_digraph_with_bandwidth_and_latency_on_all_edges(name: str) -> None:
    graph = graph_of(name, 3)
    assert isinstance(graph, nx.DiGraph)
    assert nx.is_strongly_connected(graph)
    for a, b, edge in graph.edges(data=True):
        assert edge["bandwidth"] > 0
        assert edge["latency"] >= 0
        assert graph.has_edge(b, a)
    assert sum(vertex[0] == "gpu" for vertex in graph) == 3 * find_cluster(name).gpus_per_node


@pytest.mark.parametrize("name", PRESETS)
def test_inside_a_node_the_bottleneck_is_the_scale_up_link(name: str) -> None:
    spec, graph = find_cluster(name), graph_of(name, 2)
    assert bottleneck(graph, ("gpu", 0, 0), ("gpu", 0, 1)) == (spec.scale_up.bandwidth, spec.scale_up.latency)
    assert ("nic", 0, 0) not in path(graph, ("gpu", 0, 0), ("gpu", 0, 1))


@pytest.mark.parametrize("name", [name for name in PRESETS if not find_cluster(name).scale_up_domain])
def test_across_nodes_the_bottleneck_is_the_card_and_the_latency_one_way(name: str) -> None:
    spec, graph = find_cluster(name), graph_of(name, 2)
    assert spec.scale_out is not None
    bandwidth, latency = bottleneck(graph, ("gpu", 0, 0), ("gpu", 1, 0))
    assert bandwidth == spec.scale_out.bandwidth
    assert latency == pytest.approx(spec.scale_out.latency)
    assert "fabric" in path(graph, ("gpu", 0, 0), ("gpu", 1, 0))


def test_a_gpu_reaches_itself_at_once() -> None:
    assert bottleneck(graph_of("dgx-h100", 1), ("gpu", 0, 0), ("gpu", 0, 0)) == (float("inf"), 0.0)


def test_eight_data_parallel_groups_share_a_nodes_eight_cards() -> None:
    """tp 8 inside the nodes: each of the eight groups across them has its own GPU's card."""
    graph = graph_of("dgx-h100", 4)
    one = group_shape(graph, (0, 8, 16, 24))
    assert (one.ranks, one.domains, one.ranks_per_domain, one.bandwidth) == (4, 4, 1, 50e9)
    all_of_them = group_shape(graph, tuple(range(32)))
    assert (all_of_them.ranks_per_domain, all_of_them.bandwidth) == (8, 8 * 50e9)


def test_gpus_that_share_a_card_share_its_bandwidth() -> None:
    graph = graph_of("workstation-4x4090", 2)
    assert group_shape(graph, (0, 4)).bandwidth == pytest.approx(1.25e9 / 4)
    assert group_shape(graph, tuple(range(8))).bandwidth == pytest.approx(1.25e9)


def test_a_group_inside_a_node_has_one_domain_and_its_link() -> None:
    shape = group_shape(graph_of("dgx-a100", 2), (8, 9, 10, 11))
    assert (shape.ranks, shape.domains, shape.ranks_per_domain, shape.bandwidth) == (4, 1, 4, 300e9)


def test_a_group_of_one_has_nobody_to_talk_to() -> None:
    assert group_shape(graph_of("dgx-a100", 1), (3,)).ranks == 1


def test_an_nvl72_rack_is_one_domain_over_its_eighteen_nodes() -> None:
    graph = graph_of("gb200-nvl72", 36)
    assert find_cluster("gb200-nvl72").domain == 72
    assert bottleneck(graph, ("gpu", 0, 0), ("gpu", 17, 3))[0] == 900e9
    assert bottleneck(graph, ("gpu", 0, 0), ("gpu", 18, 0))[0] == 50e9
    assert group_shape(graph, tuple(range(72))).domains == 1
    two_racks = group_shape(graph, tuple(range(0, 144, 4)))
    assert (two_racks.domains, two_racks.ranks_per_domain, two_racks.bandwidth) == (2, 18, 18 * 50e9)


def test_a_leaf_lies_between_cards_and_spine() -> None:
    """Six nodes on leaves of four: 4 · 8 · 50 GB/s of cards, a quarter of it above them."""
    spec = dataclasses.replace(find_cluster("dgx-h100"), nodes_per_leaf=4, spine_oversubscription=4.0)
    graph = build_cluster(spec, 6)
    assert nx.is_strongly_connected(graph)
    assert [v for v in graph if v[0] == "leaf"] == [("leaf", 0), ("leaf", 1)]
    assert graph.edges[("leaf", 0), "fabric"]["bandwidth"] == 400e9
    assert "fabric" not in path(graph, ("gpu", 0, 0), ("gpu", 3, 0))
    assert path(graph, ("gpu", 0, 0), ("gpu", 4, 0))[2:5] == [("leaf", 0), "fabric", ("leaf", 1)]
    assert bottleneck(graph, ("gpu", 0, 0), ("gpu", 4, 0))[1] == pytest.approx(5e-6)


def test_start_moves_a_group() -> None:
    graph = graph_of("dgx-h100", 2)
    assert group_shape(graph, (0, 1), start=7).domains == 2


@pytest.mark.parametrize("name", PRESETS)
def test_presets_name_their_sources_and_know_every_collective(name: str) -> None:
    spec = find_cluster(name)
    assert len(spec.source) > 40 and len(spec.gpu.source) > 40
    assert spec.name == name
    for link in (spec.scale_up, spec.scale_out):
        assert link is not None
        assert set(link.collectives) == {"all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv"}
        for fits in link.collectives.values():
            assert [f.ranks for f in fits] == sorted({f.ranks for f in fits})
            # NVLink SHARP sends each byte once where a ring sends it twice: its bus bandwidth may pass the link's.
            assert all(0 < f.efficiency < 1.2 and f.ramp >= 0 for f in fits)


def gpu_names() -> list[str]:
    import tomllib

    return sorted(tomllib.loads((DATA / "gpus.toml").read_text()))


@pytest.mark.parametrize("name", gpu_names())
def test_no_gpu_computes_faster_than_its_data_sheet(name: str) -> None:
    import tomllib

    table = tomllib.loads((DATA / "gpus.toml").read_text())[name]
    gpu = to_dataclass(Gpu, {"name": name, **table}, f"gpu '{name}'")
    assert set(gpu.matmul) == set(gpu.peak)
    assert all(gpu.matmul[precision].rate < gpu.peak[precision] for precision in gpu.peak)
    for kernels in gpu.attention.values():
        fits = [fit for kernel in kernels for fit in (kernel.forward, kernel.backward)]
        assert all(fit.causal_rate <= fit.rate < gpu.peak["bf16"] for fit in fits)
        assert all(fit.half_length < fit.causal_half_length for fit in fits)
    assert 0.5 < gpu.sustained <= 1 and 0.5 < gpu.memory_efficiency <= 1


CLUSTER = """
name = "mine"
gpu = "H100-SXM5-80G"
gpus_per_node = 4
source = "a test"
[scale_up]
kind = "NVLink"
bandwidth = "450 GB/s"
latency = "2 us"
[scale_up.collectives]
all_reduce = [{ ranks = 2, latency = "10 us", efficiency = 0.8 }]
all_gather = [{ ranks = 2, latency = "10 us", efficiency = 0.8 }]
reduce_scatter = [{ ranks = 2, latency = "10 us", efficiency = 0.8 }]
all_to_all = [{ ranks = 2, latency = "10 us", efficiency = 0.7 }]
send_recv = [{ ranks = 2, latency = "10 us", efficiency = 0.9 }]
"""


def test_a_cluster_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(CLUSTER)
    spec = find_cluster("mine.toml", tmp_path)
    assert isinstance(spec, ClusterSpec)
    assert (spec.domain, spec.gpu.name, spec.scale_up.latency) == (4, "H100-SXM5-80G", 2e-6)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"H100-SXM5-80G"', '"H100-SXM-80G"', ["gpu 'H100-SXM-80G'", "did you mean 'H100-SXM5-80G'"]),
        ('"450 GB/s"', '"450 GB"', ["scale_up.bandwidth", "450 GB/s"]),
        ("gpus_per_node", "gpus_per_nod", ["gpus_per_nod", "did you mean 'gpus_per_node'"]),
        ('latency = "2 us"', "", ["'scale_up.latency' is missing"]),
        ("per_node = 4", "per_node = 0", ["gpus_per_node = 0", "at least 1"]),
        ("per_node = 4", "per_node = 4\nscale_up_domain = 6", ["scale_up_domain = 6", "multiple", "= 4"]),
        ("per_node = 4", "per_node = 4\nnodes_per_leaf = -1", ["nodes_per_leaf = -1", "at least 0"]),
        ("per_node = 4", "per_node = 4\nscale_up_domain = 8\nnodes_per_leaf = 3", ["nodes_per_leaf = 3", "multiple"]),
        ("per_node = 4", "per_node = 4\nspine_oversubscription = 0.5", ["spine_oversubscription = 0.5", "at least 1"]),
        ("per_node = 4", "per_node = 4\nspine_oversubscription = 3", ["spine_oversubscription", "nodes_per_leaf"]),
        ("per_node = 4", 'per_node = 4\nnccl = "hoper"', ["nccl", "'hopper'"]),
        ('latency = "2 us"', 'latency = "2 us"\ndevices_per_root = 2', ["root_bandwidth", "above zero"]),
        ("450 GB/s", "0 GB/s", ["scale_up", "bandwidth = 0 must be above zero"]),
        ("all_gather", "all_gathers", ["scale_up.collectives", "no 'all_gather'"]),
        ("efficiency = 0.7", "efficiency = 0.0", ["all_to_all", "efficiency above zero"]),
        ("efficiency = 0.7", "efficency = 0.7", ["unknown key", "efficency"]),
        ("efficiency = 0.7", "efficiency = 0.7, active = -1", ["all_to_all", "active = -1 must be at least 0"]),
        ("efficiency = 0.7", "efficiency = 0.7, active = 4", ["all_to_all: active = 4", "concurrency is empty"]),
        ('source = "a test"', "source = 2026-01-31\nprice_per_gpu_hour = 2026-01-31", ["price_per_gpu_hour"]),
    ],
)
def test_a_bad_cluster_file_is_the_users_error(tmp_path: Path, old: str, new: str, words: list[str]) -> None:
    (tmp_path / "mine.toml").write_text(CLUSTER.replace(old, new))
    with pytest.raises(UserError) as caught:
        find_cluster("mine.toml", tmp_path)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_network_needs_cards(tmp_path: Path) -> None:
    text = (DATA / "clusters" / "dgx-h100.toml").read_text().replace("nics_per_node = 8", "nics_per_node = 0")
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(UserError, match="nics_per_node = 0 must be at least 1"):
        find_cluster("mine.toml", tmp_path)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(UserError, match="cluster 'dgx-h10' is not known; did you mean 'dgx-h100'"):
        find_cluster("dgx-h10")


def test_this_machine_needs_a_measurement_first() -> None:
    with pytest.raises(UserError, match="run `layoutwise measure` first"):
        find_cluster(THIS_MACHINE)


def test_a_cluster_survives_json() -> None:
    spec = find_cluster("dgx-h100")
    assert to_dataclass(ClusterSpec, json.loads(json.dumps(dataclasses.asdict(spec))), "cluster") == spec
