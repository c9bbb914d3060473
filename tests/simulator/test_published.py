"""Training runs that others published, predicted with constants to which none of them was fitted.

tests/golden/megatron_papers.csv: Megatron-LM on A100s (arXiv 2104.04473, table 2, without the rows of ZeRO-3;
arXiv 2205.05198, table 5 and section 6.3). `pytest tests/simulator/test_published.py -rP` prints every error.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from simulator.job import Job, Training
from simulator.layout import Layout
from simulator.model import ModelSpec
from simulator.presets import find_cluster, find_stack
from simulator.simulate import simulate

ROWS = list(csv.DictReader((Path(__file__).parents[1] / "golden" / "megatron_papers.csv").open(encoding="utf-8")))


def predicted(row: dict[str, str]) -> float:
    """Tokens per second per GPU."""

    def number(name: str, default: int = 1) -> int:
        return int(float(row[name] or default))

    hidden, heads, gpus = number("hidden"), number("heads"), number("n_gpus")
    model = ModelSpec(
        name=row["id"], family="gpt", num_hidden_layers=number("layers"), hidden_size=hidden,
        num_attention_heads=heads, num_key_value_heads=heads, head_dim=hidden // heads, intermediate_size=4 * hidden,
        vocab_size=number("vocab"), max_position_embeddings=number("seq_len"), tie_word_embeddings=True,
        norm="layernorm", activation="gelu_tanh", gated_mlp=False, position="learned",
    )  # fmt: skip
    cluster = find_cluster("dgx-a100")
    training = Training(number("gbs"), number("seq_len"), "bf16")
    job = Job(model, cluster, gpus // cluster.gpus_per_node, training, find_stack("megatron-2021"))
    tp, pp, chunks = number("tp"), number("pp"), number("vpp")
    layout = Layout(
        dp_replicate=gpus // (tp * pp), tp=tp, pp=pp, micro_batch_size=number("mbs"), virtual_stages=chunks,
        schedule="Interleaved1F1B" if chunks > 1 else "1F1B", sequence_parallel=row["sp"] == "yes",
        recompute=row["recompute"],  # type: ignore[arg-type]
    )  # fmt: skip
    assert not layout.problems(job)
    return simulate(job, layout).tokens_per_second_per_gpu


@pytest.fixture(scope="module")
def errors() -> dict[str, float]:
    found = {row["id"]: predicted(row) / float(row["tokens_per_s_per_gpu"]) - 1 for row in ROWS}
    for name, error in found.items():
        print(f"{name:12} {error:+.1%}")
    print(f"mean absolute error {sum(map(abs, found.values())) / len(found):.1%}")
    return found


def test_mean_error(errors: dict[str, float]) -> None:
    assert sum(map(abs, errors.values())) / len(errors) < 0.04


def test_worst_error(errors: dict[str, float]) -> None:
    assert max(map(abs, errors.values())) < 0.10


def test_selective_recompute_beats_full(errors: dict[str, float]) -> None:
    """As measured: 29 to 32 % more throughput (arXiv 2205.05198, table 5); predicted within 7 points of it."""
    rates = {row["id"]: (predicted(row), float(row["tokens_per_s_per_gpu"])) for row in ROWS if "korth" in row["id"]}
    for full, selective in (("korth-0001", "korth-0002"), ("korth-0003", "korth-0004"), ("korth-0007", "korth-0008")):
        gain = [rates[selective][i] / rates[full][i] for i in (0, 1)]
        assert gain[0] == pytest.approx(gain[1], abs=0.07)
