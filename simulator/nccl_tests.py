"""Tables that nccl-tests and rccl-tests print (all_reduce_perf and its siblings), as people paste them.

    #  Rank  0 Group  0 Pid  88731 on  node-1 device  0 [0x27] NVIDIA A100-SXM4-80GB
    #       size         count      type   redop    root     time   algbw   busbw #wrong     time   algbw   busbw #wrong
        33554432       8388608     float     sum      -1   1047.8   32.02   60.04      0   1015.2   33.05   61.97      0

size is bytes of the whole buffer, times are microseconds out of place and in place. What was run stands in newer
versions' header; otherwise the name of the file and the ratio of busbw to algbw tell.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from simulator.errors import UserError

PROGRAMS = {
    "all_reduce": "all_reduce",
    "allreduce": "all_reduce",
    "all_gather": "all_gather",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "all_to_all": "all_to_all",
    "sendrecv": "send_recv",
    "send_recv": "send_recv",
}
_RANK = re.compile(r"Rank\s+(\d+)\s.*?\bon\s+(\S+)\s+device")
_PREFIX = re.compile(r"^\s*(?:\[\d+,\d+\]<std\w+>:|\d+:)\s?")


@dataclass(frozen=True)
class NcclTable:
    """One run: ranks on hosts, and seconds of the buffers' sizes in bytes. hosts is 0 where the table does not say."""

    collective: str
    ranks: int
    hosts: int
    seconds: tuple[tuple[float, float], ...]
    gpu: str = ""


def parse_nccl_tests(text: str, name: str, ranks: int | None = None) -> NcclTable:
    """The table in a pasted text. Times are those out of place, in place where there are no others.

    Args:
        name: of the file, which may say what was run.
        ranks: how many there were, where the text does not say.

    Raises:
        UserError: no table, or one of which collective or number of ranks cannot be told.
    """
    lines = [_PREFIX.sub("", line) for line in text.splitlines()]
    rows = [row for line in lines if (row := _row(line))]
    if not rows:
        raise UserError(
            f"'{name}' has no table of nccl-tests: rows begin with size, count and type, like all_reduce_perf's"
        )
    places = {int(m[1]): m[2] for line in lines if line.lstrip().startswith("#") or "Rank" in line
              for m in [_RANK.search(line)] if m}  # fmt: skip
    hosts = [m[2] for line in lines for m in [_RANK.search(line)] if m]
    # Builds without MPI number the ranks of every process anew.
    count = max(len(places), len(hosts)) or None
    if ranks and count and ranks != count:
        raise UserError(f"'{name}' lists {count} ranks, --ranks says {ranks}")
    ratio = _ratio(rows)
    collective = _collective(text, name, rows[0][1], ratio)
    found = ranks or count or _ranks_of(collective, ratio, name)
    if found < 2:
        raise UserError(f"'{name}' is of one rank, which says nothing about a network")
    times = {size: seconds for size, _, seconds, _, _ in rows if size > 0 and seconds > 0}
    return NcclTable(collective, found, len(set(hosts)), tuple(sorted(times.items())))


def _row(line: str) -> tuple[float, str, float, float, float] | None:
    """(size, redop, seconds, algbw, busbw)."""
    words = line.split()
    if len(words) < 6 or not (words[0].isdigit() and words[1].isdigit()) or words[2].isdigit():
        return None
    redop = words[3] if not _number(words[3]) else ""
    rest = words[4:] if redop else words[3:]
    # Behind the operation older tables have no root, newer ones -1 or a rank.
    if rest and re.fullmatch(r"-?\d+", rest[0]):
        rest = rest[1:]
    for start in (0, 4):
        values = rest[start : start + 3]
        if len(values) == 3 and all(_number(value) for value in values):
            time, algbw, busbw = map(float, values)
            return float(words[0]), redop, time * 1e-6, algbw, busbw
    return None


def _number(word: str) -> bool:
    return bool(re.fullmatch(r"\d+(\.\d*)?(e[+-]?\d+)?", word, re.IGNORECASE))


def _ratio(rows: list[tuple[float, str, float, float, float]]) -> float | None:
    """busbw over algbw where it has most digits."""
    algbw, busbw = max(((row[3], row[4]) for row in rows), default=(0.0, 0.0))
    return busbw / algbw if algbw >= 1 else None


def _collective(text: str, name: str, redop: str, ratio: float | None) -> str:
    """What was run: said in the text, said by the file's name, or what busbw, algbw and the operation leave."""
    said = re.search(r"Collective test starting:\s*(\w+?)_perf", text) or re.search(r"(\w+?)_perf(?:_mpi)?\b", text)
    for word in (said[1] if said else "", name.lower().replace("-", "_")):
        for program, collective in PROGRAMS.items():
            if program in word:
                return collective
    if redop not in ("none", "") and ratio is not None:
        return "all_reduce" if ratio >= 1 else "reduce_scatter"
    raise UserError(
        f"'{name}' does not say which collective it measured: name the file after it, like all_gather.txt "
        f"({', '.join(sorted(set(PROGRAMS.values())))})"
    )


def _ranks_of(collective: str, ratio: float | None, name: str) -> int:
    """From busbw / algbw: 2(n-1)/n of an all-reduce, (n-1)/n of the others. Many ranks are too alike to tell."""
    if ratio is not None and collective != "send_recv":
        share = ratio / 2 if collective == "all_reduce" else ratio
        if share < 1:
            ranks = 1 / (1 - share)
            if ranks < 32 and abs(ranks - round(ranks)) < 0.2:
                return round(ranks)
    raise UserError(f"'{name}' lists no ranks, and its bandwidths do not tell how many there were: --ranks N")
