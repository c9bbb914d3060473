"""Every family computes what transformers computes, from the same weights in the same files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from runtime.model import Transformer, named_weights
from runtime.pipeline import build_stage
from runtime.weights import hf_names, load_safetensors, save_safetensors, their_shape
from simulator.errors import UserError
from simulator.files import write_json
from simulator.hf import read_config
from simulator.layout import Layout

GOLDEN = Path(__file__).parent / "golden"
sys.path.insert(0, str(GOLDEN))
from make_logits import CASES, ENTRIES, LENGTH, PLACES, formula, tokens  # noqa: E402

LOGITS = json.loads((GOLDEN / "logits.json").read_text())["logits"]


def empty_model(config: dict[str, Any]) -> Transformer:
    model = build_stage(read_config(config, "golden"), Layout(), LENGTH, 0)
    model.to_empty(device=torch.device("cpu"))
    model.tie_weights()
    model.place(torch.device("cpu"))
    return model


def write_formula(model: Transformer, folder: Path, config: dict[str, Any]) -> None:
    """The files that Hugging Face would have for these weights."""
    folder.mkdir(parents=True, exist_ok=True)
    parameters = dict(named_weights(model))
    places = hf_names(model.spec, parameters)
    shapes = {place.name: their_shape(place, parameters[name].shape) for name, place in places.items()}
    tensors = {name: torch.from_numpy(formula(name, shape)) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    write_json(folder / "config.json", config)


def logits(model: Transformer) -> torch.Tensor:
    inputs = [torch.from_numpy(tokens(salt)) for salt in range(2 if model.spec.encoder_decoder else 1)]
    with torch.no_grad():
        return model(*inputs)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    model = empty_model(CASES[case])
    write_formula(model, tmp_path, CASES[case])
    load_safetensors([model], tmp_path)
    found = logits(model)[0, PLACES, ENTRIES]
    torch.testing.assert_close(found, torch.tensor(LOGITS[case]), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("case", CASES)
def test_an_exported_model_is_the_one_that_was_imported(case: str, tmp_path: Path) -> None:
    """Names, shapes, values and configuration: exporting gives back every file that was read."""
    model = empty_model(CASES[case])
    write_formula(model, tmp_path / "theirs", CASES[case])
    load_safetensors([model], tmp_path / "theirs")
    save_safetensors([model], tmp_path / "ours", pp_rank=0, writes=True)
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    offset = 2 if case == "opt" else 0
    for name, tensor in theirs.items():
        skipped = offset if "embed_positions" in name else 0
        assert torch.equal(ours[name][skipped:], tensor[skipped:]), name
    assert read_config(json.loads((tmp_path / "ours" / "config.json").read_text()), "golden") == model.spec


def test_files_are_cut_at_their_size_and_indexed(tmp_path: Path) -> None:
    model = empty_model(CASES["llama"])
    write_formula(model, tmp_path / "theirs", CASES["llama"])
    load_safetensors([model], tmp_path / "theirs")
    save_safetensors([model], tmp_path / "ours", pp_rank=0, writes=True, file_bytes=20_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "ours").glob("*.safetensors"))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == 4 * model.spec.parameters()
    again = empty_model(CASES["llama"])
    load_safetensors([again], tmp_path / "ours")
    assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (CASES["llama"] | {"intermediate_size": 96}, "intermediate_size = 96, but the job's has 48"),
        (CASES["llama"] | {"rope_theta": 10000.0}, "rope_theta = 10000.0, but the job's has 500.0"),
        (None, "hold no tensor 'model.embed_tokens.weight'"),
    ],
)
def test_weights_of_another_model_are_refused(config: dict[str, Any] | None, words: str, tmp_path: Path) -> None:
    other = CASES["gpt2"] if config is None else config
    write_formula(empty_model(other), tmp_path, other)
    if config is None:
        (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=words):
        load_safetensors([empty_model(CASES["llama"])], tmp_path)
