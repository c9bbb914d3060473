"""The same job on another cluster or with another batch, planned anew: would the layout change, and how much faster.

    inter-node=2x      bandwidth of the network between scale-up domains        intra-node=0.5x   of NVLink, xGMI, PCIe
    memory=+10GiB      of each device; also 2x, 141GB, unlimited                nvlink=none       PCIe in its place
    batch=2x           sequences in a step; also a number                       nodes=+1          also 2x or a number

A variant is the job with one dataclass replaced; latencies, kernels and prices stay what they are.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.plan import Plan
from planner.search import plan
from simulator import presets
from simulator.checks import check_job
from simulator.cluster import ClusterSpec, Link
from simulator.error_bars import tie_share
from simulator.errors import NothingFitsError, UserError, nearest
from simulator.files import plain
from simulator.job import Job
from simulator.layout_text import difference
from simulator.results import Prediction
from simulator.simulate import simulate
from simulator.units import BYTES, show_bytes, show_nodes, show_seconds

# Seconds of planning that a reader waits for without having asked.
PATIENCE = 5.0
# What is tried where nothing is named.
USUAL = (
    "inter-node=2x", "inter-node=0.5x", "memory=+10GiB", "nvlink=none", "batch=2x", "batch=0.5x", "nodes=+1",
    "nodes=-1",
)  # fmt: skip
# Bytes of a device with memory without a limit: more than any job needs, and still a number that can be printed.
UNLIMITED = 1e18
# The cluster whose scale-up network stands for PCIe 4.0 x16, and the next generations, twice as fast each.
PCIE, PCIE_GENERATION, LAST_GENERATION = "pcie-8xa100", 4, 7

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Variant:
    """A job that differs in what `change` says; `meaning` is the same in words, `problem` why there is no such job."""

    change: str
    meaning: str
    job: Job | None
    problem: str = ""


@dataclass(frozen=True)
class Outcome:
    """A variant, planned. `best` is what would be recommended then, None where nothing fits; `same` is the plan's own
    layout there, None where it cannot run. Speeds are tokens per second over those of the plan."""

    change: str
    meaning: str
    best: Prediction | None
    same: Prediction | None
    changes: str
    speed: float | None
    same_speed: float | None
    problem: str = ""


def asked(read: Plan, given: Sequence[str] | None) -> tuple[str, ...]:
    """The changes that a user asked for: "all" for the usual ones, "none" for none. Without a word the usual ones where
    planning them takes no longer than a reader waits."""
    if given is None:
        return USUAL if seconds_of(read) <= PATIENCE else ()
    words = [word.strip() for word in given if word.strip()]
    return USUAL if "all" in words else tuple(word for word in words if word != "none")


def variants(job: Job, given: Sequence[str] = USUAL) -> list[Variant]:
    """The jobs that these changes make of a job; of the usual ones only those that would change something.

    Raises:
        UserError: a text that is no change, or one that this cluster cannot have.
    """
    found = []
    for text in given:
        try:
            found.append(_variant(job, text))
        except UserError:
            if tuple(given) != USUAL:
                raise
    return found


def what_if(read: Plan, given: Sequence[str] = USUAL, progress: Progress | None = None) -> list[Outcome]:
    """Plan every variant of a plan's job."""
    report = progress or (lambda what, fraction: None)
    found, tried = [], variants(read.job, given)
    for place, variant in enumerate(tried):
        report(variant.change, place / len(tried))
        found.append(_outcome(read, variant))
    return found


def seconds_of(read: Plan) -> float:
    """What planning the usual variants takes, if each takes as long as the plan did."""
    return (1 + len(variants(read.job))) * read.certificate.seconds


def without_memory_limit(job: Job) -> Job:
    """The job on devices that hold everything."""
    return dataclasses.replace(job, cluster=_with_memory(job.cluster, UNLIMITED))


