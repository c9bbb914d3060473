"""What starts a plan on a cluster, as text: golden files, and what a shell and Kubernetes make of them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call
from tiny_jobs import tiny_plan

from planner.plan import Plan, read_plan, write_plan
from runtime.__main__ import _parse
from runtime.launchers import LaunchOptions, launch_files
from runtime.settings import Settings, settings_of
from simulator.errors import UserError
from simulator.job import build_job
from simulator.layout import Layout

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
SETTINGS = Settings(1000, 10, checkpoint=Path("/shared/my run"), checkpoint_every=50)
OPTIONS = LaunchOptions(SETTINGS, image="registry/train:1", max_restarts=3)


def gpu_plan(nodes: int = 2) -> Plan:
    """Llama 3.1 8B on nodes of 8 H100s, with a prediction that no calibration changes."""
    training = {"global_batch_size": 64, "seq_len": 8192, "stack": "layoutwise-cuda"}
    job = build_job({"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": nodes, "training": training}, "test")
    layout = Layout(dp_shard=nodes * 4, tp=2, sequence_parallel=True, zero_stage=3)
    plan = tiny_plan(layout)
    return dataclasses.replace(plan, job=job)


PLANS = {"gpu": gpu_plan(), "one-gpu-node": gpu_plan(1), "cpu": tiny_plan(Layout(dp_replicate=4))}
CASES = [(target, name) for target in ("torchrun", "slurm", "kubernetes") for name in PLANS]


def scripts(target: str, name: str) -> dict[str, str]:
    """The files of a target with the plan cut out, which is data."""
    files = launch_files(PLANS[name], target, OPTIONS)
    plan = files.pop("plan.json", None)
    if plan is not None:
        assert json.loads(plan)["best"]["layout"]["tp"] == PLANS[name].layout.tp
    return files


@pytest.mark.parametrize(("target", "name"), CASES)
def test_golden(target: str, name: str) -> None:
    """To write them anew: python tests/runtime/test_launchers.py"""
    for file, text in scripts(target, name).items():
        assert without_plan(text) == (GOLDEN / f"{target}-{name}-{file}").read_text()


def without_plan(text: str) -> str:
    """YAML wraps the plan's text over many lines: all of them become one word."""
    if "kind: ConfigMap" not in text:
        return text
    head, config, job = text.partition("data:\n  plan.json: ")[0], "data:\n  plan.json: PLAN\n", text.split("---\n")[1]
    return f"{head}{config}---\n{job}"


@pytest.mark.parametrize(("target", "name"), [case for case in CASES if case[0] != "kubernetes"])
def test_scripts_are_shell(target: str, name: str, tmp_path: Path) -> None:
    for file, text in scripts(target, name).items():
        (tmp_path / file).write_text(text)
        assert subprocess.run(["bash", "-n", tmp_path / file], capture_output=True, text=True).stderr == ""


