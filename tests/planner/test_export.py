"""Export: the same layout in the words of another framework.

The files of several layouts per target are kept in tests/golden/export; `LAYOUTWISE_WRITE_GOLDEN=1 pytest` writes them
anew. Predicted numbers are made up, so that they move with the exporters alone. The slow tests hand the files to the
targets themselves, where LAYOUTWISE_TARGETS_PYTHON names an interpreter that has them (docs/files.md, Export).
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import call

from planner.export import TARGETS, export
from planner.export.header import header
from planner.plan import Certificate, Plan, write_plan
from simulator.errors import UserError
from simulator.job import build_job
from simulator.layout_text import parse_layout
from simulator.results import Breakdown, MemoryBreakdown, Prediction

GOLDEN = Path(__file__).parents[1] / "golden" / "export"
# name: model, cluster, nodes, stack, layout, training
CASES: dict[str, tuple[str, str, int, str, str, dict[str, Any]]] = {
    "uneven": (
        "llama-3.1-70b", "dgx-h100", 8, "torchtitan",
        "tp=4 pp=4 virtual_stages=2 dp_shard=4 zero_stage=3 stage_layers=9,10,10,10,10,10,10,11 recompute=full",
        {"global_batch_size": 64, "seq_len": 8192},
    ),
    "instances": (
        "llama-3.1-70b", "dgx-h100", 8, "megatron-core",
        "tp=4 pp=4 virtual_stages=2 dp_replicate=2 dp_shard=2 zero_stage=1 micro_batch_size=2 recompute=selective "
        "stage_layers=9,10,10,10,10,10,10,11",
        {"global_batch_size": 64, "seq_len": 8192},
    ),
    "order": (
        "llama-3.1-405b", "dgx-h100", 16, "megatron-bridge",
        "tp=8 pp=2 virtual_stages=3 dp_shard=8 zero_stage=1 rank_order=tp-cp-ep-pp-dp",
        {"global_batch_size": 24, "seq_len": 8192, "precision": "fp8"},
    ),
    "context": (
        "llama-3.1-8b", "dgx-h100", 1, "torchtitan", "dp_shard=4 cp=2 zero_stage=3 recompute=full micro_batch_size=2",
        {"global_batch_size": 64, "seq_len": 8192},
    ),
    "mixture": (
        "qwen3-30b-a3b", "dgx-h100", 2, "torchtitan", "dp_shard=8 tp=2 ep=8 zero_stage=3 sequence_parallel=true",
        {"global_batch_size": 64, "seq_len": 4096},
    ),
    "experts": (
        "mixtral-8x7b", "dgx-h100", 2, "torchtitan", "dp_shard=16 ep=8 zero_stage=3",
        {"global_batch_size": 64, "seq_len": 4096},
    ),
    "dualpipe": (
        "llama-3.1-8b", "dgx-h100", 1, "torchtitan", "pp=4 dp_shard=2 zero_stage=2 schedule=DualPipeV",
        {"global_batch_size": 64, "seq_len": 4096, "precision": "fp8"},
    ),
    "hybrid": (
        "llama-3.1-8b", "dgx-h100", 1, "torchtitan",
        "tp=2 sequence_parallel=false dp_replicate=2 dp_shard=2 zero_stage=3 recompute=full",
        {"global_batch_size": 32, "seq_len": 4096},
    ),
    "replicas": (
        "gpt2", "dgx-a100", 1, "megatron-core", "dp_replicate=8 zero_stage=0 micro_batch_size=4",
        {"global_batch_size": 64, "seq_len": 1024, "precision": "fp16"},
    ),
    "stages": (
        "gpt2", "dgx-a100", 1, "megatron-core", "dp_shard=4 pp=2 zero_stage=1 micro_batch_size=2 recompute=full",
        {"global_batch_size": 64, "seq_len": 1024},
    ),
}  # fmt: skip
# Which target can say which of them; every other pair has a reason.
EXPRESSED = {
    "torchtitan": ("uneven", "context", "mixture", "experts", "dualpipe", "hybrid"),
    "torchtitan-main": ("uneven", "context", "mixture", "experts", "hybrid"),
    "megatron": ("instances", "order", "context", "mixture", "experts", "hybrid", "replicas", "stages"),
    "megatron-bridge": ("instances", "order", "context", "mixture", "experts", "hybrid", "replicas", "stages"),
    "transformers": ("experts", "hybrid"),
    "accelerate": ("context", "hybrid", "replicas"),
    "deepspeed": ("context", "replicas", "stages"),
}
PAIRS = [(target, case) for target, cases in EXPRESSED.items() for case in cases]


def make_plan(model: str, cluster: str, nodes: int, stack: str, layout: str, training: dict[str, Any]) -> Plan:
    """A plan for a layout that is legal for its job, with made-up numbers."""
    job = build_job(
        {"model": model, "cluster": cluster, "nodes": nodes, "training": {**training, "stack": stack}}, "test"
    )
    chosen = parse_layout(layout, job)
    assert chosen.problems(job) == []
    memory = MemoryBreakdown(0, 0, 0, 0, 0, 0, peak=60.5 * 2**30)
    best = Prediction(chosen, True, (), 1.5, 1e6, 1234.0, 0.4, 0.4, Breakdown(compute=1.5), memory, (memory,), 0.0)
    return Plan(job, best, (), best, Certificate(1, 0, 0, 0, 1, 0.0, 0.0), {})


def case_plan(case: str) -> Plan:
    return make_plan(*CASES[case])


@pytest.fixture(autouse=True)
def one_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.export.header.version", lambda name: "0.0.0")


@pytest.mark.parametrize(("target", "case"), PAIRS)
def test_files_are_the_golden_ones(target: str, case: str) -> None:
    folder = GOLDEN / target / case
    texts = export(case_plan(case), target)
    if os.environ.get("LAYOUTWISE_WRITE_GOLDEN"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
    assert texts == {path.name: path.read_text() for path in folder.iterdir()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_layout_is_written_or_refused_with_a_reason(target: str, case: str) -> None:
    assert bool(TARGETS[target].problems(case_plan(case))) == (case not in EXPRESSED[target])


@pytest.mark.parametrize(("target", "case"), PAIRS)
def test_files_parse(target: str, case: str, tmp_path: Path) -> None:
    for name, text in export(case_plan(case), target).items():
        if name.endswith(".py"):
            ast.parse(text)
        elif name.endswith(".json"):
            json.loads(text)
        elif name.endswith(".yaml"):
            assert isinstance(yaml.safe_load(text), dict)
        else:
            (tmp_path / name).write_text(text)
            subprocess.run(["bash", "-n", tmp_path / name], check=True)
        if not name.endswith(".json"):
            assert text.startswith("# Written by layoutwise 0.0.0 for ")
            assert all(len(line) <= 120 for line in text.splitlines() if line.startswith("#"))


def test_header_says_what_was_predicted_and_for_which_stack() -> None:
    plan = case_plan("context")
    ours = header(plan, "torchtitan 0.3.0", ("torchtitan",))
    assert "predicted for the stack torchtitan: 1.5 s a step, 1,234 tokens/s per GPU, 60.5 GiB at the peak" in ours
    assert "not for" not in ours
    assert "is for torchtitan, not for Megatron-LM: plan with training.stack" in header(plan, "Megatron-LM", ("m",))


def recipe(text: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a recipe's module with packages that hold whatever is asked of them."""

    class Anything(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return types.SimpleNamespace(Config=lambda **kwargs: name)

    packages = "torchtitan", "torchtitan.components", "torchtitan.distributed", "torchtitan.models"
    leaves = (
        "trainer", "components.quantization", "distributed.activation_checkpoint", "models.llama3",
        "models.llama3.config_registry",
    )  # fmt: skip
    for name in (*packages, *(f"torchtitan.{leaf}" for leaf in leaves)):
        monkeypatch.setitem(sys.modules, name, Anything(name))
    space: dict[str, Any] = {}
    exec(compile(text, "recipe", "exec", flags=0, dont_inherit=True), space)
    return space


def empty_config() -> Any:
    parts = {name: types.SimpleNamespace() for name in ("training", "parallelism", "compile")}
    return types.SimpleNamespace(**parts)


def test_torchtitan_counts_a_pipelines_batch_in_one_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 sequences over 4 data-parallel ranks in microbatches of one: 16 in a step of the pipeline."""
    text = export(case_plan("uneven"), "torchtitan")["layoutwise_torchtitan.py"]
    config = recipe(text, monkeypatch)["layout"](empty_config())
    assert (config.training.local_batch_size, config.training.global_batch_size) == (16, 64)
    assert config.parallelism.pipeline_parallel_microbatch_size == 1
    assert config.activation_checkpoint == "FullAC"
    stages = config.parallelism.module_fqns_per_model_part
    assert [len(stage) for stage in stages] == [10, 10, 10, 10, 10, 10, 10, 13]
    assert [name for stage in stages for name in stage] == [
        "tok_embeddings", *(f"layers.{number}" for number in range(80)), "norm", "lm_head",
    ]  # fmt: skip
    assert stages[1][0] == "layers.9" and stages[7][0] == "layers.69"


def test_torchtitan_accumulates_without_a_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a microbatch on one data-parallel rank; torchtitan finds the 8 accumulation steps itself."""
    text = export(case_plan("context"), "torchtitan")["layoutwise_torchtitan.py"]
    config = recipe(text, monkeypatch)["layout"](empty_config())
    assert (config.training.local_batch_size, config.training.global_batch_size) == (2, 64)
    assert not hasattr(config.training, "disable_cuda_graphs")


def test_torchtitan_main_counts_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    text = export(case_plan("uneven"), "torchtitan-main")["layoutwise_torchtitan.py"]
    config = recipe(text, monkeypatch)["layout"](empty_config())
    assert config.training.num_tokens_per_microbatch_per_dp_rank == 8192
    assert config.training.num_tokens_per_train_step == 64 * 8192
    assert config.parallelism.num_pp_microbatches == 16
    assert len(config.parallelism.pipeline_parallel_module_fqns_per_model_part) == 8


def flags(case: str, tmp_path: Path) -> list[str]:
    """The words that a shell makes of megatron.sh."""
    (tmp_path / "megatron.sh").write_text(export(case_plan(case), "megatron")["megatron.sh"])
    command = 'source megatron.sh; printf "%s\\n" "${LAYOUT[@]}" "$CUDA_DEVICE_MAX_CONNECTIONS"'
    return subprocess.run(
        ["bash", "-uc", command], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.splitlines()


def test_megatron_flags_survive_the_shell(tmp_path: Path) -> None:
    words = flags("instances", tmp_path)
    assert words[words.index("--pipeline-model-parallel-layout") + 1] == "Et*9|(t*10|)*6t*11L"
    assert words[words.index("--num-distributed-optimizer-instances") + 1] == "2"
    assert words[words.index("--recompute-modules") + 1] == "core_attn"
    assert words[-1] == "1"


def test_megatron_makes_rounds_as_long_as_torchs(tmp_path: Path) -> None:
    """24 sequences over 8 data-parallel ranks: torch runs 3 microbatches over pp = 2 in one round of 3, where Megatron
    left alone would take rounds of 2."""
    words = flags("order", tmp_path)
    assert "--use-tp-pp-dp-mapping" in words
    assert words[words.index("--num-virtual-stages-per-pipeline-rank") + 1] == "3"
    assert words[words.index("--microbatch-group-size-per-virtual-pipeline-stage") + 1] == "3"


REFUSED = [
    ("torchtitan", "stages", "zero_stage 1"),
    ("torchtitan", "order", "rank_order"),
    ("torchtitan", "replicas", "training.mixed_precision_param has no fp16"),
    ("torchtitan-main", "dualpipe", "Float8LinearConverter"),
    ("megatron", "dualpipe", "no DualPipeV"),
    ("megatron", "uneven", "not beside pipeline-model-parallel-size = 4"),
    ("megatron-bridge", "dualpipe", "two schedules, 1F1B and interleaved"),
    ("transformers", "stages", "pp_size = 2 cannot stand beside fsdp_size"),
    ("transformers", "context", "no context parallelism"),
    ("transformers", "mixture", "enable_sequence_parallel is reserved"),
    ("accelerate", "stages", "pp = 2: parallelism_config has no pipeline"),
    ("accelerate", "experts", "ep = 8: parallelism_config has no expert parallelism"),
    ("deepspeed", "uneven", "stage 0 and 1 only, not 3"),
    ("deepspeed", "hybrid", "mics_shard_size is gone"),
    ("deepspeed", "experts", "deepspeed.moe.layer.MoE"),
]


@pytest.mark.parametrize(("target", "case", "reason"), REFUSED)
def test_what_a_target_cannot_say_is_named_in_its_own_words(target: str, case: str, reason: str) -> None:
    plan = case_plan(case)
    with pytest.raises(UserError, match="cannot express") as caught:
        export(plan, target)
    assert reason in str(caught.value)
    assert all(problem in str(caught.value) for problem in TARGETS[target].problems(plan))


def test_command_writes_files_and_refuses_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_plan(case_plan("replicas"), "plan.json")
    assert call(monkeypatch, "export", "plan.json", "--to", "deepspeed", "-o", "ds") == 0
    assert {path.name for path in Path("ds").iterdir()} == {"ds_config.json", "deepspeed.sh"}
    capsys.readouterr()
    assert call(monkeypatch, "export", "plan.json", "--to", "accelerate", "--json") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["files"] == {"accelerate.yaml": Path("accelerate.yaml").read_text()}
    assert call(monkeypatch, "export", "plan.json", "--to", "torchtitan", "-o", "tt") == 2
    assert capsys.readouterr().err.count("\n") == 1 and not Path("tt").exists()
    assert call(monkeypatch, "export", "plan.json", "--to", "megatorn") == 2
    assert "did you mean 'megatron'?" in capsys.readouterr().err


def ask(package: str, script: str, folder: Path, *arguments: object, **environment: str) -> str:
    """Run a script with the interpreter that has the targets; skip where it has not this one."""
    python = os.environ.get("LAYOUTWISE_TARGETS_PYTHON")
    if python is None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; LAYOUTWISE_TARGETS_PYTHON names no interpreter that has it")
    python = python or sys.executable
    if subprocess.run([python, "-c", f"import {package}"], capture_output=True, check=False).returncode:
        pytest.skip(f"{python} cannot import {package}")
    result = subprocess.run(
        [python, "-c", script, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout


def written(target: str, case: str, folder: Path) -> Path:
    for name, text in export(case_plan(case), target).items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPRESSED["accelerate"])
def test_accelerate_takes_its_file(case: str, tmp_path: Path) -> None:
    """`accelerate launch` reads the file, makes its environment, and ParallelismConfig is built from that."""
    script = """
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env
parser = launch.launch_command_parser()
args = parser.parse_args(["--config_file", "accelerate.yaml", "train.py"])
args, defaults, _ = launch._validate_launch_command(args)
environment = prepare_multi_gpu_env(args)
import os
os.environ.update({k: v for k, v in environment.items() if k.startswith(("PARALLELISM", "FSDP", "ACCELERATE"))})
from accelerate.parallelism_config import ParallelismConfig
print(ParallelismConfig().total_size if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG") == "true" else 1)
if args.use_fsdp:
    from accelerate import FullyShardedDataParallelPlugin
    print(FullyShardedDataParallelPlugin().reshard_after_forward)
"""
    shown = ask("accelerate", script, written("accelerate", case, tmp_path)).split()
    assert shown == {"context": ["8", "True"], "hybrid": ["8", "True"], "replicas": ["1"]}[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPRESSED["transformers"])
def test_transformers_takes_its_file(case: str, tmp_path: Path) -> None:
    script = """
import json
from transformers.distributed import DistributedConfig
given = json.load(open("distributed_config.json"))
config = DistributedConfig.from_dict(given)
assert {name: config.to_dict()[name] for name in given} == given, config
import layoutwise_transformers
print(config.dp_size * config.tp_size, config.efsdp_size)
"""
    shown = ask("transformers", script, written("transformers", case, tmp_path)).split()
    assert shown == {"experts": ["16", "2"], "hybrid": ["8", "4"]}[case]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "ranks"), [("context", 4), ("replicas", 8), ("stages", 4)])
def test_deepspeed_takes_its_file(case: str, ranks: int, tmp_path: Path) -> None:
    """Its parser checks that micro batch times accumulation times data-parallel ranks is the batch."""
    script = """
import sys
from deepspeed.runtime.config import DeepSpeedConfig
class Unit:
    get_data_parallel_world_size = staticmethod(lambda: int(sys.argv[1]))
from deepspeed import comm
comm.get_rank = lambda *a, **k: 0
config = DeepSpeedConfig("ds_config.json", mpu=Unit)
print(config.train_batch_size, config.zero_config.stage)
if len(sys.argv) > 2:
    import layoutwise_deepspeed
"""
    extra = ["pipeline"] if case == "stages" else []
    shown = ask("deepspeed", script, written("deepspeed", case, tmp_path), ranks, *extra).splitlines()[-1]
    assert shown == {"context": "64 3", "replicas": "64 0", "stages": "64 1"}[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", EXPRESSED["torchtitan"])
def test_torchtitan_has_every_field(case: str, tmp_path: Path) -> None:
    """The recipe's `layout` sets fields of torchtitan's own dataclasses, which have slots: a wrong name raises. Its
    model registry needs a GPU's packages, and is left out."""
    script = """
import sys, types
class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return types.SimpleNamespace(Config=lambda **kwargs: name)
for name in ("trainer", "models", "models.llama3", "models.llama3.config_registry", "models.qwen3",
             "models.qwen3.config_registry", "components.quantization"):
    sys.modules["torchtitan." + name] = Anything("torchtitan." + name)
from torchtitan.config import CompileConfig, ParallelismConfig, TrainingConfig
from torchtitan.distributed.parallel_dims import ParallelDims
import layoutwise_torchtitan as ours
config = types.SimpleNamespace(training=TrainingConfig(), parallelism=ParallelismConfig(), compile=CompileConfig())
ours.layout(config)
dims = ParallelDims.from_config(config.parallelism, int(sys.argv[1]))
print(dims.world_size // dims.pp, config.activation_checkpoint)
"""
    ranks = case_plan(case).layout.world_size
    assert ask("torchtitan", script, written("torchtitan", case, tmp_path), ranks)


@pytest.mark.slow
def test_megatron_reads_its_stages_as_ours(tmp_path: Path) -> None:
    script = """
import sys
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
layout = PipelineParallelLayerLayout(sys.argv[1], 4)
layout.validate_layer_layout(80, 0)
print([[stage.count(LayerType.decoder) for stage in rank] for rank in layout.layout])
"""
    words = flags("instances", tmp_path)
    letters = words[words.index("--pipeline-model-parallel-layout") + 1]
    shown = ask("megatron.core", script, tmp_path, letters)
    assert json.loads(shown) == [[9, 10], [10, 10], [10, 10], [10, 11]]
