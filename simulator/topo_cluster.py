"""A cluster file from a topology matrix: links and their bandwidth from the matrix and data sheets, the shares that
collectives reach from the measured cluster that is most alike (data/boards.toml says which)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simulator.checks import LEAST_BANDWIDTH, MOST_BANDWIDTH, MOST_GPUS_PER_NODE
from simulator.errors import UserError, nearest
from simulator.files import read_toml
from simulator.topo_matrix import TopoMatrix, parts
from simulator.units import BANDWIDTH

DATA = Path(__file__).parent / "data"
_NETWORK = re.compile(r"\s*(?:(\d+)\s*[x×*]\s*)?([0-9.]+\s*[kMGT]i?[bB]/s)\s*([A-Za-z]*)\s*", re.ASCII)
# Whose constants a network has, by what it is called.
_NETWORKS = {
    "infiniband": "dgx-h100",
    "ib": "dgx-h100",
    "roce": "dgx-h100",
    "efa": "aws-p5",
    "ethernet": "workstation-4x4090",
}
# Slower cards than this speak TCP, unless the user says otherwise.
_SOCKETS_BELOW = 100e9 / 8
# A card is a GPU's own where no host bridge lies between them.
_NEAR = ("PSB", "PIX", "PXB")


@dataclass
class DescribedCluster:
    """The table of a cluster file, and sentences on what was assumed."""

    table: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def find_board(name: str) -> tuple[str, dict[str, Any]]:
    """The name in gpus.toml and the board of what people call a GPU: "h100", "NVIDIA H100 80GB HBM3"."""
    boards = read_toml(DATA / "boards.toml", "boards")
    wanted = re.sub(r"^nvidia\s+|tesla\s+", "", name.strip(), flags=re.IGNORECASE).lower()
    for key, board in boards.items():
        if wanted == key.lower() or wanted in board["names"]:
            return key, board
    known = [board["names"][0] for board in boards.values()]
    raise UserError(f"--gpu '{name}' is not known{nearest(wanted, known)}")


def cluster_from_topo(matrix: TopoMatrix, gpu: str, network: str, name: str) -> DescribedCluster:
    """The table of a cluster file.

    Args:
        gpu: what the GPU is called.
        network: cards and their speed, "8 x 400 Gb/s", with InfiniBand, RoCE, EFA or Ethernet behind it if one likes;
            empty for a machine on its own.

    Rules: NV# to every GPU, more links than a GPU has in all if each pair had its own, is a switch that gives # links
    to each; fewer are links of their own between pairs. NVLinks between some GPUs alone make roots (bridged pairs),
    whose way to the others is one PCIe slot, or a mesh (DGX-1) whose rings use all links of a GPU.
    Ignored: that PCIe switches share a slot, different speeds of the ways PIX to NODE, GPUs of unlike neighbourhoods.
    """
    key, board = find_board(gpu)
    found = DescribedCluster({"name": name, "gpu": key, "gpus_per_node": matrix.gpus})
    up = _scale_up(matrix, key, board, found.notes)
    like = read_toml(DATA / "clusters" / f"{up.pop('like')}.toml", "cluster")
    shares = _shares(like["scale_up"], up.pop("mesh", 0))
    up = {
        "kind": up.pop("kind"),
        "bandwidth": up.pop("bandwidth"),
        **shares,
        **up,
        "collectives": shares["collectives"],
    }
    if like.get("nccl"):
        found.table["nccl"] = like["nccl"]
    out = _scale_out(matrix, network, found)
    found.table["source"] = _source(board, like["name"], out, found.notes)
    found.table["scale_up"] = up
    if out:
        found.table["scale_out"] = out
    return found


def _scale_up(matrix: TopoMatrix, key: str, board: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    link, most = BANDWIDTH.parse(board["nvlink"]), int(board["nvlinks"])
    islands = parts(matrix, frozenset({"NV"}))
    counts = {matrix.nvlinks(a, b) for a in range(matrix.gpus) for b in range(a)}
    if max(counts, default=0) > most:
        raise UserError(
            f"the matrix has NV{max(counts)}, but {key} has {most} NVLinks: is --gpu right? (bridged PCIe cards and "
            "SXM modules are different GPUs)"
        )
    if matrix.gpus == 1 or max(counts) == 0:
        return _over_pcie(matrix, board, notes)
    if len(islands) > 1:
        return _bridged(matrix, board, islands, link, notes)
    if len(counts) == 1:
        (count,) = counts
        if matrix.gpus > 2 and count * (matrix.gpus - 1) <= most:
            notes.append(
                f"every pair has {count} NVLinks of its own, no switch: smaller groups reach as much less as they use "
                "fewer of them"
            )
            total = count * (matrix.gpus - 1)
            return {"kind": f"{total} NVLinks, a mesh", "bandwidth": _shown(total * link), "like": board["like"],
                    "mesh": matrix.gpus, "topology": "links"}  # fmt: skip
        if count < most:
            notes.append(f"NV{count} of the {most} NVLinks of {key}: shares of the bandwidth are those of all links")
        return {"kind": f"{count} NVLinks, switched", "bandwidth": _shown(count * link), "like": board["like"]}
    totals = {sum(matrix.nvlinks(a, b) for b in range(matrix.gpus)) for a in range(matrix.gpus)}
    if len(totals) > 1:
        notes.append(f"GPUs have {min(totals)} to {max(totals)} NVLinks: the fewest are taken for all")
    notes.append("NVLinks join some GPUs directly and others over them: rings through all are what is modelled")
    return {"kind": f"{min(totals)} NVLinks, a cube mesh", "bandwidth": _shown(min(totals) * link),
            "like": board["like"]}  # fmt: skip


def _over_pcie(matrix: TopoMatrix, board: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    found = {
        "kind": f"PCIe, {board['pcie']}",
        "bandwidth": board["pcie"],
        "like": board["pcie_like"],
        "topology": "pcie",
    }
    sockets = parts(matrix, frozenset({"PSB", "PIX", "PXB", "PHB", "NODE"}))
    if len(sockets) == 1:
        return found
    if not _even(matrix, sockets, notes, "sockets"):
        return found
    notes.append("the way between the sockets is not in the matrix: it is taken to carry as much as a slot")
    return found | {"devices_per_root": len(sockets[0]), "root_bandwidth": board["pcie"]}


def _bridged(
    matrix: TopoMatrix, board: dict[str, Any], islands: list[list[int]], link: float, notes: list[str]
) -> dict[str, Any]:
    inside = min(sum(matrix.nvlinks(a, b) for b in range(matrix.gpus)) for island in islands for a in island)
    if not inside or not _even(matrix, islands, notes, "groups joined by NVLinks"):
        notes.append("NVLinks that only some GPUs have are left out")
        return _over_pcie(matrix, board, notes)
    notes.append(
        f"NVLinks join groups of {len(islands[0])}; between groups there is PCIe, one slot of which a group is taken "
        "to use at a time"
    )
    return {"kind": f"{inside} NVLinks in groups of {len(islands[0])}", "bandwidth": _shown(inside * link),
            "like": board["like"], "topology": "links", "devices_per_root": len(islands[0]),
            "root_bandwidth": board["pcie"]}  # fmt: skip


def _even(matrix: TopoMatrix, groups: list[list[int]], notes: list[str], what: str) -> bool:
    """Whether all groups are equal; ranks are to be numbered so that each is a run of them."""
    if len({len(group) for group in groups}) > 1:
        sizes = ", ".join(str(len(group)) for group in groups)
        notes.append(f"{what} of {sizes} GPUs: a node has equal parts here, so that they are taken for one")
        return False
    order = [gpu for group in groups for gpu in group]
    if order != list(range(matrix.gpus)):
        wanted = ",".join(map(str, order))
        notes.append(
            f"{what} are not runs of GPUs: CUDA_VISIBLE_DEVICES={wanted} makes them so, and is taken for granted"
        )
    return True


def _shares(like: dict[str, Any], mesh: int) -> dict[str, Any]:
    """Latencies and shares of another cluster's links; r of a mesh's n GPUs use (r - 1)/(n - 1) of the links."""
    kept = {name: like[name] for name in ("topology", "latency", "ring_hops") if name in like}
    table = {}
    for collective, fits in like["collectives"].items():
        fit = max(fits, key=lambda one: one["ranks"] if one["ranks"] <= 4 else 0)
        reached = [fit | {"ranks": r, "efficiency": round(fit["efficiency"] * _use(collective, r, mesh), 4)}
                   for r in range(2, mesh + 1)]  # fmt: skip
        table[collective] = (reached[:1] if collective == "send_recv" else reached) if mesh else fits
    return kept | {"collectives": table}


def _use(collective: str, ranks: int, mesh: int) -> float:
    return (1 if collective == "send_recv" else ranks - 1) / (mesh - 1)


def _scale_out(matrix: TopoMatrix, network: str, found: DescribedCluster) -> dict[str, Any] | None:
    near = [name for name, ways in matrix.cards.items() if any(way in _NEAR for way in ways)]
    cards = near or [name for name, ways in matrix.cards.items() if any(way != "SYS" for way in ways)]
    if not network:
        if matrix.cards:
            found.notes.append(
                f"the matrix has {len(matrix.cards)} network cards, {len(near)} of them beside GPUs, but not their "
                f'speed: --network "{len(cards) or len(matrix.cards)} x 400 Gb/s" adds them'
            )
        return None
    match = _NETWORK.fullmatch(network)
    if not match or (match[3] and match[3].lower() not in _NETWORKS):
        raise UserError(f'--network \'{network}\' is not like "8 x 400 Gb/s" or "1 x 25 Gb/s Ethernet"')
    speed = BANDWIDTH.parse(match[2])
    count = int(match[1]) if match[1] else len(cards) or 1
    if not 1 <= count <= MOST_GPUS_PER_NODE:
        raise UserError(f"--network '{network}': {count} cards must be from 1 to {MOST_GPUS_PER_NODE}")
    if not LEAST_BANDWIDTH <= speed <= MOST_BANDWIDTH:
        raise UserError(
            f"--network '{network}': a card of {speed:g} bytes per second must have from {LEAST_BANDWIDTH:g} to "
            f"{MOST_BANDWIDTH:g}, like 400 Gb/s (5e+10)"
        )
    if cards and count != len(cards):
        beside = "beside GPUs" if near else "on their side of the sockets"
        found.notes.append(f"the matrix has {len(cards)} network cards {beside}, --network {count}: the latter holds")
    kind = match[3] or ("Ethernet" if speed < _SOCKETS_BELOW else "InfiniBand")
    like = read_toml(DATA / "clusters" / f"{_NETWORKS[kind.lower()]}.toml", "cluster")
    found.table["nics_per_node"] = count
    found.notes.append(f"between nodes: shares and latencies of {like['name']}")
    scale_out: dict[str, Any] = dict(like["scale_out"])
    return scale_out | {"kind": f"{kind}, {match[2].strip()} a card", "bandwidth": match[2].strip()}


def _source(board: dict[str, Any], like: str, out: dict[str, Any] | None, notes: list[str]) -> str:
    sentences = [
        "Devices, cards and links: `nvidia-smi topo -m`; bandwidth of a link: the GPU's data sheet",
        f"latencies, and the share of that bandwidth that collectives reach: those of {like}, not measured here",
        *notes,
        "calibrate with `layoutwise cluster FILE --nccl-tests TABLE...`",
    ]
    return " ".join(sentence[0].upper() + sentence[1:].rstrip(".") + "." for sentence in sentences)


def _shown(bandwidth: float) -> str:
    return f"{bandwidth / 1e9:g} GB/s"
