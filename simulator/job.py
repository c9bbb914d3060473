"""Job: model x cluster x training recipe, read from a `job.toml`. Everything is resolved: a Job needs no other file."""

from __future__ import annotations

import dataclasses
import functools
import math
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from simulator import presets
from simulator.checks import check_job
from simulator.cluster import ClusterSpec, build_cluster
from simulator.errors import UserError, nearest
from simulator.files import STRICT, read_toml, to_dataclass
from simulator.layout import Layout
from simulator.model import ModelSpec
from simulator.objective import Objective
from simulator.stack import Stack
from simulator.stragglers import Stragglers
from simulator.units import DOLLARS

if TYPE_CHECKING:
    import networkx as nx

# A batch of about four million tokens: what runs of 70B and more use (Llama 3, arXiv 2407.21783, section 3.4).
DEFAULT_BATCH_TOKENS = 4 * 2**20
DEFAULT_SEQ_LEN = 8192
# Fields of Training that a job.toml has in its table [data].
DATA_KEYS = ("sharding", "remainder")


@dataclass(frozen=True)
class Training:
    """The recipe. global_batch_size is in sequences, seq_len in tokens; learning_rate, seed and data are for
    running a plan; peft = "lora" trains adapters beside frozen weights (their own cost is left out: about 1 % of the
    weights). data is a folder of text files or a file of token ids; empty means the Python standard library's own
    source. tokenizer is a tokenizer.json for text; without it a token is a byte. Both are absolute paths. Gradients
    are scaled down to max_grad_norm. sharding is how samples are cut among replicas, remainder what becomes of those
    that make no whole step (runtime/sharding.py).

    expert_load is how many tokens the fullest rank of a mixture gets over the mean, which its memory must hold: 1 where
    balance is forced, the capacity factor where tokens are padded or dropped to one. Without either it depends on the
    router; Megatron-Core reserves 1.1 times the mean (NVIDIA/Megatron-LM@d98e8a64, paged stash). Seconds are the
    mean's."""

    global_batch_size: int
    seq_len: int
    precision: Literal["fp32", "bf16", "fp16", "fp8", "mxfp8", "nvfp4"]
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 3e-4
    seed: int = 0
    data: str = ""
    tokenizer: str = ""
    peft: Literal["none", "lora"] = "none"
    max_grad_norm: float = 1.0
    sharding: Literal["sampled", "block", "sequential", "random", "hash"] = "sampled"
    remainder: Literal["drop", "pad"] = "drop"
    expert_load: float = 1.1

    __pydantic_config__ = STRICT


@dataclass(frozen=True)
class Job:
    """What to train, on what, and how. `search` pins or limits fields of the Layout: {"tp": [1, 2, 4]}; stragglers are
    ranks and steps slower than the others; objective is what a number of nodes is chosen by."""

    model: ModelSpec
    cluster: ClusterSpec
    nodes: int
    training: Training
    stack: Stack
    search: dict[str, list[Any]] = field(default_factory=dict)
    stragglers: Stragglers = field(default_factory=Stragglers)
    objective: Objective = field(default_factory=Objective)

    __pydantic_config__ = STRICT

    @property
    def world_size(self) -> int:
        """Devices of the cluster; a layout uses all of them."""
        return self.nodes * self.cluster.gpus_per_node

    @property
    def tokens_per_step(self) -> int:
        return self.training.global_batch_size * self.training.seq_len

    @functools.cached_property
    def graph(self) -> nx.DiGraph:
        """The cluster as a graph, built once."""
        return build_cluster(self.cluster, self.nodes)

    @functools.cached_property
    def known(self) -> dict[str, dict[Any, Any]]:
        """What does not differ between the layouts of this job and was found once (placement.known_to)."""
        return {}


def read_job(path: Path | str, overrides: list[str] | None = None) -> Job:
    """The job in a TOML file.

    Args:
        overrides: `"training.seq_len=4096"`: a key and a value as TOML writes it; bare words are strings.

    Raises:
        UserError: anything that is wrong with the file or with what it names.
    """
    data = read_toml(path, "job")
    for override in overrides or []:
        _override(data, override)
    return build_job(data, f"job '{path}'", Path(path).parent)


def build_job(data: dict[str, Any], where: str, folder: Path | None = None) -> Job:
    """The job in a dictionary with the keys of a job.toml; paths in it are relative to `folder`."""
    known = (
        "model", "cluster", "nodes", "price_per_gpu_hour", "profile", "training", "data", "search", "stragglers",
        "objective",
    )  # fmt: skip
    for key in data:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{nearest(key, known)}")
    for key in ("model", "cluster", "nodes"):
        if key not in data:
            raise UserError(f"{where}: the key '{key}' is missing")
    nodes = data["nodes"]
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise UserError(f"{where}: nodes = {nodes!r} must be an integer of at least 1")
    for key in ("training", "data", "search", "stragglers", "objective"):
        if not isinstance(data.get(key, {}), dict):
            raise UserError(f"{where}: '{key}' must be a table: write [{key}] above its keys")
    for key in ("model", "cluster", "profile"):
        if not isinstance(data.get(key, ""), str):
            raise UserError(f"{where}: {key} = {data[key]!r} must be a text: a preset or a path")
    model = presets.find_model(data["model"], folder)
    cluster = _priced(presets.find_cluster(data["cluster"], folder, data.get("profile")), data, where)
    settings = dict(data.get("training", {}))
    stack = presets.find_stack(settings.pop("stack", _default_stack(cluster)))
    for key in ("data", "tokenizer"):
        if isinstance(settings.get(key), str) and settings[key]:
            settings[key] = presets.absolute(settings[key], folder)
    training = _training(settings, data.get("data", {}), model, cluster, nodes, where)
    stragglers = to_dataclass(Stragglers, data.get("stragglers", {}), f"{where} [stragglers]")
    objective = _objective(data.get("objective", {}), where)
    job = Job(model, cluster, nodes, training, stack, _search(data.get("search", {}), where), stragglers, objective)
    check_job(job, where)
    return job


