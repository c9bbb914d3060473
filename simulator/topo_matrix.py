"""The table that `nvidia-smi topo -m` prints, as people paste it: who meets whom over what.

GPU0   X   NV18  NV18  PIX  NODE  SYS  0-55   0       NV#: so many NVLinks; the others are ways over PCIe, from a
GPU1  ...                                              switch (PIX, PXB) over the host (PHB, NODE) to the way
NIC0  ...                                              between sockets (SYS)
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from simulator.errors import UserError

# Nearest first. PSB is what MIG parts of one GPU have, SOC what drivers before 2018 called SYS.
WAYS = ("PSB", "PIX", "PXB", "PHB", "NODE", "SYS")
_CELL = re.compile(r"X|NV\d+|PSB|PIX|PXB|PHB|NODE|SYS|SOC")
_DEVICE = re.compile(r"GPU\d+|NIC\d+|(?:mlx\d+|hfi\d+|bnxt_re|ib|rdma|efa|irdma|mana|roce)[\w.-]*", re.IGNORECASE)
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m|\x1b\[\d*[A-Za-z]")
_LEGEND = re.compile(r"(NIC\d+):\s*(\S+)")


@dataclass(frozen=True)
class TopoMatrix:
    """GPUs in the order of the table; `ways[i][j]` is the cell of GPU i and GPU j, `cards[name][i]` that of a network
    card and GPU i. `models` are the cards' own names where the table has a legend of them."""

    ways: tuple[tuple[str, ...], ...]
    cards: dict[str, tuple[str, ...]]
    models: dict[str, str]

    @property
    def gpus(self) -> int:
        return len(self.ways)

    def nvlinks(self, a: int, b: int) -> int:
        """NVLinks between two GPUs; on a switch each has them to all others at once."""
        way = self.ways[a][b]
        return int(way[2:]) if way.startswith("NV") else 0


def parse_topo(text: str) -> TopoMatrix:
    """The matrix in a pasted text; what stands around it (prompts, the legend, other output) is passed over.

    Raises:
        UserError: no matrix, one that was cut off, or one that is not symmetric between GPUs.
    """
    lines = [_ESCAPE.sub("", line).strip(" |\r\n#>") for line in text.splitlines()]
    header, start = _header(lines)
    rows: dict[str, list[str]] = {}
    for line in lines[start:]:
        words = line.split()
        if words and words[0] in header and words[0] not in rows:
            cells = [word.upper() for word in words[1 : 1 + len(header)]]
            rows[words[0]] = ["SYS" if cell == "SOC" else cell for cell in cells]
    gpus = [name for name in header if name.upper().startswith("GPU")]
    for name in gpus:
        if name not in rows:
            raise UserError(f"the topology matrix has a column {name} but no row of it: was it cut off?")
        cells = rows[name]
        if len(cells) < len(header) or not all(_CELL.fullmatch(cell) for cell in cells):
            wrong = next((cell for cell in cells if not _CELL.fullmatch(cell)), None)
            seen = f"'{wrong}' in it" if wrong else f"{len(cells)} of {len(header)} cells"
            raise UserError(f"the row of {name} in the topology matrix has {seen}: was it cut off or wrapped?")
    at = {name: header.index(name) for name in header}
    ways = tuple(tuple(rows[a][at[b]] for b in gpus) for a in gpus)
    for i, row in enumerate(ways):
        for j, way in enumerate(row):
            if (way == "X") != (i == j) or way != ways[j][i]:
                raise UserError(
                    f"the topology matrix says {way} from {gpus[i]} to {gpus[j]} and {ways[j][i]} back: it must be "
                    "symmetric, with X on its diagonal"
                )
    cards = {name: tuple(rows[gpu][at[name]] for gpu in gpus) for name in header if name not in gpus}
    return TopoMatrix(ways, cards, dict(_LEGEND.findall("\n".join(lines))))


def _header(lines: list[str]) -> tuple[list[str], int]:
    """The names of the columns, and the line behind them: "CPU Affinity" and what follows are no devices."""
    for number, line in enumerate(lines):
        # Old drivers print some columns without room between them.
        words = line.split()
        devices = []
        for word in words:
            if not _DEVICE.fullmatch(word):
                break
            devices.append(word)
        if devices and devices[0] == "GPU0" and not (len(words) > 1 and words[1].upper() == "X"):
            return devices, number + 1
    raise UserError(
        "no topology matrix is in the text: paste the whole output of `nvidia-smi topo -m`, from the line that begins "
        "with GPU0"
    )


def parts(matrix: TopoMatrix, meets: frozenset[str]) -> list[list[int]]:
    """GPUs grouped by ways: two are in one part if a chain of these ways joins them. In the order of their first."""
    found: list[list[int]] = []
    left = set(range(matrix.gpus))
    while left:
        part, edge = {min(left)}, {min(left)}
        while edge:
            edge = {b for a in edge for b in left - part if _kind(matrix.ways[a][b]) in meets}
            part |= edge
        left -= part
        found.append(sorted(part))
    return found


def _kind(way: str) -> str:
    return "NV" if way.startswith("NV") else way
