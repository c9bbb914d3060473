"""Import: a layout in the words of another framework, pasted from a command line or a file, the inverse of
`planner.export`. Wherever a layout is taken, so are these."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.imports import deepspeed, megatron, torchtitan
from planner.imports.settings import Settings, from_command, from_json, from_python, from_toml
from simulator.errors import UserError
from simulator.files import read_text
from simulator.job import Job
from simulator.layout import Layout
from simulator.layout_text import complete, parse_fields

Reader = Callable[[Settings, Job], tuple[dict[str, Any], dict[str, Any], list[str]]]
# A framework, the names of which any one tells that a text is meant for it, and what reads it.
_FRAMEWORKS: tuple[tuple[str, tuple[str, ...], Reader], ...] = (
    ("Megatron-LM", megatron.MARKS, megatron.read),
    ("torchtitan", torchtitan.MARKS, torchtitan.read),
    ("DeepSpeed", deepspeed.MARKS, deepspeed.read),
)


@dataclass(frozen=True)
class ReadLayout:
    """A layout as it was written by the user, and what else that text said.

    framework is whose words they were, empty for our own. notes are sentences: what the text says of the job and the
    job says otherwise, and what a Layout has no word for. ignored are names that do not concern the layout.
    """

    layout: Layout
    framework: str = ""
    notes: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What to tell the user, nothing for our own words."""
        if not self.framework:
            return []
        found = [f"read as {self.framework}'s: {self.layout.short()}", *self.notes]
        if self.ignored:
            found.append(f"not about the layout, ignored: {' '.join(self.ignored)}")
        return found


def read_layout(text: str, job: Job) -> ReadLayout:
    """A layout in our words ("tp=8 pp=4"), or a pasted command line of Megatron-LM or torchtitan, or `@FILE` with such
    a command line, a torchtitan or Megatron-Bridge recipe, torchtitan's TOML or DeepSpeed's JSON.

    Raises:
        UserError: one sentence; flags that contradict each other, a value of the wrong kind, words of nobody.
    """
    where = "the layout"
    if text.startswith("@"):
        where = f"'{text[1:]}'"
        text = read_text(text[1:], "layout")
    settings = _settings(text)
    if settings is None:
        return ReadLayout(complete(parse_fields(_own_words(text)), job))
    config = settings.value("deepspeed_config", "deepspeed")
    if isinstance(config, str) and config.endswith(".json"):
        settings = from_json(read_text(Path(config), "DeepSpeed configuration"))
    for framework, marks, read in _FRAMEWORKS:
        if settings.has(*marks):
            fields, said, notes = read(settings, job)
            layout = complete(_canonical(fields, job), job)
            ignored = tuple(name for name in settings.left() if not _of_launcher(name))
            return ReadLayout(layout, framework, tuple(_differences(said, job) + notes), ignored)
    known = "Megatron-LM (--tensor-model-parallel-size), torchtitan (--parallelism.tensor_parallel_degree) or DeepSpeed"
    raise UserError(f"{where} names nothing of a layout in the words of {known}")


def _settings(text: str) -> Settings | None:
    """The names and values of a text, None for a layout in our own words."""
    if text.lstrip().startswith("{"):
        return from_json(text)
    if re.search(r"^\s*\[\w+\]\s*(#.*)?$", text, re.MULTILINE):
        return from_toml(text)
    if re.search(r"^\s*\w+(\.\w+)+\s*=[^=]", text, re.MULTILINE):
        return from_python(text)
    if re.search(r"(^|[\s(=\"'])--[A-Za-z]", text):
        return from_command(text)
    return None


def _own_words(text: str) -> str:
    """A file of our own words may have comments and lines."""
    return " ".join(line.split("#")[0] for line in text.splitlines())


def _canonical(fields: dict[str, Any], job: Job) -> dict[str, Any]:
    """Stages as even as possible are not listed, so that the same layout is written in one way."""
    layers = fields.get("stage_layers")
    if layers is None:
        return fields
    even = replace(Layout(**fields), stage_layers=None).layers_per_stage(job.model.num_hidden_layers)
    return {**fields, "stage_layers": None if tuple(layers) == even else tuple(layers)}


def _differences(said: dict[str, Any], job: Job) -> list[str]:
    """What the text says of the job and the job says otherwise; the job's value holds, because only it is planned."""
    ours = {
        "global_batch_size": job.training.global_batch_size,
        "seq_len": job.training.seq_len,
        "precision": job.training.precision,
        "ranks": job.world_size,
        "num_hidden_layers": job.model.num_hidden_layers,
        "hidden_size": job.model.hidden_size,
        "num_attention_heads": job.model.num_attention_heads,
        "num_experts": job.model.num_experts,
    }
    return [
        f"it says {name} = {value}, the job {ours[name]}: the job's holds"
        for name, value in said.items()
        if value is not None and value != ours[name]
    ]


_LAUNCHER = ("rdzv", "master", "node_rank", "max_restarts", "tee", "log_dir", "role", "nnodes", "nproc")


def _of_launcher(name: str) -> bool:
    return name.lstrip("-").replace("-", "_").startswith(_LAUNCHER)
