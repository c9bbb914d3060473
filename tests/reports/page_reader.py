"""A page as its reader sees it: words, links, and the data of its curves."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "br", "input", "link", "img", "hr"}


class Reader(HTMLParser):
    """Tags in balance; what is linked, named and embedded."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.outside: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        assert len(found) == len(attributes), f"<{tag}> has an attribute twice"
        self.tags.append((tag, found))
        self.ids += [value for name, value in attributes if name == "id" and value]
        self.links += [value for name, value in attributes if name == "href" and value]
        self.outside += [f"{tag} {name}" for name, _ in attributes if name in ("src", "srcset", "action", "poster")]
        self.outside += [tag for _ in [0] if tag in ("link", "iframe", "object", "embed", "base", "img")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> ends <{self.open[-1] if self.open else ''}>"
        self.open.pop()

    def handle_data(self, text: str) -> None:
        (self.scripts if self.open[-1:] in (["script"], ["style"]) else self.words).append(text)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [] and len(reader.ids) == len(set(reader.ids))
    return reader


def data_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert match
    return dict(json.loads(match[1]))
