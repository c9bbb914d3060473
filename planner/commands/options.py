"""Arguments and options that several commands take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

JobFile = Annotated[Path, typer.Argument(metavar="JOB.toml", help="Model, cluster, nodes and recipe.")]
PlanFile = Annotated[Path, typer.Argument(metavar="PLAN.json", help="What `layoutwise plan` wrote.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the job, like training.seq_len=4096."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Folder = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Where to write.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps to train.")]
Warmup = Annotated[int | None, typer.Option(min=0, help="First steps that do not count; 5, or all but one.")]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Save here, and go on from what is saved here; all nodes see it.")
]
CheckpointEvery = Annotated[int | None, typer.Option(min=1, metavar="N", help="Steps between saves; 100.")]
Weights = Annotated[Path | None, typer.Option(metavar="DIR", help="Safetensors to begin with.")]
Export = Annotated[Path | None, typer.Option(metavar="DIR", help="Write the trained model as safetensors.")]
MaxRestarts = Annotated[int, typer.Option(min=0, metavar="R", help="Restarts from DIR when a rank dies.")]
SlowRank = Annotated[
    str | None,
    typer.Option(metavar="R:X", help="An artificial straggler: rank R computes X times as long; 1:2.0,3:1.5."),
]

WhatIf = Annotated[
    list[str] | None,
    typer.Option(
        "--what-if",
        metavar="KEY=VALUE",
        help="Plan the job anew with this changed: inter-node=2x, memory=+10GiB, nvlink=none, batch=0.5x, nodes=+1; "
        "the usual ones without a value (and by default where that is quick), or none.",
    ),
]


class WithOptionalWhatIf(TyperCommand):
    """A command whose --what-if may stand alone, for "all"."""

    def parse_args(self, ctx: typer.Context, args: list[str]) -> list[str]:  # type: ignore[override]
        filled = []
        for place, word in enumerate(args):
            filled.append(word)
            behind = args[place + 1] if place + 1 < len(args) else "-"
            # A bare word that is no plan is a key without its value, which gets a sentence of its own.
            given = "=" in behind or (re.fullmatch("[a-z][a-z-]*", behind) and not Path(behind).exists())
            if word == "--what-if" and not given:
                filled.append("all")
        return super().parse_args(ctx, filled)


def default_warmup(given: int | None, steps: int) -> int:
    """First steps that do not count: what was given, or 5, or all but one."""
    return max(0, min(5, steps - 1)) if given is None else given