def ran(script: str, folder: Path, *arguments: str, **variables: str) -> list[str]:
    """The words with which a script calls torchrun, where commands of the cluster are stand-ins."""
    stand_ins = folder / "bin"
    stand_ins.mkdir()
    for name, text in {
        "torchrun": 'printf "%s\\n" "$@"',
        "srun": '"$@"',
        "scontrol": 'printf "node1\\nnode2\\n"',
    }.items():
        (stand_ins / name).write_text(f"#!/bin/bash\n{text}\n")
        (stand_ins / name).chmod(0o755)
    (folder / "script").write_text(script)
    environment = {"PATH": f"{stand_ins}:/usr/bin:/bin", **variables}
    done = subprocess.run(
        ["bash", folder / "script", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


RUNTIME = ["-m", "runtime", "plan.json", "--steps=1000", "--warmup=10", "--output=measurement.json"]
CHECKPOINTS = ["--checkpoint=/shared/my run", "--checkpoint-every=50"]


def test_torchrun_meets_at_the_head(tmp_path: Path) -> None:
    words = ran(scripts("torchrun", "gpu")["launch.sh"], tmp_path, "node7")
    nodes = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=node7:29500"]
    assert words == [*nodes, "--nproc-per-node=8", "--max-restarts=3", *RUNTIME, *CHECKPOINTS]


def test_slurm_meets_on_its_first_node(tmp_path: Path) -> None:
    script = scripts("slurm", "gpu")["launch.sbatch"]
    job = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_ID": "123456"}
    words = ran(script, tmp_path, **job)
    assert words[:4] == ["--nnodes=2", "--rdzv-id=123456", "--rdzv-backend=c10d", "--rdzv-endpoint=node1:23456"]
    assert words[4:] == ["--nproc-per-node=8", "--max-restarts=3", *RUNTIME, *CHECKPOINTS]
    settings = [line.split()[1] for line in script.splitlines() if line.startswith("#SBATCH")]
    assert {"--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8"} <= set(settings)


def trainjob(name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    text = launch_files(PLANS[name], "kubernetes", dataclasses.replace(OPTIONS, **changes))["trainjob.yaml"]
    config, job = yaml.safe_load_all(text)
    return config, job


def test_trainjob_has_what_the_schema_requires(tmp_path: Path) -> None:
    """github.com/kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go: required fields, types, lengths."""
    config, job = trainjob("gpu")
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert set(job["spec"]) <= {"runtimeRef", "trainer", "initializer", "suspend", "managedBy", "runtimePatches"}
    assert job["spec"]["runtimeRef"]["name"] == "torch-distributed"
    trainer = job["spec"]["trainer"]
    assert set(trainer) <= {"image", "command", "args", "env", "numNodes", "numProcPerNode", "resourcesPerNode"}
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["resourcesPerNode"]["limits"] == {"nvidia.com/gpu": 8}
    assert all(isinstance(one["value"], str) for one in trainer["env"] if "value" in one)
    assert all(len(word) <= 65536 for word in trainer["command"])
    name = job["metadata"]["name"]
    assert name == config["metadata"]["name"] and len(name) <= 63 and name.replace("-", "a").isalnum()


def test_a_pod_unpacks_its_plan_and_runs_it(tmp_path: Path) -> None:
    config, job = trainjob("gpu")
    (variable,) = [one for one in job["spec"]["trainer"]["env"] if "valueFrom" in one]
    reference = variable["valueFrom"]["configMapKeyRef"]
    assert reference == {"name": config["metadata"]["name"], "key": "plan.json"}
    interpreter, flag, script = job["spec"]["trainer"]["command"]
    assert (interpreter, flag) == ("bash", "-c")
    words = ran(
        script.replace("/tmp/plan.json", str(tmp_path / "plan.json")),
        tmp_path,
        **{variable["name"]: config["data"]["plan.json"]},
    )
    assert words[:5] == ["--nproc-per-node=8", "--max-restarts=3", "-m", "runtime", str(tmp_path / "plan.json")]
    assert words[5:] == ["--steps=1000", "--warmup=10", *CHECKPOINTS]
    assert read_plan(tmp_path / "plan.json").layout == PLANS["gpu"].layout


def test_processors_have_what_the_profile_was_measured_with() -> None:
    _, job = trainjob("cpu", max_restarts=0)
    variables = {one["name"]: one.get("value") for one in job["spec"]["trainer"]["env"]}
    assert variables["OMP_NUM_THREADS"] == "1"
    assert job["spec"]["trainer"]["resourcesPerNode"]["limits"] == {"cpu": 4}
    assert "export OMP_NUM_THREADS=1" in scripts("slurm", "cpu")["launch.sbatch"]
    assert "export" not in launch_files(PLANS["gpu"], "slurm", LaunchOptions())["launch.sbatch"]


def test_the_runtime_takes_what_the_scripts_give_it() -> None:
    settings = dataclasses.replace(SETTINGS, output=Path("measurement.json"))
    assert settings_of(_parse(["plan.json", *settings.arguments()])) == settings
    assert settings_of(_parse(["plan.json"])) == Settings()


@pytest.mark.parametrize(
    ("target", "changes", "words"),
    [
        ("slrum", {}, "--on 'slrum' is not known.*slurm"),
        ("kubernetes", {"image": ""}, "needs --image"),
        ("slurm", {"settings": Settings()}, "max-restarts = 3 needs --checkpoint DIR"),
        ("slurm", {"settings": Settings(checkpoint_every=9)}, "checkpoint-every = 9 needs a folder"),
        ("slurm", {"settings": Settings(1000, 1000)}, "less than steps = 1000"),
    ],
)
def test_what_cannot_be_launched_is_refused(target: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        launch_files(PLANS["gpu"], target, dataclasses.replace(OPTIONS, **changes))


def test_a_name_of_two_lines_stays_a_comment() -> None:
    plan = PLANS["gpu"]
    model = dataclasses.replace(plan.job.model, name="a\ntouch b")
    named = dataclasses.replace(plan, job=dataclasses.replace(plan.job, model=model))
    for target, file in (("torchrun", "launch.sh"), ("slurm", "launch.sbatch")):
        assert "\ntouch b" not in launch_files(named, target)[file]


def test_stacks_of_others_and_uneven_nodes_are_refused() -> None:
    with pytest.raises(UserError, match="'megatron-core' is simulated only"):
        launch_files(tiny_plan(Layout(), stack="megatron-core"), "slurm")
    # Two nodes of two processors that take two ranks each: four ranks on the first leave one for the second.
    plan = tiny_plan(Layout(dp_replicate=5), global_batch_size=10)
    cluster = dataclasses.replace(plan.job.cluster, gpus_per_node=2, oversubscribe=2.0)
    job = dataclasses.replace(plan.job, cluster=cluster, nodes=2)
    with pytest.raises(UserError, match="5 ranks, which 2 nodes cannot share evenly"):
        launch_files(dataclasses.replace(plan, job=job), "slurm")


def test_the_command_writes_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = write_plan(tiny_plan(Layout(micro_batch_size=4)), tmp_path / "plan.json")
    out = tmp_path / "out"
    assert call(monkeypatch, "launch", plan, "--on", "torchrun", "-o", out) == 0
    assert capsys.readouterr().out.split() == ["written", "to", f"{out}/launch.sh", "written", "to", f"{out}/plan.json"]
    assert (out / "launch.sh").stat().st_mode & 0o100
    assert read_plan(out / "plan.json").layout == Layout(micro_batch_size=4)


def test_importing_the_launchers_loads_no_torch() -> None:
    code = "import runtime.launchers, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for one_target, one_name in CASES:
        for one_file, one_text in scripts(one_target, one_name).items():
            (GOLDEN / f"{one_target}-{one_name}-{one_file}").write_text(without_plan(one_text))
