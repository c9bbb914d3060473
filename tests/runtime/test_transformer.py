"""The reference transformer counts as its ModelSpec does, and starts from the same weights however it is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_jobs import GPT_UNTIED, LLAMA, MODELS

from runtime.model import Stage, init_weights, named_weights, rope_table
from runtime.pipeline import blocks_of, build_stage
from simulator.layout import Layout
from simulator.model import ModelSpec

CPU = torch.device("cpu")


def whole_model(spec: ModelSpec, seed: int = 0) -> Stage:
    stage = build_stage(spec, Layout(), 32, 0)
    init_weights(stage, seed, CPU)
    return stage


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_parameter_count_is_the_specs(spec: ModelSpec) -> None:
    assert sum(p.numel() for p in whole_model(spec).parameters()) == spec.parameters()


@pytest.mark.parametrize("spec", [LLAMA, GPT_UNTIED], ids=lambda spec: spec.name)
def test_stages_hold_the_whole_models_weights(spec: ModelSpec) -> None:
    whole = dict(named_weights(whole_model(spec)))
    layout = Layout(pp=2, schedule="Interleaved1F1B", virtual_stages=2, stage_layers=(1, 1, 1, 1))
    found = {}
    for number in range(layout.stages):
        stage = build_stage(spec, layout, 32, number)
        init_weights(stage, 0, CPU)
        found |= dict(named_weights(stage))
    assert found.keys() == whole.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=0)


def test_weights_depend_on_the_seed_and_the_name() -> None:
    first, second = dict(named_weights(whole_model(LLAMA, seed=0))), dict(named_weights(whole_model(LLAMA, seed=1)))
    name, other = "layers.0.attention.wq.weight", "layers.1.attention.wq.weight"
    assert not torch.equal(first[name], second[name])
    assert not torch.equal(first[name], first[other])
    assert first[name].std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.equal(first["norm.weight"], torch.ones(LLAMA.hidden_size))


def test_blocks_are_shared_out_in_order() -> None:
    layout = Layout(pp=2, stage_layers=(3, 1))
    assert [list(blocks_of(layout, 4, stage)) for stage in range(2)] == [[0, 1, 2], [3]]


def test_a_stage_on_the_meta_device_holds_no_memory() -> None:
    assert all(p.is_meta for p in build_stage(LLAMA, Layout(), 32, 0).parameters())


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_no_token_sees_the_future(spec: ModelSpec) -> None:
    model, tokens = whole_model(spec), torch.arange(32).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 20:] = 7
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_rope_depends_on_distances_alone() -> None:
    from runtime.model import _rotate

    rope = rope_table(LLAMA, 32, CPU)
    q, k = torch.randn(1, 1, 1, LLAMA.head_dim), torch.randn(1, 1, 1, LLAMA.head_dim)
    q, k = _rotate(q.expand(1, 32, 1, -1), rope), _rotate(k.expand(1, 32, 1, -1), rope)
    scores = torch.einsum("bqhd,bkhd->qk", q, k)
    torch.testing.assert_close(scores[5, 2], scores[25, 22], rtol=1e-4, atol=1e-5)


def test_initial_loss_is_that_of_a_guess() -> None:
    tokens = torch.randint(0, 256, (4, 32))
    loss = F.cross_entropy(whole_model(LLAMA)(tokens).flatten(0, 1), tokens.flatten())
    assert loss.item() == pytest.approx(5.545, abs=0.2)  # ln 256
