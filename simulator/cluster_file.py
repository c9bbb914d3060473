"""Cluster files as text: the tables of TOML that people read and correct."""

from __future__ import annotations

import json
from textwrap import wrap
from typing import Any

WIDTH = 118


def cluster_toml(table: dict[str, Any], comment: str) -> str:
    """A cluster's table as TOML, in the order and the form of those in data/clusters."""
    lines = [f"# {line}" for line in wrap(comment, WIDTH)]
    plain = {key: value for key, value in table.items() if not isinstance(value, dict) and not _is_tables(value)}
    lines += ["", *(_entry(key, value) for key, value in plain.items())]
    for key, value in table.items():
        if _is_tables(value):
            lines += ["", f"{key} = [", *(f"    {_inline(one)}," for one in value), "]"]
    for key, value in table.items():
        if isinstance(value, dict):
            lines += _section(key, value)
    return "\n".join(lines) + "\n"


def _is_tables(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def _section(path: str, table: dict[str, Any]) -> list[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = ["", f"[{path}]", *(_entry(key, value) for key, value in table.items() if key not in inner)]
    for key, value in inner.items():
        lines += _section(f"{path}.{key}", value)
    return lines


def _entry(key: str, value: Any) -> str:
    if isinstance(value, str) and len(value) > 80:
        body = "\n".join(wrap(value, WIDTH, break_long_words=False, break_on_hyphens=False))
        return f'{key} = """\n' + body.replace("\\", "\\\\").replace('"""', "'''") + '"""'
    if _is_tables(value) and len(value) > 1:
        return f"{key} = [\n" + "".join(f"    {_inline(one)},\n" for one in value) + "]"
    return f"{key} = {_inline(value)}"


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_inline(one)}" for key, one in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_inline(one) for one in value) + "]"
    if isinstance(value, float):
        return f"{value:.6g}" if value != int(value) or abs(value) >= 1e6 else f"{value:.1f}"
    return json.dumps(value, ensure_ascii=False)
