"""Import: a layout in the words of another framework, pasted from a command line or a file, the inverse of
`planner.export`. Wherever a layout is taken, so are these."""

from __future__ import annotations

import dataclasses
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

    fields are those that the text names. framework is whose words they were, empty for our own. notes are sentences:
    what the text says of the job and the job says otherwise, and what a Layout has no word for. ignored are names that
    do not concern the layout.
    """

    layout: Layout
    fields: dict[str, Any]
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
        if not text.strip():
            raise UserError(f"{where} is empty; a layout is like tp=8 pp=4")
    settings = _settings(text)
    if settings is None:
        own = parse_fields(_own_words(text))
        return ReadLayout(complete(own, job), own)
    settings = _deepspeed_file(settings)
    meant = [one for one in _FRAMEWORKS if settings.has(*one[1])]
    if not meant:
        known = "Megatron-LM (--tensor-model-parallel-size), torchtitan (--parallelism.tensor_parallel_degree)"
        raise UserError(f"{where} names nothing of a layout in the words of {known} or DeepSpeed")
    if len(meant) > 1:
        words = [f"{_first(settings, marks)} of {framework}" for framework, marks, _ in meant]
        raise UserError(f"{where} mixes the words of several frameworks, {' and '.join(words)}: leave one out")
    ((framework, _, read),) = meant
    fields, said, notes = read(settings, job)
    ignored = tuple(name for name in settings.left() if not _of_launcher(name))
    fields = _canonical(fields, job)
    return ReadLayout(complete(fields, job), fields, framework, tuple(_differences(said, job) + notes), ignored)


def _settings(text: str) -> Settings | None:
    """The names and values of a text, None for a layout in our own words."""
    if text.lstrip().startswith("{"):
        return from_json(text)
    if re.search(r"^\s*\[\w+\]\s*(#.*)?$", text, re.MULTILINE):
        return from_toml(text)
    if re.search(r"^\s*\w+(\.\w+)+\s*=[^=]", text, re.MULTILINE):
        return from_python(text)
    if re.search(r"(^|[\s(=\"'])--[A-Za-z]", text):
        _check_not_mixed(text)
        return from_command(text)
    return None


def _first(settings: Settings, names: tuple[str, ...]) -> str:
    """The first of these names that is there, as it was written."""
    return next(settings.shown[name] for name in names if settings.has(name))


def _deepspeed_file(settings: Settings) -> Settings:
    """What the JSON says that DeepSpeed's launcher was given, where a command names one."""
    given = [settings.value(name) for name in ("deepspeed_config", "deepspeed")]
    config = next((one for one in given if isinstance(one, str) and one.endswith(".json")), None)
    if config is None:
        return settings
    if settings.has(*megatron.MARKS):
        raise UserError(
            f"{_first(settings, megatron.MARKS)} and '{config}' say a part of the layout each; write all of it in our "
            "words, like tp=8 pp=4 dp_shard=8 zero_stage=1"
        )
    return from_json(read_text(Path(config), "DeepSpeed configuration"))


def _check_not_mixed(text: str) -> None:
    """Raises UserError for our words beside flags, which the shell would take for variables that nobody uses."""
    own = {one.name for one in dataclasses.fields(Layout)}
    words = _own_words(text).split()
    for before, word in zip(["", *words], words, strict=False):
        name, equals, _ = word.partition("=")
        if equals and name in own and not before.startswith("--") and f"${name}" not in text.replace("{", ""):
            raise UserError(f"the layout mixes '{word}' with flags of another framework: write all of it in one way")


def _own_words(text: str) -> str:
    """A text without its comments, in one line."""
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
