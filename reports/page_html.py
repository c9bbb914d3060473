"""The pieces that sections of a page are made of. Every text that comes from a file passes through `esc`."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass


def esc(text: object) -> str:
    """Text that is safe between tags and in quoted attributes."""
    return html.escape(str(text), quote=True)


def copy_box(text: str, what: str) -> str:
    return (
        f'<div class="copy"><code>{esc(text)}</code>'
        f'<button type="button" data-copy="{esc(text)}" aria-label="Copy the {esc(what)}">Copy</button></div>'
    )


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1, caption: str = "", last: bool = False
) -> str:
    """A table of texts; all columns but the first `texts`, "layout", and the last if so, are numbers."""
    named = f"<caption>{esc(caption)}</caption>" if caption else ""
    kind = [
        'class="text"' if place < texts or name == "layout" or (last and place == len(head) - 1) else 'class="number"'
        for place, name in enumerate(head)
    ]
    top = "".join(f'<th scope="col" {kind[place]}>{esc(name)}</th>' for place, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td {kind[place]}>{esc(cell)}</td>" for place, cell in enumerate(row)) + "</tr>"
        for row in rows
    )
    content = f"<table>{named}<thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{content}</div>'


def folded(summary: str, content: str) -> str:
    return f"<details><summary>{esc(summary)}</summary>{content}</details>"


@dataclass(frozen=True)
class Bar:
    """A bar: what it is, its parts by kind in order, their sum as a text, an interval of the sum if known."""

    name: str
    note: str
    parts: dict[str, float]
    text: str
    interval: tuple[float, float] | None = None

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def bars(found: Sequence[Bar], show: Callable[[float], str], limit: float | None = None, limit_text: str = "") -> str:
    """Stacked bars on one scale; `show` turns a value into a text, `limit` is a line over all of them."""
    ends = [end for bar in found for end in (bar.total, bar.interval[1] if bar.interval else 0.0)]
    scale = max([*ends, limit or 0.0]) * 1.01 or 1.0
    rows = "".join(_bar(bar, show, scale, limit, limit_text) for bar in found)
    named = "bars noted" if any(bar.note for bar in found) else "bars"
    return f'<div class="{named}">{rows}</div>'


def _bar(bar: Bar, show: Callable[[float], str], scale: float, limit: float | None, limit_text: str) -> str:
    parts = {name: value for name, value in bar.parts.items() if value > 1e-6 * scale}
    words = ", ".join(f"{name} {show(value)}" for name, value in parts.items())
    segments = "".join(
        f'<span class="k-{name}" style="width:{100 * value / scale:.3f}%" '
        f'data-tip="{esc(name)}: {esc(show(value))} ({value / bar.total:.1%})"></span>'
        for name, value in parts.items()
    )
    line = ""
    if bar.interval:
        low, high = (100 * end / scale for end in bar.interval)
        tip = f"four of five: {show(bar.interval[0])} to {show(bar.interval[1])}"
        line += f'<i class="whisker" style="left:{low:.3f}%;width:{high - low:.3f}%" data-tip="{esc(tip)}"></i>'
    if limit is not None:
        line += f'<i class="limit" style="left:{100 * limit / scale:.3f}%" data-tip="{esc(limit_text)}"></i>'
    note = f"<code>{esc(bar.note)}</code>" if bar.note else ""
    return (
        f'<div class="bar-row"><div class="bar-name">{esc(bar.name)} {note}</div>'
        f'<div class="bar-text">{esc(bar.text)}</div>'
        f'<div class="bar" role="img" aria-label="{esc(bar.name)}: {esc(words)}">{segments}{line}</div></div>'
    )


def legend(kinds: Sequence[str]) -> str:
    items = "".join(f'<li><span class="k-{kind}"></span>{esc(kind)}</li>' for kind in kinds)
    return f'<ul class="legend" aria-hidden="true">{items}</ul>'
