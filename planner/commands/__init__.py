"""The commands of `layoutwise`, a file for each thing one does with a plan; `app` knows them all."""

from __future__ import annotations

import typer

app = typer.Typer(
    name="layoutwise",
    help="Lay out a training job on a cluster: predict every layout, pick the best, run it, compare.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
