"""A plan as what a cluster starts: text for torchrun by hand, for Slurm and for Kubernetes. Nothing here imports torch.

All of them run the same command, `torchrun -m runtime plan.json`, on as many nodes as the layout takes. The files of a
target are complete: the plan lies among them (on Kubernetes in a ConfigMap), and no path of this machine is in them.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from planner.plan import Plan
from runtime.here import RESTART_ENVIRONMENT, check_layout
from runtime.machine import CPU_RANK_ENVIRONMENT
from runtime.settings import DEFAULT, Settings
from simulator.errors import UserError, nearest
from simulator.files import plain

PORT = 29500
# A node of a cluster is a container's: what Linux passes to a process in one variable (MAX_ARG_STRLEN).
MOST_PLAN_BYTES = 128 * 1024


@dataclass(frozen=True)
class LaunchOptions:
    """What a run is given besides its plan.

    image: of the containers on Kubernetes; layoutwise must be installed in it. Paths in the settings are those of the
    nodes, and all of them see the checkpoint's; max_restarts is torchrun's: how often ranks are started anew after one
    of them failed.
    """

    settings: Settings = DEFAULT
    image: str = ""
    max_restarts: int = 0


@dataclass(frozen=True)
class Nodes:
    """How many nodes a layout takes, and how many ranks and parameter servers run on each."""

    count: int
    ranks: int
    servers: int = 0

    @property
    def processes(self) -> int:
        return self.ranks + self.servers


def launch_files(plan: Plan, target: str, options: LaunchOptions | None = None) -> dict[str, str]:
    """The files that start a plan on a cluster, by name.

    Args:
        target: torchrun, slurm or kubernetes.

    Raises:
        UserError: an unknown target, a plan that the runtime cannot execute, or an option that it needs or cannot take.
    """
    options = options or LaunchOptions()
    if target not in TARGETS:
        raise UserError(f"--on '{target}' is not known{nearest(target, TARGETS)}")
    check_layout(plan)
    options.settings.check()
    if options.max_restarts and options.settings.checkpoint is None:
        raise UserError(f"max-restarts = {options.max_restarts} needs --checkpoint DIR: there is nothing to go on from")
    return TARGETS[target](plan, nodes_of(plan), options)


def nodes_of(plan: Plan) -> Nodes:
    """Nodes are filled one after the other, as the simulator assumes. Raises UserError where they cannot be alike."""
    spec, ranks = plan.job.cluster, plan.layout.world_size
    count = math.ceil(ranks / max(1, int(spec.gpus_per_node * spec.oversubscribe)))
    if ranks % count:
        raise UserError(
            f"the layout '{plan.layout.short()}' has {ranks} ranks, which {count} nodes cannot share evenly"
        )
    if (servers := plan.layout.servers) % count:
        raise UserError(
            f"servers = {servers} cannot be spread evenly over {count} nodes; the nearest number is "
            f"{max(1, round(servers / count)) * count}"
        )
    return Nodes(count, ranks // count, servers // count)


def torchrun_files(plan: Plan, nodes: Nodes, options: LaunchOptions) -> dict[str, str]:
    """A script to start on every node by hand, and the plan."""
    if nodes.count == 1:
        usage, head = "Run on the node:  ./launch.sh", []
        rendezvous = ["--standalone"]
    else:
        usage = f"Run on each of the {nodes.count} nodes, with the name of one of them:  ./launch.sh HEAD_NODE"
        head = ["head=${1:?name the node that the others meet at: ./launch.sh HEAD_NODE}"]
        rendezvous = [f"--nnodes={nodes.count}", "--rdzv-backend=c10d", f'--rdzv-endpoint="$head:{PORT}"']
    lines = [
        "#!/usr/bin/env bash",
        *_comments(plan, nodes, usage),
        "set -euo pipefail",
        *head,
        'cd "$(dirname "$0")"',
        *_exports(plan, options),
        _shell("exec torchrun", [*rendezvous, *_torchrun_options(nodes, options)], _arguments(options)),
    ]
    return {"launch.sh": "\n".join(lines) + "\n", "plan.json": _plan_text(plan)}


def slurm_files(plan: Plan, nodes: Nodes, options: LaunchOptions) -> dict[str, str]:
    """A batch script with one torchrun on each node, and the plan. Ranks follow the order of the nodes' names, as
    torchrun's rendezvous sorts them."""
    wants = [
        f"--job-name={_label(plan)}",
        f"--nodes={nodes.count}",
        "--ntasks-per-node=1",
        f"--gpus-per-node={nodes.ranks}" if _on_gpus(plan) else f"--cpus-per-task={nodes.processes}",
        "--exclusive",
        "--distribution=block",
        "--output=%x-%j.out",
    ]
    rendezvous = [
        f"--nnodes={nodes.count}",
        '--rdzv-id="$SLURM_JOB_ID"',
        "--rdzv-backend=c10d",
        '--rdzv-endpoint="$head:$port"',
    ]
    usage = "Submit from the folder of this file, which all nodes see:  sbatch launch.sbatch  (--partition, --time ...)"
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH {want}" for want in wants),
        *_comments(plan, nodes, usage),
        "set -euo pipefail",
        'cd "$SLURM_SUBMIT_DIR"',
        # sed reads to the end: with pipefail a scontrol whose reader has gone would end the script.
        'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)',
        "port=$((20000 + SLURM_JOB_ID % 10000))",
        *_exports(plan, options),
        _shell("srun torchrun", [*rendezvous, *_torchrun_options(nodes, options)], _arguments(options)),
    ]
    return {"launch.sbatch": "\n".join(lines) + "\n", "plan.json": _plan_text(plan)}


