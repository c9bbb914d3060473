"""Find models, clusters, stacks and GPUs by preset name or by path."""

from __future__ import annotations

import functools
import os
from importlib import resources
from pathlib import Path
from typing import Any, get_args

from simulator import profile as profiles
from simulator.cluster import ClusterSpec
from simulator.collectives import Collective
from simulator.errors import UserError, nearest
from simulator.files import read_json, read_toml, to_dataclass
from simulator.hf import read_config
from simulator.model import ModelSpec
from simulator.stack import Stack

DATA = Path(str(resources.files("simulator"))) / "data"
THIS_MACHINE = "this-machine"


def names(kind: str) -> list[str]:
    """The presets of a kind: "models", "clusters", "stacks"."""
    found = sorted(p.stem for p in (DATA / kind).iterdir() if p.suffix in (".json", ".toml"))
    return sorted([*found, THIS_MACHINE]) if kind == "clusters" else found


def find_model(name: str, folder: Path | None = None) -> ModelSpec:
    """A model by preset name or by the path of a Hugging Face config.json."""
    path = _find("models", name, ".json", folder, "model")
    return read_config(read_json(path, "model"), path.stem)


def find_cluster(name: str, folder: Path | None = None, profile: str | None = None) -> ClusterSpec:
    """A cluster by preset name or by the path of a cluster file.

    `this-machine` comes from the profile that `layoutwise measure` wrote: the one named, else the user's own.
    """
    if name == THIS_MACHINE:
        path = _relative(profile, folder) if profile else user_profile()
        if not profile and not path.exists():
            raise UserError(
                f"cluster '{THIS_MACHINE}' needs a profile of this machine ({path} does not exist); "
                "run `layoutwise measure` first"
            )
        return profiles.cluster_of(profiles.read_profile(path))
    data = dict(read_toml(_find("clusters", name, ".toml", folder, "cluster"), "cluster"))
    if isinstance(data.get("gpu"), str):
        data["gpu"] = _gpu(data["gpu"])
    spec = to_dataclass(ClusterSpec, data, f"cluster '{name}'")
    _check_cluster(spec)
    return spec


def find_stack(name: Any, cluster: ClusterSpec | None = None) -> Stack:
    """A stack by preset name."""
    if not isinstance(name, str) or name not in names("stacks"):
        raise UserError(f"stack '{name}' is not known{nearest(str(name), names('stacks'))}")
    data = read_toml(DATA / "stacks" / f"{name}.toml", "stack")
    return to_dataclass(Stack, {"name": name} | data, f"stack '{name}'")


def user_profile() -> Path:
    """Where `layoutwise measure` keeps the profile of this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "layoutwise" / "this-machine.json"


def _check_cluster(spec: ClusterSpec) -> None:
    """Raise UserError where a cluster file is well formed but describes no machine."""
    where = f"cluster '{spec.name}'"
    if spec.gpus_per_node < 1:
        raise UserError(f"{where}: gpus_per_node = {spec.gpus_per_node} must be at least 1")
    if spec.domain % spec.gpus_per_node:
        raise UserError(
            f"{where}: scale_up_domain = {spec.domain} must be a multiple of gpus_per_node = {spec.gpus_per_node}"
        )
    if spec.scale_out is not None and spec.nics_per_node < 1:
        raise UserError(f"{where}: nics_per_node = {spec.nics_per_node} must be at least 1 to reach scale_out")
    for tier, link in (("scale_up", spec.scale_up), ("scale_out", spec.scale_out)):
        if link is None:
            continue
        if link.bandwidth <= 0 or link.latency < 0:
            raise UserError(f"{where}: {tier} needs a bandwidth above zero and a latency of at least zero")
        for collective in get_args(Collective):
            fits = link.collectives.get(collective)
            if not fits:
                raise UserError(f"{where}: {tier}.collectives has no '{collective}'; it needs at least one entry")
            if any(fit.efficiency <= 0 or fit.latency < 0 or fit.ramp < 0 for fit in fits):
                raise UserError(
                    f"{where}: {tier}.collectives.{collective} needs an efficiency above zero and no negative time"
                )


def _gpu(name: str) -> dict[str, Any]:
    table = _gpus()
    if name not in table:
        raise UserError(f"gpu '{name}' is not known{nearest(name, table)}")
    return {"name": name, **table[name]}


@functools.cache
def _gpus() -> dict[str, Any]:
    return read_toml(DATA / "gpus.toml", "gpus")


def _find(kind: str, name: str, suffix: str, folder: Path | None, what: str) -> Path:
    """A preset if there is one of this name, else a file. A name with a separator or suffix is meant as a path."""
    preset = DATA / kind / f"{name}{suffix}"
    looks_like_path = "/" in name or os.sep in name or name.endswith(suffix)
    if not looks_like_path:
        if name in names(kind) and preset.exists():
            return preset
        raise UserError(f"{what} '{name}' is not known{nearest(name, names(kind))}")
    return _relative(name, folder)


def _relative(name: str, folder: Path | None) -> Path:
    path = Path(name).expanduser()
    return path if path.is_absolute() or folder is None or path.exists() else folder / path