def _outcome(read: Plan, variant: Variant) -> Outcome:
    job, was = variant.job, read.best
    if job is None:
        return Outcome(variant.change, variant.meaning, None, None, "", None, None, variant.problem)
    same = None
    if not was.layout.problems(job):
        same = simulate(job, was.layout)
    try:
        best = plan(job, top=1, ties=False).best
    except NothingFitsError as error:
        return Outcome(variant.change, variant.meaning, None, same, "", None, _speed(same, was), str(error))
    # Of layouts that nobody can tell apart the one that is there already.
    if same and same.fits and same.step_seconds <= best.step_seconds * (1 + tie_share()):
        best = same
    return Outcome(
        variant.change,
        variant.meaning,
        best,
        same,
        difference(was.layout, best.layout),
        _speed(best, was),
        _speed(same, was),
    )


def _speed(found: Prediction | None, was: Prediction) -> float | None:
    return found.tokens_per_second / was.tokens_per_second if found and found.fits else None


def _variant(job: Job, text: str) -> Variant:
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not value:
        raise UserError(f"--what-if '{text}' is not of the form key=value, like inter-node=2x")
    if key not in _MAKERS:
        raise UserError(f"--what-if: unknown key '{key}'{nearest(key, _MAKERS)}")
    changed, meaning = _MAKERS[key](job, value)
    if changed == job:
        raise UserError(f"--what-if '{text}' changes nothing")
    try:
        check_job(changed, f"--what-if {text}")
    except UserError as error:
        return Variant(text, meaning, None, str(error))
    return Variant(text, meaning, changed)


def _number(key: str, value: str, known: float) -> float:
    """`2x` of what is known, `+1` or `-1` more, or the number itself."""
    match = re.fullmatch(r"([+-]?)([0-9]*\.?[0-9]+)(x?)", value)
    if not match or (match[1] and match[3]):
        raise UserError(f"--what-if {key}={value}: write 2x, +1 or a number")
    number = float(match[2])
    if match[3]:
        number *= known
    elif match[1]:
        number = known + float(match[1] + match[2])
    if not 0 < number < math.inf:
        raise UserError(f"--what-if {key}={value} must leave more than zero")
    return number


def _times(key: str, value: str) -> float:
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)x", value)
    if not match or float(match[1]) <= 0:
        raise UserError(f"--what-if {key}={value} must be a factor above zero, like 2x")
    return float(match[1])


def _inter_node(job: Job, value: str) -> tuple[Job, str]:
    spec, factor = job.cluster, _times("inter-node", value)
    if spec.scale_out is None or job.world_size <= spec.domain:
        raise UserError(f"--what-if inter-node={value}: nothing of this job goes between nodes or racks")
    cards = dataclasses.replace(spec.scale_out, bandwidth=spec.scale_out.bandwidth * factor)
    meaning = f"{factor:g} times the bandwidth of {spec.scale_out.kind}"
    return dataclasses.replace(job, cluster=dataclasses.replace(spec, scale_out=cards)), meaning


def _intra_node(job: Job, value: str) -> tuple[Job, str]:
    spec, factor = job.cluster, _times("intra-node", value)
    link = _faster(spec.scale_up, factor)
    meaning = f"{factor:g} times the bandwidth of {spec.scale_up.kind}"
    return dataclasses.replace(job, cluster=dataclasses.replace(spec, scale_up=link)), meaning


def _faster(link: Link, factor: float) -> Link:
    return dataclasses.replace(link, bandwidth=link.bandwidth * factor, root_bandwidth=link.root_bandwidth * factor)


def _with_memory(spec: ClusterSpec, memory: float) -> ClusterSpec:
    return dataclasses.replace(spec, gpu=dataclasses.replace(spec.gpu, memory=memory))


def _memory(job: Job, value: str) -> tuple[Job, str]:
    known = job.cluster.gpu.memory
    if value == "unlimited":
        return without_memory_limit(job), "memory without a limit"
    sign, text = (value[0], value[1:]) if value[0] in "+-" else ("", value)
    if value.endswith("x"):
        memory = known * _times("memory", value)
    else:
        try:
            size = BYTES.parse(re.sub(r"(?<=[0-9])(?=[A-Za-z])", " ", text))
        except UserError:
            raise UserError(f"--what-if memory={value}: write +10GiB, 141GB, 2x or unlimited") from None
        memory = {"+": known + size, "-": known - size, "": size}[sign]
    if memory <= 0:
        raise UserError(f"--what-if memory={value} leaves nothing of {show_bytes(known)}")
    return dataclasses.replace(job, cluster=_with_memory(job.cluster, memory)), f"{show_bytes(memory)} on each device"


