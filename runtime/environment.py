"""Which rank this process is: torchrun says it in variables, and where torchrun did not start it, Slurm does."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping

from simulator.errors import UserError

# Below the ports that Linux gives out by itself (32768 and above).
_FIRST_PORT, _PORTS = 20000, 10000


def slurm_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables for a task that `srun python -m runtime` started; empty where torchrun set them already,
    and where there is one task alone, or no Slurm.

    All tasks of a step find the same address and port: the first host of the step's list, and a port that follows
    from job and step.

    Raises:
        UserError: Slurm's variables are there, but one of them is missing or no number.
    """
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return {}
    tasks = _first(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    if _number(tasks, "SLURM_NTASKS") == 1:
        return {}
    per_node = _first(environment, "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
    # "4(x2),3" is how Slurm writes 4, 4, 3.
    local = re.split(r"[(,]", per_node)[0]
    job = _number(_first(environment, "SLURM_JOB_ID"), "SLURM_JOB_ID")
    step = environment.get("SLURM_STEP_ID", "0")
    port = _FIRST_PORT + (job + (int(step) if step.isdigit() else 0)) % _PORTS
    found = {
        "RANK": environment["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": _first(environment, "SLURM_LOCALID"),
        "LOCAL_WORLD_SIZE": str(_number(local, "SLURM_NTASKS_PER_NODE")),
        "MASTER_ADDR": first_host(_first(environment, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST")),
        "MASTER_PORT": str(port),
    }
    if environment.get("SLURM_GPUS_PER_TASK") == "1" or environment.get("SLURM_NTASKS_PER_GPU") == "1":
        # Slurm shows each task its own GPU alone, as the first one.
        found |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    # What a user set by hand stays.
    return {name: value for name, value in found.items() if name not in environment}


def world_size(environment: Mapping[str, str]) -> int:
    """How many processes take part; one where nothing says so.

    Raises:
        UserError: a variable of torchrun's is there, but it is no number, or the others that go with it are missing.
    """
    if "WORLD_SIZE" not in environment:
        return 1
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not environment.get(name):
            raise UserError(f"WORLD_SIZE is set, but {name} is not; start ranks with torchrun, or set all four")
    for name in ("RANK", "MASTER_PORT"):
        _number(environment[name], name)
    return _number(environment["WORLD_SIZE"], "WORLD_SIZE")


def first_host(hosts: str) -> str:
    """The first of Slurm's host list: asked of scontrol, or read from the list where there is no scontrol.

    >>> first_host("gpu[007-012,20],login1")
    'gpu007'
    """
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, timeout=30)
        if done.returncode == 0 and done.stdout.split():
            return done.stdout.split()[0]
    except (OSError, subprocess.TimeoutExpired):
        pass
    # A name may have several brackets: rack[1-2]node[01-16]. Of each the first number counts.
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert name is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", name[0])


def _first(environment: Mapping[str, str], *names: str) -> str:
    for name in names:
        if environment.get(name):
            return environment[name]
    raise UserError(f"Slurm did not set {names[-1]}; start ranks with srun, or with torchrun")


def _number(text: str, name: str) -> int:
    if not text.isdigit() or int(text) < 0:
        raise UserError(f"{name} = '{text}' must be a number")
    return int(text)
