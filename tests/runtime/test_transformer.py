"""The reference transformer counts as its ModelSpec does, and starts from the same weights however it is cut."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from tiny_jobs import BART, BERT, BERT_UNTIED, GPT_UNTIED, LLAMA, MISTRAL, MODELS, T5

from runtime.model import Transformer, init_weights, named_weights, rope_table
from runtime.pipeline import blocks_of, build_stage
from runtime.positions import alibi_slopes, inverse_frequencies, relative_buckets
from simulator.layout import Layout
from simulator.model import ModelSpec
from simulator.presets import find_model, names

CPU = torch.device("cpu")


def whole_model(spec: ModelSpec, seed: int = 0) -> Transformer:
    stage = build_stage(spec, Layout(), 32, 0)
    init_weights(stage, seed, CPU)
    return stage


def untrained(spec: ModelSpec) -> int:
    """Published parameters that no masked token trains: BERT's pooler h·h + h and its head for the next sentence,
    2·h + 2."""
    h = spec.hidden_size
    return (h * h + h) + (2 * h + 2) if spec.family == "bert" else 0


RUN = [name for name in names("models") if find_model(name).family in ("gpt", "llama", "neox", "bert", "t5", "bart")]


@pytest.mark.parametrize("spec", [*MODELS.values(), *map(find_model, RUN)], ids=[*MODELS, *RUN])
def test_parameter_count_is_the_specs(spec: ModelSpec) -> None:
    built = build_stage(spec, Layout(), 32, 0)
    assert all(p.is_meta for p in built.parameters())
    assert sum(p.numel() for p in built.parameters()) == spec.parameters() - untrained(spec)


@pytest.mark.parametrize("name", ["bert-large", "t5-large", "bart-large"])
def test_encoders_are_among_the_presets_that_run(name: str) -> None:
    assert name in RUN


@pytest.mark.parametrize("spec", [LLAMA, GPT_UNTIED, BERT_UNTIED], ids=lambda spec: spec.name)
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


CAUSAL = {name: spec for name, spec in MODELS.items() if spec.family != "bert"}


@pytest.mark.parametrize("spec", CAUSAL.values(), ids=CAUSAL)
def test_no_token_sees_the_future(spec: ModelSpec) -> None:
    model, tokens = whole_model(spec), torch.arange(32).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 20:] = 7
    # A decoder behind an encoder: what the encoder sees stays.
    source = (tokens,) if spec.encoder_decoder else ()
    before, after = model(*source, tokens), model(*source, changed)
    torch.testing.assert_close(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


@pytest.mark.parametrize("spec", [BERT, T5, BART], ids=lambda spec: spec.name)
def test_encoders_see_both_ways(spec: ModelSpec) -> None:
    model, tokens = whole_model(spec), torch.arange(32).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 31] = 7
    target = (tokens,) if spec.encoder_decoder else ()
    assert not torch.equal(model(tokens, *target)[:, 0], model(changed, *target)[:, 0])


def test_a_window_hides_what_is_far() -> None:
    """One block, so that nothing passes through others: token 9 does not see token 0 through a window of 9."""
    spec = dataclasses.replace(MISTRAL, num_hidden_layers=1)
    model, tokens = whole_model(spec), torch.arange(32).unsqueeze(0)
    changed = tokens.clone()
    changed[0, 0] = 7
    same = (model(tokens) == model(changed)).all(dim=-1)[0]
    assert same.tolist() == [False] * 9 + [True] * 23


def test_alibi_slopes_are_the_papers() -> None:
    """arXiv 2108.12409, section 3: 8 heads 1/2, 1/4 ... 1/256; the six of the authors' code are those of four, 1/4 ...
    1/256, and every other one of eight."""
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(6).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]


def test_buckets_of_t5_grow_with_distance() -> None:
    """8 buckets up to distance 16, causal: 4 exact ones, then 4 + floor(4·ln(d/4)/ln 4), at most 7."""
    last = relative_buckets(20, True, 8, 16, CPU)[19].flip(0)
    assert last.tolist() == [0, 1, 2, 3, 4, 4, 5, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7, 7, 7]
    assert relative_buckets(3, False, 8, 16, CPU).tolist() == [[0, 5, 6], [1, 0, 5], [2, 1, 0]]


def test_llama3_scales_long_waves_alone() -> None:
    """Context 8192, factor 8: wavelengths below 8192/4 stay, those above 8192 grow by 8 (theta 500000, d 128)."""
    spec = find_model("llama-3.1-8b")
    plain = inverse_frequencies(dataclasses.replace(spec, rope_scaling=None), CPU)
    ratio = inverse_frequencies(spec, CPU) / plain
    waves = 2 * torch.pi / plain
    torch.testing.assert_close(ratio[waves < 2048], torch.ones(int((waves < 2048).sum())))
    torch.testing.assert_close(ratio[waves > 8192], torch.full((int((waves > 8192).sum()),), 1 / 8))
    between = ratio[(waves > 2048) & (waves < 8192)]
    assert len(between) > 2 and (between.diff() < 0).all()


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
