"""What every command prints alike: one JSON document, and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2))


def say(lines: Iterable[str]) -> None:
    """How the input was understood: on stderr, because stdout has the result alone."""
    for line in lines:
        print(line, file=sys.stderr)


@contextmanager
def progress(title: str, quiet: bool, lines: bool = False) -> Iterator[Callable[[str, float], None]]:
    """A progress bar on stderr where that is a terminal; elsewhere nothing, or a line for every tenth."""
    if not quiet and not sys.stderr.isatty() and lines:
        yield _line_by_line(title)
        return
    if quiet or not sys.stderr.isatty():
        yield lambda what, fraction: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda what, fraction: bar.update(task, description=f"{title}: {what}", completed=fraction)


def _line_by_line(title: str) -> Callable[[str, float], None]:
    """Say on stderr when another tenth is done, and what is being done."""
    said = -1

    def report(what: str, fraction: float) -> None:
        nonlocal said
        if int(10 * fraction) > said:
            said = int(10 * fraction)
            print(f"{title} {fraction:4.0%}  {what}", file=sys.stderr, flush=True)

    return report
