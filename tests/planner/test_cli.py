"""The command line: what it prints, what it writes, and how it answers bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_job import JOB
from command_line import call

from simulator.cluster import AttentionFit, AttentionKernel, CollectiveFit, HostFit, MatmulFit
from simulator.files import write_json
from simulator.presets import find_model
from simulator.profile import Profile

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_plan_writes_and_prints(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "job.toml", "-o", "out", "--top", 3) == 0
    shown = capsys.readouterr()
    assert "recommended:" in shown.out and "data parallel" in shown.out and shown.err == ""
    assert json.loads((folder / "out" / "plan.json").read_text())["version"] == 1


def test_words_in_brackets_are_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """rich would take [search] for markup. Plain data parallelism is the fastest for GPT-2, and is left out here."""
    assert call(monkeypatch, "plan", "job.toml", "--set", "search.pp=8") == 0
    assert "plain data parallelism is faster, but [search] leaves it out" in capsys.readouterr().out


def test_plan_json_is_the_contract(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", "job.toml", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {"job", "best", "runners_up", "baseline", "certificate", "riskier", "choice", "warnings"}
    assert 0 <= document["best"]["out_of_memory_probability"] <= 1
    assert set(document["certificate"]) == {
        "space", "illegal", "out_of_memory", "bounded", "simulated", "lower_bound_gap", "seconds",
    }  # fmt: skip


def test_simulate_json_is_the_contract(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "simulate", "job.toml", "--layout", "tp=2 pp=2", "--json", "--trace", "t.json") == 0
    document = json.loads(capsys.readouterr().out)
    assert set(document) == {
        "layout", "fits", "problems", "step_seconds", "tokens_per_second", "tokens_per_second_per_gpu", "mfu", "hfu",
        "breakdown", "memory", "memory_per_stage", "memory_parts", "out_of_memory_probability",
        "interval", "warnings", "remedies",
    }  # fmt: skip
    assert sum(document["breakdown"].values()) == pytest.approx(document["step_seconds"])
    assert list(document["breakdown"]) == [
        "compute", "recompute", "tp", "cp", "ep", "pp", "dp", "bubble", "optimizer", "host",
    ]  # fmt: skip
    assert list(document["memory"]) == [
        "parameters", "gradients", "optimizer", "activations", "buffers", "overhead", "peak",
    ]  # fmt: skip
    names = {event["name"] for event in json.loads((folder / "t.json").read_text())["traceEvents"]}
    assert {"PP:0F0", "PP:1B0", "OPTIMIZER"} <= names


def test_explain_reads_what_plan_wrote(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "plan", "job.toml")
    assert call(monkeypatch, "explain", "plan.json", "--against", "tp=4") == 0
    assert "yours (dp_shard=2 tp=4" in capsys.readouterr().out


# The others are planned in test_examples.py.
@pytest.mark.parametrize(
    "example", ["gpt2-workstation.toml", "llama-70b-256-h100.toml", "llama-8b-8-h100.toml", "office-10gbe.toml"]
)
def test_examples_are_planned_and_explained(
    example: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "plan", EXAMPLES / example) == 0
    shown = capsys.readouterr().out
    assert "recommended:" in shown and "OOM risk" in shown
    assert call(monkeypatch, "explain", "plan.json", "--what-if", "none") == 0
    shown = capsys.readouterr().out
    assert "pipeline rank" in shown and "over the step" in shown and "are free" in shown
    assert call(monkeypatch, "explain", "plan.json", "--what-if", "none", "--json") == 0
    document = json.loads(capsys.readouterr().out)["recommended"]
    peaks = [sample["memory"]["peak"] for sample in document["memory_timeline"]]
    assert max(peaks) == document["memory"]["peak"] == document["binding"]["peak"]
    assert document["binding"]["free"] >= 0


GPU_CLUSTER = """
name = "mine"
gpus_per_node = 1
source = "me"
[gpu]
name = "mine"
kind = "gpu"
memory = "80 GB"
memory_bandwidth = "3 TB/s"
peak = { bf16 = "1 PFLOP/s" }
matmul = { bf16 = { rate = "800 TFLOP/s" } }
source = "me"
[scale_up]
kind = "none"
bandwidth = "1 GB/s"
latency = "1 us"
collectives = {}
"""

# (files to write, command, words of the one sentence, exit code)
PLAN = ("plan", "job.toml")
SIMULATE = ("simulate", "job.toml", "--layout")
BAD: dict[str, tuple[dict[str, str], tuple[str, ...], list[str], int]] = {
    "missing job": ({}, ("plan", "jop.toml"), ["job 'jop.toml' does not exist", "job.toml"], 2),
    "job is a folder": ({}, ("plan", "."), ["is a folder"], 2),
    "not toml": ({"job.toml": "model = "}, PLAN, ["not valid TOML"], 2),
    "binary": ({"job.toml": "\udcff"}, PLAN, ["not a UTF-8 text file"], 2),
    "missing key": ({"job.toml": 'model = "gpt2"\nnodes = 1'}, PLAN, ["'cluster' is missing"], 2),
    "unknown key": ({"job.toml": JOB.replace("nodes", "node")}, PLAN, ["unknown key 'node'", "'nodes'"], 2),
    "unknown training key": ({"job.toml": JOB + "seqlen = 1"}, PLAN, ["'training.seqlen'", "'seq_len'"], 2),
    "unknown search key": ({"job.toml": JOB + "[search]\ntpp = 2"}, PLAN, ["'search.tpp'", "'tp'"], 2),
    "empty search": ({"job.toml": JOB + "[search]\ntp = []"}, PLAN, ["search.tp = []"], 2),
    "search of a wrong kind": ({"job.toml": JOB + '[search]\ntp = ["2"]'}, PLAN, ["tp", "integer"], 2),
    "search of an unknown schedule": ({"job.toml": JOB + '[search]\nschedule = "1f1b"'}, PLAN, ["1f1b", "1F1B"], 2),
    "misspelled model": ({}, (*PLAN, "--set", "model=gtp2"), ["model 'gtp2'", "'gpt2'"], 2),
    "misspelled cluster": ({}, (*PLAN, "--set", "cluster=dgx-h10"), ["cluster 'dgx-h10'", "did you mean"], 2),
    "misspelled stack": ({}, (*PLAN, "--set", "training.stack=megatron"), ["stack 'megatron'", "megatron-core"], 2),
    "misspelled precision": ({}, (*PLAN, "--set", "training.precision=bf-16"), ["precision", "bf16"], 2),
    "precision without a rate": ({}, (*PLAN, "--set", "training.precision=fp8"), ["fp8", "A100"], 2),
    "precision without a recipe": (
        {}, (*PLAN, "--set", "cluster=dgx-h100", "--set", "training.stack=megatron-2021", "--set",
             "training.precision=fp8"), ["precision = 'fp8'", "megatron-2021", "bf16"], 2,
    ),
    "nodes of zero": ({}, (*PLAN, "--set", "nodes=0"), ["nodes = 0"], 2),
    "a batch beyond reason": (
        {}, (*PLAN, "--set", "training.global_batch_size=1000000000"), ["global_batch_size", "at most 1048576"], 2,
    ),
    "layers beyond reason": (
        {"c.json": '{"model_type": "gpt2", "n_layer": 1000000, "n_embd": 64, "n_head": 1, "vocab_size": 256}'},
        (*PLAN, "--set", "model=./c.json"), ["num_hidden_layers = 1000000", "10000"], 2,
    ),
    "a null in the model": (
        {"c.json": '{"model_type": "gpt2", "n_layer": null, "n_embd": 64, "n_head": 1, "vocab_size": 256}'},
        (*PLAN, "--set", "model=./c.json"), ["n_layer = null"], 2,
    ),
    "a field given twice": ({}, (*SIMULATE, "tp=2 tp=4"), ["'tp' is given twice"], 2),
    "a size that no combination reaches": ({}, (*PLAN, "--set", "search.tp=3"), ["no sizes", "8 ranks"], 3),
    "an unknown option": ({}, (*PLAN, "--fast"), ["No such option", "--fast"], 2),
    "an option out of range": ({}, (*PLAN, "--top", "0"), ["--top", "1"], 2),
    "a missing option": ({}, ("simulate", "job.toml"), ["--layout"], 2),
    "two keys in one --set": ({}, (*PLAN, "--set", "nodes=1\nnodes=2"), ["one line"], 2),
    "a gpu without memory bandwidth": (
        {"c.toml": GPU_CLUSTER.replace("3 TB/s", "0 TB/s")}, (*PLAN, "--set", "cluster=./c.toml"),
        ["memory_bandwidth = 0 must be above zero"], 2,
    ),
    "a gpu without a peak": (
        {"c.toml": GPU_CLUSTER.replace('peak = { bf16 = "1 PFLOP/s" }', "peak = {}")},
        (*PLAN, "--set", "cluster=./c.toml"), ["peak has no 'bf16'"], 2,
    ),
    "more nodes than there are": ({}, (*PLAN, "--set", "nodes=1000000"), ["8000000 devices", "131072"], 2),
    "nodes as text": ({}, (*PLAN, "--set", "nodes=two"), ["nodes = 'two'"], 2),
    "batch of zero": ({}, (*PLAN, "--set", "training.global_batch_size=0"), ["global_batch_size = 0"], 2),
    "batch as text": ({}, (*PLAN, "--set", 'training.global_batch_size="64"'), ["global_batch_size", "integer"], 2),
    "sequence too long": ({}, (*PLAN, "--set", "training.seq_len=2048"), ["2048", "1024 positions"], 2),
    "set without a value": ({}, (*PLAN, "--set", "nodes"), ["--set 'nodes'", "key=value"], 2),
    "training is no table": ({"job.toml": JOB.split("[")[0] + "training = 1"}, PLAN, ["[training]"], 2),
    "missing model file": ({}, (*PLAN, "--set", "model=./c.json"), ["model 'c.json' does not exist"], 2),
    "model without a type": ({"c.json": "{}"}, (*PLAN, "--set", "model=./c.json"), ["model_type", "config.json"], 2),
    "model of an unknown type": (
        {"c.json": '{"model_type": "lama"}'}, (*PLAN, "--set", "model=./c.json"), ["'lama'", "'llama'"], 2,
    ),
    "model cut off": ({"c.json": '{"model_type": "gp'}, (*PLAN, "--set", "model=./c.json"), ["cut off"], 2),
    "cluster without keys": ({"c.toml": ""}, (*PLAN, "--set", "cluster=./c.toml"), ["is missing"], 2),
    "cluster with a bad unit": (
        {"c.toml": 'name="c"\ngpu="H100-SXM5-80G"\ngpus_per_node=8\nsource="me"\n[scale_up]\nkind="x"\nlatency="1 us"\n'
                   'bandwidth="450 GBps"\n[scale_up.collectives]\n'},
        (*PLAN, "--set", "cluster=./c.toml"), ["scale_up.bandwidth", "'450 GBps'", "450 GB/s"], 2,
    ),
    "cluster with an unknown gpu": ({"c.toml": 'gpu="H100"'}, (*PLAN, "--set", "cluster=./c.toml"), ["gpu 'H100'"], 2),
    "unmeasured machine": ({}, (*PLAN, "--set", "cluster=this-machine"), ["layoutwise measure"], 2),
    "profile that is not there": (
        {}, (*PLAN, "--set", "cluster=this-machine", "--set", "profile=p.json"), ["profile 'p.json'"], 2,
    ),
    "layout without an equals sign": ({}, (*SIMULATE, "tp"), ["'tp'", "field=value"], 2),
    "layout with an unknown field": ({}, (*SIMULATE, "tpp=2"), ["'tpp'", "'tp'"], 2),
    "layout with text for a number": ({}, (*SIMULATE, "tp=two"), ["tp = 'two'", "integer"], 2),
    "layout with an unknown choice": ({}, (*SIMULATE, "recompute=some"), ["recompute = 'some'", "none"], 2),
    "tp that does not divide the heads": ({}, (*SIMULATE, "tp=8"), ["tp = 8", "num_attention_heads = 12", "is 6"], 2),
    "tp of zero": ({}, (*SIMULATE, "tp=0"), ["tp = 0 must be at least 1"], 2),
    "tp below zero": ({}, (*SIMULATE, "tp=-2"), ["tp = -2 must be at least 1"], 2),
    "a grid that is not the world": ({}, (*SIMULATE, "tp=2 dp_replicate=2"), ["= 4 ranks", "have 8"], 2),
    "more ranks than samples": (
        {}, (*SIMULATE, "dp_replicate=8", "--set", "training.global_batch_size=4"), ["global_batch_size = 4", "8"], 2,
    ),
    "fewer microbatches than stages": (
        {}, (*SIMULATE, "pp=4 dp_replicate=2 micro_batch_size=16"), ["2 microbatches", "pp = 4 needs at least 4"], 2,
    ),
    "more stages than layers": ({}, (*SIMULATE, "pp=8 virtual_stages=2"), ["16 stages", "12 layers"], 2),
    "a model that cannot fit": (
        {}, (*PLAN, "--set", "model=llama-3.1-405b", "--set", "training.global_batch_size=8"), ["GiB", "nearest"], 3,
    ),
    "missing plan": ({}, ("explain", "plan.json"), ["plan 'plan.json' does not exist"], 2),
    "plan cut off": ({"plan.json": '{"version": 1, "job": {'}, ("explain", "plan.json"), ["cut off"], 2),
    "plan of another version": ({"plan.json": '{"version": 7}'}, ("explain", "plan.json"), ["version = 7"], 2),
    "plan that is a list": ({"plan.json": "[]"}, ("explain", "plan.json"), ["list", "object"], 2),
    "run of a missing plan": ({}, ("run", "plan.json"), ["plan 'plan.json' does not exist"], 2),
    "output that is a file": ({"o": ""}, (*PLAN, "-o", "o"), ["cannot write", "o"], 2),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_one_sentence(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files, command, words, code = BAD[case]
    for name, text in files.items():
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    before = sorted(p.name for p in folder.iterdir())
    assert call(monkeypatch, *command) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    # Where nothing fits a line each says what would.
    assert shown.err.startswith("error: ") and (shown.err.count("\n") == 1 or code == 3)
    for word in words:
        assert word in shown.err
    assert sorted(p.name for p in folder.iterdir()) == before, "nothing is written on the way"


def test_help_is_light(tmp_path: Path) -> None:
    """`--help` and planning load neither torch nor matplotlib; help alone not even pydantic or networkx."""
    code = (
        "import sys; sys.argv = ['layoutwise', {arguments}]\n"
        "from planner import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {{'torch', 'matplotlib', 'pydantic', 'networkx', 'numpy', 'simpy'}}\n"
        "print('LOADED', sorted(heavy & set(sys.modules)))"
    )
    loaded: dict[str, Any] = {}
    for name, arguments in {"help": "'--help'", "plan": f"'plan', {str(EXAMPLES / 'gpt2-workstation.toml')!r}"}.items():
        result = subprocess.run(
            [sys.executable, "-c", code.format(arguments=arguments)],
            capture_output=True, text=True, check=True, cwd=tmp_path,
        )  # fmt: skip
        loaded[name] = result.stdout.splitlines()[-1]
    assert "torch" not in loaded["plan"] and "matplotlib" not in loaded["plan"]
    assert loaded["help"] == "LOADED []"


def this_machine(folder: Path) -> None:
    """A profile of a machine with two processors, as `layoutwise measure` would leave it (round figures)."""
    rate = AttentionFit(rate=5e10, half_length=100, causal_rate=4e10, causal_half_length=200)
    fits = {
        kind: (CollectiveFit(ranks=2, latency=5e-4, efficiency=0.5),)
        for kind in ("all_reduce", "all_gather", "reduce_scatter", "send_recv")
    }
    profile = Profile(
        name="two processors", created="2026-01-01T00:00:00+00:00", versions={}, kind="cpu", devices=2, memory=16e9,
        process_memory=3e8, matmul={"fp32": MatmulFit(8e10)}, memory_bandwidth=3e10,
        attention=(AttentionKernel(64, rate, rate),), host=HostFit(1e-5, 2e-5, 5e-5), link_bandwidth=3e9,
        link_latency=1e-4, collectives=fits, concurrency=(1.0, 0.9, 0.6, 0.45), samples=(),
    )  # fmt: skip
    write_json(folder / "profile.json", profile)
    job = 'model = "llama-bytes-12m"\ncluster = "this-machine"\nprofile = "profile.json"\nnodes = 1\n'
    (folder / "job.toml").write_text(job + "[training]\nglobal_batch_size = 4\nseq_len = 32\n")


def test_this_machine_is_planned_with_its_own_constants(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    this_machine(folder)
    assert call(monkeypatch, "plan", "job.toml", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    layouts = [document["best"], *document["runners_up"]]
    worlds = {
        p["layout"]["dp_replicate"] * p["layout"]["dp_shard"] * p["layout"]["tp"] * p["layout"]["pp"] for p in layouts
    }
    assert worlds <= {1, 2, 4}, "up to two ranks a processor"
    assert document["job"]["stack"]["name"] == "layoutwise-cpu"


@pytest.mark.parametrize("model", ["bert-large", "t5-large", "bart-large"])
def test_encoders_are_predicted_on_this_machine(
    model: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At least the six floating-point operations per weight and token take their time: 8e10 a second and processor."""
    this_machine(folder)
    assert call(monkeypatch, "simulate", "job.toml", "--set", f"model={model}", "--layout", "dp_shard=2", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["problems"] == []
    flops = 6 * find_model(model).active_matmul_parameters() * 4 * 32
    assert flops / 2 / 8e10 < document["step_seconds"] < 4 * flops / 2 / 8e10


def test_run_trains_and_measures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    this_machine(folder)
    pins = [word for axis in ("dp_replicate", "dp_shard", "tp", "pp") for word in ("--set", f"search.{axis}=1")]
    call(monkeypatch, "plan", "job.toml", *pins)
    capsys.readouterr()
    assert call(monkeypatch, "run", "plan.json", "--steps", 3, "--warmup", 1, "--export", "trained", "--json") == 0
    assert {path.name for path in (folder / "trained").iterdir()} == {"config.json", "model.safetensors"}
    document = json.loads(capsys.readouterr().out)
    assert list(document) == [
        "layout", "world_size", "steps", "warmup", "step_seconds", "tokens_per_second", "peak_memory", "losses",
        "grad_norms", "device", "versions", "updates", "sharding", "reserved_memory", "version",
    ]  # fmt: skip
    assert document == json.loads((folder / "measurement.json").read_text())
    assert (document["steps"], len(document["losses"]), document["world_size"]) == (3, 3, 1)
    assert set(document["step_seconds"]) == {"median", "p10", "p90"}
    # A model that knows nothing gives every byte the same chance: ln 256 = 5.545.
    assert document["losses"][0] == pytest.approx(5.545, abs=0.3)


def test_run_refuses_a_wrong_number_of_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    this_machine(folder)
    call(monkeypatch, "plan", "job.toml", "--set", "search.dp_replicate=2")
    capsys.readouterr()
    assert call(monkeypatch, "run", "plan.json", "--nproc-per-node", 3) == 2
    assert "processes, not 3" in capsys.readouterr().err
    assert not (folder / "measurement.json").exists()


def test_options_that_one_rank_cannot_use_are_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "run", "plan.json", "--alone", "--weights", "folder") == 2
    assert "--weights does not go with --alone" in capsys.readouterr().err


def test_plan_for_another_stack_is_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call(monkeypatch, "plan", "job.toml")
    capsys.readouterr()
    assert call(monkeypatch, "run", "plan.json") == 2
    assert "megatron-core" in capsys.readouterr().err
