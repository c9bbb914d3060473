"""Find models, clusters, stacks and GPUs by preset name or by path."""

from __future__ import annotations

import functools
import os
from importlib import resources
from pathlib import Path
from typing import Any

from simulator import profile as profiles
from simulator.checks import check_cluster
from simulator.cluster import ClusterSpec, Gpu
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
        path = _profile(profile, folder) if profile else user_profile()
        if not profile and not path.exists():
            raise UserError(
                f"cluster '{THIS_MACHINE}' needs a profile of this machine ({path} does not exist); "
                "run `layoutwise measure` first"
            )
        spec = profiles.cluster_of(profiles.read_profile(path))
        check_cluster(spec)
        return spec
    return cluster_from_table(cluster_table(name, folder), f"cluster '{name}'")


def cluster_table(name: str, folder: Path | None = None) -> dict[str, Any]:
    """What a cluster's file says, as it says it."""
    if name.endswith((".txt", ".log")):
        raise UserError(
            f"cluster '{name}' is no .toml; `layoutwise cluster {name} --gpu h100 -o cluster.toml` makes one of what "
            "`nvidia-smi topo -m` prints"
        )
    if name == THIS_MACHINE:
        raise UserError(f"cluster '{THIS_MACHINE}' is no file but a profile, which `layoutwise measure` measures")
    return read_toml(_find("clusters", name, ".toml", folder, "cluster"), "cluster")


def cluster_from_table(table: dict[str, Any], where: str) -> ClusterSpec:
    """The cluster that a file's table describes; its GPU may be a name."""
    data = dict(table)
    if isinstance(data.get("gpu"), str):
        data["gpu"] = _gpu(data["gpu"])
    spec = to_dataclass(ClusterSpec, data, where)
    check_cluster(spec)
    return spec


def find_stack(name: Any, folder: Path | None = None) -> Stack:
    """A stack by preset name, or by that of a file in `folder`."""
    if isinstance(name, str) and folder is not None and (folder / f"{name}.toml").exists():
        return to_dataclass(Stack, {"name": name} | _stack_table(name, folder), f"stack '{name}'")
    if not isinstance(name, str) or name not in names("stacks"):
        raise UserError(f"stack '{name}' is not known{nearest(str(name), names('stacks'))}")
    return to_dataclass(Stack, {"name": name} | _stack_table(name), f"stack '{name}'")


def find_gpu(name: str) -> Gpu:
    """A device by its name in gpus.toml."""
    return to_dataclass(Gpu, _gpu(name), f"gpu '{name}'")


def user_profile() -> Path:
    """Where `layoutwise measure` keeps the profile of this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "layoutwise" / "this-machine.json"


def _profile(name: str, folder: Path | None) -> Path:
    """A profile by its path, or by its name if it lies where `layoutwise measure` keeps them."""
    if "/" in name or os.sep in name or name.endswith(".json"):
        return _relative(name, folder)
    kept = user_profile().parent
    known = [path.stem for path in kept.glob("*.json")]
    if name not in known:
        raise UserError(f"profile '{name}' is not known in {kept}{nearest(name, known)}")
    return kept / f"{name}.json"


def _stack_table(name: str, folder: Path | None = None) -> dict[str, Any]:
    """A stack's file over that of the stack which it `extends`: tables are merged, other keys replaced."""
    own = folder / f"{name}.toml" if folder is not None else None
    data = dict(read_toml(own if own is not None and own.exists() else DATA / "stacks" / f"{name}.toml", "stack"))
    parent = data.pop("extends", None)
    return data if parent is None else _merged(_stack_table(parent, folder), data)


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        result[key] = _merged(below[key], value) if both else value
    return result


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


def absolute(name: str, folder: Path | None) -> str:
    """The absolute path of data that a job file names: beside that file, or from where we are if it is only there. Data
    that is nowhere yet may lie on the machine that will train, so it is no error here."""
    path = Path(name).expanduser()
    beside = (folder or Path()) / path
    # A data set of several files is named by what their names have in common.
    here = path.exists() or path.with_name(path.name + ".bin").exists()
    there = beside.exists() or beside.with_name(beside.name + ".bin").exists()
    return os.path.abspath(path if here and not there else beside)


def _relative(name: str, folder: Path | None) -> Path:
    """A path as the job file means it: beside that file, or from where we are if it is not there."""
    try:
        path = Path(name).expanduser()
        beside = (folder or Path()) / path
        return beside if beside.exists() else path
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"'{name[:60]}' is no path: {error}") from None