def kubernetes_files(plan: Plan, nodes: Nodes, options: LaunchOptions) -> dict[str, str]:
    """A TrainJob of Kubeflow Trainer v2 with its plan in a ConfigMap, for `kubectl apply -f`.

    The plan comes in a variable, because a volume would be spelt differently before and after Trainer 2.2
    (podTemplateOverrides, runtimePatches). Trainer tells torchrun in PET_* variables where the nodes meet.
    """
    import yaml

    if not options.image:
        raise UserError("kubernetes needs --image: one with layoutwise and its torch installed")
    name, text = _label(plan), _plan_text(plan, compact=True)
    if len(text.encode()) >= MOST_PLAN_BYTES:
        raise UserError(f"the plan has {len(text.encode())} bytes; a container takes less than {MOST_PLAN_BYTES}")
    torchrun = ["torchrun", f"--nproc-per-node={nodes.processes}"]
    torchrun += [f"--max-restarts={options.max_restarts}"] if options.max_restarts else []
    run = shlex.join([*torchrun, "-m", "runtime", "/tmp/plan.json", *_arguments(options, output=False)])
    per_node = {"nvidia.com/gpu": nodes.ranks} if _on_gpus(plan) else {"cpu": nodes.processes}
    source = {"configMapKeyRef": {"name": name, "key": "plan.json"}}
    trainer = {
        "image": options.image,
        "numNodes": nodes.count,
        "numProcPerNode": nodes.processes,
        "command": ["bash", "-c", f'printf %s "$LAYOUTWISE_PLAN" > /tmp/plan.json && exec {run}'],
        "env": [
            {"name": "LAYOUTWISE_PLAN", "valueFrom": source},
            *({"name": key, "value": value} for key, value in _environment(plan, options).items()),
        ],
        "resourcesPerNode": {"limits": per_node, "requests": dict(per_node)},
    }
    runtime = {"apiGroup": "trainer.kubeflow.org", "kind": "ClusterTrainingRuntime", "name": "torch-distributed"}
    documents = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"plan.json": text}},
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": name},
            "spec": {"runtimeRef": runtime, "trainer": trainer},
        },
    ]
    usage = "Start with  kubectl apply -f trainjob.yaml ; the measurement is the last that the first node logs."
    head = "\n".join(_comments(plan, nodes, usage))
    return {"trainjob.yaml": f"{head}\n{yaml.safe_dump_all(documents, sort_keys=False, width=120)}"}


TARGETS: dict[str, Callable[[Plan, Nodes, LaunchOptions], dict[str, str]]] = {
    "torchrun": torchrun_files,
    "slurm": slurm_files,
    "kubernetes": kubernetes_files,
}


def _on_gpus(plan: Plan) -> bool:
    return plan.job.cluster.gpu.kind == "gpu"


def _label(plan: Plan) -> str:
    """A name as Kubernetes takes it (RFC 1035): lower case, digits and hyphens, a letter first, at most 63."""
    words = re.sub(r"[^a-z0-9]+", "-", f"layoutwise-{plan.job.model.name}-{plan.layout.world_size}".lower())
    return words.strip("-")[:63].rstrip("-")


def _comments(plan: Plan, nodes: Nodes, usage: str) -> list[str]:
    p, job = plan.best, plan.job
    backend = "NCCL" if _on_gpus(plan) else "gloo"
    # On one line: what follows a comment's line is executed.
    name = " ".join(job.model.name.split())
    return [
        f"# {name} on {nodes.count} x {nodes.ranks} ranks ({backend}): {plan.layout.short()}",
        f"# Predicted: {p.step_seconds:.4g} s a step, {p.tokens_per_second:,.0f} tokens/s, "
        f"{p.memory.peak / 2**30:.1f} GiB on the fullest rank.",
        f"# {usage}",
    ]


def _environment(plan: Plan, options: LaunchOptions) -> dict[str, str]:
    """Variables of the ranks: on processors what the profile was measured with."""
    found = {} if _on_gpus(plan) else dict(CPU_RANK_ENVIRONMENT)
    if options.max_restarts:
        found |= RESTART_ENVIRONMENT
    return found


def _exports(plan: Plan, options: LaunchOptions) -> list[str]:
    return [f"export {name}={value}" for name, value in _environment(plan, options).items()]


def _torchrun_options(nodes: Nodes, options: LaunchOptions) -> list[str]:
    restarts = [f"--max-restarts={options.max_restarts}"] if options.max_restarts else []
    return [f"--nproc-per-node={nodes.processes}", *restarts]


def _arguments(options: LaunchOptions, output: bool = True) -> list[str]:
    """What `-m runtime` takes after the plan."""
    return replace(options.settings, output=Path("measurement.json") if output else None).arguments()


def _shell(command: str, options: list[str], arguments: list[str]) -> str:
    """A command on a few lines. Options are shell text already, arguments are quoted."""
    lines = [command, *options, "-m runtime plan.json", shlex.join(arguments)]
    return " \\\n    ".join(lines)


def _plan_text(plan: Plan, compact: bool = False) -> str:
    """The plan without its runners-up, which a run has no use for."""
    data = plain(replace(plan, runners_up=()))
    if compact:
        return json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
