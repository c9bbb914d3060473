"""A model that is cut over ranks reads and writes the same files as one process, whatever the cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_golden import write_formula
from tiny_jobs import MODELS
from workers import start_worker

from runtime.hf_config import hf_config
from runtime.hf_names import Place
from runtime.pipeline import build_stage
from runtime.shards import local_ranges
from runtime.weights import load_safetensors
from simulator.errors import UserError
from simulator.layout import Layout

_FSDP = {"dp_shard": 2, "zero_stage": 3}
_TP = {"tp": 2, "sequence_parallel": True}
_PP = {"pp": 2, "micro_batch_size": 2}
# Four ranks each. Where both cut the same dim, data parallelism cuts the tensor axis's pieces.
CASES = [
    ("tiny-llama", Layout(dp_shard=4, zero_stage=3)),
    ("tiny-llama", Layout(**_FSDP, **_TP)),
    ("tiny-llama", Layout(**_FSDP, **_PP)),
    ("tiny-gpt-untied", Layout(**_TP, **_PP, schedule="Interleaved1F1B", virtual_stages=2)),
    ("tiny-gpt", Layout(dp_replicate=2, **_FSDP)),
    ("tiny-neox", Layout(**_FSDP, **_TP)),
    ("tiny-t5", Layout(dp_replicate=2, tp=2)),
    ("tiny-bert", Layout(dp_replicate=4)),
]


@pytest.fixture(scope="module")
def exchanged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For each case a folder that was read by all ranks, and one that they wrote."""
    folder = tmp_path_factory.mktemp("weights")
    for name in {name for name, _ in CASES}:
        model = build_stage(MODELS[name], Layout(), 32, 0)
        write_formula(model, folder / name, hf_config(model.spec))
    start_worker("weights_worker.py", 4, str(folder))
    return folder


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda n: f"{CASES[n][0]} {CASES[n][1].short()}")
def test_what_ranks_write_is_what_they_read(number: int, exchanged: Path) -> None:
    name, layout = CASES[number]
    theirs = load_file(exchanged / name / "model.safetensors")
    folder = exchanged / f"out-{number}"
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == layout.pp
    ours = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    if layout.pp > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert all(key in load_file(folder / file) for key, file in index.items())
    assert not list(folder.glob(".part*"))


@pytest.mark.parametrize(
    ("value", "words"), [(torch.tensor(1), "holds I64"), (torch.tensor(float("nan")), "values that are not finite")]
)
def test_what_cannot_be_a_weight_is_refused(value: torch.Tensor, words: str, tmp_path: Path) -> None:
    model = build_stage(MODELS["tiny-llama"], Layout(), 32, 0)
    write_formula(model, tmp_path, hf_config(model.spec))
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] = value.expand(tensors["model.norm.weight"].shape).contiguous()
    save_file(tensors, path)
    model.to_empty(device="cpu")
    with pytest.raises(UserError, match=words):
        load_safetensors([model], tmp_path)


def test_a_plain_tensor_is_held_whole() -> None:
    assert local_ranges(torch.empty(3, 5)) == ((0, 3), (0, 5))


@pytest.mark.parametrize(
    ("place", "rows", "runs"),
    [
        (Place("x"), (2, 5), [(2, 2, 3)]),
        (Place("x", offset=2), (2, 5), [(2, 4, 3)]),
        (Place("x", part=1, parts=3), (2, 5), [(2, 10, 3)]),  # q, k, v of 8 rows each, one behind the other
        (Place("x", part=2, parts=3, turn=4), (2, 5), [(2, 10, 2), (4, 20, 1)]),  # by heads of 4 rows
    ],
)
def test_rows_of_fused_tensors_are_found(place: Place, rows: tuple[int, int], runs: list[tuple[int, int, int]]) -> None:
    assert list(place.segments(*rows, 8)) == runs