def _priced(cluster: ClusterSpec, data: dict[str, Any], where: str) -> ClusterSpec:
    """The cluster at the job's own price, which replaces that of the cluster file."""
    if "price_per_gpu_hour" not in data:
        return cluster
    price = DOLLARS.parse(data["price_per_gpu_hour"])
    if isinstance(price, bool) or not isinstance(price, int | float) or not 0 < price < math.inf:
        raise UserError(
            f"{where}: price_per_gpu_hour = {data['price_per_gpu_hour']!r} must be above zero; write it like "
            f'"{DOLLARS.example}"'
        )
    return dataclasses.replace(cluster, price_per_gpu_hour=float(price))


def _objective(table: dict[str, Any], where: str) -> Objective:
    """[objective]; who names a deadline means it."""
    goal = {"goal": "deadline"} if "deadline" in table else {}
    return to_dataclass(Objective, goal | table, f"{where} [objective]")


def _default_stack(cluster: ClusterSpec) -> str:
    return "layoutwise-cpu" if cluster.gpu.kind == "cpu" else "megatron-core"


def _training(
    settings: dict[str, Any], sharding: dict[str, Any], model: ModelSpec, cluster: ClusterSpec, nodes: int, where: str
) -> Training:
    names = [*(f.name for f in dataclasses.fields(Training) if f.name not in DATA_KEYS), "stack"]
    for table, given, known in (("training", settings, names), ("data", sharding, DATA_KEYS)):
        for key in given:
            if key not in known:
                there = "; it belongs into [data]" if key in DATA_KEYS else nearest(key, known)
                raise UserError(f"{where}: unknown key '{table}.{key}'{there}")
    filled = {"seq_len": min(model.max_position_embeddings, DEFAULT_SEQ_LEN)} | settings | sharding
    seq_len = filled["seq_len"]
    if isinstance(seq_len, int) and seq_len > 0:
        # A multiple of the world size, so that every split of it over data parallel ranks is even.
        world = nodes * cluster.gpus_per_node
        filled.setdefault("global_batch_size", max(1, round(DEFAULT_BATCH_TOKENS / seq_len / world)) * world)
    filled.setdefault("precision", "fp32" if cluster.gpu.kind == "cpu" else "bf16")
    return to_dataclass(Training, filled, f"{where} [training]")


# Values of one field in [search]: no axis of a cluster of 16,384 devices has half as many sizes.
MOST_SEARCHED = 256


def _search(table: dict[str, Any], where: str) -> dict[str, list[Any]]:
    names = [f.name for f in dataclasses.fields(Layout)]
    result = {}
    for key, value in table.items():
        if key not in names:
            raise UserError(f"{where}: unknown key 'search.{key}'{nearest(key, names)}")
        # A list of numbers is one split into stages, a list of lists several.
        several = isinstance(value, list) and (key != "stage_layers" or any(isinstance(one, list) for one in value))
        values = value if several else [value]
        if not values:
            raise UserError(f"{where}: search.{key} = [] leaves no layout; name at least one value")
        if len(values) > MOST_SEARCHED:
            raise UserError(f"{where}: search.{key} has {len(values)} values; name at most {MOST_SEARCHED}")
        if key == "staleness":
            # TOML has no word for nothing.
            values = [None if one == "none" else one for one in values]
        for one in values:
            shown = tuple(one) if isinstance(one, list) else one
            to_dataclass(Layout, {key: shown}, f"{where} [search]")
        result[key] = values
    owners = {"servers": "parameter_server", "staleness": "parameter_server", "sync_interval": "local_sgd"}
    for key, owner in (owners | {"outer_optimizer": "local_sgd"}).items():
        if key in result and owner not in result.get("sync", []):
            raise UserError(f"{where}: search.{key} says nothing without '{owner}' in search.sync")
    return result


def _override(data: dict[str, Any], text: str) -> None:
    """Set one key of the job's tables from `training.seq_len=4096`."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise UserError(f"--set '{text}' is not of the form key=value, like training.seq_len=4096")
    if "\n" in text:
        raise UserError("--set takes one key and one value on one line")
    try:
        parsed = tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        parsed = value.strip()
    *tables, name = key.strip().split(".")
    for table in tables:
        data = data.setdefault(table, {})
        if not isinstance(data, dict):
            raise UserError(f"--set '{text}': '{table}' is not a table")
    data[name] = parsed
