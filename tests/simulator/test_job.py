"""job.toml: three keys are enough, `--set` changes any of them, and every mistake is answered in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from simulator.errors import UserError
from simulator.files import plain, to_dataclass
from simulator.job import Job, build_job, read_job
from simulator.presets import DATA, names

SMALL: dict[str, Any] = {"model": "llama-3.1-8b", "cluster": "dgx-h100", "nodes": 2}

TOML = """
model = "llama-3.1-8b"
cluster = "dgx-h100"
nodes = 2

[training]
global_batch_size = 256
seq_len = 4096

[search]
tp = [1, 2, 4, 8]
schedule = "1F1B"
"""


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    path = tmp_path / "job.toml"
    path.write_text(TOML)
    return path


def test_three_keys_are_a_job() -> None:
    job = build_job(SMALL, "job")
    assert job.world_size == 16
    assert job.stack.name == "megatron-core"
    assert (job.training.seq_len, job.training.precision, job.training.optimizer) == (8192, "bf16", "adamw")
    assert job.search == {}


def test_the_default_batch_is_four_million_tokens_and_divides_over_the_gpus() -> None:
    for nodes in (1, 2, 3, 5, 64):
        job = build_job(SMALL | {"nodes": nodes}, "job")
        assert job.training.global_batch_size % job.world_size == 0
        assert job.tokens_per_step == pytest.approx(4 * 2**20, rel=0.5) or job.world_size > 512
    assert build_job(SMALL, "job").tokens_per_step == 4 * 2**20


def test_the_default_sequence_is_not_longer_than_the_model_allows() -> None:
    assert build_job(SMALL | {"model": "gpt2"}, "job").training.seq_len == 1024


def test_a_file_is_read_whole(job_file: Path) -> None:
    job = read_job(job_file)
    assert (job.training.global_batch_size, job.training.seq_len) == (256, 4096)
    assert job.search == {"tp": [1, 2, 4, 8], "schedule": ["1F1B"]}


def test_paths_in_a_job_are_relative_to_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "jobs"
    folder.mkdir()
    config = {"model_type": "gpt2", "n_head": 4, "n_embd": 64, "n_layer": 2, "vocab_size": 100}
    (folder / "tiny.json").write_text(json.dumps(config))
    (folder / "job.toml").write_text(TOML.replace("llama-3.1-8b", "tiny.json").replace("4096", "512"))
    monkeypatch.chdir(tmp_path)
    assert read_job("jobs/job.toml").model.name == "tiny"


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("nodes=4", lambda job: job.nodes == 4),
        ("model=mixtral-8x7b", lambda job: job.model.name == "mixtral-8x7b"),
        ('model="mixtral-8x7b"', lambda job: job.model.name == "mixtral-8x7b"),
        ("training.seq_len=2048", lambda job: job.training.seq_len == 2048),
        ("training.seq_len = 2048", lambda job: job.training.seq_len == 2048),
        ("training.stack=torchtitan", lambda job: job.stack.name == "torchtitan"),
        ("training.learning_rate=1e-4", lambda job: job.training.learning_rate == 1e-4),
        ("search.tp=[2, 4]", lambda job: job.search["tp"] == [2, 4]),
        ("search.pp=2", lambda job: job.search["pp"] == [2]),
        ("search.recompute=full", lambda job: job.search["recompute"] == ["full"]),
        ("search.stage_layers=[20, 12]", lambda job: job.search["stage_layers"] == [[20, 12]]),
    ],
)
def test_set_changes_one_key(job_file: Path, override: str, check: Any) -> None:
    assert check(read_job(job_file, [override]))


def test_of_two_settings_of_a_key_the_last_holds(job_file: Path) -> None:
    assert read_job(job_file, ["nodes=4", "nodes=8"]).nodes == 8


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("nodes", ["--set 'nodes'", "key=value"]),
        ("=4", ["--set '=4'", "key=value"]),
        ("nodes.count=4", ["'nodes' is not a table"]),
        ("node=4", ["unknown key 'node'", "did you mean 'nodes'"]),
        ("nodes=four", ["nodes = 'four'", "integer"]),
        ("nodes=0", ["nodes = 0", "at least 1"]),
        ("nodes=true", ["nodes = True", "integer"]),
        ("model=8", ["model = 8", "preset or a path"]),
        ("model=lama-3.1-8b", ["'lama-3.1-8b'", "did you mean 'llama-3.1-8b'"]),
        ("model=no/such.json", ["no/such.json'", "does not exist"]),
        ("cluster=dgx-h10", ["did you mean 'dgx-h100'"]),
        ("training=3", ["'training' must be a table", "[training]"]),
        ("training.seq_length=4096", ["unknown key 'training.seq_length'", "did you mean 'seq_len'"]),
        ("training.seq_len=4096.5", ["seq_len", "4096.5", "integer"]),
        ("training.seq_len=8k", ["seq_len", '"8k"', "integer"]),
        ("training.seq_len=2026-01-31", ["seq_len", "2026-01-31", "integer"]),
        ("training.seq_len=0", ["training.seq_len = 0", "at least 1"]),
        ("training.global_batch_size=-8", ["training.global_batch_size = -8", "at least 1"]),
        ("training.precision=fp61", ["precision", '"fp61"', "'bf16'"]),
        ("training.optimizer=lion", ["optimizer", '"lion"', "'adamw'"]),
        ("training.learning_rate=0", ["learning_rate", "above zero"]),
        ("training.stack=megatron", ["stack 'megatron'", "did you mean 'megatron-"]),
        ("training.stack=7", ["stack '7'", "valid:"]),
        ("search.tensor=2", ["unknown key 'search.tensor'"]),
        ("search.tp=[]", ["search.tp = []", "at least one value"]),
        ("search.tp=two", ["tp", '"two"', "integer"]),
        ("search.recompute=half", ["recompute", '"half"', "'full'"]),
        ("search.zero_stage=[1, 5]", ["zero_stage", "5"]),
    ],
)
def test_a_mistake_is_answered_in_one_sentence(job_file: Path, override: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_job(job_file, [override])
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("key", ["model", "cluster", "nodes"])
def test_the_three_keys_are_needed(key: str) -> None:
    with pytest.raises(UserError, match=f"'{key}' is missing"):
        build_job({k: v for k, v in SMALL.items() if k != key}, "job 'x'")


def test_a_precision_needs_a_rate_on_the_gpu() -> None:
    with pytest.raises(UserError, match="precision = 'fp8' has no matmul rate on A100-SXM4-80G"):
        build_job(SMALL | {"cluster": "dgx-a100", "training": {"precision": "fp8"}}, "job")


def test_learned_positions_bound_the_sequence_but_rotary_ones_do_not() -> None:
    with pytest.raises(UserError, match="seq_len = 2048 is more than the 1024 positions that gpt2 has"):
        build_job(SMALL | {"model": "gpt2", "training": {"seq_len": 2048}}, "job")
    assert build_job(SMALL | {"training": {"seq_len": 262144}}, "job").training.seq_len == 262144


@pytest.mark.parametrize("cluster", [name for name in names("clusters") if name != "this-machine"])
def test_every_cluster_makes_a_job(cluster: str) -> None:
    job = build_job(SMALL | {"cluster": cluster}, "job")
    assert job.graph.graph["nodes"] == 2
    assert job.graph is job.graph


def test_several_nodes_need_a_network_between_them(tmp_path: Path) -> None:
    text = (DATA / "clusters" / "dgx-h100.toml").read_text()
    (tmp_path / "alone.toml").write_text(text[: text.index("[scale_out]")])
    alone = SMALL | {"cluster": "alone.toml"}
    assert build_job(alone | {"nodes": 1}, "job", tmp_path).world_size == 8
    with pytest.raises(UserError, match="nodes = 2, but cluster 'dgx-h100' has no scale_out network"):
        build_job(alone, "job", tmp_path)


def test_a_job_survives_json() -> None:
    job = build_job(SMALL | {"search": {"tp": [2, 4], "stage_layers": [16, 16]}}, "job")
    assert to_dataclass(Job, json.loads(json.dumps(plain(job))), "job") == job
