"""A layout as a user writes it, like `tp=8 pp=4`, and what follows for the fields that are not named."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args, get_origin, get_type_hints

from simulator.errors import UserError, nearest
from simulator.job import Job
from simulator.layout import Layout, written
from simulator.schedules import MULTI_STAGE


def parse_layout(text: str, job: Job) -> Layout:
    """A layout as a user writes it: `"tp=8 pp=4 micro_batch_size=2"`. What is not named follows from the job.

    Ranks not named go to data parallelism, sharded as the stack shards by default; sequence_parallel is on with tp
    where the stack has it; naming virtual_stages alone chooses Interleaved1F1B, naming a schedule of several stages
    chooses two of them on each rank; with another sync than all_reduce ranks not named are replicas, and
    parameter_server has one server.

    Raises:
        UserError: a word that is no `field=value`, an unknown field, a value of the wrong kind.
    """
    return complete(parse_fields(text), job)


def parse_fields(text: str) -> dict[str, Any]:
    """The fields that a layout's text names. Raises UserError as `parse_layout` does."""
    hints = get_type_hints(Layout)
    given: dict[str, Any] = {}
    for word in text.replace(",", " ").split() if "stage_layers" not in text else text.split():
        name, equals, value = word.partition("=")
        if not equals or not value:
            raise UserError(f"layout: '{word}' is not of the form field=value, like tp=8")
        if name not in hints:
            raise UserError(f"layout: unknown field '{name}'{nearest(name, hints)}")
        if name in given:
            raise UserError(f"layout: '{name}' is given twice")
        given[name] = _parse_value(name, hints[name], value)
    return given


def difference(before: Layout, after: Layout) -> str:
    """The fields in which a layout differs from another, as `--layout` takes them.

    >>> difference(Layout(tp=8, dp_shard=4, zero_stage=1), Layout(tp=8, dp_shard=2, pp=2, zero_stage=1))
    'dp_shard=2 pp=2'
    """
    return _words(_differing(before, after))


def spelt_out(layout: Layout, job: Job) -> str:
    """The layout in words that `parse_layout` reads as exactly it: the fields that differ from the default, and those
    of which otherwise something else would follow.

    Stacks with sequence parallelism have it wherever tp is above 1: "tp=2 sequence_parallel=false" where it is off.
    """
    default = Layout()
    return _words(_pinned([{}], _differing(default, layout), layout, job)) or layout.short()


def change_text(before: Layout, after: Layout, job: Job, larger: Job | None = None) -> str:
    """What differs, in words that give exactly `after` for `larger` (the same job on more nodes, or the job itself),
    whether they are pasted over all the fields of `before` or over the few that a user typed and left others to
    follow from.

    From tp=8 without shards to cp=2 tp=4 without them: "cp=2 tp=4 zero_stage=0", as cp shards by itself.
    """
    every = _differing(None, before)
    few = dict(every)
    for name in every:
        fewer = {key: value for key, value in few.items() if key != name}
        if complete(fewer, job) == before:
            few = fewer
    return _words(_pinned([every, few], _differing(before, after), after, larger or job))


def _pinned(typed: Sequence[dict[str, Any]], named: dict[str, Any], wanted: Layout, job: Job) -> dict[str, Any]:
    """`named`, and what must be named besides so that over each of the typed fields they complete to what is wanted."""
    for fields in typed:
        # What is named does not change any more, so every turn names more.
        while wrong := _differing(complete(fields | named, job), wanted):
            named = named | wrong
    return named


def _differing(found: Layout | None, wanted: Layout) -> dict[str, Any]:
    """The fields of a layout that another has not, all of them beside none."""
    names = [field.name for field in dataclasses.fields(Layout)]
    values = {name: getattr(wanted, name) for name in names}
    return {name: value for name, value in values.items() if found is None or getattr(found, name) != value}


def _words(fields: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={written(value)}" for name, value in fields.items())


def complete(given: dict[str, Any], job: Job) -> Layout:
    """Fill the fields that were not given, so that the grid covers the job's ranks and the stack can run it."""
    fields = dict(given)
    if fields.get("tp", 1) > 1:
        fields.setdefault("sequence_parallel", bool(job.stack.sequence_parallel))
    if fields.get("virtual_stages", 1) > 1:
        fields.setdefault("schedule", "Interleaved1F1B")
    elif fields.get("schedule") in MULTI_STAGE:
        fields.setdefault("virtual_stages", 2)
    if fields.get("sync") == "parameter_server":
        fields.setdefault("servers", 1)
    if "dp_replicate" not in fields and "dp_shard" not in fields:
        inner = math.prod(fields.get(axis, 1) for axis in ("tp", "cp", "pp"))
        rest = max(1, job.world_size // inner) if inner > 0 else 1
        shards = rest * max(1, fields.get("cp", 1))
        # Other ways to synchronise than an all-reduce keep replicas together.
        sharded = shards > 1 and fields.get("sync", "all_reduce") == "all_reduce"
        zero = fields.setdefault("zero_stage", job.stack.default_zero_stage if sharded else 0)
        fields["dp_shard" if zero else "dp_replicate"] = rest
    elif fields.get("dp_shard", 1) > 1:
        fields.setdefault("zero_stage", job.stack.default_zero_stage or max(job.stack.zero_stages, default=0))
    return Layout(**fields)


def _parse_value(name: str, hint: Any, text: str) -> Any:
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        for choice in choices:
            if str(choice) == text:
                return choice
        raise UserError(f"layout: {name} = '{text}' is not valid{nearest(text, map(str, choices))}")
    if hint is bool:
        if text not in ("true", "false"):
            raise UserError(f"layout: {name} = '{text}' must be true or false")
        return text == "true"
    if hint is str:
        return text
    optional = type(None) in get_args(hint)
    if optional and text == "none":
        return None
    if hint in (int, int | None):
        if not re.fullmatch(r"-?[0-9]{1,12}", text):
            raise UserError(f"layout: {name} = '{text}' must be an integer{' or none' if optional else ''}")
        return int(text)
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(-?[0-9]{1,12})(?:\*([0-9]{1,4}))?", part)
        if not found:
            raise UserError(f"layout: {name} = '{text}' must be integers like 2,3,3,2 or 2,3*14,2, or none")
        counts += [int(found[1])] * int(found[2] or 1)
    return tuple(counts)
