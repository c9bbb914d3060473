"""Which rank a process is where Slurm started it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_jobs import tiny_plan

from planner.plan import write_plan
from runtime.environment import first_host, slurm_ranks, world_size
from simulator.errors import UserError
from simulator.layout import Layout

# Task 5 of `srun --nodes 2 --ntasks 8` in job 1234567.
TASK = {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "0",
}


@pytest.fixture(autouse=True)
def no_scontrol(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


def test_slurms_variables_become_torchruns() -> None:
    assert slurm_ranks(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "24567",
    }


def test_torchrun_goes_first() -> None:
    assert slurm_ranks(TASK | {"RANK": "0", "WORLD_SIZE": "2"}) == {}
    assert slurm_ranks({}) == {}


def test_one_task_is_one_process() -> None:
    assert slurm_ranks(TASK | {"SLURM_NTASKS": "1"}) == {}


def test_a_step_counts_before_its_job() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "6",
        "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
        "SLURM_STEP_NODELIST": "gpu08,gpu07",
        "SLURM_STEP_ID": "2",
    }
    found = slurm_ranks(TASK | step)
    assert (found["WORLD_SIZE"], found["LOCAL_WORLD_SIZE"]) == ("6", "3")
    assert (found["MASTER_ADDR"], found["MASTER_PORT"]) == ("gpu08", "24569")


def test_an_address_of_the_user_stays() -> None:
    assert "MASTER_ADDR" not in slurm_ranks(TASK | {"MASTER_ADDR": "10.0.0.1"})


def test_a_task_that_sees_one_gpu_takes_it() -> None:
    found = slurm_ranks(TASK | {"SLURM_GPUS_PER_TASK": "1"})
    assert (found["LOCAL_RANK"], found["LOCAL_WORLD_SIZE"]) == ("0", "1")


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-012,20],login1", "gpu007"),
        ("rack[2-3]node[01,05-16]", "rack2node01"),
        ("n[3,5].cluster.org", "n3.cluster.org"),
    ],
)
def test_the_first_host_of_a_list(hosts: str, first: str) -> None:
    assert first_host(hosts) == first


def test_scontrol_is_asked_first(tmp_path: Path) -> None:
    (tmp_path / "scontrol").write_text('#!/bin/sh\n[ "$1 $2 $3" = "show hostnames x[1-2]" ] && echo x9 && echo x2\n')
    (tmp_path / "scontrol").chmod(0o755)
    assert first_host("x[1-2]") == "x9"


@pytest.mark.parametrize("missing", ["SLURM_JOB_NODELIST", "SLURM_LOCALID", "SLURM_JOB_ID"])
def test_what_slurm_did_not_say_is_named(missing: str) -> None:
    with pytest.raises(UserError, match=missing):
        slurm_ranks({name: value for name, value in TASK.items() if name != missing})


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


def test_torchruns_variables_are_all_there_and_numbers() -> None:
    assert world_size({}) == 1
    assert world_size(TORCHRUN) == 2
    with pytest.raises(UserError, match="WORLD_SIZE = 'x' must be a number"):
        world_size(TORCHRUN | {"WORLD_SIZE": "x"})
    with pytest.raises(UserError, match="WORLD_SIZE is set, but RANK is not"):
        world_size({"WORLD_SIZE": "2"})


def test_two_tasks_train_without_torchrun(text_folder: Path, tmp_path: Path) -> None:
    plan = write_plan(tiny_plan(Layout(dp_replicate=2, micro_batch_size=4), data=str(text_folder)), tmp_path / "p.json")
    output = tmp_path / "measurement.json"
    # The port follows from the job; this process's number keeps runs of the test apart.
    job = {**TASK, "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NODELIST": "localhost"}
    job |= {"SLURM_JOB_ID": str(os.getpid()), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "runtime", str(plan), "--steps=2", "--warmup=1", f"--output={output}"]
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    root = str(Path(__file__).parents[2])
    tasks = [
        subprocess.Popen(
            command,
            env=kept | job | {"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n), "PYTHONPATH": root},
            stderr=subprocess.PIPE,
            text=True,
        )
        for n in range(2)
    ]
    try:
        for task in tasks:
            _, errors = task.communicate(timeout=120)
            assert task.returncode == 0, errors
    finally:
        for task in tasks:
            task.kill()
    assert json.loads(output.read_text())["world_size"] == 2
