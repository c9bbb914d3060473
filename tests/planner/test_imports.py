"""Import: pasted command lines and files of other frameworks as layouts.

The law: what an exporter writes is read back as the same layout, for every layout that the target can say.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.export import TARGETS, export
from planner.imports import read_layout
from planner.imports.megatron import stage_counts
from planner.plan import Certificate, Plan
from planner.space import space
from simulator.errors import UserError
from simulator.job import Job, build_job
from simulator.layout import Layout
from simulator.layout_text import complete, parse_layout
from simulator.results import Breakdown, MemoryBreakdown, Prediction

JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "megatron": ("llama-3.1-8b", {"stack": "megatron-core"}),
    "megatron-bridge": ("llama-3.1-8b", {"stack": "megatron-bridge"}),
    "torchtitan": ("llama-3.1-8b", {"stack": "torchtitan"}),
    "torchtitan-main": ("llama-3.1-8b", {"stack": "torchtitan-compile"}),
    "deepspeed": ("llama-3.1-8b", {"stack": "layoutwise-cuda"}),
}
MIXTURES = {name: ("qwen3-30b-a3b", JOBS[name][1]) for name in ("megatron", "torchtitan", "torchtitan-main")}
CASES = [*JOBS.items(), *MIXTURES.items()]
# JSON does not say it.
UNSAID = {"deepspeed": {"recompute": "none"}}


@functools.cache
def job_of(model: str, stack: str) -> Job:
    training = {"global_batch_size": 96, "seq_len": 4096, "stack": stack}
    return build_job({"model": model, "cluster": "dgx-h100", "nodes": 2, "training": training}, "test")


@functools.cache
def legal_layouts(target: str, model: str, stack: str) -> list[Layout]:
    """Of 3,000 candidates from all over the space, with and without offload, those that can run the job and that the
    target can say."""
    job = job_of(model, stack)
    columns = space(job)
    rows = range(0, len(columns), max(1, len(columns) // 3000))
    drawn = map(columns.layout, rows)
    both = (replace(one, offload=offload) for one in drawn for offload in ("none", "optimizer"))
    found = [one for one in both if not one.problems(job)]
    return [one for one in found if not TARGETS[target].problems(plan_of(job, one))]


def plan_of(job: Job, layout: Layout) -> Plan:
    memory = MemoryBreakdown(0, 0, 0, 0, 0, 0, peak=1.0)
    best = Prediction(layout, True, (), 1.5, 1e6, 1234.0, 0.4, 0.4, Breakdown(compute=1.5), memory, (memory,), 0.0)
    return Plan(job, best, (), best, Certificate(1, 0, 0, 0, 1, 0.0, 0.0), {})


@pytest.mark.parametrize(("target", "about"), CASES, ids=[f"{name}-{about[0]}" for name, about in CASES])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_exported_is_read_back(target: str, about: tuple[str, dict[str, Any]], data: Any) -> None:
    model, stack = about[0], about[1]["stack"]
    job = job_of(model, stack)
    layout = data.draw(st.sampled_from(legal_layouts(target, model, stack)))
    texts = export(plan_of(job, layout), target)
    text = next(text for name, text in texts.items() if not name.startswith("deepspeed"))
    read = read_layout(text, job)
    assert same(read.layout, layout, UNSAID.get(target, {}))
    assert not read.ignored and not [note for note in read.notes if note.startswith("it says")]


def same(read: Layout, written: Layout, unsaid: dict[str, Any]) -> bool:
    """Equal but for ways to write the same: a rank order that moves axes of one rank, stages as even as possible."""
    fields = dict(vars(written)) | unsaid
    even = Layout(**(fields | {"stage_layers": None}))
    if written.stage_layers is not None and even.layers_per_stage(sum(written.stage_layers)) == written.stage_layers:
        fields["stage_layers"] = None
    axes = [axis for axis in written.axes if getattr(written, axis) > 1]
    if axes == [axis for axis in read.axes if getattr(read, axis) > 1]:
        fields["rank_order"] = read.rank_order
    return read == Layout(**fields)


MEGATRON = """torchrun --nproc_per_node 8 --nnodes 2 pretrain_gpt.py --tensor-model-parallel-size 4 \\
  --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4 --sequence-parallel \\
  --use-distributed-optimizer --micro-batch-size 2 --global-batch-size 96 --seq-length 4096 --bf16 --num-layers 32"""
# (a pasted text, the same in our words)
SAME = {
    "megatron": (
        MEGATRON,
        # 32 layers in stages of 4 over 2 ranks: 32 / (2 * 4) = 4 stages a rank; 16 / (4 * 2) = 2 data-parallel ranks.
        "tp=4 pp=2 virtual_stages=4 dp_shard=2 zero_stage=1 micro_batch_size=2 sequence_parallel=true",
    ),
    "megatron selective": (f"{MEGATRON} --recompute-activations",
        "tp=4 pp=2 virtual_stages=4 dp_shard=2 zero_stage=1 micro_batch_size=2 recompute=selective"),
    "megatron without distributed optimizer": (
        "--tensor-model-parallel-size 4", "tp=4 sequence_parallel=false dp_replicate=4 zero_stage=0"),
    "megatron fsdp": (
        "--use-megatron-fsdp --data-parallel-sharding-strategy optim_grads_params --use-distributed-optimizer "
        "--micro-batch-size=2", "dp_shard=16 zero_stage=3 micro_batch_size=2"),
    "megatron script": (
        'TP=4\nPP=${PP:-2}\nARGS=(\n  --tensor-model-parallel-size $TP  # in a node\n'
        '  --pipeline-model-parallel-size ${PP}\n)\ntorchrun pretrain_gpt.py "${ARGS[@]}"',
        "tp=4 pp=2 sequence_parallel=false dp_replicate=2 zero_stage=0"),
    "megatron ends": (
        # 32 layers, 6 of them last: 26 on the other rank.
        "--pipeline-model-parallel-size 2 --decoder-last-pipeline-num-layers 6", 
        "pp=2 stage_layers=26,6 dp_replicate=8 zero_stage=0"),
    "megatron accounts": (
        # 32 layers and two that stand for embedding and loss: 34 / 2 = 17 a rank, of which one is no layer.
        "--pipeline-model-parallel-size 2 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split", "pp=2 dp_replicate=8 zero_stage=0"),
    "torchtitan": (
        "torchrun -m torchtitan.train --parallelism.tensor_parallel_degree=4 "
        "--parallelism.data_parallel_shard_degree -1 --activation_checkpoint.mode full "
        "--training.local_batch_size 2 --compile.enable",
        "tp=4 dp_shard=4 zero_stage=3 micro_batch_size=2 recompute=full"),
    "torchtitan pipeline": (
        # 34 layers with embedding and head over 2 stages: 17 each, of which the first and the last have one less.
        "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule 1f1b "
        "--parallelism.pipeline_parallel_microbatch_size 3 --training.local_batch_size 6",
        "pp=2 dp_shard=8 zero_stage=2 micro_batch_size=3"),
    "torchtitan of 2024": (
        "--training.data_parallel_degree 4 --training.tensor_parallel_degree 2 "
        "--experimental.pipeline_parallel_degree 2 --experimental.pipeline_parallel_schedule interleaved1f1b "
        "--experimental.pipeline_parallel_microbatches 4 --training.batch_size 8",
        # Four stages of 34 / 4: 9, 9, 8, 8, less one at both ends.
        "tp=2 pp=2 virtual_stages=2 dp_shard=4 zero_stage=2 micro_batch_size=2 stage_layers=8,9,8,7"),
    "torchtitan toml": (
        '[parallelism]\ntensor_parallel_degree = 2\nfsdp_reshard_after_forward = "never"\n'
        '[training]\nlocal_batch_size = 1\nseq_len = 4096\n[activation_checkpoint]\nmode = "none"\n'
        "[optimizer]\nlr = 3e-4",
        "tp=2 dp_shard=8 zero_stage=2"),
    "deepspeed": (
        '{"train_batch_size": 96, "gradient_accumulation_steps": 3, "zero_optimization": {"stage": 2}, '
        '"bf16": {"enabled": true}}', "dp_shard=16 zero_stage=2 micro_batch_size=2"),
    "deepspeed auto": (
        '{"train_micro_batch_size_per_gpu": "auto", "zero_optimization": {"stage": 3}}', "dp_shard=16 zero_stage=3"),
}  # fmt: skip


@pytest.mark.parametrize("case", SAME)
def test_pasted_texts_say_the_same_as_our_words(case: str) -> None:
    pasted, ours = SAME[case]
    stack = "torchtitan" if "torchtitan" in case else "layoutwise-cuda" if "deepspeed" in case else "megatron-core"
    job = job_of("llama-3.1-8b", stack)
    assert read_layout(pasted, job).layout == parse_layout(ours, job)


def test_what_the_text_says_of_the_job_is_compared_with_the_job() -> None:
    job = job_of("llama-3.1-8b", "megatron-core")
    text = MEGATRON.replace("--global-batch-size 96", "--global-batch-size 1536").replace("--nnodes 2", "--nnodes 4")
    read = read_layout(text + " --lr 6e-5 --adam-beta2 0.95", job)
    assert read.notes == (
        "it says ranks = 32, the job 16: the job's holds",
        "it says global_batch_size = 1536, the job 96: the job's holds",
    )
    assert read.ignored == ("--lr", "--adam-beta2")
    assert read_layout(MEGATRON, job).notes == () and read_layout(MEGATRON, job).ignored == ()


REFUSED = {
    "nested repetitions": (
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'E(((t*99999)*99999)*99999)L'",
        "more than 100,000 items"),
    "many digits": ("--tensor-model-parallel-size " + "9" * 5000, "must be an integer of at least 1"),
    "deep JSON": ('{"a":' * 100_000, "JSON cannot be read"),
    "deep Python": ("a.tensor_model_parallel_size = " + "-" * 5000 + "1", "Python cannot be read"),
    "layers that are none": (
        "a.pipeline_parallel_degree = 4\nLAYERS = ['a']", "must be the layers of every stage"),
    "modules that are none": (
        "--parallelism.pipeline_parallel_degree 4 --parallelism.module_fqns_per_model_part stages",
        "must list the modules of every stage"),
    "two frameworks": (
        "--parallelism.tensor_parallel_degree 8 --tensor-model-parallel-size 4", "mixes the words of several"),
    "ours and theirs": ("tp=8 --pipeline-model-parallel-size 2", "mixes 'tp=8' with flags"),
    "DeepSpeed's file too": (
        "--tensor-model-parallel-size 8 --deepspeed --deepspeed_config ds.json", "say a part of the layout each"),
    "twice": ("--tensor-model-parallel-size 4 --tensor-model-parallel-size 8", "is given twice, as '4' and as '8'"),
    "two ways": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4 "
        "--num-virtual-stages-per-pipeline-rank 4", "say the same in two ways"),
    "recompute": (
        "--micro-batch-size 1 --recompute-activations --recompute-granularity full", "leave one out"),
    "precision": ("--micro-batch-size 1 --bf16 --fp16", "contradict each other"),
    "old and new name": (
        "--training.batch_size 4 --training.local_batch_size 2 --parallelism.tensor_parallel_degree 2",
        "contradict each other"),
    "variable": ("--tensor-model-parallel-size $TP", "the variable TP is not set"),
    "no number": ("--tensor-model-parallel-size four", "must be an integer of at least 1"),
    "no value": ("--tensor-model-parallel-size --bf16", "= true must be an integer"),
    "too many": ("--tensor-model-parallel-size 3", "must divide the job's 16 ranks"),
    "layers": (
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 5", "must divide the 32 layers"),
    "letters": ("--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Ex*2|tL", "is not like"),
    "quote": ("--tensor-model-parallel-size '4", "cannot be read"),
    "schedule": (
        "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_schedule GPype", "is not one of"),
    "nothing": ("python train.py --lr 3e-4", "names nothing of a layout"),
    "json": ('{"train_batch_size": 96', "cannot be read"),
    "batch": (
        '{"train_batch_size": 100, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}',
        "train_batch_size = 100 is not"),
    "no file": ("@nowhere.sh", "does not exist"),
    "our words": ("tp=8 pq=2", "unknown field 'pq'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_one_sentence(case: str) -> None:
    text, words = REFUSED[case]
    with pytest.raises(UserError) as caught:
        read_layout(text, job_of("llama-3.1-8b", "megatron-core"))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80), st.sampled_from(["", "--tensor-model-parallel-size ", "{", "[parallelism]\n", "a.b = "]))
def test_any_text_is_a_layout_or_one_sentence(text: str, start: str) -> None:
    job = job_of("llama-3.1-8b", "megatron-core")
    try:
        assert isinstance(read_layout(start + text.replace("@", ""), job).layout, Layout)
    except UserError as error:
        assert str(error)


@given(st.lists(st.integers(0, 5), min_size=2, max_size=24).filter(any))
def test_megatrons_letters_are_read_as_they_are_written(counts: list[int]) -> None:
    from planner.export.megatron import stage_letters

    counts = [count + 1 for count in counts]
    assert stage_counts(stage_letters(tuple(counts))) == tuple(counts)


def test_our_own_words_are_completed_as_before() -> None:
    job = job_of("llama-3.1-8b", "megatron-core")
    assert read_layout("tp=4  # a comment\npp=2", job).layout == complete({"tp": 4, "pp": 2}, job)
    assert read_layout("tp=4", job).lines() == []


def test_commands_take_a_file_and_say_how_they_read_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train.sh").write_text(
        "torchrun pretrain_gpt.py --tensor-model-parallel-size 2 --sequence-parallel --lr 1e-4\n"
    )
    assert call(monkeypatch, "simulate", "job.toml", "--layout", "@train.sh", "--json") == 0
    shown = capsys.readouterr()
    assert "read as Megatron-LM's: dp_replicate=4 tp=2" in shown.err and "ignored: --lr" in shown.err
    assert '"tp": 2' in shown.out
    call(monkeypatch, "plan", "job.toml")
    assert (
        call(monkeypatch, "explain", "plan.json", "--against", "--tensor-model-parallel-size 2 --sequence-parallel")
        == 0
    )
    assert "yours (dp_replicate=4 tp=2 sequence_parallel=true)" in capsys.readouterr().out


def test_modules_of_a_command_line_are_read() -> None:
    """Ten and 22 of the 32 layers: lists in JSON, as torchtitan's own parser takes them."""
    numbers = [f"layers.{i}" for i in range(32)]
    modules = json.dumps([["tok_embeddings", *numbers[:10]], [*numbers[10:], "norm", "output"]])
    text = f"--parallelism.pipeline_parallel_degree 2 --parallelism.module_fqns_per_model_part '{modules}'"
    assert read_layout(text, job_of("llama-3.1-8b", "torchtitan")).layout.stage_layers == (10, 22)