def _no_nvlink(job: Job, value: str) -> tuple[Job, str]:
    """PCIe in the place of the scale-up network: the constants of a server with A100s on PCIe 4.0, in the slowest
    generation that feeds the node's network cards (each twice as fast), and a domain of one node."""
    spec = job.cluster
    if value != "none":
        raise UserError(f"--what-if nvlink={value}: write nvlink=none")
    if spec.gpu.kind != "gpu" or spec.scale_up.topology == "pcie" or spec.gpus_per_node == 1:
        raise UserError(f"--what-if nvlink=none: the devices of {spec.name} have no NVLink or xGMI to lose")
    if spec.scale_out is None and job.nodes > 1:
        raise UserError(f"--what-if nvlink=none: nothing else joins the nodes of {spec.name}")
    link, generation = presets.find_cluster(PCIE).scale_up, PCIE_GENERATION
    card = spec.scale_out.bandwidth if spec.scale_out else 0.0
    while link.bandwidth < card and generation < LAST_GENERATION:
        link, generation = _faster(link, 2.0), generation + 1
    kind = f"PCIe {generation}.0 x16"
    roots = min(spec.gpus_per_node, link.devices_per_root) if spec.gpus_per_node > link.devices_per_root else 0
    link = dataclasses.replace(link, kind=kind, devices_per_root=roots)
    changed = dataclasses.replace(spec, scale_up=link, scale_up_domain=0)
    return dataclasses.replace(job, cluster=changed), f"{kind} inside a node in place of {spec.scale_up.kind}"


def _batch(job: Job, value: str) -> tuple[Job, str]:
    size = _number("batch", value, job.training.global_batch_size)
    if size != int(size):
        raise UserError(f"--what-if batch={value}: {size:g} sequences are no whole number")
    training = dataclasses.replace(job.training, global_batch_size=int(size))
    return dataclasses.replace(job, training=training), f"{int(size)} sequences in a step"


def _nodes(job: Job, value: str) -> tuple[Job, str]:
    count = _number("nodes", value, job.nodes)
    if count != int(count):
        raise UserError(f"--what-if nodes={value}: {count:g} nodes are no whole number")
    if count > 1 and job.cluster.scale_out is None:
        raise UserError(f"--what-if nodes={value}: cluster '{job.cluster.name}' has no network between nodes")
    return dataclasses.replace(job, nodes=int(count)), show_nodes(int(count))


_MAKERS: dict[str, Callable[[Job, str], tuple[Job, str]]] = {
    "inter-node": _inter_node, "intra-node": _intra_node, "memory": _memory, "nvlink": _no_nvlink, "batch": _batch,
    "nodes": _nodes,
}  # fmt: skip


COLUMNS = ("change", "meaning", "same layout", "best", "its step", "what the best changes")


def what_if_rows(found: Sequence[Outcome]) -> list[tuple[str, ...]]:
    """A row of COLUMNS for each: speeds are tokens per second over the plan's."""
    return [
        (
            one.change,
            one.meaning,
            _show_speed(one.same_speed) if one.same is None or one.same.fits else "does not fit",
            _show_speed(one.speed),
            show_seconds(one.best.step_seconds) if one.best else "-",
            one.problem or (one.changes or "the same layout"),
        )
        for one in found
    ]


def _show_speed(speed: float | None) -> str:
    return "-" if speed is None else f"{speed - 1:+.1%}"


def what_if_json(found: Sequence[Outcome]) -> list[dict[str, object]]:
    """The documents of `explain --json`."""
    return [
        {
            "change": one.change,
            "meaning": one.meaning,
            "layout": plain(one.best.layout) if one.best else None,
            "step_seconds": one.best.step_seconds if one.best else None,
            "tokens_per_second": one.best.tokens_per_second if one.best else None,
            "layout_changes": one.changes,
            "speed": one.speed,
            "speed_of_same_layout": one.same_speed,
            "problem": one.problem or None,
        }
        for one in found
    ]