def test_an_empty_file_is_no_layout(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text(" \n")
    with pytest.raises(UserError, match="is empty; a layout is like"):
        read_layout(f"@{tmp_path / 'empty'}", job_of("llama-3.1-8b", "megatron-core"))


def test_a_variable_of_a_script_is_none_of_our_words() -> None:
    found = read_layout("tp=8\npretrain.py --tensor-model-parallel-size ${tp}", job_of("llama-3.1-8b", "megatron-core"))
    assert found.layout.tp == 8


def test_deepspeed_takes_its_file_from_the_command(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text('{"train_batch_size": 96, "zero_optimization": {"stage": 3}}')
    text = f"deepspeed train.py --deepspeed --deepspeed_config {tmp_path / 'ds.json'}"
    assert read_layout(text, job_of("llama-3.1-8b", "layoutwise-cuda")).layout.zero_stage == 3


def test_stages_of_the_embedding_and_of_the_head_alone() -> None:
    """Llama 3's pipeline (arXiv 2407.21783, section 3.3.2), 34 stages for 32 layers, in Megatron's words."""
    job = job_of("llama-3.1-8b", "megatron-core")
    text = "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout 'E|(t|)*32L' --use-distributed-optimizer"
    layout = read_layout(text, job).layout
    assert layout.virtual_stages == 17 and layout.layers_per_stage(32) == (0, *[1] * 32, 0)
    assert layout == parse_layout("pp=2 virtual_stages=17 dp_shard=8 zero_stage=1", job)
